"""Training palette: one trainer for adapters, chosen blocks and whole small models, and the pieces that describe a run."""

from __future__ import annotations

from ..errors import input_error
from .declare import Node, Output, boolean, choice, integer, number, socket, text

GROUP = "training"
DATASET = Output("DATASET", "data", "Examples for Train.")


class RectiflowLatentDataset(Node):
    """Latents and their prompts as examples for training: one prompt for all, or one each in the same order."""

    TITLE = "Latent Dataset"
    GROUP = GROUP
    SEARCH_ALIASES = ["training data", "dataset"]
    INPUTS = (
        socket("latents", "LATENT", "A batch; its noise mask, if it has one, weighs the loss."),
        socket("positive", "CONDITIONING", "One prompt for all, or Conditioning (Combine) of one each."),
        socket("more", "DATASET", "Examples that are added in front, also of another size.", optional=True),
    )
    OUTPUTS = (DATASET,)

    def run(self, latents, positive, more=None):
        from ..train.dataset import Dataset
        from ..train.host_model import ordinary

        samples = ordinary(latents["samples"]).float().cpu()
        prompts = tuple(ordinary(list(positive)))
        if len(prompts) == 1:
            prompts = prompts * len(samples)
        mask = latents.get("noise_mask")
        weights = () if mask is None else tuple(_cell_weights(mask, samples))
        made = Dataset(tuple(samples), prompts, weights)
        made.check(self.TITLE)
        if more is not None:
            if bool(more.weights) != bool(made.weights) or more.noise:
                allowed = "examples of the same kind: both with masks or both without, no pairs"
                raise input_error(self.TITLE, "more", "examples of another kind", allowed, "Link others.")
            made = Dataset(more.latents + made.latents, more.conditioning + made.conditioning, more.weights + made.weights)
        return (made,)


def _cell_weights(mask, samples):
    """A noise mask as (1, h, w) weights in latent cells, one a latent."""
    import torch

    from ..train.host_model import ordinary

    mask = ordinary(mask).float().cpu().reshape(-1, 1, *mask.shape[-2:])
    cells = torch.nn.functional.interpolate(mask, size=samples.shape[-2:], mode="area")
    return cells.expand(len(samples), -1, -1, -1) if len(cells) == 1 else cells[: len(samples)]


class RectiflowPairDataset(Node):
    """Pairs of noise and picture as examples, for reflow and one-step distillation."""

    TITLE = "Pair Dataset"
    GROUP = GROUP
    SEARCH_ALIASES = ["reflow", "distillation data"]
    INPUTS = (
        socket("pairs", "FLOW_PAIRS", "From Flow Pair Generator."),
        socket("positive", "CONDITIONING", "The prompt that the pairs were made with."),
        socket("more", "DATASET", "Pairs of another prompt that are added in front.", optional=True),
        boolean("flip", False, "Mirror every second pair; not for letters, or prompts with left and right.", optional=True, advanced=True),
    )
    OUTPUTS = (DATASET,)

    def run(self, pairs, positive, more=None, flip=False):
        from ..train.dataset import Dataset
        from ..train.host_model import ordinary

        clean, noise, prompts = tuple(ordinary(pairs.clean)), tuple(ordinary(pairs.noise())), tuple(ordinary(list(positive)))
        made = Dataset(clean, prompts, noise=noise, facts=repr(dict(pairs.facts)), flip=flip)
        made.check(self.TITLE)
        if more is not None:
            if not more.noise or more.flip != flip:
                allowed = "pairs, from a Pair Dataset with the same flip"
                raise input_error(self.TITLE, "more", "examples of another kind", allowed, "Link another Pair Dataset.")
            prompts = _one_each(more) + _one_each(made)
            made = Dataset(more.latents + clean, prompts, noise=more.noise + noise, facts=more.facts + made.facts, flip=flip)
        return (made,)


def _one_each(data):
    return data.conditioning * len(data) if len(data.conditioning) == 1 else data.conditioning


class RectiflowTrainParams(Node):
    """Which parameters learn: a LoRA, chosen blocks, biases, or everything."""

    TITLE = "Train Parameters"
    GROUP = GROUP
    SEARCH_ALIASES = ["lora rank", "finetune"]
    INPUTS = (
        choice("kind", ("lora", "blocks", "biases", "all"), "lora: two small matrices a layer. blocks, all: differences to whole weights."),
        integer("rank", 8, 1, 4096, "Of the LoRA. Higher holds more and forgets more."),
        number("alpha", 0.0, 0.0, 65536.0, "Scale of the LoRA is alpha / rank; 0 stands for the rank, a scale of 1."),
        text("blocks", "", "Such as double:0-2, single:4-. Empty: all layers, those outside of blocks too."),
        text("include", "", "Regular expression over layer names, such as attn|linear1. Empty: all.", advanced=True),
        text("exclude", "", "Layers to leave out, such as mod.", advanced=True),
    )
    OUTPUTS = (Output("PARAM_SUBSET", "params", "For Train."),)

    def run(self, kind, rank, alpha, blocks, include, exclude):
        from ..train.params import ParamSubset

        return (ParamSubset(kind, rank, alpha, include, exclude, blocks),)


class RectiflowTimestepDensity(Node):
    """How often training sees each sigma; 1 is noise."""

    TITLE = "Timestep Density"
    GROUP = GROUP
    SEARCH_ALIASES = ["logit normal", "u-shaped", "timestep sampling"]
    INPUTS = (
        choice("kind", ("logit_normal", "uniform", "mode", "cosmap", "u_shaped"),
            "logit_normal: most at the middle. u_shaped: most at both ends, for reflow. uniform: evenly."),
        number("mean", 0.0, -10.0, 10.0, "Of logit_normal; above 0 favours noise, below 0 detail."),
        number("std", 1.0, 0.01, 10.0, "Of logit_normal; larger spreads to both ends."),
        number("mode_scale", 1.29, -1.0, 1.75, "Of mode; above 0 favours the middle, below 0 the ends."),
        number("a", 4.0, 0.0, 20.0, "Of u_shaped; 0 is uniform."),
        number("shift", 1.0, 0.01, 100.0, "Resolution shift after that, as an alpha: 3 favours noise. The sampler has its own."),
        boolean("stratified", True, "Spread the sigmas of a step evenly; less noise in the loss."),
    )
    OUTPUTS = (
        Output("TIMESTEP_DENSITY", "density", "For Train."),
        Output("IMAGE", "plot", "The density over sigma."),
    )

    def run(self, kind, mean, std, mode_scale, a, shift, stratified):
        from ..train.curve import density_picture
        from ..train.densities import Density

        density = Density(kind, mean, std, mode_scale, a, shift, low=LEAST_SIGMA, stratified=stratified)
        return (density, density_picture(density))


LEAST_SIGMA = 1e-3  # a host gives the denoised picture; below this sigma the velocity in it is lost to rounding


class RectiflowTrainTarget(Node):
    """What the model shall answer: the data's velocity, another model's, or the way to the end of a pair."""

    TITLE = "Train Target"
    GROUP = GROUP
    SEARCH_ALIASES = ["reflow", "distillation", "teacher"]
    INPUTS = (
        choice("kind", ("velocity", "teacher_velocity", "reflow_pairs", "annealing_reflow", "distill_onestep", "flow_guided_distill"),
            "velocity: flow matching on the data. teacher_velocity: what the linked model answers. The others need pairs."),
        number("teacher_cfg", 1.0, 0.0, 100.0, "Guidance of the teacher; the student then needs none.", step=0.1),
        integer("anneal_steps", 0, 0, 1000000, "annealing_reflow: steps over which fresh noise gives way to the pairs'."),
        choice("annealing", ("linear", "cosine", "exponential"), "How it gives way.", advanced=True),
        socket("teacher", "MODEL", "For teacher_velocity. For flow_guided_distill the reflowed model, such as Train's own.", optional=True),
        number("two_step_weight", 1.0, 0.0, 1000.0, "flow_guided_distill: weight of the two-step target; 0 is distill_onestep.",
            optional=True, advanced=True),
        number("t_min", 0.2, 0.01, 0.99, "flow_guided_distill: least length of the first of the two steps.", optional=True, advanced=True),
        number("t_max", 0.8, 0.01, 0.99, "Largest length of it.", optional=True, advanced=True),
        choice("first_step", ("student", "flow"), "flow_guided_distill: who takes the first step.", optional=True, advanced=True),
    )
    OUTPUTS = (Output("TRAIN_TARGET", "target", "For Train."),)

    def run(self, kind, teacher_cfg, anneal_steps, annealing, teacher=None, **two_step):
        from ..train.targets import NEEDS_TEACHER, Target

        if kind in NEEDS_TEACHER and teacher is None:
            raise input_error(self.TITLE, "teacher", None, "a MODEL", "Link the model that shall be followed.")
        return ((Target(kind, teacher_cfg, anneal_steps, annealing, **two_step), teacher if kind in NEEDS_TEACHER else None),)


class RectiflowTrainLoss(Node):
    """How the distance to the target is counted."""

    TITLE = "Train Loss"
    GROUP = GROUP
    SEARCH_ALIASES = ["huber", "mse", "loss weighting", "wavelet", "ultraflux"]
    INPUTS = (
        choice("kind", ("mse", "pseudo_huber", "huber", "huber_wavelet"),
            "pseudo_huber and huber forgive single large errors. huber_wavelet: UltraFlux's, over the clean picture's Haar bands."),
        choice("weighting", ("none", "sigma2", "inverse", "min_snr"), "Weight over sigma; sigma2: error of the denoised picture."),
        number("c_scale", 0.00054, 0.000001, 1.0, "Of pseudo_huber: c over the numbers of a picture.", step=0.00001, advanced=True),
        number("delta", 1.0, 0.001, 100.0, "Of huber: where it turns from square to linear.", advanced=True),
        number("c_min", 0.2, 0.001, 1000000.0, "Of huber_wavelet: where it turns from square to linear at sigma 1.", optional=True,
            advanced=True),
        number("c_max", 1.0, 0.001, 1000000.0, "The same at low sigma; at least c_min.", optional=True, advanced=True),
        number("snr_gamma", 5.0, 0.1, 100.0, "Of huber_wavelet: signal over noise, ((1 − σ)/σ)², above which all sigmas are alike.",
            optional=True, advanced=True),
        number("beta", 0.0, 0.0, 1.0, "Of huber_wavelet: power of that ratio in its weight; 0: σ/(1 − σ), 0.5: even at high noise.",
            optional=True, advanced=True),
        number("alpha", 0.5, 0.0, 1.0, "Of huber_wavelet: power by which c falls with the noise; 0: c_max everywhere.", optional=True,
            advanced=True),
    )
    OUTPUTS = (Output("TRAIN_LOSS", "loss", "For Train."),)

    def run(self, kind, weighting, c_scale, delta, **wavelet):
        from ..train.losses import Loss

        return (Loss(kind, weighting, c_scale, delta, **wavelet),)


class RectiflowTrainOptimizer(Node):
    """How parameters move: optimiser, rate and its course."""

    TITLE = "Train Optimizer"
    GROUP = GROUP
    SEARCH_ALIASES = ["adamw", "muon", "learning rate", "warmup"]
    INPUTS = (
        choice("kind", ("adamw", "adam", "sgd", "muon"), "muon: orthogonal steps for matrices of whole blocks; not for LoRA."),
        number("lr", 1e-3, 0.0, 10.0, "Learning rate. LoRA 1e-4 to 1e-3, whole weights a tenth of it.", step=0.00001),
        number("muon_lr", 0.02, 0.0, 10.0, "Rate of muon's matrices.", step=0.001, advanced=True),
        integer("warmup", 10, 0, 100000, "Steps over which the rate rises."),
        choice("schedule", ("cosine", "constant", "linear", "decay_at_end"), "decay_at_end: constant, then linear over decay_steps."),
        integer("decay_steps", 0, 0, 1000000, "Of decay_at_end.", advanced=True),
        number("floor", 0.02, 0.0, 1.0, "Share of the rate that is left at the end.", advanced=True),
        number("weight_decay", 0.01, 0.0, 1.0, "Pulls what learns towards zero, times the rate.", advanced=True),
        number("clip", 1.0, 0.0, 1000.0, "Largest norm of the gradient; 0 is none.", advanced=True),
    )
    OUTPUTS = (Output("TRAIN_OPTIM", "optim", "For Train."),)

    def run(self, kind, lr, muon_lr, warmup, schedule, decay_steps, floor, weight_decay, clip):
        from ..train.optim import Optim

        course = {"warmup": warmup, "schedule": schedule, "decay_steps": decay_steps, "floor": floor}
        return (Optim(kind, lr, muon_lr, weight_decay=weight_decay, clip=clip, **course),)


class RectiflowFeatureLoss(Node):
    """An additional loss: hidden states of chosen blocks shall be those of a teacher at the same point."""

    TITLE = "Feature Loss"
    GROUP = GROUP
    SEARCH_ALIASES = ["distillation", "feature matching", "recover"]
    INPUTS = (
        socket("teacher", "MODEL", "A model with blocks of the same width."),
        text("blocks", "single", "Blocks of the model that learns, such as double:0-2, single:5."),
        text("teacher_blocks", "", "The teacher's, as many and in order; empty: the same."),
        number("weight", 0.1, 0.0, 1000.0, "How much it counts; 0 is off."),
        integer("start", 0, 0, 1000000, "First step it counts in.", advanced=True),
        integer("stop", 1000000, 0, 1000000, "First step it no longer counts in.", advanced=True),
        integer("every", 1, 1, 1000, "It counts in one step of so many.", advanced=True),
    )
    OUTPUTS = (Output("AUX_LOSS", "features", "For Train."),)

    def run(self, teacher, blocks, teacher_blocks, weight, start, stop, every):
        return ({"teacher": teacher, "blocks": blocks, "teacher_blocks": teacher_blocks or blocks, "weight": weight, "start": start,
                 "stop": stop, "every": every},)  # fmt: skip


class RectiflowTrain(Node):
    """Trains what is chosen of a model, keeps checkpoints, and goes on from them; with nothing else linked a LoRA."""

    TITLE = "Train"
    GROUP = GROUP
    OUTPUT_NODE = True
    SEARCH_ALIASES = ["lora training", "finetune", "trainer", "dreambooth"]
    INPUTS = (
        socket("model", "MODEL", "The model; it is not changed."),
        socket("data", "DATASET", "Examples, from a dataset node."),
        integer("steps", 500, 1, 100000000, "Steps in all.", optional=True),
        integer("batch", 1, 1, 4096, "Pictures a step and micro-batch.", optional=True),
        integer("seed", 0, 0, 0xFFFFFFFFFFFFFFFF, "Of every draw: order, noise, sigma, first values.", optional=True),
        text("name", "run", "Folder below output/rf_train; letters, digits, space, _ - and dots.", optional=True),
        socket("negative", "CONDITIONING", "The model's own empty prompt, for cond_dropout; without it none is left out.", optional=True),
        socket("params", "PARAM_SUBSET", "What learns. Without it a LoRA of rank 8.", optional=True),
        socket("density", "TIMESTEP_DENSITY", "Without it logit-normal(0, 1).", optional=True),
        socket("target", "TRAIN_TARGET", "Without it the data's velocity.", optional=True),
        socket("loss", "TRAIN_LOSS", "Without it mean squares.", optional=True),
        socket("optim", "TRAIN_OPTIM", "Without it AdamW at 1e-3 with a cosine.", optional=True),
        socket("features", "AUX_LOSS", "A teacher's hidden states as a second target.", optional=True),
        socket("vae", "VAE", "Decodes previews.", optional=True),
        choice("resume", ("auto", "new", "error_if_exists"), "auto: go on where this name stopped. new: set that aside.", optional=True),
        integer("steps_this_run", 0, 0, 100000000, "Stop after so many now and go on in the next queue; 0: all.", optional=True),
        integer("accumulate", 1, 1, 4096, "Micro-batches a step.", optional=True, advanced=True),
        choice("dtype", ("bf16", "fp32"), "Of the model's computation; what learns is fp32.", optional=True, advanced=True),
        boolean("checkpointing", True, "Compute blocks twice and keep less memory.", optional=True, advanced=True),
        number("cond_dropout", 0.1, 0.0, 1.0, "Share of examples seen with the empty prompt.", optional=True, advanced=True),
        number("ema", 0.99, 0.0, 0.99999, "Decay of the average that is handed out; 0: none.", step=0.0001, optional=True, advanced=True),
        integer("save_every", 250, 0, 1000000, "Steps between checkpoints; 0: the end alone.", optional=True, advanced=True),
        integer("keep", 2, 1, 1000, "Newest checkpoints kept besides the best.", optional=True, advanced=True),
        integer("validate_every", 100, 0, 1000000, "Steps between validations; 0: never.", optional=True, advanced=True),
        integer("preview_every", 0, 0, 1000000, "Steps between preview pictures; 0: only at the end.", optional=True, advanced=True),
    )
    OUTPUTS = (
        Output("MODEL", "model", "The model with what was learnt (the average)."),
        Output("LORA_MODEL", "lora", "What was learnt, as a LoRA file has it."),
        Output("LOSS_MAP", "loss_map", "Loss of every step."),
        Output("IMAGE", "curve", "The loss curve."),
        Output("IMAGE", "previews", "Pictures of the first prompts; an empty one without a VAE."),
        Output("STRING", "report", "What happened, as JSON."),
        Output("INT", "step", "Steps done."),
    )

    @classmethod
    def IS_CHANGED(cls, name="run", **inputs):
        """The newest step on the disk: a run with steps left is run again, a finished one is not."""
        from ..train.checkpoints import RunFolder

        folder = _run_folder(name)
        return -1 if folder is None else (RunFolder(folder).steps() or [-1])[0]

    def run(self, model, data, **given):
        from ..train.session import TrainRequest, run_training

        defaults = {declared.name: declared.options["default"] for declared in self.INPUTS if "default" in declared.options}
        settings = defaults | {name: value for name, value in given.items() if value is not None}
        folder = _run_folder(settings.pop("name"))
        if folder is None:
            allowed = "1 to 80 letters, digits, spaces, _, - and dots, not beginning with a dot"
            raise input_error(self.TITLE, "name", given.get("name"), allowed, "Choose another name.")
        return run_training(TrainRequest(model, data, folder, settings), _host_services())


def _run_folder(name: str):
    """output/rf_train/<name>, or None where the name is none for a folder."""
    import re
    from pathlib import Path

    from ..host import get_output_directory

    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9 _.-]{0,79}", name) or name.endswith((".", " ")):
        return None
    return Path(get_output_directory()) / "rf_train" / name


def _host_services():
    """What the trainer asks of its host."""
    from ..host import CallbacksMP, CFGGuider, ProgressBar, load_lora_for_models, load_models_gpu, throw_if_interrupted
    from ..train.session import Services

    def load(models):
        load_models_gpu(models, memory_required=1e20, force_full_load=True)  # a partly loaded model moves its weights in the backward pass

    def with_lora(model, lora):
        return load_lora_for_models(model, None, lora, 1.0, 0.0)[0]

    return Services(CFGGuider, ProgressBar, throw_if_interrupted, load, with_lora, CallbacksMP.ON_PRE_RUN)
