"""Predictions palette: models of other predictions and paths, and samplers and schedules for models that jump."""

from __future__ import annotations

from .declare import Node, Output, boolean, choice, integer, number, socket

GROUP = "predictions"
_MODEL = Output("MODEL", "model", "The model as it is read from here on; weights stay as they are.")


class RectiflowConvertPrediction(Node):
    """Reads an epsilon, v or EDM model (SD 1.5, SDXL) as a flow, so that flow samplers run on it, or a flow model as an epsilon model."""

    TITLE = "Convert Prediction"
    GROUP = GROUP
    SEARCH_ALIASES = ["eps to flow", "velocity", "rf++", "model sampling", "vp to flow"]
    INPUTS = (
        socket("model", "MODEL", "Any model with one noise level for the whole picture."),
        choice("to", ("flow_velocity", "eps"),
            "flow_velocity: sigma from 0 to 1, for the samplers of this pack. eps: sigma up to 999, for samplers and schedulers made for "
            "epsilon models. A model that already is so stays as it is.",
        ),
    )
    OUTPUTS = (_MODEL,)

    def run(self, model, to: str):
        from ..host import CONST, EPS
        from ..samplers.prediction import diffusion_view, flow_view, is_flow

        inner = model.get_model_object("model_sampling")
        patched = model.clone()
        if is_flow(inner) != (to == "flow_velocity"):
            patched.add_object_patch("model_sampling", flow_view(inner, CONST) if to == "flow_velocity" else diffusion_view(inner, EPS))
        return (patched,)


class RectiflowFlowUNetSampling(Node):
    """Says that a UNet's output is a flow velocity, which its checkpoint does not: InstaFlow, 2-Rectified Flow, PeRFlow-like weights."""

    TITLE = "Flow UNet Sampling"
    GROUP = GROUP
    SEARCH_ALIASES = ["instaflow", "2-rectified flow", "perflow", "reflow", "sd 1.5 flow"]
    INPUTS = (
        socket("model", "MODEL", "The loaded UNet, SD 1.5 layout in most cases."),
        choice("velocity_sign", ("data_minus_noise", "noise_minus_data"),
            "What the network puts out: data_minus_noise for InstaFlow and the rectified-flow papers, noise_minus_data for SD3 and Flux.",
        ),
        number("shift", 1.0, 0.1, 20.0, "Alpha of the time shift; reflowed weights have none."),
        number("multiplier", 1000.0, 1.0, 10000.0, "The network's time at sigma 1.", advanced=True),
        socket("check_latent", "LATENT", "An encoded picture: the sign is tried on it in one step and refused if it harms.", optional=True),
        socket("check_positive", "CONDITIONING", "What that picture shows.", optional=True),
    )
    OUTPUTS = (_MODEL,)

    def run(self, model, velocity_sign, shift, multiplier, check_latent=None, check_positive=None):
        from ..errors import input_error
        from ..host import CONST, ModelSamplingDiscreteFlow
        from ..samplers.prediction import signed_flow

        patched = model.clone()
        patched.add_object_patch("model_sampling", signed_flow(ModelSamplingDiscreteFlow, CONST, velocity_sign, shift, multiplier))
        if (check_latent is None) != (check_positive is None):
            raise input_error(self.TITLE, "check_latent, check_positive", "one of the two", "both or neither", "Connect the other one too.")
        if check_latent is not None:
            self._check(patched, velocity_sign, check_latent["samples"], check_positive)
        return (patched,)

    def _check(self, model, velocity_sign, latent, positive):
        """One step from sigma 0.2 must bring a noised picture nearer to itself."""
        import torch

        from ..errors import input_error
        from ..host import KSAMPLER, prepare_noise, sample_custom
        from ..samplers.solvers import sample_euler

        noise = prepare_noise(latent, 0)
        sigmas = torch.tensor([0.2, 0.0])
        out = sample_custom(
            model, noise, 1.0, KSAMPLER(sample_euler), sigmas, positive, positive, latent, disable_pbar=True, seed=0
        ).float().cpu()  # fmt: skip
        to_model = model.get_model_object("process_latent_in")
        clean, restored = to_model(latent.float().cpu()), to_model(out)
        before = float((0.2 * (noise - clean)).square().mean().sqrt())
        after = float((restored - clean).square().mean().sqrt())
        if not after < before:
            got = f"{velocity_sign}, with which one step from sigma 0.2 takes the error of the picture from {before:.3g} to {after:.3g}"
            allowed = "a sign with which the error falls"
            raise input_error(self.TITLE, "velocity_sign", got, allowed, "Choose the other sign, or use this node on flow weights only.")


class RectiflowFlowMapSampler(Node):
    """One model call jumps from one sigma of the schedule to the next, for weights that learned such jumps. 1 to 4 steps."""

    TITLE = "Flow Map Sampler"
    GROUP = GROUP
    SEARCH_ALIASES = ["consistency model", "cm", "ctm", "meanflow", "lcm", "shortcut"]
    INPUTS = (
        choice("kind", ("meanflow", "ctm", "cm"),
            "What the weights learned. meanflow: mean velocity to a second time. ctm: consistency trajectories. cm: jumps to sigma 0.",
        ),
        boolean("restart_noise", False, "Jump to the picture and noise it anew in every step, as consistency models are sampled."),
        integer("seed_offset", 0, 0, 2**31 - 1, "Added to the run's seed for the fresh noise, so that it can vary alone.", advanced=True),
    )
    OUTPUTS = (Output("SAMPLER", "sampler", "For SamplerCustom or SamplerCustomAdvanced."),)

    def run(self, kind: str, restart_noise: bool, seed_offset: int):
        from ..host import KSAMPLER
        from ..samplers.flow_maps import sample_flow_map

        return (KSAMPLER(sample_flow_map, {"kind": kind, "restart_noise": restart_noise, "seed_offset": seed_offset}),)


class RectiflowPhasedSigmas(Node):
    """A schedule of the model's own table with trailing steps, so that every border between phases of a phased model is met."""

    TITLE = "Phased Sigmas"
    GROUP = GROUP
    SEARCH_ALIASES = ["rectified diffusion", "perflow", "trailing", "pcm"]
    INPUTS = (
        socket("model", "MODEL", "An epsilon or a flow model."),
        integer("phases", 4, 1, 16, "Segments that the weights were trained in; 4 for Rectified Diffusion's and PeRFlow's."),
        integer("steps_per_phase", 1, 1, 16, "Steps in each of them."),
        choice("spacing", ("trailing",), "trailing: the first step is at the highest noise level, as few-step weights need it."),
    )
    OUTPUTS = (Output("SIGMAS", "sigmas", "phases × steps_per_phase steps, the last ends at 0."),)

    def run(self, model, phases: int, steps_per_phase: int, spacing: str):
        from ..samplers.prediction import phased_sigmas

        return (phased_sigmas(model.get_model_object("model_sampling"), phases, steps_per_phase),)


class RectiflowPathOrderProbe(Node):
    """Measures whether a model's paths have a constant noise estimate (first order) or a constant velocity (straight), and says which."""

    TITLE = "Path Order Probe"
    GROUP = GROUP
    SEARCH_ALIASES = ["rectified diffusion", "first order", "straightness", "reflow"]
    INPUTS = (
        socket("noise", "NOISE", "Where the paths start."),
        socket("guider", "GUIDER", "The model with its conditions; guidance is part of what is measured."),
        socket("sigmas", "SIGMAS", "Falling, of the model's own kind; 2 model calls a step. 20 steps or more."),
        socket("latent_image", "LATENT", "An empty latent; its batch is the number of paths, 8 or more for a steady figure."),
    )
    OUTPUTS = (
        Output("FLOAT", "first_order_error", "Share of the noise estimate that varies along a path; 0: one DDIM step is exact."),
        Output("FLOAT", "straightness_error", "Share of the velocity that varies along a path; 0: one Euler step of the flow is exact."),
        Output("STRING", "table", "What is small, and a line a step."),
    )

    def run(self, noise, guider, sigmas, latent_image):
        from ..errors import input_error
        from ..host import KSAMPLER, fix_empty_latent_channels
        from ..samplers.path_order import PathOrder, sample_path_order
        from ..samplers.prediction import is_flow

        samples = fix_empty_latent_channels(guider.model_patcher, latent_image["samples"])
        latent = {**latent_image, "samples": samples}
        record = PathOrder()
        options = {"record": record, "flow": is_flow(guider.model_patcher.get_model_object("model_sampling"))}
        sampler = KSAMPLER(sample_path_order, options)
        guider.sample(noise.generate_noise(latent), samples, sampler, sigmas, disable_pbar=True, seed=noise.seed)
        if not record.times:
            remedy = "Connect the schedule you sample with."
            raise input_error(self.TITLE, "sigmas", "an empty schedule", "2 or more values that fall", remedy)
        return (record.first_order_error, record.straightness_error, record.table())
