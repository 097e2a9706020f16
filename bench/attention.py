"""Measure attention over fewer keys: `python bench/attention.py [--rounds N] [--tokens 4096 16384] [grouped] [tiles] [rettention] [error]`.

All times are seconds of this process (`time.process_time`) of one thread, which work beside it hardly moves; rows interleave what they
compare. Two heads of 64 in fp32, no text.

grouped      attention.csv: groups of 16 × 16 against torch's SDPA. `ideal` is n²/pairs, what leaving out pairs could give; `of_ideal` the
             share of it that is reached, `sdpa_of_ideal` the share that SDPA alone reaches, called for the same groups over keys in place;
             `kept_mib` the keys and values of all kept blocks; `max_error` against dense attention under the same mask. Beside it, from
             arXiv 2505.14687: 35.8× for block and 11.6× for cross at 262144 tokens on an A100.
tiles        attention_tiles.csv: nanoseconds a pair of query and key of one head by SDPA, whose tile of queries grows with their number,
             and by two products with a softmax between, written into tensors that are there.
rettention   rettention_step.csv: a dense step, one that measures and one that is corrected, at the first size; `run_gain` of a run of 20
             steps as arXiv 2505.22918 has it, 5 + 3 + 12 of them.
error        rettention_error.csv: the tiny model at 64×64, 20 steps, guidance 1, single tokens and their 8 neighbours, 8 seeds:
             ‖z − z₀‖/‖z₀‖ of the final latent against the dense run, mean.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time

import torch
import torch.nn.functional as F
from rectiflow.accel.attention.dispatch import AttentionCall, RunFacts
from rectiflow.accel.attention.grouped import PATTERNS, GroupRule, group_layout
from rectiflow.accel.attention.rettention import PATTERNS as KEPT_PATTERNS
from rectiflow.accel.attention.rettention import Rettention, RettentionLog, attach_rettention, layout_for
from rectiflow.families.tokens import TokenSpec
from rectiflow.kernels.block_sparse_attention import BlockLayout, block_sparse_attention
from rectiflow.metrics.fidelity import relative_errors
from table import write_table

GROUPED = ["tokens", "pattern", "sparsity", "dense_s", "grouped_s", "gain", "ideal", "of_ideal", "sdpa_of_ideal", "kept_mib", "max_error"]
TILES = ["queries", "keys", "sdpa_ns", "products_ns"]
STEP = ["tokens", "pattern", "keep", "seen", "dense_s", "measured_s", "sparse_s", "gain", "ideal", "run_gain"]
ERROR = ["form", "ratio", "residual", "ramp", "period", "seeds", "pairs_share", "error"]
KEEP = 0.03125
QUERIES = 512  # compared at a time


def seconds(work, *given) -> float:
    start = time.process_time()
    work(*given)
    return time.process_time() - start


def random_qkv(tokens: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, tokens, 64, generator=generator) for _ in range(3)]


def largest_error(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: BlockLayout) -> float:
    """Against dense attention under the layout as a mask, some queries at a time."""
    out, worst = block_sparse_attention(q, k, v, layout), 0.0
    mask = layout.mask()
    for rows in torch.arange(layout.tokens).split(QUERIES):
        dense = F.scaled_dot_product_attention(q[:, :, rows], k, v, attn_mask=mask[rows])
        worst = max(worst, float((out[:, :, rows] - dense).abs().max()))
    return worst


def grouped_row(tokens: int, pattern: str, rounds: int) -> list:
    side = math.isqrt(tokens)
    layout = group_layout((side, side), GroupRule(pattern))
    q, k, v = random_qkv(tokens)
    in_place = [x[:, :1, : max(layout.keys)].contiguous() for x in (k, v)]

    def sdpa_alone() -> None:
        for head, (length, keys) in itertools.product(range(2), zip(layout.lengths, layout.keys)):
            F.scaled_dot_product_attention(q[:, head : head + 1, :length], *(x[:, :, :keys] for x in in_place))

    ways = ((F.scaled_dot_product_attention, q, k, v), (block_sparse_attention, q, k, v, layout), (sdpa_alone,))
    for way in ways:
        seconds(*way)
    taken = [[seconds(*way) for way in ways] for _ in range(rounds)]
    gain, most = (statistics.median(row[0] / row[i] for row in taken) for i in (1, 2))
    dense, ours, _ = (statistics.median(times) for times in zip(*taken))
    kept = 2 * sum(layout.keys) * 2 * 64 * 4
    return [
        tokens, pattern, f"{1 - layout.share:.4f}", f"{dense:.4f}", f"{ours:.4f}", f"{gain:.2f}", f"{1 / layout.share:.2f}",
        f"{gain * layout.share:.2f}", f"{most * layout.share:.2f}", f"{kept / 2**20:.0f}", f"{largest_error(q, k, v, layout):.1e}",
    ]  # fmt: skip


def tile_row(queries: int, keys: int, rounds: int) -> list:
    q, (_, k, v) = random_qkv(queries)[0][:, :1], (x[:, :1] for x in random_qkv(keys))
    scaled, scores, out = q[0, 0] * 64**-0.5, torch.empty(queries, keys), torch.empty(queries, 64)

    def products() -> None:
        torch.mm(scaled, k[0, 0].t(), out=scores)
        torch.softmax(scores, -1, out=scores)
        torch.mm(scores, v[0, 0], out=out)

    def repeated(work, *given) -> float:
        return sum(seconds(work, *given) for _ in range(16)) / (16 * queries * keys)

    taken = [(repeated(F.scaled_dot_product_attention, q, k, v), repeated(products)) for _ in range(rounds + 1)][1:]
    return [queries, keys, *(f"{1e9 * statistics.median(times):.2f}" for times in zip(*taken))]


def step_row(tokens: int, pattern: str, rounds: int) -> list:
    side = math.isqrt(tokens)
    q, k, v = random_qkv(tokens)
    plan = Rettention(RettentionLog(), "bench", KEEP, pattern, warmup=0, period=2, min_tokens=1)
    handler = plan.open(RunFacts((1.0, 0.5, 0.0), (1, 16, side, side), TokenSpec("bench", (1, 1), (), 1), None, torch.device("cpu")))
    calls = [
        AttentionCall(q, k, v, None, 0, (side, side), 0, ("double_block", 0), 0, sigma, (("a", 0),),
                      lambda q, k, v, mask=None: F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
        for sigma in (1.0, 0.5)
    ]  # fmt: skip
    for call in calls:
        handler.attend(call)
    taken = [(seconds(F.scaled_dot_product_attention, q, k, v), *(seconds(handler.attend, call) for call in calls)) for _ in range(rounds)]
    dense, measured, sparse = (statistics.median(times) for times in zip(*taken))
    layout = layout_for(pattern, KEEP, (side, side))
    return [
        tokens, pattern, KEEP, f"{layout.share:.4f}", f"{dense:.4f}", f"{measured:.4f}", f"{sparse:.4f}", f"{dense / sparse:.2f}",
        f"{1 / layout.share:.2f}", f"{20 * dense / (5 * dense + 3 * measured + 12 * sparse):.2f}",
    ]  # fmt: skip


def error_rows(seeds: int) -> list[list]:
    from rectiflow.host.embedded import make_host, use_host
    from rectiflow.tests.contract.tiny_runs import TinyRuns

    host = make_host()
    with use_host(host):
        tiny = TinyRuns(host)
        words = ["noto watermelon on blue", "noto cat", "noto rocket on black", "noto fox on white"]
        prompts, noise = [words[seed % 4] for seed in range(seeds)], tiny.noise(range(seeds))
        dense = tiny.sample(prompts, noise, steps=20, cfg=1.0)
        rows = []
        for form, ratio, residual, ramp, period in (
            ("centred", True, True, 0.0, 5), ("published", True, True, 0.0, 5), ("centred", True, True, 0.04, 5),
            ("published", True, True, 0.04, 5), ("either", False, True, 0.0, 5), ("centred", True, False, 0.0, 5),
            ("published", True, False, 0.0, 5), ("either", False, False, 0.0, 5), ("centred", True, True, 0.0, 10),
            ("centred", True, True, 0.0, 2), ("centred", True, True, 0.0, 1),
        ):  # fmt: skip
            log = RettentionLog()
            plan = Rettention(log, "bench", KEEP, warmup=5, period=period, ramp=ramp, use_ratio=ratio, use_residual=residual,
                              min_tokens=1, form="centred" if form == "either" else form)  # fmt: skip
            latent = tiny.sample(prompts, noise, steps=20, cfg=1.0, model=attach_rettention(tiny.model, plan))
            error = relative_errors(latent, dense).mean()
            rows.append([form, ratio, residual, ramp, period, seeds, f"{log.share:.3f}", f"{float(error):.4f}"])
    return rows


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["grouped", "tiles", "rettention", "error"], help="all when none is named")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384], help="squares of multiples of 16")
    parser.add_argument("--seeds", type=int, default=8)
    arguments = parser.parse_args()
    if "grouped" in arguments.what:
        write_table("attention", GROUPED, [grouped_row(tokens, pattern, arguments.rounds) for tokens in arguments.tokens
                                           for pattern in PATTERNS])  # fmt: skip
    if "tiles" in arguments.what:
        rows = [tile_row(queries, keys, arguments.rounds) for queries in (64, 256, 1024) for keys in (1024, 2304, 3840)]
        write_table("attention_tiles", TILES, rows)
    if "rettention" in arguments.what:
        rows = [step_row(arguments.tokens[0], pattern, arguments.rounds) for pattern in KEPT_PATTERNS if pattern != "frame_band"]
        write_table("rettention_step", STEP, rows)
    if "error" in arguments.what:
        write_table("rettention_error", ERROR, error_rows(arguments.seeds))


if __name__ == "__main__":
    main()
