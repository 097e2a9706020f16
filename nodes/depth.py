"""Pruning palette, what is learnt: which blocks to leave out, and students of runs of blocks that can be switched back."""

from __future__ import annotations

from .declare import Node, Output, choice, integer, number, seed_input, socket, steps_of, text
from .pruning import (
    CALIBRATION,
    GROUP,
    LATENT,
    MODEL,
    PLAN,
    POSITIVE,
    PROTECT,
    REPORT,
    calibration,
    host_services,
    idle_patches,
    run_folder,
    students_of,
)  # fmt: skip

_PATTERN = "How many of how many neighbours stay, as often as it fits, or a list such as 2:4, 3:4. Empty: all stay."
_RESUME = choice("resume", ("auto", "new", "error_if_exists"), "auto: go on where this name stopped. new: set that aside.", optional=True)
_SAVE = integer("save_every", 250, 0, 1000000, "Steps between checkpoints; 0: the end alone.", optional=True, advanced=True)
_SHOWN = ("negative", "samples", "sample_steps", "cfg")
_BATCH = integer("batch", 4, 1, 4096, "Points of the flow a step; each has a sigma of its own.")


def newest_step(name):
    """The newest step on the disk: a finished run is not repeated, an interrupted one goes on."""
    from .training import RectiflowTrain

    return RectiflowTrain.IS_CHANGED(name)


class RectiflowDepthPruneLearn(Node):
    """Learns which blocks to leave out by training their chances to stay together with a LoRA that stands for later recovery."""

    TITLE = "Learn Depth"
    GROUP = GROUP
    OUTPUT_NODE = True
    SEARCH_ALIASES = ["tinyfusion", "depth pruning", "learned masks", "gumbel", "smaller model"]
    INPUTS = (
        MODEL, POSITIVE, LATENT,
        text("double_pattern", "1:2", _PATTERN),
        text("single_pattern", "1:2", _PATTERN),
        PROTECT,
        integer("steps", 500, 1, 1000000, "Steps in all."),
        _BATCH,
        seed_input("Of the samples and of every draw."),
        text("name", "depth", "Folder below output/rf_train for checkpoints."),
        *CALIBRATION,
        socket("latents", "LATENT", "Examples in place of the model's own samples.", optional=True),
        choice("objective", ("teacher", "flow"), "teacher: the whole model's answer. flow: from noise to the example.", optional=True),
        number("lr_logits", 1e-3, 0.0, 1.0, "Rate of the chances. Lower it for small batches.", step=0.0001, optional=True),
        number("lr_lora", 1e-4, 0.0, 1.0, "Rate of the LoRA.", step=0.00001, optional=True),
        integer("rank", 8, 1, 4096, "Of the LoRA.", optional=True, advanced=True),
        number("tau_start", 4.0, 0.001, 100.0, "Temperature of the draws at the first step: high spreads the gradient.", optional=True,
            advanced=True),
        number("tau_end", 0.1, 0.001, 100.0, "And at the last. Raise it for few steps.", optional=True, advanced=True),
        number("logit_scale", 100.0, 0.001, 10000.0, "What the logits are multiplied by.", optional=True, advanced=True),
        number("ema", 0.999, 0.0, 0.99999, "Decay of the average of the logits that decides; 0: none.", step=0.0001, optional=True,
            advanced=True),
        _RESUME, _SAVE,
    )  # fmt: skip
    OUTPUTS = (
        PLAN, Output("STRING", "report", "Chances and errors as JSON."),
        Output("IMAGE", "plot", "How probable it is that each block stays, over the steps."),
        Output("IMAGE", "curve", "The loss curve."),
    )  # fmt: skip

    @classmethod
    def IS_CHANGED(cls, name="depth", **inputs):
        return newest_step(name)

    def run(self, model, positive, latent, name, seed, latents=None, **given):
        import json

        from ..metrics.matrix import matrix_chart
        from ..train.host_model import ordinary
        from ..train.learn_depth import DepthSettings, learn_depth

        shown = {key: given.pop(key) for key in _SHOWN if key in given}
        pool = calibration(model, positive, latent, seed=seed, **shown)
        examples = None if latents is None else ordinary(latents["samples"])
        done = learn_depth(model, DepthSettings(seed=seed, **given), pool, run_folder(name, self.TITLE), host_services(), examples)
        steps = [str(step) for step in done.steps]
        plot = matrix_chart(done.probabilities, done.names, steps, "How probable it is that a block stays, by step (pale: stays)")
        return (done.plan.to_json(), json.dumps(done.report, indent=1), plot, done.curve)


class RectiflowLayerProbe(Node):
    """Fits a linear map to every block and measures how well chains of them stand for runs of blocks."""

    TITLE = "Layer Probe"
    GROUP = GROUP
    SEARCH_ALIASES = ["cka", "ppcl", "linear probe", "redundant layers"]
    INPUTS = (
        MODEL, POSITIVE, LATENT,
        integer("tokens", 1024, 16, 65536, "Tokens kept of each stream of every block; at least twice the width of the model is best."),
        number("ridge", 1e-4, 0.0, 1.0, "Pulls the maps towards the identity where tokens are few.", step=0.00001),
        integer("max_run", 10, 1, 100, "Longest run that is measured."),
        seed_input("Of the samples."),
        *CALIBRATION,
        integer("points", 16, 1, 1024, "Places of the flow where the model is asked.", optional=True, advanced=True),
        choice("judge", ("students", "cka", "outcome"), "students: also what the model's answer loses with a fitted block in the place of "
            "each run; a minute or more. cka: maps and their tokens alone. outcome: what whole runs' pictures lose too; the dearest.",
            optional=True,
        ),
    )  # fmt: skip
    OUTPUTS = (
        Output("LAYER_STATS", "stats", "For Find Redundant Runs."), REPORT,
        Output("IMAGE", "plot", "CKA of the run from each row's block to each column's, 1 (pale) where straight maps say all."),
    )  # fmt: skip

    def run(self, model, positive, latent, tokens, ridge, max_run, seed, points=16, judge="students", **shown):
        from ..accel.prune.apply import stack_under
        from ..accel.prune.fitted_students import runs_to_judge
        from ..host import CFGGuider
        from ..train.prune_scores import probe_layers

        pool = calibration(model, positive, latent, seed=seed, **shown)
        step = steps_of(len(runs_to_judge(stack_under(model, self.TITLE), max_run)))
        stats = probe_layers(model, pool, CFGGuider, self.TITLE, max_run, ridge, points, tokens, judge, step)
        return (stats, stats.report(), cka_picture(stats))


def cka_picture(stats):
    """The tables of all kinds one below the other, as wide as the widest."""
    import torch

    from ..metrics.matrix import matrix_chart

    tables = list(stats.tables["min"].cka.values())
    widest = max(len(table) for table in tables)
    padded = [torch.nn.functional.pad(table, (0, widest - len(table)), value=float("nan")) for table in tables]
    names = [block.name for block in stats.stack.blocks]
    columns = [str(number) for number in range(widest)]
    return matrix_chart(torch.cat(padded), names, columns, "CKA of linear maps for the run from row to column")


class RectiflowFindRedundantRuns(Node):
    """Chooses runs of neighbouring blocks that straight maps nearly replace: each becomes one student."""

    TITLE = "Find Redundant Runs"
    GROUP = GROUP
    SEARCH_ALIASES = ["ppcl", "contiguous layers", "pruning"]
    INPUTS = (
        socket("stats", "LAYER_STATS", "From Layer Probe."),
        number("remove", 0.33, 0.0, 0.9, "Share of all blocks to leave out. 0: as many as the trend rule finds."),
        integer("max_run", 10, 2, 100, "Longest run."),
        number("largest_loss", 0.1, 0.0, 1.0, "Trend rule: 1 - CKA that a run may reach.", step=0.01),
        number("tie", 0.001, 0.0, 1.0, "Trend rule: a further block that costs less than this is free.", step=0.001),
        PROTECT,
        choice("merge_streams", ("min", "image", "mean", "velocity", "outcome"), "What a run costs: of several streams the worst CKA, the "
            "image's, or the mean; or what the model's answer loses, nearest; or that and what final latents lose.", default="velocity",
        ),
    )  # fmt: skip
    OUTPUTS = (PLAN, REPORT)

    def run(self, stats, remove, max_run, largest_loss, tie, protect, merge_streams):
        from ..train.prune_scores import RunSearch, runs_from

        scored = runs_from(stats, RunSearch(remove, max_run, largest_loss, tie, protect, merge_streams), self.TITLE)
        return (scored.plan.to_json(), scored.report)


class RectiflowDistillRuns(Node):
    """Trains one student for every run of a plan on the whole model's own states, all runs at once."""

    TITLE = "Distill Runs"
    GROUP = GROUP
    OUTPUT_NODE = True
    SEARCH_ALIASES = ["ppcl", "layer distillation", "contiguous", "recovery"]
    INPUTS = (
        MODEL,
        text("plan", "", "A plan with runs, from Find Redundant Runs.", multiline=True),
        POSITIVE, LATENT,
        integer("steps", 500, 1, 1000000, "Steps in all."),
        _BATCH,
        number("lr", 1e-4, 0.0, 10.0, "Learning rate: 1e-5 for large models, 1e-3 for small ones.", step=0.00001),
        choice("init", ("middle", "first", "last", "average", "fitted"), "Which block of its run a student begins as. fitted: the middle "
            "one, its last layer solved to say what the run says; nearest.", default="fitted",
        ),
        choice("loss", ("dir_mse", "dir_l1", "mse"), "dir: of directions, with the size where it leaves 0.9 to 1.1. mse: of the tokens."),
        number("own_share", 0.2, 0.0, 1.0, "Share of the steps, at the end, on the states that the students make themselves."),
        seed_input("Of the samples and of every draw."),
        text("name", "runs", "Folder below output/rf_train for checkpoints and the students."),
        *CALIBRATION,
        number("shift", 1.0, 0.01, 100.0, "Of the sigmas that are drawn; 3 favours noise.", optional=True, advanced=True),
        number("ema", 0.99, 0.0, 0.99999, "Decay of the average that is kept; 0: none.", step=0.0001, optional=True, advanced=True),
        _RESUME, _SAVE,
    )  # fmt: skip
    OUTPUTS = (
        Output("STRING", "plan", "The plan with its students, for Apply Runs."),
        Output("STRING", "file", "The students' file, below output/rf_train."),
        Output("STRING", "report", "Errors of single runs and of all, and sizes, as JSON."),
        Output("IMAGE", "curve", "The loss curve."),
    )

    @classmethod
    def IS_CHANGED(cls, name="runs", **inputs):
        return newest_step(name)

    def run(self, model, plan, positive, latent, name, seed, loss, **given):
        import json

        from ..accel.prune.plan import plan_from_json
        from ..accel.prune.students import STUDENTS_FILE
        from ..train.distill_runs import RunSettings, distill_runs

        shown = {key: given.pop(key) for key in _SHOWN if key in given}
        pool = calibration(model, positive, latent, seed=seed, **shown)
        settings, folder = RunSettings(seed=seed, distance=loss, **given), run_folder(name, self.TITLE)
        done = distill_runs(model, plan_from_json(plan, self.TITLE), settings, pool, folder, host_services())
        return (done.plan.to_json(), f"{name}/{STUDENTS_FILE}", json.dumps(done.report, indent=1), done.curve)


class RectiflowApplyRuns(Node):
    """A model with students in place of runs of blocks: all of them, some, or only in a part of the sampling."""

    TITLE = "Apply Runs"
    GROUP = GROUP
    SEARCH_ALIASES = ["ppcl", "pluggable", "depth pruning", "students"]
    INPUTS = (
        socket("model", "MODEL", "The model that the plan was made on."),
        text("plan", "", "From Distill Runs.", multiline=True),
        text("active_runs", "all", "all, none, or numbers such as 0, 2 in the order of the plan."),
        number("start_percent", 0.0, 0.0, 1.0, "Part of the sampling where runs are replaced. 0 and 1 save memory; else both are kept."),
        number("end_percent", 1.0, 0.0, 1.0, "End of that part."),
    )
    OUTPUTS = (Output("MODEL", "model", "The model with students."), Output("STRING", "report", "What is replaced, and its size."))

    def run(self, model, plan, active_runs, start_percent, end_percent):
        from ..accel.prune.apply import size_change, stack_under
        from ..accel.prune.plan import plan_from_json
        from ..accel.prune.students import active_plan, apply_runs
        from ..errors import input_error

        if start_percent > end_percent:
            allowed = f"at most end_percent, {end_percent:g}"
            raise input_error(self.TITLE, "start_percent", start_percent, allowed, "Exchange the two.")
        found = active_plan(plan_from_json(plan, self.TITLE), active_runs, self.TITLE)
        sigmas = None
        if (start_percent, end_percent) != (0.0, 1.0):
            sampling = model.get_model_object("model_sampling")
            sigmas = tuple(float(sampling.percent_to_sigma(part)) for part in (start_percent, end_percent))
        applied = apply_runs(model, found, students_of(found, model, self.TITLE), self.TITLE, sigmas)
        lines = [f"{found.describe(stack_under(model, self.TITLE))}; {size_change(model, applied)}"]
        lines += [f"{run.path} to {run.last}: {found.students.get(run.path, 'its first block')}" for run in found.runs]
        return (applied, "\n".join(lines) + idle_patches(model, found, self.TITLE))
