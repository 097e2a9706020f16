"""Width palette: which heads and neurons can go, masks that show it, narrower layers, LoRAs for them."""

from __future__ import annotations

from .declare import Node, Output, boolean, choice, integer, number, seed_input, socket, steps_of, text

GROUP = "pruning"
_MODEL = socket("model", "MODEL", "The model at full width.")
_POSITIVE = socket("positive", "CONDITIONING", "Prompts to sample with; Conditioning (Combine) of many is better than one.")
_LATENT = socket("latent", "LATENT", "An empty latent: its size is what counts.")
_NEGATIVE = socket("negative", "CONDITIONING", "For cfg above 1.", optional=True)
_SAMPLES = integer("samples", 16, 1, 4096, "Noises, each with the next prompt.", optional=True, advanced=True)
_MEASURED_ON = (
    integer("samples", 16, 1, 4096, "Pictures that the model draws to be measured on.", optional=True, advanced=True),
    integer("sample_steps", 12, 1, 200, "Euler steps of each of these.", optional=True, advanced=True),
    number("cfg", 1.0, 0.0, 100.0, "Guidance of these samples.", step=0.1, optional=True, advanced=True),
)
_SCORES = Output("WIDTH_SCORES", "scores", "A number for every head and neuron, for Apply Width Mask.")
_REPORT = Output("STRING", "report", "What was measured.")
_PLAN = text("plan", "", "A plan as JSON, linked or pasted.", multiline=True)


def before_run():
    """The host's name for "before a run": masks are put behind a LoRA there."""
    from ..host import CallbacksMP

    return CallbacksMP.ON_PRE_RUN


def mean_picture(scores, title):
    """The mean of each group's numbers as bars from the smallest."""
    from ..metrics.bars import bar_chart

    means = {f"{path.replace('_blocks', '')} {kind}": float(value.mean()) for (path, kind), value in scores.values.items()}
    low = min(means.values())
    return bar_chart({name: value - min(low, 0.0) for name, value in means.items()}, set(), title)


class RectiflowWidthMaskLearn(Node):
    """Learns which heads and neurons can go: masks that keep the end of the whole sampling run where it was (EcoDiff)."""

    TITLE = "Width Mask Learn"
    GROUP = GROUP
    OUTPUT_NODE = True
    SEARCH_ALIASES = ["ecodiff", "width pruning", "head pruning", "learned sparsity", "smaller model"]
    INPUTS = (
        _MODEL, _POSITIVE, _LATENT,
        socket("sigmas", "SIGMAS", "The steps of each run, from 1 to 0; 4 to 12 are enough."),
        number("cfg", 1.0, 0.0, 100.0, "Guidance of these runs. Learn with the one you will use.", step=0.1),
        integer("iterations", 100, 1, 5000, "Optimiser steps."),
        integer("accumulate", 4, 1, 256, "Runs a step, each with a mask of its own."),
        number("lr_heads", 0.5, 0.0, 10.0, "Learning rate of heads."),
        number("lr_ffn", 0.1, 0.0, 10.0, "Learning rate of neurons; there are many more of them."),
        number("beta", 0.01, 0.0, 10.0, "Weight of the penalty: too low and every mask stays open, too high and all close.", step=0.001),
        choice("penalty", ("l1_sigmoid", "l0"), "l1_sigmoid: as released. l0: as published, the chance that a mask is open."),
        choice("targets", ("both", "heads", "ffn"), "What is masked. Wan and LTX-Video have neurons alone that can go."),
        number("delta", 0.1, 0.0, 10.0, "Damps the noise of the masks; 0.1 for FLUX, 0.5 for SDXL.", advanced=True),
        number("stop_at_sparsity", 0.0, 0.0, 1.0, "Stop when this share of the masks is more closed than open; 0: never.", advanced=True),
        text("include", "", "Regular expression over names such as double_blocks.0.heads. Empty: all.", advanced=True),
        text("exclude", "", "What to leave alone, such as txt_ffn.", advanced=True),
        seed_input("Of noises and masks."),
        text("name", "width", "Folder below output/rf_train for checkpoints."),
        choice("resume", ("auto", "new", "error_if_exists"), "auto: go on where this name stopped. new: set that aside."),
        _NEGATIVE, _SAMPLES,
        integer("batch", 1, 1, 256, "Pictures of one run, under one mask.", optional=True, advanced=True),
        choice("objective", ("end_to_end", "per_step"), "per_step compares single steps: to see what the whole run brings.", optional=True,
            advanced=True),
        boolean("checkpointing", False, "Compute blocks twice and keep less memory.", optional=True, advanced=True),
    )  # fmt: skip
    OUTPUTS = (
        _SCORES, Output("STRING", "report", "Losses, and the error at 10, 20 and 30 %, as JSON."),
        Output("IMAGE", "plot", "Mean of what was learnt, each layer."), Output("IMAGE", "curve", "The loss curve."),
    )  # fmt: skip

    @classmethod
    def IS_CHANGED(cls, name="width", **inputs):
        """The newest step on the disk: a finished run is not repeated, an interrupted one goes on."""
        from .training import RectiflowTrain

        return RectiflowTrain.IS_CHANGED(name)

    def run(self, model, positive, latent, sigmas, cfg, stop_at_sparsity, name, seed, negative=None, samples=16, **given):
        import json

        from ..train.curve import curve_picture
        from ..train.width_masks import MaskSettings, learn_masks
        from .pruning import calibration, host_services, run_folder

        shown = calibration(model, positive, latent, negative, samples, len(sigmas), cfg, seed)
        settings = MaskSettings(stop_at=stop_at_sparsity, seed=seed, **given)
        folder = run_folder(name, self.TITLE)
        done = learn_masks(model, settings, shown, sigmas, folder, host_services(), self.TITLE)
        picture = mean_picture(done.scores, f"{settings.objective}: mean λ of each layer")
        return (done.scores, json.dumps(done.report, indent=1), picture, curve_picture(done.history))


class RectiflowWidthMaskScore(Node):
    """Ranks heads and neurons without learning: what learned masks have to beat."""

    TITLE = "Width Mask Score"
    GROUP = GROUP
    SEARCH_ALIASES = ["head importance", "taylor pruning", "magnitude pruning", "width pruning", "wanda"]
    INPUTS = (
        _MODEL, _POSITIVE, _LATENT,
        choice("method", ("taylor", "activation", "magnitude", "random"), "taylor: how much the flow loss turns on it. activation: what it "
            "adds to its layer. magnitude: size of its weights. random: to compare with."),
        seed_input("Of the samples, and of random."),
        _NEGATIVE, _SAMPLES,
        integer("sample_steps", 12, 1, 200, "Euler steps of each sample.", optional=True, advanced=True),
        number("cfg", 1.0, 0.0, 100.0, "Guidance of the samples.", step=0.1, optional=True, advanced=True),
        integer("points", 32, 1, 4096, "Places of the flow where the model is asked.", optional=True, advanced=True),
    )  # fmt: skip
    OUTPUTS = (_SCORES, _REPORT, Output("IMAGE", "plot", "Mean of each layer."))

    def run(self, model, positive, latent, method, seed, negative=None, samples=16, sample_steps=12, cfg=1.0, points=32):
        from ..train.width_masks import score_width
        from .pruning import calibration, host_services

        shown = calibration(model, positive, latent, negative, samples, sample_steps, cfg, seed)
        scores = score_width(model, method, shown, points, host_services(), self.TITLE)
        counts = {kind: sum(len(v) for (_, k), v in scores.values.items() if k.startswith("heads") == (kind == "heads"))
                  for kind in ("heads", "neurons")}  # fmt: skip
        report = f"{method}: {counts['heads']} heads and {counts['neurons']} neurons in {len(scores.values)} layers"
        return (scores, report, mean_picture(scores, f"{method}: mean of each layer"))


class RectiflowApplyWidthMask(Node):
    """Shows a model without its least important heads and neurons, still at full size, and plans to narrow it."""

    TITLE = "Apply Width Mask"
    GROUP = GROUP
    SEARCH_ALIASES = ["width pruning", "head mask", "ecodiff", "sparsity"]
    INPUTS = (
        _MODEL,
        socket("scores", "WIDTH_SCORES", "From Width Mask Learn or Width Mask Score, of this model."),
        number("remove", 0.2, 0.0, 0.9, "Share of the weights of heads, and of those of neurons, that goes."),
        choice("scope", ("global", "local"), "global: the least important of all layers. local: the same share of each."),
        choice("align", ("64", "1", "8", "16", "32", "128"), "Neurons kept are a multiple: 64 for fast kernels, 128 for int8."),
        integer("min_keep_heads", 1, 0, 1024, "Heads that every attention keeps."),
    )
    OUTPUTS = (
        Output("MODEL", "model", "Masked: the answer of the narrow model at full size. For Compact Width, or to sample and compare."),
        Output("STRING", "plan", "What is kept, as JSON."),
        Output("STRING", "report", "Shares of weights that go."),
        Output("IMAGE", "plot", "Share kept in each layer, orange where it is less than all."),
    )

    def run(self, model, scores, remove, scope, align, min_keep_heads):
        from ..accel.prune.identity import model_hash
        from ..accel.prune.width import WidthCut, groups_of, kept_units, mask_model, removed_share, width_plan
        from ..errors import input_error
        from ..metrics.bars import bar_chart

        groups = groups_of(model, self.TITLE)
        if scores.model != model_hash(model):
            allowed = f"scores of this model, {model_hash(model)}"
            raise input_error(self.TITLE, "scores", f"scores of {scores.model}", allowed, "Link the model that was scored.")
        kept = kept_units(groups, scores, WidthCut(remove, scope, int(align), min_keep_heads), model)
        shares = {name: round(share, 4) for name, share in removed_share(kept, groups, model).items()}
        plan = width_plan(model, kept, groups, self.TITLE, method=scores.method, facts={"removed": shares, "asked": remove, "scope": scope})
        masked = mask_model(model, plan, before_run(), self.TITLE)
        parts = {f"{g.path.replace('_blocks', '')} {g.kind}": len(kept[g.key]) / g.count for g in groups if g.key in kept}
        picture = bar_chart(parts, {name for name, share in parts.items() if share < 1.0}, f"{scores.method}: share kept in each layer")
        report = "; ".join(f"{share:.1%} of {'all weights' if name == 'all' else name}" for name, share in shares.items())
        return (masked, plan.to_json(), f"{scores.method}, {scope}: removes {report}", picture)


class RectiflowCompactWidth(Node):
    """Deletes what a width plan does not keep: smaller, faster layers. LoRAs of the whole model still fit, in front of it or behind."""

    TITLE = "Compact Width"
    GROUP = GROUP
    SEARCH_ALIASES = ["width pruning", "narrow model", "structured pruning", "ecodiff"]
    INPUTS = (
        socket("model", "MODEL", "A masked model, or the model that the plan was made on."),
        text("plan", "", "A plan as JSON; empty: the plan of the masks. Blocks it leaves out go too.", multiline=True),
        boolean("enabled", True, "Off hands the model on as it is."),
    )
    OUTPUTS = (Output("MODEL", "model", "The narrower model."), Output("STRING", "report", "Its size and widths."))

    def run(self, model, plan, enabled):
        from ..accel.prune.apply import plan_of, size_change, stack_under
        from ..accel.prune.compact import compact_model
        from ..accel.prune.plan import plan_from_json

        if not enabled:
            return (model, "off: every layer is as wide as it was")
        found = plan_from_json(plan, self.TITLE) if plan.strip() else None
        narrow = compact_model(model, found, self.TITLE)
        described = plan_of(narrow).describe(stack_under(model, self.TITLE))
        return (narrow, f"{described}; {size_change(model, narrow)}")


class RectiflowLoraForPruned(Node):
    """Cuts a LoRA to what a pruned or narrowed model has: for its file, where it is loaded without our nodes."""

    TITLE = "LoRA for Pruned"
    GROUP = GROUP
    SEARCH_ALIASES = ["slice lora", "convert lora", "pruned lora"]
    INPUTS = (
        socket("model", "MODEL", "The whole model, or one with a plan on it."),
        text("plan", "", "A plan as JSON; empty: the plan that the model has.", multiline=True),
        text("lora_name", "", "A file in models/loras. Empty where a LoRA is linked."),
        choice("numbering", ("compact", "original"), "compact: blocks counted without gaps, as files have them. original: as in the whole "
            "model."),
        socket("lora", "LORA_MODEL", "A LoRA in memory, from Train or Recover Pruned.", optional=True),
    )  # fmt: skip
    OUTPUTS = (Output("LORA_MODEL", "lora", "The LoRA that fits."), Output("STRING", "report", "What was cut and what was dropped."))

    def run(self, model, plan, lora_name, numbering, lora=None):
        from ..accel.prune.apply import plan_of, stack_under
        from ..accel.prune.compact import layer_cuts
        from ..accel.prune.identity import model_hash, original_part
        from ..accel.prune.lora import slice_lora
        from ..accel.prune.plan import plan_from_json
        from ..accel.prune.width import check_width, full_groups
        from ..errors import input_error

        found = plan_from_json(plan, self.TITLE) if plan.strip() else plan_of(model)
        if found is None:
            raise input_error(self.TITLE, "plan", "a model without a plan", "a plan, linked or on the model", "Link a plan.")
        stack, groups = stack_under(model, self.TITLE), full_groups(model, self.TITLE)
        found.check(stack, model_hash(model), self.TITLE)
        cuts = layer_cuts(check_width(found, groups, self.TITLE), groups, lambda path: original_part(model, path))
        given = lora if lora is not None else self._read(lora_name)
        try:
            made = slice_lora(given, found, stack, cuts, numbering == "compact")
        except ValueError as error:
            allowed = "a LoRA of the whole model"
            raise input_error(self.TITLE, "lora", str(error), allowed, "Link the LoRA as it was trained.") from error
        dropped = f", dropped {', '.join(made.dropped)[:400]}" if made.dropped else ""
        return (made.tensors, f"{made.sliced} layers cut, {made.whole} as they were{dropped}")

    def _read(self, lora_name):
        from pathlib import Path

        from ..accel.compressed.tensor_file import read_tensors
        from ..errors import input_error
        from ..host import get_full_path

        path = get_full_path("loras", lora_name.strip()) if lora_name.strip() else None
        if path is None:
            allowed = "a file in models/loras, or a linked LoRA"
            raise input_error(self.TITLE, "lora_name", lora_name, allowed, "Give the file's name with its ending.")
        try:
            return read_tensors(Path(path))[0]
        except (OSError, ValueError) as error:
            got, allowed = f"{lora_name}: {error}"[:190], "a whole safetensors file"
            raise input_error(self.TITLE, "lora_name", got, allowed, "Fetch it again.") from error


class RectiflowWidthToLinear(Node):
    """Exchanges the MLPs that are nearly linear for linear maps, fitted to what they do on the model's own samples (PPCL)."""

    TITLE = "Width to Linear"
    GROUP = GROUP
    SEARCH_ALIASES = ["ppcl", "ffn pruning", "linear mlp", "smaller model", "width pruning"]
    INPUTS = (
        socket("model", "MODEL", "A model in 16 or 32 bits at full width; blocks may be left out."),
        _POSITIVE, _LATENT,
        integer("count", 1, 1, 1000, "MLPs to exchange: those whose map leaves least unsaid. An eighth of an MLP's weights stays."),
        choice("streams", ("both", "image", "text"), "Of which tokens. Text has few different tokens: show many prompts."),
        seed_input("Of the samples."),
        _NEGATIVE,
        *_MEASURED_ON,
        integer("points", 32, 1, 1024, "Places of the flow where the model is asked.", optional=True, advanced=True),
        integer("tokens", 8192, 16, 1048576, "Tokens of each MLP that its map is fitted to; more than its channels, and on the CPU.",
            optional=True, advanced=True,
        ),
    )  # fmt: skip
    OUTPUTS = (
        Output("MODEL", "model", "The model with maps; Train takes back what they lost, Save Compressed keeps them."),
        Output("STRING", "report", "What each map leaves unsaid, and sizes; link it to Preview Any."),
        Output("IMAGE", "plot", "Residuals as bars, orange what is a map now."),
    )

    def run(self, model, positive, latent, count, streams, seed, points=32, tokens=8192, **shown):
        from ..host import CFGGuider
        from ..metrics.bars import bar_chart
        from ..train.linear_mlps import MapRequest, linearise
        from .pruning import calibration

        pool = calibration(model, positive, latent, seed=seed, **shown)
        done = linearise(model, MapRequest(count, streams, points, tokens), pool, CFGGuider, self.TITLE)
        return (done.model, done.report, bar_chart(done.residuals, set(done.exchanged), "unsaid by a linear map"))


class RectiflowTextToLinear(Node):
    """Exchanges the text of neighbouring double blocks for linear maps: what the picture reads of it stays, the rest goes (PPCL)."""

    TITLE = "Text to Linear"
    GROUP = GROUP
    SEARCH_ALIASES = ["ppcl", "text stream pruning", "mmdit", "qwen image pruning", "smaller model"]
    INPUTS = (
        socket("model", "MODEL", "Flux, HunyuanVideo, SD3 or Qwen-Image in 16 or 32 bits; blocks may be left out."),
        _POSITIVE, _LATENT,
        integer("count", 1, 1, 1000, "Blocks that read another's text: a run of three has two. Those that lose least."),
        integer("max_run", 6, 2, 1000, "Blocks that a run has at most."),
        text("runs", "", "Runs of your own among the double blocks, such as 1-2, 4-6. Empty: chosen by count."),
        choice("judge", ("velocity", "maps"), "velocity: what the model's answer loses with a run's maps. maps: what they leave unsaid of "
            "the text, as published; quicker."),
        seed_input("Of the samples."),
        socket("negative", "CONDITIONING", "What you guide away from: its text is measured too. Link it if cfg is above 1.", optional=True),
        *_MEASURED_ON,
        integer("points", 32, 4, 1024, "Places of the flow where the model is asked; a quarter judges.", optional=True, advanced=True),
        integer("tokens", 8192, 16, 1048576, "Tokens of each block that maps are fitted to; more than its channels, and on the CPU.",
            optional=True, advanced=True,
        ),
    )  # fmt: skip
    OUTPUTS = (
        Output("MODEL", "model", "The model with maps; Train takes back what they lost, Save Compressed keeps them."),
        Output("STRING", "report", "What each run loses, and sizes; link it to Preview Any."),
        Output("IMAGE", "plot", "What every run loses as bars, orange what is linear now."),
    )

    def run(self, model, positive, latent, count, max_run, runs, judge, seed, points=32, tokens=8192, **shown):
        from ..host import CFGGuider
        from ..metrics.bars import bar_chart
        from ..train.text_runs import TextRequest, linearise_text
        from .pruning import calibration

        pool = calibration(model, positive, latent, seed=seed, **shown)
        request = TextRequest(runs, count, max_run, judge, points, tokens)
        done = linearise_text(model, request, pool, CFGGuider, self.TITLE, steps_of)
        title = "velocity error of runs of linear text" if judge == "velocity" else "unsaid by the maps of a run's text"
        return (done.model, done.report, bar_chart(done.losses, {f"{run.first}-{run.last}" for run in done.runs}, title))
