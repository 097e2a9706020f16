"""Measure grouped attention: `python bench/attention.py [--rounds N] [--tokens 4096 16384]`. Writes bench/results/attention.csv.

Two heads of 64 in fp32, groups of 16 × 16, no text: torch's SDPA and ours in turn. `ideal` is n²/pairs, what leaving out pairs could give;
`of_ideal` the share of it that is reached; `kept_mib` the keys and values of all kept blocks. Beside it, from arXiv 2505.14687: 35.8× for
block and 11.6× for cross at 262144 tokens on an A100.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import torch
import torch.nn.functional as F
from rectiflow.accel.attention.grouped import PATTERNS, GroupRule, group_layout
from rectiflow.kernels.block_sparse_attention import block_sparse_attention, reference
from table import write_table

HEADER = ["tokens", "pattern", "sparsity", "dense_s", "grouped_s", "gain", "ideal", "of_ideal", "kept_mib", "max_error"]
MASKED = 4096  # tokens up to which the dense mask of the comparison fits everywhere


def seconds(work, *given) -> float:
    start = time.perf_counter()
    work(*given)
    return time.perf_counter() - start


def row(tokens: int, pattern: str, rounds: int) -> list:
    side = math.isqrt(tokens)
    layout = group_layout((side, side), GroupRule(pattern))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, tokens, 64, generator=generator) for _ in range(3))
    dense, ours = [], []
    block_sparse_attention(q, k, v, layout)
    for _ in range(rounds):
        dense.append(seconds(F.scaled_dot_product_attention, q, k, v))
        ours.append(seconds(block_sparse_attention, q, k, v, layout))
    gain = statistics.median(a / b for a, b in zip(dense, ours))
    error = f"{float((block_sparse_attention(q, k, v, layout) - reference(q, k, v, layout)).abs().max()):.1e}" if tokens <= MASKED else ""
    kept = 2 * sum(layout.keys) * 2 * 64 * 4
    return [
        tokens, pattern, f"{1 - layout.share:.4f}", f"{statistics.median(dense):.4f}", f"{statistics.median(ours):.4f}", f"{gain:.2f}",
        f"{1 / layout.share:.2f}", f"{gain * layout.share:.2f}", f"{kept / 2**20:.0f}", error,
    ]  # fmt: skip


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384], help="squares of multiples of 16")
    arguments = parser.parse_args()
    write_table("attention", HEADER, [row(tokens, pattern, arguments.rounds) for tokens in arguments.tokens for pattern in PATTERNS])


if __name__ == "__main__":
    main()
