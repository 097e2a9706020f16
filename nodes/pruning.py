"""Pruning palette: which blocks can go, models without them, and training that recovers what they did."""

from __future__ import annotations

from .declare import Node, Output, boolean, choice, integer, number, seed_input, socket, steps_of, text

GROUP = "pruning"
MODEL = socket("model", "MODEL", "The whole model.")
POSITIVE = socket("positive", "CONDITIONING", "Prompts to sample with; Conditioning (Combine) of several is better than one.")
LATENT = socket("latent", "LATENT", "An empty latent: its size is what counts.")
_NEGATIVE = socket("negative", "CONDITIONING", "For cfg above 1.", optional=True)
REMOVE = number("remove", 0.33, 0.0, 0.9, "Share of all blocks to leave out.")
PROTECT = text("protect", "0, -1", "Blocks that stay: 0 is the first, -1 the last; double:1 and single:-1 count within a kind.")
_SAMPLES = integer("samples", 8, 1, 4096, "Pictures that the model draws to be measured on.", optional=True, advanced=True)
_POOL_STEPS = integer("sample_steps", 12, 1, 200, "Euler steps of each of these.", optional=True, advanced=True)
_CFG = number("cfg", 1.0, 0.0, 100.0, "Guidance of these samples.", step=0.1, optional=True, advanced=True)
_POINTS = integer("points", 16, 1, 1024, "Places of the flow where the model is asked.", optional=True, advanced=True)
CALIBRATION = (_NEGATIVE, _SAMPLES, _POOL_STEPS, _CFG)
PLAN = Output("STRING", "plan", "What is kept, as JSON: for Apply Prune Plan, or to save.")
REPORT = Output("STRING", "report", "What was measured.")


def calibration(model, positive, latent, negative=None, samples=8, sample_steps=12, cfg=1.0, seed=0):
    """What a model is shown where there is no data set."""
    from ..host import fix_empty_latent_channels
    from ..train.pool import Calibration

    size = tuple(fix_empty_latent_channels(model, latent["samples"]).shape[1:])
    return Calibration(positive, negative, size, samples, sample_steps, cfg, seed)


def named(model, scores, where):
    """Scores under the names that people write, double:0 for double_blocks.0."""
    from ..accel.prune.apply import stack_under

    return {block.path: block.name for block in stack_under(model, where).blocks if block.path in scores}


def drawn(model, scored, title, where):
    """Scores as bars, what is left out in another colour."""
    from ..metrics.bars import bar_chart

    names = named(model, scored.scores, where)
    return bar_chart({name: scored.scores[path] for path, name in names.items()}, {names.get(path) for path in scored.gone}, title)


class RectiflowPruneScore(Node):
    """Ranks the blocks of a model by how much each matters and plans to leave out the least important."""

    TITLE = "Prune Score"
    GROUP = GROUP
    SEARCH_ALIASES = ["block importance", "shortgpt", "depth pruning", "layer sensitivity", "smaller model"]
    INPUTS = (
        MODEL, POSITIVE, LATENT,
        choice("method", ("sensitivity", "similarity", "magnitude", "probe", "even", "ends", "random", "outcome"),
            "sensitivity: error of the answer without the block. similarity: how little it turns its tokens. magnitude: size of its "
            "weights. probe: what a linear map does not say about it. even, ends, random: patterns to compare with. outcome: error of the "
            "answer and of whole runs' pictures; the dearest.",
        ),
        REMOVE, PROTECT,
        seed_input("Of the samples, and of random."),
        *CALIBRATION, _POINTS,
    )  # fmt: skip
    OUTPUTS = (
        PLAN, REPORT, Output("IMAGE", "plot", "The numbers as bars, orange what is left out."),
        Output("STRING", "double_pattern", "For Learn Depth: as many out of each eight double blocks as here, empty for none."),
        Output("STRING", "single_pattern", "The same of single blocks."),
    )

    def run(self, model, positive, latent, method, remove, protect, seed, points=16, **shown):
        from ..accel.prune.apply import stack_under
        from ..accel.prune.depth_masks import patterns_like
        from ..accel.prune.select import protected
        from ..host import CFGGuider
        from ..train.prune_scores import ScoreRequest, score_blocks

        request, stack = ScoreRequest(method, remove, protect, points), stack_under(model, self.TITLE)
        step = steps_of(len(stack.blocks) * (2 if method == "outcome" else 1))
        scored = score_blocks(model, request, calibration(model, positive, latent, seed=seed, **shown), CFGGuider, self.TITLE, step)
        patterns = patterns_like(scored.plan.removed(stack), stack, protected(protect, stack, self.TITLE))
        plot = drawn(model, scored, f"{method} of each block", self.TITLE)
        return (scored.plan.to_json(), scored.report, plot, *(patterns.get(kind, "") for kind in ("double", "single")))


class RectiflowApplyPrunePlan(Node):
    """A model without the blocks that a plan leaves out; all others keep their numbers."""

    TITLE = "Apply Prune Plan"
    GROUP = GROUP
    SEARCH_ALIASES = ["depth pruning", "skip blocks", "smaller model", "tinyfusion"]
    INPUTS = (
        socket("model", "MODEL", "The model that the plan was made on."),
        text("plan", "", "A plan as JSON, linked or pasted.", multiline=True),
        boolean("enabled", True, "Off hands the model on as it is."),
    )
    OUTPUTS = (Output("MODEL", "model", "The smaller model."), Output("STRING", "report", "What it lacks, and its size."))

    def run(self, model, plan, enabled):
        from ..accel.prune.apply import apply_plan, size_change, stack_under
        from ..accel.prune.plan import plan_from_json

        if not enabled:
            return (model, "off: every block is kept")
        found = plan_from_json(plan, self.TITLE)
        pruned = apply_plan(model, found, self.TITLE, students_of(found, model, self.TITLE))
        sizes = size_change(model, pruned)
        return (pruned, f"{found.describe(stack_under(model, self.TITLE))}; {sizes}{idle_patches(model, found, self.TITLE)}")


class RectiflowRecoverPruned(Node):
    """Trains a pruned model to answer as the whole one does, on samples of the whole one: no data set is needed."""

    TITLE = "Recover Pruned"
    GROUP = GROUP
    OUTPUT_NODE = True
    SEARCH_ALIASES = ["distillation", "prune recovery", "knowledge distillation", "tinyfusion"]
    INPUTS = (
        socket("student", "MODEL", "The pruned model: from Apply Prune Plan, Apply Width Mask or Compact Width."),
        socket("teacher", "MODEL", "The whole one. The same loaded model costs no second copy."),
        POSITIVE, LATENT,
        integer("steps", 200, 1, 1000000, "Steps in all."),
        integer("batch", 4, 1, 4096, "Points of the flow a step."),
        choice("learns", ("lora", "changed_blocks", "all", "biases"), "changed_blocks: whole weights of narrow blocks, and beside gaps."),
        integer("rank", 16, 1, 4096, "Of the LoRA."),
        number("lr", 5e-4, 0.0, 10.0, "Learning rate. LoRA 5e-4, whole weights 1e-4.", step=0.00001),
        seed_input("Of the samples and of every draw."),
        text("name", "recovered", "Folder below output/rf_train for checkpoints and the LoRA."),
        *CALIBRATION,
        choice("data", ("teacher_x0", "mixed", "on_policy"), "teacher_x0: the teacher's samples, noised. The others also follow the "
            "student's own steps, in one step of three or in all.", optional=True),
        number("flow_share", 0.1, 0.0, 1.0, "How much the target is the flow to the sample, not the teacher's answer.", optional=True,
            advanced=True),
        number("feature_weight", 0.0002, 0.0, 1000.0, "Weight of the hidden states at the gaps; falls to 0 over the run.", step=0.0001,
            optional=True, advanced=True),
        number("mask_sigma", 2.0, 0.0, 100.0, "Hidden numbers further than so many deviations from the mean do not count; 0: all do.",
            optional=True, advanced=True),
        choice("resume", ("auto", "new", "error_if_exists"), "auto: go on where this name stopped. new: set that aside.", optional=True),
        number("ema", 0.99, 0.0, 0.99999, "Decay of the average that is handed out; 0: none.", step=0.0001, optional=True, advanced=True),
        integer("save_every", 250, 0, 1000000, "Steps between checkpoints; 0: the end alone.", optional=True, advanced=True),
        boolean("checkpointing", False, "Compute blocks twice and keep less memory.", optional=True, advanced=True),
        socket("pairs", "FLOW_PAIRS", "The whole model's pictures, in place of samples that are drawn here.", optional=True),
    )  # fmt: skip
    OUTPUTS = (
        Output("MODEL", "model", "The pruned model with what was learnt (the average)."),
        Output("LORA_MODEL", "lora", "What was learnt, as a LoRA file has it."),
        Output("LOSS_MAP", "loss_map", "Loss of every step."),
        Output("STRING", "report", "Error before and after, speed, as JSON."),
        Output("IMAGE", "curve", "The loss curve."),
    )

    @classmethod
    def IS_CHANGED(cls, name="recovered", **inputs):
        """The newest step on the disk: a finished run is not repeated, an interrupted one goes on."""
        from .training import RectiflowTrain

        return RectiflowTrain.IS_CHANGED(name)

    def run(self, student, teacher, positive, latent, name, seed, pairs=None, **given):
        import json

        from ..train.pool import Calibration
        from ..train.recovery import RecoverSettings, recover

        shown = {key: given.pop(key) for key in ("negative", "samples", "sample_steps", "cfg") if key in given}
        settings = RecoverSettings(seed=seed, **given)
        if pairs is None:
            pool = calibration(teacher, positive, latent, seed=seed, **shown)
        else:
            pool = Calibration.from_pairs(teacher, positive, shown.get("negative"), pairs, self.TITLE, seed)
        done = recover(student, teacher, settings, pool, run_folder(name, self.TITLE), host_services())
        return (done.model, done.lora, {"loss": done.losses}, json.dumps(done.report, indent=1), done.picture)


def idle_patches(model, plan, where):
    """A line on the LoRA weights of `model` that meet no block under `plan`; empty where there are none."""
    from ..accel.prune.apply import stack_under
    from ..accel.prune.identity import NETWORK

    gone = tuple(f"{NETWORK}{path}." for path in [*(block.path for block in plan.removed(stack_under(model, where))), *plan.students])
    count = sum(key.startswith(gone) for key in model.patches)
    return f"\n{count} of {len(model.patches)} patched weights are of blocks that are not there now" if count else ""


def students_of(plan, model, where):
    """The students that a plan names, from their files below output/rf_train: path → module.

    Raises: NodeInputError for names that lead elsewhere, and see accel.prune.students.read_students.
    """
    import dataclasses

    from ..accel.prune.students import STUDENTS_FILE, read_students
    from ..errors import input_error
    from .training import _run_folder

    found = {}
    for name in sorted(set(plan.students.values())):
        folder, _, file = name.partition("/")
        place = _run_folder(folder) if file == STUDENTS_FILE else None
        if place is None:
            allowed = f"<name>/{STUDENTS_FILE} below output/rf_train"
            raise input_error(where, "plan", f"students in {name!r}", allowed, "Take the plan as Distill Runs gave it.")
        own = {path: each for path, each in plan.students.items() if each == name}
        found |= read_students(place / STUDENTS_FILE, dataclasses.replace(plan, students=own), model, where)
    return found


def run_folder(name, where):
    """output/rf_train/<name>. Raises: NodeInputError for what is no name."""
    from ..errors import input_error
    from .training import _run_folder

    folder = _run_folder(name)
    if folder is None:
        allowed = "1 to 80 letters, digits, spaces, _, - and dots, not beginning with a dot"
        raise input_error(where, "name", name, allowed, "Choose another name.")
    return folder


def host_services():
    from .training import _host_services

    return _host_services()
