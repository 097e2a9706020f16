"""An 8-bit linear layer of ours beside comfy-kitchen's eager one on the same codes: `python bench/quant_speed.py [--suffix _NAME]`.

Writes bench/results/quant_speed<suffix>.csv: process time of one thread, interleaved rounds. `pip install comfy-kitchen==0.2.40` first.
"""

from __future__ import annotations

import argparse
import time

import torch
from quant_formats import peers_installed
from rectiflow.accel.quant.calibration import watching
from rectiflow.accel.quant.recipe import QuantScheme, quantised_layer
from rectiflow.accel.quant.rotation import convrot
from rectiflow.accel.quant.uniform import int8_rows
from rectiflow.kernels.int8_linear import Int8Weight, int8_linear, prepare_int8
from table import write_table

SIGMA, DIRECTIONS = 0.02, 16


def with_directions(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.nn.Module:
    """The layer with directions beside its codes, and no rotation."""
    plain = torch.nn.Linear(*reversed(weight.shape)).requires_grad_(False)
    with watching({"layer": plain}, len(x)) as stats:
        plain(x)
    scheme = QuantScheme(8, 8, rotation="none", smooth_alpha=0.0, directions=DIRECTIONS)
    return quantised_layer(weight, bias, scheme, stats.layers["layer"])


def compare(theirs, rounds: int) -> list[list]:
    """theirs: comfy-kitchen's int8_linear. Rows of the table."""
    rows = []
    for width, out in ((768, 3072), (3072, 768)):
        generator = torch.Generator().manual_seed(width)
        x, w = torch.randn(1024, width, generator=generator), torch.randn(out, width, generator=generator) * SIGMA
        bias = torch.zeros(out)
        codes, scale = int8_rows(w)
        whole, ready, row_scale = Int8Weight(codes, scale), prepare_int8(codes, scale), scale[:, None].contiguous()
        x_half, w_half, bias_half = x.bfloat16(), w.bfloat16(), bias.bfloat16()
        turn, beside = convrot(width).turn(None), with_directions(x, w, bias)
        cases = {
            "linear, fp32": lambda x=x, w=w, b=bias: torch.nn.functional.linear(x, w, b),
            "linear, bf16": lambda x=x_half, w=w_half, b=bias_half: torch.nn.functional.linear(x, w, b),
            "ours, fp32 tokens": lambda x=x, w=whole, b=bias: int8_linear(x, w, b),
            "ours, bf16 tokens": lambda x=x_half, w=whole, b=bias_half: int8_linear(x, w, b),
            "ours prepared, fp32 tokens": lambda x=x, w=ready, b=bias: int8_linear(x, w, b),
            "ours with convrot, fp32 tokens": lambda x=x, w=whole, b=bias, t=turn: int8_linear(x, w, b, 8, t),
            f"ours with {DIRECTIONS} directions, fp32 tokens": lambda x=x, layer=beside: layer(x),
            f"ours with {DIRECTIONS} directions, bf16 tokens": lambda x=x_half, layer=beside: layer(x),
            "comfy-kitchen eager, fp32 tokens": lambda x=x, c=codes, s=row_scale, b=bias: theirs(x, c, s, b, torch.float32),
            "comfy-kitchen eager, bf16 tokens": lambda x=x_half, c=codes, s=row_scale, b=bias_half: theirs(x, c, s, b, torch.bfloat16),
            "comfy-kitchen eager with convrot, fp32 tokens":
                lambda x=x, c=codes, s=row_scale, b=bias: theirs(x, c, s, b, torch.float32, convrot=True),
        }  # fmt: skip
        times: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(rounds):
            for name, case in cases.items():
                start = time.process_time()
                case()
                times[name].append(1000 * (time.process_time() - start))
        size = f"1024 × {width} → {out}"
        for name, took in times.items():
            rows.append([size, name, f"{min(took):.1f}", f"{sorted(took)[rounds // 2]:.1f}", rounds, peers_installed()])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suffix", default="", help="of the table's name: one a processor")
    parser.add_argument("--rounds", type=int, default=25, help="few are enough without VNNI, where comfy-kitchen takes seconds")
    given = parser.parse_args()
    from comfy_kitchen import int8_linear as theirs

    torch.set_num_threads(1)
    header = ["size", "layer", "least_ms", "median_ms", "rounds", "peers"]
    write_table(f"quant_speed{given.suffix}", header, compare(theirs, given.rounds))


if __name__ == "__main__":
    main()
