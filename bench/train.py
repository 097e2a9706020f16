"""Steps per second and peak memory of the trainer: `python bench/train.py [--steps N] [--pictures DIR]`; writes bench/results/train.csv.

    LoRA      rank 8 on the tiny model as a graph trains it, batch 4: dtype and checkpointing
    recipe    the tiny model from nothing, batch 64, bf16: AdamW and Muon (with --pictures)

Each case runs in a process of its own, so that its peak is its own; seconds are the median of the rounds, cases interleaved. On one thread
they are processor time, which a busy machine hardly moves; on more, wall clock.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from table import write_table

CASES = {
    "LoRA, fp32": {"dtype": "fp32", "checkpointing": False},
    "LoRA, fp32, recomputed blocks": {"dtype": "fp32", "checkpointing": True},
    "LoRA, bf16": {"dtype": "bf16", "checkpointing": False},
    "LoRA, bf16, recomputed blocks": {"dtype": "bf16", "checkpointing": True},
}
RECIPES = {"recipe, AdamW": "adamw", "recipe, Muon": "muon"}
WARM = 2  # steps before the clock: first allocations and kernels


def clock() -> float:
    import torch

    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def lora(settings: dict, steps: int) -> float:
    import torch
    from rectiflow.host.embedded import HostSettings, make_host, use_host
    from rectiflow.nodes.training import RectiflowLatentDataset, RectiflowTrain
    from rectiflow.tests.contract.tiny_runs import TinyRuns

    host = make_host(Path(tempfile.mkdtemp()), settings=HostSettings(device="cpu", dtype="fp32"))
    with use_host(host):
        tiny = TinyRuns(host)
        latents = torch.randn((8, 16, 16, 16), generator=torch.Generator().manual_seed(0))
        data = RectiflowLatentDataset().execute(latents={"samples": latents}, positive=tiny.conditioning("noto cat on white"))[0]
        common = {"model": tiny.model, "data": data, "batch": 4, "validate_every": 0, "save_every": 0, **settings}
        RectiflowTrain().execute(steps=WARM, **common)
        start = clock()
        RectiflowTrain().execute(steps=WARM + steps, **common)
        return clock() - start


def recipe(kind: str, steps: int, pictures: Path) -> float:
    from rectiflow.host.embedded.ldm.flux import Flux, FluxParams
    from rectiflow.tiny.codec import LinearCodec
    from rectiflow.tiny.emoji import EmojiLook
    from rectiflow.tiny.weights import FLUX_SIZES, load_weights
    from rectiflow.train.config import TrainConfig
    from rectiflow.train.loop import Trainer
    from rectiflow.train.optim import Optim
    from rectiflow.train.recipes.tiny import EmojiData, TinyTrainee, initialise

    shipped = load_weights()
    codec = LinearCodec(shipped.codec_basis, shipped.codec_scale, shipped.codec_mean)
    data = EmojiData.from_folder(pictures, EmojiLook(mirror=0.0), codec)
    trainee = TinyTrainee(Flux(FluxParams(**FLUX_SIZES)), len(data.vocabulary.tokens))
    initialise(trainee, 0)
    trainer = Trainer(trainee, data, TrainConfig(steps=WARM + steps, batch=64, validate_every=0, optim=Optim(kind, lr=2e-3)))
    started = []
    trainer.callbacks.progress = lambda done, steps, history: started.append(clock())
    trainer.run()
    return started[-1] - started[WARM - 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        import torch

        seconds = lora(CASES[given.case], given.steps) if given.case in CASES else recipe(RECIPES[given.case], given.steps, given.pictures)
        name = "processor" if torch.get_num_threads() == 1 else "wall"
        print(json.dumps({"seconds": seconds, "clock": name, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
        return
    names = [*CASES, *(RECIPES if given.pictures else ())]
    found: dict[str, list[dict]] = {name: [] for name in names}
    for _ in range(given.rounds):
        for name in names:
            command = [sys.executable, __file__, "--case", name, "--steps", str(given.steps)]
            command += ["--pictures", str(given.pictures)] if given.pictures else []
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    rows = []
    for name, runs in found.items():
        seconds = statistics.median(run["seconds"] for run in runs) / given.steps
        pictures = (64 if name in RECIPES else 4) / seconds
        peak = statistics.median(run["peak"] for run in runs)
        rows.append((name, given.steps, given.rounds, runs[0]["clock"], f"{1 / seconds:.3f}", f"{pictures:.1f}", f"{peak:.0f}"))
    write_table("train", ("case", "steps", "rounds", "clock", "steps_per_second", "pictures_per_second", "peak_mib"), rows)


if __name__ == "__main__":
    main()
