"""`rectiflow train CONFIG`: run a training recipe without a graph; stopped at any time, it goes on where it was."""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
import time
from pathlib import Path
from typing import Any

from .failures import BAD_INPUT, INTERRUPTED, CommandError

__all__ = ["main"]

RECIPES = ("tiny",)


def main(arguments: list[str]) -> int:
    given = _parser().parse_args(arguments)
    recipe = _read(given.config)
    from ..errors import NodeInputError

    try:
        return _train_tiny(recipe, given)
    except NodeInputError as error:
        raise CommandError(str(error), BAD_INPUT) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rectiflow train",
        description="Train by a recipe file. Ctrl-C keeps what is done; the same command goes on from there.",
        epilog="example: rectiflow train train/recipes/tiny.toml --finish 1000",
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="the recipe, a TOML file")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="folder of the training pictures instead of the recipe's")
    parser.add_argument("--out", type=Path, default=Path("output"), metavar="DIR", help="folder for rf_train/NAME (default: ./output)")
    parser.add_argument("--steps-this-run", type=int, default=0, metavar="N", help="stop after so many steps")
    parser.add_argument("--finish", type=int, metavar="N", help="let the learning rate fall to its floor over the next N steps, and end")
    parser.add_argument("--compile", action="store_true", help="run the network through torch.compile")
    parser.add_argument("--start", type=Path, metavar="FILE", help="begin a new run with these weights, not random ones")
    parser.add_argument("--export", type=Path, metavar="FILE", help="write the averaged weights of the newest checkpoint and train nothing")
    return parser


def _read(path: Path) -> dict[str, Any]:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        try:
            import tomli as tomllib
        except ModuleNotFoundError:
            raise CommandError("recipes are TOML: use Python 3.11, or install the package tomli") from None
    try:
        recipe = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CommandError(f"the recipe {path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise CommandError(f"the recipe {path} is not TOML: {error}") from None
    known = {"recipe", "name", "pictures", "dtype", "compile", "look", "train"}
    if unknown := sorted(set(recipe) - known):
        raise CommandError(f"{path}: '{unknown[0]}' is not known; there are {', '.join(sorted(known))}")
    if recipe.get("recipe") not in RECIPES:
        raise CommandError(f"{path}: recipe = {recipe.get('recipe')!r}; there is {', '.join(RECIPES)}")
    if recipe.get("dtype", "bf16") not in ("bf16", "fp32"):
        raise CommandError(f"{path}: dtype = {recipe['dtype']!r}; allowed: bf16, fp32")
    return recipe


def _train_tiny(recipe: dict[str, Any], given: argparse.Namespace) -> int:
    import torch

    from ..host.embedded.ldm.flux import Flux, FluxParams
    from ..host.embedded.safe_files import UnsafePathError, checked_path
    from ..tiny.codec import LinearCodec
    from ..tiny.emoji import EmojiLook
    from ..tiny.weights import FLUX_SIZES, load_weights
    from ..train.checkpoints import RunFolder
    from ..train.config import TrainConfig
    from ..train.loop import Callbacks, Trainer
    from ..train.recipes.tiny import EmojiData, TinyTrainee, initialise, start_from

    try:
        path = checked_path(given.out, f"rf_train/{recipe.get('name', 'tiny')}", for_writing=True)
        look = EmojiLook(**recipe.get("look", {}))
    except (UnsafePathError, TypeError) as error:
        raise CommandError(f"{given.config}: {error}") from None
    folder = RunFolder(Path(path), "rectiflow train")
    shipped = load_weights()
    if given.export:
        return _export(folder, shipped, given.export, given.config)
    config = TrainConfig.from_table(recipe.get("train", {}), str(given.config))
    config = dataclasses.replace(config, steps_this_run=given.steps_this_run)
    if given.finish is not None:
        config = _finishing(config, folder, given.finish)
    codec = LinearCodec(shipped.codec_basis, shipped.codec_scale, shipped.codec_mean)
    data = EmojiData.from_folder(given.pictures or Path(recipe.get("pictures", "input/emoji")), look, codec)
    dtype = torch.bfloat16 if recipe.get("dtype", "bf16") == "bf16" else torch.float32
    compiled = given.compile or recipe.get("compile", False)
    trainee = TinyTrainee(Flux(FluxParams(**FLUX_SIZES)), len(data.vocabulary.tokens), dtype, compiled)
    if given.start:
        start_from(trainee, load_weights(given.start))
    else:
        initialise(trainee, config.seed)
    with _Signals() as signals:
        callbacks = Callbacks(_Lines(config.examples), signals.check, log=lambda line: print(line, flush=True))
        try:
            Trainer(trainee, data, config, folder, callbacks=callbacks).run()
        except KeyboardInterrupt:
            print(f"stopped; what is done is in {folder.path}", file=sys.stderr)
            return INTERRUPTED
    return 0


def _finishing(config, folder, steps: int):
    """The plan whose rate begins to fall at the newest checkpoint, or goes on falling where one of a finishing run is newer."""
    done = (folder.steps() or [0])[0]
    before = folder.description(done)["config"] if done else {}
    if before.get("steps") != config.steps and before.get("steps", 0) > done and before.get("optim", {}).get("decay_steps"):
        end, decay = before["steps"], before["optim"]["decay_steps"]
    else:
        end, decay = done + steps, steps
    optim = dataclasses.replace(config.optim, schedule="decay_at_end", decay_steps=decay)
    return dataclasses.replace(config, steps=end, optim=optim)


def _export(folder, shipped, target: Path, recipe: Path) -> int:
    from safetensors.torch import save

    from ..train.checkpoints import write_whole
    from ..train.recipes.tiny import weight_file

    checkpoint, complaints = folder.newest()
    for line in complaints:
        print(line, file=sys.stderr)
    if checkpoint is None:
        raise CommandError(f"there is no whole checkpoint in {folder.path}; train first")
    metadata = {"format": "pt", "steps": str(checkpoint.step), "recipe": recipe.name}
    write_whole(target, save(weight_file(checkpoint.part("ema") or checkpoint.part("params"), shipped), metadata))
    print(f"step {checkpoint.step} → {target}")
    return 0


class _Signals:
    """While it is open, Ctrl-C and a polite kill stop the run between two micro-batches, never inside a step."""

    def __enter__(self):
        self.stopped = False
        self.before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _stop(self, *_) -> None:
        self.stopped = True

    def check(self) -> None:
        if self.stopped:
            raise KeyboardInterrupt


class _Lines:
    """One line every 20 steps: loss, rate, pictures a second, and seconds of processor time a step."""

    EVERY = 20

    def __init__(self, examples: int):
        self.examples, self.since, self.cpu, self.counted = examples, time.monotonic(), time.process_time(), 0

    def __call__(self, done: int, steps: int, history) -> None:
        self.counted += 1
        if done % self.EVERY and done != steps:
            return
        seconds, cpu = time.monotonic() - self.since, time.process_time() - self.cpu
        line = f"step {done}/{steps}  loss {history.mean_loss(self.EVERY):.4f}  rate ×{history.steps[-1].lr_factor:.3f}"
        line += f"  {self.counted * self.examples / seconds:.1f} pictures/s  {cpu / self.counted:.2f} s of processor a step"
        if history.validations and history.validations[-1].step > done - self.EVERY:
            shown = history.validations[-1]
            line += f"  validation ({shown.weights}) {shown.mean:.4f}: " + " ".join(f"{value:.3f}" for value in shown.bins)
        print(f"{time.strftime('%H:%M:%S')}  {line}", flush=True)
        self.since, self.cpu, self.counted = time.monotonic(), time.process_time(), 0
