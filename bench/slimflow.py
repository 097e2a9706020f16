"""SlimFlow's two ideas measured: `python bench/slimflow.py [--seeds N]`; writes bench/results/slimflow_plane.csv and slimflow_latent.csv.

    plane     eight Gaussians on a ring, the exact flow as teacher: annealing against reflow from the start at equal steps, by how many
              pairs there are and how wide the student is
    latent    the tiny model under one prompt at cfg 2 as teacher (12 Euler steps), a student of a fortieth of its parameters: reflow, then
              one step by pairs alone, by the two-step target alone, and by both; error to the teacher's picture of held-out noise
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from pathlib import Path

import torch
from small_flow import Table, drawn, small_flow
from table import write_table

WIDTHS, COUNTS, PLANE_STEPS = (24, 64), (8, 32, 1024), 600
PAIRS, HELD_OUT, TEACHER_STEPS, CFG = 96, 32, 12, 2.0
FLOW_STEPS, DISTILL_STEPS, BATCH, HIDDEN = 400, 150, 16, 64


def plane(seeds: int) -> None:
    from rectiflow.tests.train import plane as p
    from rectiflow.train.targets import Target

    noise = p.normal(5, 2048)
    exact = p.drawn(p.RingFlow(), noise, 200)
    rows = []
    for width in WIDTHS:
        for count in COUNTS:
            pairs = p.paired(p.pairs_of(p.RingFlow(), count))
            for seed in range(seeds):
                found = []
                for anneal in (0, int(0.6 * PLANE_STEPS)):
                    student = p.Plane(width, seed + 1)
                    target = Target("annealing_reflow", anneal_steps=anneal)
                    p.train(student, pairs, target, PLANE_STEPS, 5e-3, batch=min(count, 256), seed=seed)
                    found += [p.mmd(p.drawn(student, noise, 1), exact), p.bend(student, noise)]
                rows.append((width, count, PLANE_STEPS, seed, *(f"{value:.4f}" for value in (found[0], found[2], found[1], found[3]))))
    header = ("width", "pairs", "steps", "seed", "mmd_one_step_reflow", "mmd_one_step_annealed", "s_reflow", "s_annealed")
    write_table("slimflow_plane", header, rows)


def teacher_pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (n, 16, 16, 16) in model space and their noises, by the node that users have."""
    from rectiflow import NODE_CLASS_MAPPINGS as NODES
    from rectiflow.host import sampler_object
    from rectiflow.host.embedded import HostSettings, make_host, use_host

    with use_host(make_host(Path(tempfile.mkdtemp()), settings=HostSettings(device="cpu", dtype="fp32"))):
        model, clip, _ = NODES["RectiflowLoadTiny"]().execute()
        cat, empty = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("noto cat on white", ""))
        pairs = NODES["RectiflowFlowPairGenerator"]().execute(
            model=model, positive=cat, negative=empty, cfg=CFG, sampler=sampler_object("euler"),
            sigmas=torch.linspace(1.0, 0.0, TEACHER_STEPS + 1), latent={"samples": torch.zeros(1, 16, 16, 16)},
            count=PAIRS + HELD_OUT, seed=0, path="pairs", batch=16,
        )[0]  # fmt: skip
    return pairs.clean, pairs.noise()


def run(student, data, target, steps: int, lr: float, seed: int, teacher=None) -> float:
    """Train and return the seconds of processor time a step took."""
    from rectiflow.train.config import TrainConfig
    from rectiflow.train.densities import Density
    from rectiflow.train.loop import Trainer
    from rectiflow.train.optim import Optim

    config = TrainConfig(
        steps=steps, batch=BATCH, seed=seed, target=target, optim=Optim(lr=lr, warmup=20, weight_decay=0.0), density=Density("uniform"),
        ema=0.0, dropout=0.0, validate_every=0, save_every=0,
    )  # fmt: skip
    started = time.process_time()
    Trainer(student, data, config, teacher=teacher).run()
    return (time.process_time() - started) / steps


def latent(seeds: int) -> None:
    from rectiflow.train.targets import Target

    clean, noise = teacher_pairs()
    data, held, truth = Table(clean[:PAIRS], noise[:PAIRS]), noise[PAIRS:], clean[PAIRS:]
    spread = float(truth.var(0).mean())
    rows = []

    def note(stage: str, student, seconds: float, seed: int) -> None:
        one, two = (float((drawn(student, held, steps) - truth).square().mean()) / spread for steps in (1, 2))
        rows.append((stage, seed, f"{one:.4f}", f"{two:.4f}", f"{seconds:.3f}"))
        print(*rows[-1], flush=True)

    for seed in range(seeds):
        flows = {}
        for name, anneal in (("reflow", 0), ("annealing reflow", int(0.6 * FLOW_STEPS))):
            flows[name] = small_flow(16, HIDDEN, seed)
            seconds = run(flows[name], data, Target("annealing_reflow", anneal_steps=anneal), FLOW_STEPS, 2e-3, seed)
            note(name, flows[name], seconds, seed)
        flow = flows["annealing reflow"]
        for name, target in (
            ("+ pairs alone", Target("distill_onestep")),
            ("+ two steps alone", Target("flow_guided_distill", pair_weight=0.0)),
            ("+ both", Target("flow_guided_distill")),
        ):
            student = copy.deepcopy(flow)
            seconds = run(student, data, target, DISTILL_STEPS, 1e-3, seed, flow)
            note(name, student, seconds, seed)
    header = ("stage", "seed", "one_step_error", "two_step_error", "processor_seconds_a_step")
    write_table("slimflow_latent", header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--part", choices=("plane", "latent"))
    given = parser.parse_args()
    if given.part != "latent":
        plane(given.seeds)
    if given.part != "plane":
        latent(given.seeds)


if __name__ == "__main__":
    main()
