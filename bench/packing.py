"""Several sizes in one sequence against one after the other: `python bench/packing.py [--rounds 5]`; writes bench/results/packing.csv.

The tiny model, 4 Euler steps, CFG 1, processor time, medians of interleaved rounds; difference: largest of the final latents over the
largest number in them.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from rectiflow.accel.attention.packing import attach_packing
from rectiflow.host.embedded import make_host, use_host
from rectiflow.tests.contract.tiny_runs import TinyRuns
from table import write_table

SETS = {
    "3 around 64²": ((64, 64), (48, 80), (80, 48)), "6 around 64²": ((64, 64), (48, 80), (80, 48), (32, 128), (128, 32), (64, 72)),
    "6 of 32²": ((32, 32),) * 6, "3 around 128²": ((128, 128), (96, 160), (160, 96)),
}  # fmt: skip
HEADER = ("pictures", "tokens", "packed_s", "separate_s", "separate_over_packed", "difference")
STEPS, PROMPT = 4, "noto cat"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    rows = []
    with use_host(make_host()), torch.inference_mode():
        tiny = TinyRuns(make_host())
        for name, sizes in SETS.items():
            starts = [tiny.noise([seed], size) for seed, size in enumerate(sizes)]
            model, strip, packing = attach_packing(tiny.model, starts, "bench")
            taken = []
            for _ in range(given.rounds):
                began = time.process_time()
                packed = packing.pictures(tiny.sample(PROMPT, strip, model=model, steps=STEPS, cfg=1.0))
                between = time.process_time()
                alone = [tiny.sample(PROMPT, start, steps=STEPS, cfg=1.0) for start in starts]
                taken.append((between - began, time.process_time() - between))
            ours, theirs = (statistics.median(times) for times in zip(*taken))
            ratio = statistics.median(separate / together for together, separate in taken)
            far = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(packed, alone))
            rows.append((name, sum(packing.counts), f"{ours:.3f}", f"{theirs:.3f}", f"{ratio:.2f}", f"{far:.1e}"))
            print(*rows[-1], flush=True)
    write_table("packing", HEADER, rows)


if __name__ == "__main__":
    main()
