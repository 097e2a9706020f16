"""What other quantisers make of a weight: name, bits a weight with every scale counted, and the numbers they give back.

comfy-kitchen, torchao, gguf and bitsandbytes are used as they are where they are installed, and leave a row that says so where not. Q4_K
has no writer in Python: `q4_k_reference` follows the format's public definition (llama.cpp), with a search of its own for each block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

__all__ = ["Found", "others", "peers_installed", "q4_k_reference"]

Found = tuple[str, int, float, torch.Tensor | None]  # name, class of bits, bits a weight, ŵ; None where the package is missing


def peers_installed() -> str:
    found = []
    for package in ("comfy-kitchen", "torchao", "gguf", "bitsandbytes"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} none")
    return ", ".join(found)


def _bits(weight: torch.Tensor, *stored: torch.Tensor) -> float:
    return 8 * sum(tensor.nbytes for tensor in stored) / weight.numel()


def q4_k_reference(weight: torch.Tensor) -> torch.Tensor:
    """ŵ of GGUF's Q4_K, 4.5 bits: blocks of 256 in 8 parts of 32; ŵ = d·s·q − m·t with q of 4 bits, s and t of 6, d and m float16.

    Each part takes the least squared error among 24 widths of its range; then s and t are rounded and the codes taken anew.
    """
    parts = weight.float().reshape(-1, 8, 32)
    low, high = parts.amin(-1).clamp_max(0), parts.amax(-1)
    best, scale, least = torch.full_like(low, float("inf")), torch.zeros_like(low), torch.zeros_like(low)
    for share in torch.linspace(0.6, 1.05, 24).tolist():
        step = ((high - low) * share / 15).clamp_min(1e-12)
        base = low * share
        codes = ((parts - base[..., None]) / step[..., None]).round().clamp(0, 15)
        error = (codes * step[..., None] + base[..., None] - parts).square().sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        scale, least = torch.where(better, step, scale), torch.where(better, base, least)
    d = (scale.amax(-1, keepdim=True) / 63).half().float().clamp_min(1e-12)
    m = ((-least).amax(-1, keepdim=True) / 63).half().float().clamp_min(1e-12)
    step, base = (scale / d).round().clamp(0, 63) * d, -((-least / m).round().clamp(0, 63) * m)
    codes = ((parts - base[..., None]) / step.clamp_min(1e-12)[..., None]).round().clamp(0, 15)
    return (codes * step[..., None] + base[..., None]).reshape(weight.shape)


def _kitchen(weight: torch.Tensor) -> Iterator[Found]:
    from comfy_kitchen.tensor.convrot_w4a4 import dequantize_convrot_w4a4_weight, quantize_convrot_w4a4_weight
    from comfy_kitchen.tensor.int8 import TensorWiseINT8Layout
    from comfy_kitchen.tensor.mxfp8 import TensorCoreMXFP8Layout
    from comfy_kitchen.tensor.nvfp4 import TensorCoreNVFP4Layout
    from comfy_kitchen.tensor.w4a8_int8 import AsymW4A8Int8Layout

    def laid_out(layout, **options) -> tuple[float, torch.Tensor]:
        codes, params = layout.quantize(weight, **options)
        tensors = [value for value in vars(params).values() if isinstance(value, torch.Tensor)]
        return _bits(weight, codes, *tensors), layout.dequantize(codes, params).float()

    yield "comfy-kitchen int8 tensorwise", 8, *laid_out(TensorWiseINT8Layout)
    yield "comfy-kitchen int8 rowwise", 8, *laid_out(TensorWiseINT8Layout, per_channel=True)
    yield "comfy-kitchen int8 convrot", 8, *_turned_back(weight, *laid_out(TensorWiseINT8Layout, per_channel=True, convrot=True))
    yield "comfy-kitchen mxfp8", 8, *laid_out(TensorCoreMXFP8Layout)
    yield "comfy-kitchen asym W4A8", 4, *laid_out(AsymW4A8Int8Layout)
    yield "comfy-kitchen nvfp4", 4, *laid_out(TensorCoreNVFP4Layout)
    codes, scales = quantize_convrot_w4a4_weight(weight)
    yield "comfy-kitchen convrot W4A4", 4, _bits(weight, codes, scales), dequantize_convrot_w4a4_weight(codes, scales)


def _turned_back(weight: torch.Tensor, bits: float, numbers: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Some versions hand the numbers out in the turned basis."""
    from rectiflow.accel.quant.rotation import convrot

    turned = convrot(weight.shape[1]).undo(numbers)
    return bits, turned if (turned - weight).norm() < (numbers - weight).norm() else numbers


def _torchao(weight: torch.Tensor) -> Iterator[Found]:
    from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine, dequantize_affine, quantize_affine

    def affine(mapping, block: int, low: int, high: int, kept: torch.dtype) -> torch.Tensor:
        sizes = (1, block)
        scale, zero = choose_qparams_affine(weight, mapping, sizes, torch.int8, low, high, scale_dtype=kept)
        codes = quantize_affine(weight, sizes, scale, zero, torch.int8, low, high)
        return dequantize_affine(codes, sizes, scale, zero, torch.int8, low, high, output_dtype=torch.float32)

    width = weight.shape[1]
    yield "torchao int8 rowwise", 8, 8 + 32 / width, affine(MappingType.SYMMETRIC, width, -128, 127, torch.float32)
    for group in (32, 64):
        yield f"torchao int4 groups of {group}", 4, 4 + 32 / group, affine(MappingType.ASYMMETRIC, group, 0, 15, torch.bfloat16)
    yield "torchao 3 bits, groups of 64", 3, 3 + 32 / 64, affine(MappingType.ASYMMETRIC, 64, 0, 7, torch.bfloat16)


def _gguf(weight: torch.Tensor) -> Iterator[Found]:
    from gguf import GGMLQuantizationType as Kind
    from gguf import quants

    for name, bits in (("Q8_0", 8), ("Q4_0", 4), ("Q4_1", 4)):
        codes = quants.quantize(weight.numpy(), Kind[name])
        yield f"GGUF {name}", bits, 8 * codes.nbytes / weight.numel(), torch.from_numpy(quants.dequantize(codes, Kind[name]))


def _nf4(weight: torch.Tensor) -> Iterator[Found]:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    yield "bitsandbytes NF4, blocks of 64", 4, _bits(weight, codes, state.absmax), dequantize_4bit(codes, state).float()


PEERS: dict[str, Callable[[torch.Tensor], Iterator[Found]]] = {
    "comfy-kitchen": _kitchen, "torchao": _torchao, "gguf": _gguf, "bitsandbytes": _nf4,
}  # fmt: skip


def others(weight: torch.Tensor) -> Iterator[Found]:
    """Every peer on weight (n, k) float32, k a multiple of 256."""
    for package, run in PEERS.items():
        try:
            yield from run(weight)
        except ImportError:
            yield f"{package}: not installed", 0, 0.0, None
    yield "Q4_K, reference of the format", 4, 4.5, q4_k_reference(weight)
