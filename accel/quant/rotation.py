"""Orthogonal rotations of a linear layer's input: outlier channels are spread over all, and the layer's output stays what it was.

    Y = X Wᵀ = (X R)(W R)ᵀ          R orthogonal

A weight takes its rotation once; what is left to do at run time is X R. Kinds:

    hadamard         R = diag(signs)·H/√k over the whole row; k = 2^p·m takes the Kronecker product of Sylvester's matrix of 2^p with an
                     orthogonal matrix of m (a cosine transform), since Hadamard matrices of every size are not known
    hadamard_block   the same inside blocks of a power of two, cheaper
    convrot          blocks of 256 by a Kronecker power of the regular 4 × 4 Hadamard matrix, no signs: what the core's int8 format names
                     in two words, so that files with it load without us
    dual             R1·P·R2 of "DuQuant" (arXiv 2406.01721), which LRQ-DiT ("LRQ-DiT: Log-Rotation Post-Training Quantization of Diffusion
                     Transformers", arXiv 2508.03485) takes for layers with salient outliers: rotations in blocks of 128 that lay the
                     largest channel on a row of equal entries, and a permutation that deals the channels by size over the blocks

Ours and theirs differ in two places. Their greedy rotation takes the row of the largest element for its channel; here it is the channel.
Their random parts are drawn anew at every start, so that a saved model would not be the one that was measured; here they follow from a
seed, and a file stores the matrices themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from ...kernels.quantise_tokens import Turn

__all__ = [
    "BLOCK", "CONVROT", "KINDS", "Rotation", "block_hadamard", "constant_rotation", "convrot", "dual_rotation", "hadamard", "no_rotation",
]  # fmt: skip

KINDS = ("none", "hadamard", "hadamard_block", "convrot", "dual")
BLOCK = 128
CONVROT = 256
FACTOR = 32  # k·(32 + 32) products a row of 1024 in place of k·1024
GREEDY_STEPS = 64  # their 256 change the range by under one percent after the first few dozen; each costs a product of 128 × 128


@dataclass(frozen=True)
class Rotation:
    """A rotation in factors, applied in order to the last axis: signs (k,), then blocks, each a matrix (b, b) for every b channels in a row
    together with the order the channels take before it, (k,) or None.
    """

    kind: str
    signs: torch.Tensor | None
    blocks: tuple[tuple[torch.Tensor | None, torch.Tensor, int], ...]
    factor: torch.Tensor | None = None  # F where the only block is F⊗F: 32 products a channel in place of 256

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """x (…, k) → x R, in x's dtype; sums in float32 at least."""
        out = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.factor is not None:
            return self.turn(None).apply(out).to(x.dtype)
        if self.signs is not None:
            out = out * self.signs.to(out)
        for order, matrix, stride in self.blocks:
            if order is not None:
                out = out.index_select(-1, order)
            out = _turned(out, matrix, stride)
        return out.to(x.dtype)

    def undo(self, x: torch.Tensor) -> torch.Tensor:
        """x R → x, for weights that go back to the basis they were trained in."""
        out = x.to(torch.promote_types(x.dtype, torch.float32))
        for order, matrix, stride in reversed(self.blocks):
            out = _turned(out, matrix.t(), stride)
            if order is not None:
                out = out.index_select(-1, order.argsort())
        if self.signs is not None:
            out = out * self.signs.to(out)
        return out.to(x.dtype)

    @property
    def drawn_bytes(self) -> int:
        """What a file stores of it: a byte a sign; drawn matrices and the order between them."""
        signs = 0 if self.signs is None else self.signs.numel()
        if self.kind != "dual":
            return signs
        return sum(matrix.nbytes + (0 if order is None else 4 * order.numel()) for order, matrix, _ in self.blocks)

    def to(self, device: torch.device) -> Rotation:
        """The same factors on another device; their dtype stays."""

        def move(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device)

        blocks = tuple((move(order), matrix.to(device), stride) for order, matrix, stride in self.blocks)
        return Rotation(self.kind, move(self.signs), blocks, move(self.factor))

    def turn(self, smooth: torch.Tensor | None) -> Turn | None:
        """diag(smooth)·R as a step of quantise_tokens, for rotations inside groups of channels; None for those that mix a whole row."""
        if self.factor is not None:
            return Turn(smooth, self.signs, self.factor, squared=True)
        if not self.blocks:
            return Turn(smooth, self.signs)
        return Turn(smooth, self.signs, self.blocks[0][1]) if self.kind == "hadamard_block" else None


def _turned(x: torch.Tensor, matrix: torch.Tensor, stride: int) -> torch.Tensor:
    """Blocks of x (…, k) times `matrix`. Stride 1: neighbours form a block; stride s: channels s apart do, the other half of a Kronecker
    product."""
    side = matrix.shape[0]
    if stride == 1:
        return (x.unflatten(-1, (-1, side)) @ matrix.to(x)).flatten(-2)
    return torch.einsum("...bis,ij->...bjs", x.unflatten(-1, (-1, side, stride)), matrix.to(x)).flatten(-3)


def _sylvester(size: int) -> torch.Tensor:
    """Hadamard's matrix of a power of two, normalised, float64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)


def _cosine(size: int) -> torch.Tensor:
    """The orthogonal cosine transform (DCT-II), float64: its largest entry is √(2/size), nearly Hadamard's 1/√size."""
    row, column = torch.meshgrid(torch.arange(size, dtype=torch.float64), torch.arange(size, dtype=torch.float64), indexing="ij")
    matrix = torch.cos(math.pi * (column + 0.5) * row / size) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def _signs(count: int, generator: torch.Generator) -> torch.Tensor:
    return 1.0 - 2.0 * torch.randint(0, 2, (count,), generator=generator)


def no_rotation() -> Rotation:
    """The identity."""
    return Rotation("none", None, ())


def convrot(width: int) -> Rotation:
    """Inside blocks of 256 channels; refused (ValueError) for other widths."""
    if width % CONVROT:
        raise ValueError(f"blocks of {CONVROT} do not divide rows of {width}")
    regular = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float64) / 2
    factor = torch.kron(regular, regular)
    return Rotation("convrot", None, ((None, torch.kron(factor, factor).float(), 1),), factor.float())


def constant_rotation(kind: str, signs: torch.Tensor | None, width: int) -> Rotation:
    """The rotation of a file: of these kinds only the signs, (k,), are drawn; the matrices follow from the width."""
    found = {"none": lambda _: no_rotation(), "convrot": convrot, "hadamard": hadamard, "hadamard_block": block_hadamard}[kind](width)
    return found if signs is None else replace(found, signs=signs)


def hadamard(width: int, seed: int = 0) -> Rotation:
    """A rotation over the whole row of any width: 2^p·m splits into Sylvester's matrix and a cosine transform of the odd m."""
    even = width & -width
    odd = width // even
    signs = _signs(width, torch.Generator().manual_seed(seed))
    parts, stride = [], 1
    while stride < even:  # H(a·b) is H(a) over neighbours and H(b) over channels a apart: short factors, few products
        side = min(FACTOR, even // stride)
        parts.append((None, _sylvester(side).float(), stride))
        stride *= side
    if odd > 1:
        parts.append((None, _cosine(odd).float(), even))
    return Rotation("hadamard", signs, tuple(parts))


def block_hadamard(width: int, block: int = BLOCK, seed: int = 0) -> Rotation:
    """Inside blocks of `block` channels, or of the largest power of two that divides the width where that is smaller."""
    side = math.gcd(width, 1 << (max(block, 1).bit_length() - 1))
    return Rotation("hadamard_block", _signs(width, torch.Generator().manual_seed(seed)), ((None, _sylvester(side).float(), 1),))


def _spreading(size: int, generator: torch.Generator) -> torch.Tensor:
    """Orthogonal, first row 1/√n everywhere: what lies in channel 0 is spread evenly, the others are turned at random."""
    base = _householder_to_uniform(size)
    inner, _ = torch.linalg.qr(torch.randn(size - 1, size - 1, dtype=torch.float64, generator=generator))
    turned = torch.eye(size, dtype=torch.float64)
    turned[1:, 1:] = inner
    return turned @ base


def _householder_to_uniform(size: int) -> torch.Tensor:
    """The reflection that takes the first unit vector to (1, …, 1)/√n."""
    first = torch.zeros(size, dtype=torch.float64)
    first[0] = 1
    normal = first - torch.full((size,), 1 / math.sqrt(size), dtype=torch.float64)
    if float(normal.norm()) == 0:
        return torch.eye(size, dtype=torch.float64)
    normal /= normal.norm()
    return torch.eye(size, dtype=torch.float64) - 2 * torch.outer(normal, normal)


def _greedy(peaks: torch.Tensor, side: int, generator: torch.Generator) -> torch.Tensor:
    """The rotation of all blocks that leaves the smallest range of the channels' peaks, (side, side).

    peaks (k,): the largest magnitude of each channel. Each step brings the channel with the largest peak to place 0 and spreads it; the
    prefix of steps with the smallest range is kept.
    """
    lanes = torch.diag_embed(peaks.double().view(-1, side))  # (blocks, side, side): a channel's peak, met alone
    best, product = torch.eye(side, dtype=torch.float64), torch.eye(side, dtype=torch.float64)
    smallest = float(lanes.amax() - lanes.amin())
    for _ in range(GREEDY_STEPS):
        turned = lanes @ product
        place = int(turned.abs().amax((0, 1)).argmax())
        swap = torch.eye(side, dtype=torch.float64)
        swap[[0, place]] = swap[[place, 0]]
        product = product @ swap @ _spreading(side, generator)
        turned = lanes @ product
        reach = float(turned.amax() - turned.amin())
        if reach < smallest:
            smallest, best = reach, product.clone()
    return best


def dual_rotation(peaks: torch.Tensor, seed: int = 0, block: int = BLOCK) -> Rotation:
    """R1·P·R2 for an input whose channels have these peaks, (k,). Blocks are the largest divisor of the width up to `block`."""
    width = peaks.numel()
    side = next(size for size in range(min(block, width), 0, -1) if width % size == 0)
    generator = torch.Generator().manual_seed(seed)
    first = _greedy(peaks, side, generator)
    turned = (torch.diag_embed(peaks.double().view(-1, side)) @ first).abs().amax(1).flatten()
    ranked = turned.argsort(descending=True)
    order = ranked.view(side, -1).t().flatten()  # dealt like cards: the largest go to different blocks
    second = _greedy(turned[order], side, generator)
    return Rotation("dual", None, ((None, first.float(), 1), (order, second.float(), 1)))
