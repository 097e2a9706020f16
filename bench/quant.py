"""How near few bits come: `python bench/quant.py [--part weights codes rotation model] [--seeds 10]`.

    quant_weights    SQNR in dB of weights by quantiser, at equal bits with every scale counted: a normal law, one with long tails, one with
                     one weight in a thousand ten times as large, and layers of the tiny model
    quant_core_codes codes of our int8 export beside comfy-kitchen's
    quant_rotation   what rotations leave of an unquantised layer's output, and what they gain at 8 bits with four outlier channels
    quant_model      the tiny model in few bits: velocity SQNR over a schedule, bytes, and the final latent's distance
    quant_seeds      twin-log against uniform at equal bytes, seed by seed

Peers are used where they are installed: `pip install comfy-kitchen==0.2.40 torchao==0.18.0 gguf==0.19.0 bitsandbytes==0.50.2`.
"""

from __future__ import annotations

import argparse
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from quant_formats import others
from rectiflow import NODE_CLASS_MAPPINGS as NODES
from rectiflow.accel.quant.attach import quantised_parts
from rectiflow.accel.quant.error import sqnr
from rectiflow.accel.quant.rotation import block_hadamard, convrot, dual_rotation, hadamard, no_rotation
from rectiflow.accel.quant.stored import store
from rectiflow.accel.quant.twin_log import reference_quantised
from rectiflow.accel.quant.uniform import clipped_grid, int8_rows, int_tokens, min_max_grid
from rectiflow.host.embedded import HostSettings, make_host, use_host
from rectiflow.tests.contract.tiny_runs import TinyRuns
from rectiflow.tiny.weights import load_weights
from table import write_table

LAYERS = (
    "double_blocks.0.img_attn.qkv", "double_blocks.1.img_mlp.0", "double_blocks.1.img_mlp.2", "double_blocks.2.txt_attn.proj",
    "single_blocks.0.linear1", "single_blocks.3.linear2", "single_blocks.5.linear1",
)  # fmt: skip
SIGMA = 0.02
PROMPTS = ("noto cat on white", "twemoji rocket on black")
STEPS, CFG = 10, 3.0
PARTS = ("weights", "codes", "rotation", "model")
SETTINGS = (  # bits of weights and activations, method, group
    ("8", "8", "tlq", "32"), ("6", "8", "tlq", "32"), ("4", "8", "tlq", "16"), ("4", "8", "tlq", "32"), ("4", "8", "uniform", "32"),
    ("3", "8", "tlq", "32"), ("3", "8", "uniform", "32"), ("4", "4", "tlq", "32"), ("3", "4", "tlq", "32"),
)  # fmt: skip
QUANTIZE = {
    "group_size": "32", "method": "tlq", "rotation": "auto", "j_threshold": 1.0, "smooth_alpha": 0.5, "protect_down": False,
    "keep_below_db": 0.0, "include": "", "exclude": "", "lora": "before", "seed": 0,
}  # fmt: skip


def laws() -> dict[str, list[torch.Tensor]]:
    """Weights by name, each a list of matrices (n, k) float32."""
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(128, 1024, generator=generator) * SIGMA
    uniform = torch.rand(128, 1024, generator=generator).clamp(1e-6, 1 - 1e-6)
    laplace = torch.distributions.Laplace(0.0, 1.0).icdf(uniform) * SIGMA / 2**0.5
    outliers = normal.clone()
    outliers[torch.rand(normal.shape, generator=generator) < 0.001] *= 10
    trained = load_weights().transformer
    real = [trained[f"{name}.weight"].float() for name in LAYERS]
    return {"normal": [normal], "laplace": [laplace], "0.1 % ten times": [outliers], "tiny model": real}


def ours(weight: torch.Tensor):
    """(name, class of bits, bits a weight, ŵ) of our quantisers and of the plain grids that they are held against."""
    per_row = 32 / weight.shape[1]
    for bits in (3, 4):
        yield f"uniform min-max, rows, {bits} bits", bits, bits + 2 * per_row, min_max_grid(weight, bits)
        yield f"uniform with clip search, rows, {bits} bits", bits, bits + 2 * per_row, clipped_grid(weight, bits)
        yield f"published twin-log code, rows, {bits} bits", bits, bits + 4 * per_row, reference_quantised(weight, bits)
        for method in ("tlq", "uniform"):
            for group in (0, 64, 32, 16):
                stored = store(weight, bits, group, method)
                what = f"ours {method}, {f'groups of {group}' if group else 'rows'}, {bits} bits"
                yield what, bits, 8 * stored.nbytes / weight.numel(), stored.numbers()
    stored = store(weight, 8, 0, "tlq")
    yield "ours int8 rows", 8, 8 * stored.nbytes / weight.numel(), stored.numbers()
    turned = convrot(weight.shape[1])
    stored = store(turned.apply(weight), 8, 0, "tlq")
    yield "ours int8 rows, convrot", 8, 8 * stored.nbytes / weight.numel(), turned.undo(stored.numbers())
    turned = hadamard(weight.shape[1])
    for bits in (3, 4):
        stored = store(turned.apply(weight), bits, 16, "tlq")
        size = 8 * (stored.nbytes + weight.shape[1]) / weight.numel()
        yield f"ours tlq, groups of 16, hadamard, {bits} bits", bits, size, turned.undo(stored.numbers())


def peers_installed() -> str:
    found = []
    for package in ("comfy-kitchen", "torchao", "gguf", "bitsandbytes"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} none")
    return ", ".join(found)


def weights_part() -> None:
    rows, peers = [], peers_installed()
    for law, matrices in laws().items():
        collected: dict[str, tuple[int, list[float], list[float]]] = {}
        for weight in matrices:
            for name, bits, size, numbers in (*ours(weight), *others(weight)):
                kept = collected.setdefault(name, (bits, [], []))
                if numbers is not None:
                    kept[1].append(size)
                    kept[2].append(sqnr(weight, numbers))
        for name, (bits, sizes, decibels) in sorted(collected.items(), key=lambda item: (item[1][0], -sum(item[1][2]))):
            mean = [f"{sum(values) / len(values):.2f}" if values else "" for values in (sizes, decibels)]
            rows.append([law, bits, name, *mean, peers])
    write_table("quant_weights", ["weights", "bits", "quantiser", "bits_per_weight", "sqnr_db", "peers"], rows)


def codes_part() -> None:
    """Our int8 export against what comfy-kitchen makes of the same weights, code by code."""
    try:
        from comfy_kitchen.tensor.int8 import TensorWiseINT8Layout as Layout
    except ImportError:
        print("comfy-kitchen is not installed: its codes are not compared")
        return
    rows = []
    for name, weight in zip(LAYERS, laws()["tiny model"]):
        for form, turned in (("rowwise", weight), ("convrot", convrot(weight.shape[1]).apply(weight))):
            stored = store(turned, 8, 0, "tlq")
            theirs, params = Layout.quantize(weight, per_channel=True, convrot=form == "convrot")
            equal = float((stored.codes == theirs).float().mean())
            scale = float((stored.scale.flatten() / params.scale.flatten().float() - 1).abs().max())
            apart = int((stored.codes.int() - theirs.int()).abs().max())
            rows.append([name, form, f"{equal:.6f}", apart, f"{scale:.1e}", peers_installed()])
    write_table("quant_core_codes", ["layer", "form", "equal_codes", "largest_difference", "scale_difference", "peers"], rows)


def rotation_part() -> None:
    rows = []
    for width in (384, 768, 1024, 1152, 3072):
        generator = torch.Generator().manual_seed(width)
        x, w = torch.randn(128, width, generator=generator) * 0.5, torch.randn(128, width, generator=generator) * SIGMA
        for channel, level in ((5, 60.0), (130, -45.0), (300, 40.0), (371, 120.0)):
            x[:, channel] += level
        exact = x @ w.t()
        made = {"none": no_rotation(), "hadamard": hadamard(width), "hadamard_block": block_hadamard(width)}
        if width % 256 == 0:
            made["convrot"] = convrot(width)
        if width <= 1152:
            made["dual"] = dual_rotation(x.abs().amax(0))
        for kind, rotation in made.items():
            turned_x, turned_w = rotation.apply(x), rotation.apply(w)
            codes, scale = int8_rows(turned_w)
            tokens, token_scale = int_tokens(turned_x, 8)
            product = tokens.float() @ codes.float().t() * token_scale * scale
            left = float((turned_x @ turned_w.t() - exact).norm() / exact.norm())
            rows.append([width, kind, f"{left:.1e}", f"{sqnr(exact, product):.1f}"])
    write_table("quant_rotation", ["channels", "rotation", "unquantised_difference", "w8a8_output_sqnr_db"], rows)


def model_part(seeds: int) -> None:
    root = Path(tempfile.mkdtemp())
    host = make_host(root, settings=HostSettings(device="cpu", dtype="fp32"))
    with use_host(host), torch.inference_mode():
        runs = TinyRuns(host)
        noise, prompts = runs.noise(range(seeds)), [PROMPTS[i % 2] for i in range(seeds)]

        def latent(model) -> torch.Tensor:
            return runs.sample(prompts, noise, model=model, steps=STEPS, cfg=CFG)

        sigmas = torch.linspace(1, 0, STEPS + 1)
        shown = {"positive": runs.conditioning(PROMPTS[0]), "latent_image": {"samples": torch.zeros(1, 16, 16, 16)}, "sigmas": sigmas}
        stats = NODES["RectiflowQuantCalibrate"]().execute(
            model=runs.model, seed=99, num_runs=1, layers="", negative=runs.conditioning(""), cfg=CFG, **shown
        )[0]
        exact, rows, kept = latent(runs.model), [], {}
        for weight_bits, act_bits, method, group in SETTINGS:
            model = NODES["RectiflowQuantize"]().execute(
                model=runs.model, stats=stats, **{**QUANTIZE, "weight_bits": weight_bits, "act_bits": act_bits, "method": method,
                                                  "group_size": group},
            )[0]  # fmt: skip
            _, _, decibels = NODES["RectiflowQuantReport"]().execute(
                reference=runs.model, model=model, negative=runs.conditioning(""), cfg=CFG, seed=3, **shown
            )
            found = latent(model)
            errors = ((found - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)).tolist()
            kept[weight_bits, act_bits, method, group] = errors
            parts = quantised_parts(model).values()
            stored, count = sum(part.nbytes for part in parts), sum(part.in_features * part.out_features for part in parts)
            rows.append([
                f"W{weight_bits}A{act_bits}", method, group, f"{8 * stored / count:.2f}", model.model_size(), f"{decibels:.1f}",
                f"{sum(errors) / len(errors):.4f}",
            ])  # fmt: skip
        rows.insert(0, ["fp32", "", "", "32.00", runs.model.model_size(), "", "0"])
    header = ["model", "method", "group", "bits_per_weight", "bytes", "velocity_sqnr_db", f"latent_error_mean_of_{seeds}"]
    write_table("quant_model", header, rows)
    pairs = []
    for bits in ("4", "3"):
        tlq, uniform = kept[bits, "8", "tlq", "32"], kept[bits, "8", "uniform", "32"]
        pairs += [[f"W{bits}A8", seed, f"{a:.4f}", f"{b:.4f}", int(a < b)] for seed, (a, b) in enumerate(zip(tlq, uniform))]
    write_table("quant_seeds", ["model", "seed", "tlq_latent_error", "uniform_latent_error", "tlq_is_nearer"], pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seeds", type=int, default=10)
    given = parser.parse_args()
    if "weights" in given.part:
        weights_part()
    if "codes" in given.part:
        codes_part()
    if "rotation" in given.part:
        rotation_part()
    if "model" in given.part:
        model_part(given.seeds)


if __name__ == "__main__":
    main()
