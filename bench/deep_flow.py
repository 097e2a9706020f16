"""A flow of 27 thin blocks that follows the tiny model, for benches of depth: `python bench/deep_flow.py FILE [--steps N]`.

The tiny model has nine blocks, too few to tell ways of choosing blocks apart. This one has two double and 25 single blocks of width 96,
starts from random weights, reads the tiny model's text tables and learns its velocities (teacher_velocity) around samples of 24 prompts.
Half an hour of one thread; FILE is a safetensors file in Flux's layout and ships with nothing.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from rectiflow.accel.prune.scores import relative_error
from rectiflow.host.embedded.ldm.flux import Flux, FluxParams
from rectiflow.tiny.text import Vocabulary
from rectiflow.tiny.weights import FLUX_SIZES, load_weights
from rectiflow.train.config import TrainConfig
from rectiflow.train.densities import Density
from rectiflow.train.loop import Batch, Callbacks, Trainer
from rectiflow.train.optim import Optim
from rectiflow.train.pool import Calibration, PoolData, points, sample_pool, velocities
from rectiflow.train.recipes.tiny import TinyTrainee, initialise, start_from
from rectiflow.train.targets import Target
from safetensors.torch import load_file, save_file

SIZES = {**FLUX_SIZES, "hidden_size": 96, "num_heads": 3, "axes_dim": [4, 14, 14], "depth": 2, "depth_single_blocks": 25}
SHOWN = (
    "twemoji rocket on black", "noto cat on white", "twemoji apple on green", "noto koala on red", "twemoji house on yellow",
    "noto dog on white", "twemoji pizza on blue", "noto guitar on white",
)  # fmt: skip
HELD_OUT = ("noto rocket on blue", "twemoji bike on white", "noto banana on black", "twemoji penguin on red", "noto bus on white",
            "twemoji tiger on yellow")  # fmt: skip
OTHERS = (
    "noto ghost on black", "twemoji crab on white", "noto robot on red", "twemoji cactus on red", "noto umbrella on white",
    "twemoji dolphin on black", "noto mushroom on blue", "twemoji lemon on white", "noto panda on yellow", "twemoji tulip on green",
)  # fmt: skip
PROMPTS = SHOWN + HELD_OUT + OTHERS
SAMPLES, BATCH, GUIDANCE = 8, 16, 3.0  # samples a prompt


class Network(TinyTrainee):
    """The network alone learns; the text tables are the tiny model's."""

    def params(self) -> dict[str, torch.nn.Parameter]:
        return {name: value for name, value in self.named_parameters() if name.startswith("network.")}


class Prompts(PoolData):
    """The pool with what the tiny model's network reads of a prompt, (token ids, style), in place of the prompt's number."""

    def __init__(self, latents: torch.Tensor, read: list[tuple]):
        super().__init__(latents, len(read))
        self.read = read

    def batch(self, rows, draws) -> Batch:
        found = super().batch(rows, draws)
        return Batch(found.clean, [self.read[prompt] for prompt in found.cond])


class Followed:
    """The tiny model as sample_pool asks it: by the prompts' numbers."""

    def __init__(self, teacher: TinyTrainee, read: list[tuple]):
        self.teacher, self.positive = teacher, read

    def velocity(self, x, sigma, cond):
        return self.teacher.velocity(x, sigma, [None if number is None else self.positive[number] for number in cond])


def pool(teacher: TinyTrainee, read: list[tuple], count: int, seed: int) -> Prompts:
    asked = Calibration([], None, (16, 16, 16), count=count, steps=8, cfg=GUIDANCE, seed=seed)
    return Prompts(sample_pool(Followed(teacher, read), asked), read)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--muon", type=float, default=0.02)
    parser.add_argument("--lr", type=float, default=2e-3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    tiny = load_weights()
    teacher = TinyTrainee(Flux(FluxParams(**FLUX_SIZES)), len(tiny.text_embedding), torch.float32)
    start_from(teacher, tiny)
    teacher.requires_grad_(False)
    model = Network(Flux(FluxParams(**SIZES)), len(tiny.text_embedding), torch.float32)
    initialise(model, 0)
    with torch.no_grad():
        model.text.copy_(teacher.text)
        model.style.copy_(teacher.style)
    vocabulary = Vocabulary.load()
    parsed = [vocabulary.parse(prompt) for prompt in PROMPTS]
    read = [(prompt.ids, prompt.style) for prompt in parsed]
    started = time.process_time()
    data = pool(teacher, read, SAMPLES * len(read), 0)
    fixed = points(pool(teacher, read, len(read), 1000), 48, 1000)
    wanted = velocities(teacher, fixed)
    config = TrainConfig(
        steps=given.steps, batch=BATCH, density=Density("uniform", low=1e-3), target=Target("teacher_velocity"), dropout=0.1, ema=0.99,
        save_every=0, validate_every=0, optim=Optim(kind="muon", lr=given.lr, muon_lr=given.muon, warmup=50),
    )  # fmt: skip

    def progress(done: int, steps: int, history) -> None:
        if done % 100 == 0 or done == steps:
            error = relative_error(velocities(model, fixed), wanted)
            print(f"{done} of {steps} steps, {time.process_time() - started:.0f} s: velocity error {error:.4f}", flush=True)

    trainer = Trainer(model, data, config, teacher=teacher, callbacks=Callbacks(progress=progress))
    trainer.run()
    with trainer.averaged():
        print(f"average: velocity error {relative_error(velocities(model, fixed), wanted):.4f}")
        save_file({name: value.detach().contiguous() for name, value in model.network.state_dict().items()}, given.file)


def load_deep(file: Path):
    """The MODEL of FILE on the present host, beside the tiny model's CLIP and VAE."""
    from rectiflow.host import build_flux_model
    from rectiflow.nodes.tiny import tiny_latent
    from rectiflow.tiny.codec import LinearCodec

    tiny = load_weights()
    with torch.inference_mode(False):
        return build_flux_model(load_file(str(file)), SIZES, tiny_latent(LinearCodec(tiny.codec_basis, tiny.codec_scale, tiny.codec_mean)))


if __name__ == "__main__":
    main()
