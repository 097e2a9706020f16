"""Inversion palette: from a picture to the noise it came from, and from there into any sampler."""

from __future__ import annotations

from .declare import Node, Output, boolean, choice, integer, number, socket, text

GROUP = "inversion"


class RectiflowFlowInversionSigmas(Node):
    """Turns a sampling schedule round for inversion, and gives the same values for the way back."""

    TITLE = "Flow Inversion Sigmas"
    GROUP = GROUP
    SEARCH_ALIASES = ["flip sigmas", "unsampler", "reverse"]
    INPUTS = (
        socket("sigmas", "SIGMAS", "The schedule you would sample with, falling."),
        number("sigma_floor", 0.001, 0.0, 0.05, "Replaces the 0: inversion starts just above it.", step=0.0005, advanced=True),
        number("sigma_end", 1.0, 0.05, 1.0, "Where inversion stops. Below 1 the picture is only partly turned into noise."),
    )
    OUTPUTS = (
        Output("SIGMAS", "inversion_sigmas", "Rising: for the inversion."),
        Output("SIGMAS", "sampling_sigmas", "The same values falling, with 0 at the end: for sampling back."),
    )

    def run(self, sigmas, sigma_floor: float, sigma_end: float):
        from ..samplers.inversion import inversion_sigmas, sampling_sigmas

        rising = inversion_sigmas(sigmas, sigma_floor, sigma_end, self.TITLE)
        return (rising, sampling_sigmas(rising))


class RectiflowFlowInvertSampler(Node):
    """Inverts a picture along rising sigmas. Needs the source prompt and cfg 1; noise is not used and masks are left out."""

    TITLE = "Flow Invert Sampler"
    GROUP = GROUP
    SEARCH_ALIASES = ["unsampler", "inversion", "fireflow", "uni-inv", "rf inversion"]
    INPUTS = (
        choice("solver", ("rf_solver", "euler", "fireflow", "uni_inv", "heun", "fixed_point"),
            "Model calls a step: rf_solver 2, heun 2, fireflow and uni_inv 1 (one more a run), euler 1, fixed_point as many as iterations. "
            "Sample back with the same solver; uni_inv and fixed_point with euler.",
        ),
        integer("iterations", 3, 1, 10, "fixed_point only: substitutions a step.", advanced=True),
        boolean("average", False, "fixed_point only: mean of the iterates; helps with few steps, hurts with many.", advanced=True),
        boolean("floor_noise", False, "Start from a little noise at the first sigma instead of none, as rf++ does.", advanced=True),
    )
    OUTPUTS = (Output("SAMPLER", "sampler", "For SamplerCustom or SamplerCustomAdvanced with rising sigmas."),)

    def run(self, solver: str, iterations: int, average: bool, floor_noise: bool):
        from ..samplers.inversion import InvertSampler

        options = {"iterations": iterations, "average": average} if solver == "fixed_point" else {}
        return (InvertSampler(solver, options, floor_noise),)


class RectiflowNoiseFromLatent(Node):
    """An inverted latent as NOISE, so that stock samplers continue from it over an empty latent of the same size."""

    TITLE = "Noise from Latent"
    GROUP = GROUP
    SEARCH_ALIASES = ["inverted noise", "latent to noise"]
    INPUTS = (
        socket("model", "MODEL", "The model that inverted; its latent format turns the latent back into model space."),
        socket("latent", "LATENT", "The inverted latent."),
        number("sigma_start", 1.0, 0.001, 1.0, "The last sigma of the inversion, which is the first sigma of the sampling."),
        socket("sigmas", "SIGMAS", "The schedule that samples from it; refused where it does not fall from sigma_start.", optional=True),
    )
    OUTPUTS = (Output("NOISE", "noise", "For SamplerCustomAdvanced, over an empty latent."),)

    def run(self, model, latent, sigma_start: float, sigmas=None):
        from ..samplers.inversion import LatentNoise

        return (LatentNoise(model.get_model_object("process_latent_in")(latent["samples"]), sigma_start, sigmas),)


class RectiflowFlowInvert(Node):
    """Inverts a picture in one node, and keeps what RF-Edit needs of its last steps. cfg 1, no noise; masks are left out."""

    TITLE = "Flow Invert"
    GROUP = GROUP
    SEARCH_ALIASES = ["unsampler", "inversion", "rf-edit", "feature sharing"]
    INPUTS = (
        socket("model", "MODEL", "A flow model."),
        socket("source", "CONDITIONING", "What the picture shows; an empty prompt for a change of style. One prompt, not combined."),
        socket("latent", "LATENT", "The encoded picture."),
        socket("sigmas", "SIGMAS", "The schedule of the edit, falling; it is walked upwards."),
        choice("solver", ("rf_solver", "euler", "fireflow", "uni_inv", "heun", "fixed_point"),
            "Model calls a step: rf_solver 2, heun 2, fireflow and uni_inv 1 (one more a run), euler 1, fixed_point 3.",
        ),
        integer("save_steps", 0, 0, 1000, "Features are kept over this many last steps, those nearest noise. 0 keeps none."),
        text("blocks", "single:20-37",
            "Blocks whose features are kept, such as single:20-37, double:0-3. single: all of them; single:3-: to the last.",
        ),
        choice("store", ("cpu", "device"), "Where features are kept between inversion and edit.", optional=True, advanced=True),
        number("max_gib", 8.0, 0.0, 1024.0,
            "At most this much memory for features; the others are made again while editing, at one model call each.",
            step=0.25, optional=True, advanced=True,
        ),
    )
    OUTPUTS = (
        Output("LATENT", "inverted", "The state at the last sigma."),
        Output("FLOW_FEATURES", "features", "For RF-Edit Sampler."),
        Output("FLOAT", "consistency", "Distance (RMSE) of the picture that the last steps point at from the given one, in latent units."),
    )

    def run(self, model, source, latent, sigmas, solver, save_steps, blocks, store="cpu", max_gib=8.0):
        import torch

        from ..host import fix_empty_latent_channels, prepare_callback, sample_custom
        from ..samplers.feature_sharing import FeatureBank, RecordPlan
        from ..samplers.inversion import InvertSampler, inversion_sigmas

        picture = fix_empty_latent_channels(model, latent["samples"])
        rising = inversion_sigmas(sigmas, where=self.TITLE)
        bank = FeatureBank(RecordPlan(save_steps, blocks, store, int(max_gib * 2**30)), solver)
        sampler = InvertSampler(solver, watch=bank.watch if save_steps else None)
        preview = prepare_callback(model, len(rising) - 1)
        pointed_at = []

        def callback(step, denoised, x, total):
            pointed_at[:] = [denoised]
            preview(step, denoised, x, total)

        bank.sigmas = rising
        try:
            inverted = sample_custom(
                model, torch.zeros_like(picture), 1.0, sampler, rising, source, source, picture,
                callback=callback, disable_pbar=True, seed=0,
            )
        except BaseException:
            bank.release()
            raise
        given = model.get_model_object("process_latent_in")(picture.float())
        consistency = float((pointed_at[0].float().cpu() - given.cpu()).square().mean().sqrt())
        others = {key: value for key, value in latent.items() if key != "noise_mask"}
        return ({**others, "samples": inverted}, bank, consistency)


class RectiflowNoiseSlerp(Node):
    """Goes from one inverted picture's noise to another's on the arc between them, so that what lies between is noise too."""

    TITLE = "Noise Slerp"
    GROUP = GROUP
    SEARCH_ALIASES = ["interpolate", "morph", "spherical", "rf++"]
    INPUTS = (
        socket("a", "LATENT", "An inverted latent."),
        socket("b", "LATENT", "Another of the same size."),
        number("t", 0.5, 0.0, 1.0, "0 is a, 1 is b. Not used where count is above 1."),
        integer("count", 1, 1, 64, "Above 1: so many in even steps from a to b, both ends among them, as a batch."),
    )
    OUTPUTS = (Output("LATENT", "latent", "For Noise from Latent, or a sampler that starts from a latent."),)

    def run(self, a, b, t: float, count: int):
        import torch

        from ..samplers.inversion import noise_slerp

        places = [t] if count == 1 else [place / (count - 1) for place in range(count)]
        return ({"samples": torch.cat([noise_slerp(a["samples"], b["samples"], place) for place in places])},)
