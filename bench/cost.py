"""Predicted against measured: `python bench/cost.py [--rounds N]`. Writes bench/results/cost.csv.

The tiny model with CFG at three sizes: seconds of an evaluation predicted from calls at a half and a quarter of the sides, and measured, in
turn; medians. `ratio`: predicted over measured. `gflops`: of the evaluation.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from rectiflow.accel.cost import Predictor, TimedCalls, smaller_sizes
from table import write_table

HEADER = ["pixels", "tokens", "gflops", "predicted_s", "measured_s", "ratio", "lowest", "highest"]


def main() -> None:
    from rectiflow.host import CFGGuider
    from rectiflow.host.embedded import make_host, use_host
    from rectiflow.tests.contract.tiny_runs import TinyRuns

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    rows = []
    with use_host(make_host()), torch.inference_mode():
        tiny = TinyRuns(make_host())
        guider = CFGGuider(tiny.model)
        texts = [tiny.conditioning("noto cat"), tiny.conditioning("")]
        guider.set_conds(*texts)
        guider.set_cfg(3.0)

        def taken(shape) -> float:
            calls = TimedCalls()
            guider.sample(torch.zeros(shape), torch.zeros(shape), calls, torch.tensor([1.0, 0.0]), disable_pbar=True, seed=0)
            return calls.seconds

        for pixels in (64, 128, 192):
            shape = (1, 16, pixels // 4, pixels // 4)
            predictor = Predictor.of(tiny.model, shape, [text[0][0].shape[1] for text in texts], "bench")
            pairs = []
            for _ in range(rounds):
                measured = [(size, taken(size)) for size in smaller_sizes(shape, predictor.spec.patch)]
                pairs.append((predictor.run(measured, 1, 1.0, 1), taken(shape)))
            ratios = sorted(found.seconds / real for found, real in pairs)
            middle = (statistics.median(found.seconds for found, _ in pairs), statistics.median(real for _, real in pairs))
            figures = (pairs[0][0].flops / 1e9, *middle, statistics.median(ratios), ratios[0], ratios[-1])
            rows.append([pixels, pairs[0][0].tokens, *(f"{figure:.4g}" for figure in figures)])
    write_table("cost", HEADER, rows)


if __name__ == "__main__":
    main()
