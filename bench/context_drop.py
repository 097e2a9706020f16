"""Measure Context Drop: `python bench/context_drop.py [--rounds N] [--tokens 4096] [--seeds 4] [--steps 8]`.

context_drop_time.csv: one attention of 2 heads of 64 in fp32 over an image of `tokens` and 64 text tokens, dense and with pooled keys in
turn, medians; `ideal` is dense pairs over pairs computed. context_drop_error.csv: the tiny model at 128×128, 256 tokens: distance of the
final latent from that of the plain run, ‖z − z₀‖/‖z₀‖, mean over seeds, and on how many of them weighting is nearer.
"""

from __future__ import annotations

import argparse
import math
import statistics

import torch
from attention import seconds
from rectiflow.accel.attention.context_drop import LAYER_RULES, ContextDrop, DropLog, attach_context_drop, pooled_attention
from rectiflow.accel.attention.dispatch import AttentionCall
from table import write_table
from torch.nn.functional import scaled_dot_product_attention

TIME = ["tokens", "factor", "weighted", "dense_s", "dropped_s", "gain", "ideal", "of_ideal"]
ERROR = ["factor", "layers", "weighted", "seeds", "steps", "pairs_share", "error", "weighting_nearer"]
TEXT = 64


def time_rows(tokens: int, rounds: int) -> list[list]:
    side = math.isqrt(tokens)
    q, k, v = (torch.randn(1, 2, TEXT + tokens, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    call = AttentionCall(
        q, k, v, None, TEXT, (side, side), 0, ("double_block", 0), 0, 1.0, (),
        lambda q, k, v, mask=None: scaled_dot_product_attention(q, k, v, attn_mask=mask),
    )  # fmt: skip
    rows = []
    for factor in (2, 4):
        for weighted in (True, False):
            taken = [(seconds(scaled_dot_product_attention, q, k, v), seconds(pooled_attention, call, factor, weighted))
                     for _ in range(rounds)]  # fmt: skip
            gain = statistics.median(dense / ours for dense, ours in taken)
            ideal = (TEXT + tokens) / (TEXT + tokens // factor**2)
            middle = [f"{statistics.median(times):.4f}" for times in zip(*taken)]
            rows.append([tokens, factor, weighted, *middle, f"{gain:.2f}", f"{ideal:.2f}", f"{gain / ideal:.2f}"])
    return rows


def error_rows(seeds: int, steps: int) -> list[list]:
    from rectiflow.host.embedded import make_host, use_host
    from rectiflow.tests.contract.tiny_runs import TinyRuns

    rows = []
    with use_host(make_host()):
        tiny = TinyRuns(make_host())
        prompts = ["noto watermelon on blue", "noto cat", "noto rocket on black", "noto fox on white"]

        def draw(seed: int, model=None) -> torch.Tensor:
            return tiny.sample(prompts[seed % 4], tiny.noise([seed], (128, 128)), model=model, steps=steps)

        plain = [draw(seed) for seed in range(seeds)]
        for factor, rule in [(2, rule) for rule in LAYER_RULES] + [(4, LAYER_RULES[0])]:
            found = {}
            for weighted in (True, False):
                log = DropLog()
                model = attach_context_drop(tiny.model, ContextDrop(log, "bench", factor, weighted, rule, min_tokens=1))
                errors = [float((draw(seed, model) - plain[seed]).norm() / plain[seed].norm()) for seed in range(seeds)]
                found[weighted] = (log.share, errors)
            nearer = sum(a < b for a, b in zip(found[True][1], found[False][1]))
            rows += [[factor, rule, weighted, seeds, steps, f"{share:.3f}", f"{statistics.mean(errors):.3f}", nearer]
                     for weighted, (share, errors) in found.items()]  # fmt: skip
    return rows


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096], help="squares of multiples of 4")
    parser.add_argument("--seeds", type=int, default=4, help="0: only the times")
    parser.add_argument("--steps", type=int, default=8)
    arguments = parser.parse_args()
    write_table("context_drop_time", TIME, [row for tokens in arguments.tokens for row in time_rows(tokens, arguments.rounds)])
    if arguments.seeds:
        write_table("context_drop_error", ERROR, error_rows(arguments.seeds, arguments.steps))


if __name__ == "__main__":
    main()
