"""Measure Context Drop: `python bench/context_drop.py [--rounds N] [--tokens 4096] [--seeds 4] [--steps 8]`.

context_drop_time.csv: one attention of 2 heads of 64 in fp32 over an image of `tokens` and 64 text tokens, dense and with pooled keys in
turn, medians; `ideal` is dense pairs over pairs computed. context_drop_error.csv: the tiny model at 128×128, 256 tokens: distance of the
final latent from that of the plain run, ‖z − z₀‖/‖z₀‖, mean over seeds, and on how many of them weighting is nearer.
context_drop_pool.csv: the same with keys pooled after and before rotation (`--pools` measures this alone), and on how many seeds the second
is nearer; and the time of one weighted attention as above over that of pooling after rotation.
"""

from __future__ import annotations

import argparse
import math
import statistics

import torch
from attention import seconds
from rectiflow.accel.attention.context_drop import LAYER_RULES, POOLS, ContextDrop, DropLog, Turns, attach_context_drop, pooled_attention
from rectiflow.accel.attention.dispatch import AttentionCall
from rectiflow.host.embedded import make_host, use_host
from rectiflow.host.embedded.ldm.common import EmbedND
from rectiflow.tests.contract.tiny_runs import TinyRuns
from table import write_table
from torch.nn.functional import scaled_dot_product_attention

TIME = ["tokens", "factor", "weighted", "dense_s", "dropped_s", "gain", "ideal", "of_ideal"]
ERROR = ["factor", "layers", "weighted", "seeds", "steps", "pairs_share", "error", "weighting_nearer"]
POOL = ["factor", "pixels", "pool", "seeds", "steps", "error", "rope_free_nearer", "rope_free_over_mean_time"]
PROMPTS = ("noto watermelon on blue", "noto cat", "noto rocket on black", "noto fox on white")
TEXT = 64


def one_attention(tokens: int) -> AttentionCall:
    side = math.isqrt(tokens)
    q, k, v = (torch.randn(1, 2, TEXT + tokens, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    ids = torch.zeros(1, TEXT + tokens, 3)
    ids[0, TEXT:, 1:] = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
    return AttentionCall(
        q, k, v, None, TEXT, (side, side), 0, ("double_block", 0), 0, 1.0, (),
        lambda q, k, v, mask=None: scaled_dot_product_attention(q, k, v, attn_mask=mask), rotations=EmbedND(64, 10000, [8, 28, 28])(ids),
    )  # fmt: skip


def time_rows(tokens: int, rounds: int) -> list[list]:
    call = one_attention(tokens)
    rows = []
    for factor in (2, 4):
        for weighted in (True, False):
            taken = [(seconds(scaled_dot_product_attention, call.q, call.k, call.v), seconds(pooled_attention, call, factor, weighted))
                     for _ in range(rounds)]  # fmt: skip
            gain = statistics.median(dense / ours for dense, ours in taken)
            ideal = (TEXT + tokens) / (TEXT + tokens // factor**2)
            middle = [f"{statistics.median(times):.4f}" for times in zip(*taken)]
            rows.append([tokens, factor, weighted, *middle, f"{gain:.2f}", f"{ideal:.2f}", f"{gain / ideal:.2f}"])
    return rows


class Drawn:
    """Final latents of the tiny model at one size, and how far those of another model are from them."""

    def __init__(self, tiny, pixels: int, seeds: int, steps: int):
        self.tiny, self.pixels, self.steps = tiny, pixels, steps
        self.plain = [self.draw(seed) for seed in range(seeds)]

    def draw(self, seed: int, model=None) -> torch.Tensor:
        noise = self.tiny.noise([seed], (self.pixels, self.pixels))
        return self.tiny.sample(PROMPTS[seed % 4], noise, model=model, steps=self.steps)

    def errors(self, plan: ContextDrop) -> list[float]:
        model = attach_context_drop(self.tiny.model, plan)
        return [float((self.draw(seed, model) - plain).norm() / plain.norm()) for seed, plain in enumerate(self.plain)]


def error_rows(tiny, seeds: int, steps: int) -> list[list]:
    drawn, rows = Drawn(tiny, 128, seeds, steps), []
    for factor, rule in [(2, rule) for rule in LAYER_RULES] + [(4, LAYER_RULES[0])]:
        found = {}
        for weighted in (True, False):
            log = DropLog()
            found[weighted] = (log, drawn.errors(ContextDrop(log, "bench", factor, weighted, rule, min_tokens=1)))
        nearer = sum(a < b for a, b in zip(found[True][1], found[False][1]))
        rows += [[factor, rule, weighted, seeds, steps, f"{log.share:.3f}", f"{statistics.mean(errors):.3f}", nearer]
                 for weighted, (log, errors) in found.items()]  # fmt: skip
    return rows


def pool_rows(tiny, seeds: int, steps: int, tokens: int, rounds: int) -> list[list]:
    call, rows = one_attention(tokens), []
    for factor, pixels in ((2, 128), (4, 128), (2, 192)):
        drawn = Drawn(tiny, pixels, seeds, steps)
        found = {pool: drawn.errors(ContextDrop(DropLog(), "bench", factor, True, "all", min_tokens=1, pool=pool)) for pool in POOLS}
        nearer = sum(a < b for a, b in zip(found["rope_free"], found["mean"]))
        turns = Turns.of(call.rotations[:, :, TEXT:], call.sides, factor)  # once a model call, for all of its blocks
        taken = [[seconds(pooled_attention, call, factor, True, None, way) for way in (None, turns)] for _ in range(rounds)]
        slower = statistics.median(free / mean for mean, free in taken)
        rows += [[factor, pixels, pool, seeds, steps, f"{statistics.mean(errors):.3f}", nearer, f"{slower:.2f}"]
                 for pool, errors in found.items()]  # fmt: skip
        print(*rows[-2:], sep="\n", flush=True)
    return rows


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096], help="squares of multiples of 4")
    parser.add_argument("--seeds", type=int, default=4, help="0: only the times")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--pools", action="store_true", help="only the two ways of pooling")
    arguments = parser.parse_args()
    if not arguments.pools:
        write_table("context_drop_time", TIME, [row for tokens in arguments.tokens for row in time_rows(tokens, arguments.rounds)])
    if arguments.seeds:
        with use_host(make_host()):
            tiny = TinyRuns(make_host())
            write_table("context_drop_pool", POOL, pool_rows(tiny, arguments.seeds, arguments.steps, arguments.tokens[0], arguments.rounds))
            if not arguments.pools:
                write_table("context_drop_error", ERROR, error_rows(tiny, arguments.seeds, arguments.steps))


if __name__ == "__main__":
    main()
