"""Editing palette: samplers that turn a given picture into another one under a new prompt."""

from __future__ import annotations

from .declare import Node, Output, boolean, choice, integer, number, seed_input, socket, text

GROUP = "editing"
_SAMPLER = Output("SAMPLER", "sampler", "For SamplerCustom or SamplerCustomAdvanced.")


class RectiflowRFEditSampler(Node):
    """Draws an inverted picture again under a new prompt and shares the old picture's attention features, so that its layout stays."""

    TITLE = "RF-Edit Sampler"
    GROUP = GROUP
    SEARCH_ALIASES = ["rf edit", "feature sharing", "value injection", "taming rectified flow"]
    INPUTS = (
        socket("features", "FLOW_FEATURES", "Of Flow Invert, with save_steps of at least inject_steps."),
        integer("inject_steps", 3, 0, 1000, "First steps in which features are shared. 0: none; more keeps more of the picture."),
        choice("match", ("interval", "exact_sigma"),
            "interval: features of the same step, as the authors released. exact_sigma: only features of the very same sigma.",
        ),
        choice("tokens", ("all", "image_only"), "all: text tokens too, which needs prompts of equal length. image_only: the picture's."),
        choice("rows", ("cond_and_uncond", "cond"), "Whether the negative prompt's half shares features too."),
        number("strength", 1.0, 0.0, 1.0, "0 keeps the new features, 1 replaces them, between mixes both."),
        choice("start_from", ("latent", "noise"),
            "latent: the inverted latent is the sampler's latent. noise: it comes as NOISE through Noise from Latent.", optional=True,
        ),
    )
    OUTPUTS = (_SAMPLER,)

    def run(self, features, inject_steps, match, tokens, rows, strength, start_from="latent"):
        from ..host import KSAMPLER, calc_cond_batch
        from ..samplers.feature_sharing import ReplayPlan, sample_rf_edit
        from ..samplers.sampler_object import FlowSampler

        plan = ReplayPlan(inject_steps, match, tokens, rows, strength)
        options = {"bank": features, "plan": plan, "calc_cond_batch": calc_cond_batch}
        return (FlowSampler(KSAMPLER(sample_rf_edit, options), start_from),)


class RectiflowSourceTargetGuider(Node):
    """Knows what a picture shows and what it shall show; FlowEdit, Uni-Edit and KV-Edit ask for both. Others see the target."""

    TITLE = "Source Target Guider"
    GROUP = GROUP
    SEARCH_ALIASES = ["flowedit guider", "dual prompt", "edit guider"]
    INPUTS = (
        socket("model", "MODEL", "The model that edits."),
        socket("source", "CONDITIONING", "What the picture shows."),
        socket("target", "CONDITIONING", "What it shall show."),
        socket("negative", "CONDITIONING", "The empty prompt, or what to avoid, for both sides. Not asked where a cfg is 1."),
        number("cfg_source", 1.5, 0.0, 100.0, "Guidance of the source side.", step=0.1),
        number("cfg_target", 5.5, 0.0, 100.0,
            "Guidance of the target side. Too low: little changes. Too high: hard edges, burnt colours.", step=0.1,
        ),
        socket("source_negative", "CONDITIONING", "Another negative prompt for the source side.", optional=True),
    )
    OUTPUTS = (Output("GUIDER", "guider", "For SamplerCustomAdvanced."),)

    def run(self, model, source, target, negative, cfg_source, cfg_target, source_negative=None):
        from ..host import CFGGuider, calc_cond_batch, cfg_function
        from ..samplers.source_target import source_target_guider

        guider = source_target_guider(CFGGuider, model, (calc_cond_batch, cfg_function), cfg_source, cfg_target)
        other = negative if source_negative is None else source_negative
        guider.inner_set_conds({"positive": target, "negative": negative, "source": source, "source_negative": other})
        return (guider,)


class RectiflowFlowEditSampler(Node):
    """Edits without inversion: the picture moves by the difference of what both prompts say. Needs a Source Target Guider."""

    TITLE = "FlowEdit Sampler"
    GROUP = GROUP
    SEARCH_ALIASES = ["flow edit", "inversion free"]
    INPUTS = (
        integer("skip", 4, 0, 1000, "First steps that are left out. More keeps more of the picture; 0 lets everything change."),
        integer("refine", 0, 0, 1000,
            "Last steps that are plain steps of the target prompt. They sharpen, and let details go.", advanced=True,
        ),
        integer("n_avg", 1, 1, 8, "Noises over which each step is averaged; each costs two model calls."),
        seed_input("Of the noise that both prompts share."),
        boolean("batch_pairs", False, "Ask both prompts in one model call: faster on a large GPU, needs more memory.", advanced=True),
    )
    OUTPUTS = (_SAMPLER,)

    def run(self, skip, refine, n_avg, seed, batch_pairs):
        from ..samplers.flow_edit import FlowEditSampler

        return (FlowEditSampler(skip, refine, n_avg, seed, batch_pairs),)


class RectiflowUniEditSampler(Node):
    """Inverts the lower part of the schedule and comes back with both prompts, led by the target where they differ."""

    TITLE = "Uni-Edit Sampler"
    GROUP = GROUP
    SEARCH_ALIASES = ["uniedit", "uni-inv"]
    INPUTS = (
        number("alpha", 0.6, 0.0, 1.0, "Share of the schedule that is inverted. More lets more change; 0 returns the picture.", step=0.05),
        number("omega", 5.0, 0.0, 20.0, "How hard the difference of the prompts is driven. Too high burns colours.", step=0.1),
        socket("mask", "MASK", "Where the target leads, in place of the mask found from the difference.", optional=True),
    )
    OUTPUTS = (_SAMPLER,)

    def run(self, alpha, omega, mask=None):
        from ..samplers.uni_edit import UniEditSampler

        return (UniEditSampler(alpha, omega, mask),)


class RectiflowKVEditSampler(Node):
    """Draws only what a mask covers and shows the model the picture's own keys and values elsewhere, which stays as it is to the bit."""

    TITLE = "KV-Edit Sampler"
    GROUP = GROUP
    SEARCH_ALIASES = ["kv edit", "background preservation", "masked edit", "replace object", "remove object"]
    INPUTS = (
        integer("skip", 0, 0, 1000, "First steps that are left out. More keeps more of what the mask covers."),
        choice("start", ("inverted", "noise", "inversion_free"),
            "inverted: the covered part starts from its own inverted noise and keeps its layout. noise: from drawn noise, to put in or "
            "take out a thing. inversion_free: nothing is inverted, a third fewer model calls, a less exact background for the model.",
        ),
        seed_input("Of the noise, where it is drawn."),
        socket("mask", "MASK", "What is drawn again. Left out, the latent's noise mask decides.", optional=True),
        choice("store", ("device", "cpu"), "Where the keys and values of one step lie.", optional=True),
    )
    OUTPUTS = (_SAMPLER,)

    def run(self, skip, start, seed, mask=None, store="device"):
        from ..samplers.kv_edit import KVEditSampler

        return (KVEditSampler(mask, skip, start, seed, store),)


class RectiflowRFInversionForwardSampler(Node):
    """RF-Inversion's way up: inversion drawn towards one noise. Rising sigmas, an empty prompt, cfg 1."""

    TITLE = "RF-Inversion Forward Sampler"
    GROUP = GROUP
    SEARCH_ALIASES = ["controlled ode", "unsampler", "rf inversion"]
    INPUTS = (
        number("gamma", 0.5, 0.0, 1.0, "0 is Euler's inversion; 1 ends at the drawn noise and forgets the picture."),
        seed_input("Of the noise that is led to."),
    )
    OUTPUTS = (_SAMPLER,)

    def run(self, gamma, seed):
        from ..samplers.inversion import InvertSampler
        from ..samplers.rf_inversion import sample_rf_inversion_forward

        return (InvertSampler(sample_rf_inversion_forward, {"gamma": gamma, "seed": seed}, name=self.TITLE),)


class RectiflowRFInversionReverseSampler(Node):
    """RF-Inversion's way down: sampling under the new prompt, drawn back towards the source picture in a window of steps."""

    TITLE = "RF-Inversion Reverse Sampler"
    GROUP = GROUP
    SEARCH_ALIASES = ["controlled ode", "rf inversion", "eta"]
    INPUTS = (
        socket("source", "LATENT", "The picture that was inverted."),
        number("eta", 0.9, 0.0, 1.0, "Strength of the pull inside the window; 1 over all steps returns the picture."),
        number("start_percent", 0.0, 0.0, 1.0, "Where the window starts, as a share of the steps."),
        number("end_percent", 0.25, 0.0, 1.0, "Where it ends. Later keeps more of the picture."),
        choice("trend", ("constant", "linear_up", "linear_down"), "How eta goes inside the window.", advanced=True),
        choice("start_from", ("latent", "noise"),
            "latent: the inverted latent is the sampler's latent. noise: it comes as NOISE through Noise from Latent.", optional=True,
        ),
    )
    OUTPUTS = (_SAMPLER,)

    def run(self, source, eta, start_percent, end_percent, trend, start_from="latent"):
        from ..host import KSAMPLER
        from ..samplers.rf_inversion import sample_rf_inversion_reverse
        from ..samplers.sampler_object import FlowSampler

        options = {"source": source["samples"], "eta": eta, "start": start_percent, "end": end_percent, "trend": trend}
        return (FlowSampler(KSAMPLER(sample_rf_inversion_reverse, options), start_from),)


class RectiflowEditCompare(Node):
    """Edits one picture by several methods, one a line, and gives pictures, captions and a table of cost and fidelity."""

    TITLE = "Edit Compare"
    GROUP = GROUP
    SEARCH_ALIASES = ["compare editing", "benchmark", "rf-edit vs flowedit", "rf-inversion"]
    INPUTS = (
        socket("model", "MODEL", "The model that edits."),
        socket("vae", "VAE", "Decodes the results."),
        socket("source", "CONDITIONING", "What the picture shows."),
        socket("target", "CONDITIONING", "What it shall show."),
        socket("negative", "CONDITIONING", "The empty prompt; RF-Inversion inverts with it."),
        socket("latent", "LATENT", "The encoded picture."),
        socket("sigmas", "SIGMAS", "The schedule, falling; a method's option steps reads it at another number of steps."),
        text("methods",
            "euler steps=28\nrf_edit steps=14 inject_steps=3\nfireflow steps=27 inject_steps=6\nrf_inversion steps=28\nflow_edit steps=32\n"
            "uni_edit steps=30",
            "A method a line with options as name=value: euler, rf_edit, fireflow, rf_inversion, flow_edit, uni_edit, kv_edit (which needs "
            "the mask).", multiline=True,
        ),
        seed_input("Of all noise."),
        socket("mask", "MASK", "The part that shall change; the table's figures are then those of the part outside it.", optional=True),
        boolean("features", False, "Adds the feature distance to the picture as the tiny model sees it.", optional=True),
        socket("clip_vision", "CLIP_VISION", "Adds how alike the whole result and the picture are to this encoder.", optional=True),
    )
    OUTPUTS = (
        Output("LATENT", "latents", "The edited pictures in the order of the lines."),
        Output("IMAGE", "pictures", "The same, decoded."),
        Output("STRING", "labels", "A caption a picture, for Picture Grid."),
        Output("STRING", "table", "Model calls, rows, seconds, device memory, and how near each result is to the picture."),
    )

    def run(
        self, model, vae, source, target, negative, latent, sigmas, methods, seed, mask=None, features=False, clip_vision=None,
    ):  # fmt: skip
        import time

        import torch

        from ..host import KSAMPLER, CFGGuider, calc_cond_batch, cfg_function, sample_custom
        from ..metrics.stopwatch import PeakMemory
        from ..samplers.edit_methods import EditTask, HostCalls, parse_methods, run_method

        host = HostCalls(sample_custom, calc_cond_batch, cfg_function, CFGGuider, KSAMPLER)
        task = EditTask(model, source, target, negative, latent["samples"], sigmas, seed, mask)
        picture = vae.decode(latent["samples"])
        outside = None if mask is None else 1.0 - mask
        latents, pictures, labels = [], [], []
        head = f"{'method':<14}{'calls':>7}{'rows':>7}{'seconds':>9}{'MiB':>9}{'PSNR':>8}{'SSIM':>8}{'MSE':>10}{'features':>10}{'CLIP':>8}"
        table = [f"{head}  line"]
        for method in parse_methods(methods, self.TITLE):
            memory, start = PeakMemory(model.load_device), time.perf_counter()
            edited, calls, rows = run_method(method, task, host)
            seconds = time.perf_counter() - start
            decoded = vae.decode(edited)
            psnr, figures = self._figures(decoded, picture, outside, features, clip_vision)
            table.append(f"{method.name:<14}{calls:>7}{rows:>7}{seconds:>9.2f}{memory.text():>9}{figures}  {method.text}")
            labels += [f"{method.name}: {calls} calls, {psnr:.1f} dB"] * len(decoded)
            latents.append(edited)
            pictures.append(decoded)
        return ({"samples": torch.cat(latents)}, torch.cat(pictures), "\n".join(labels), "\n".join(table))

    def _figures(self, decoded, picture, outside, features, clip_vision) -> tuple[float, str]:
        """PSNR, and the columns from it on; "-" where a figure was not asked for."""
        from torch.nn.functional import cosine_similarity

        from ..metrics.fidelity import figures
        from .metrics import RectiflowFeatureDistance

        near = figures(decoded, picture, outside, "gaussian", 1.0, self.TITLE)
        psnr, ssim, mse = (float(values.mean()) for values in (near.psnr, near.ssim, near.mse))
        seen = alike = "-"
        if features:
            inputs = {"sigma": 0.2, "blocks": "double:1-2, single:0-2", "seed": 0, "mask": outside}
            seen = f"{RectiflowFeatureDistance().run(decoded, picture, **inputs)[0]:.4f}"
        if clip_vision is not None:
            ours, theirs = (clip_vision.encode_image(pixels)["image_embeds"].float() for pixels in (decoded, picture))
            alike = f"{float(cosine_similarity(ours, theirs, dim=-1).mean()):.4f}"
        return psnr, f"{psnr:>8.2f}{ssim:>8.3f}{mse:>10.2e}{seen:>10}{alike:>8}"
