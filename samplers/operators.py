"""Linear measurements of a picture and their adjoints: what steering compares with, in pixels or in latents.

Every operator works on the last two axes of `(b, c, …, h, w)` (Grayscale on axis 1) and knows

    forward   y = A x
    adjoint   x = Aᵀ y, with <A x, y> = <x, Aᵀ y> for every size, odd ones included
    norm2     the largest eigenvalue of AᵀA, or a bound close above it: x − Aᵀ(A x − y)/norm2 never overshoots

Kinds and sizes are those of "Steering Rectified Flow Models …" (FlowChef), arXiv 2412.00100, plus motion blur, colour and chains.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import adaptive_max_pool2d, avg_pool2d, conv2d, interpolate, pad

from ..errors import input_error

__all__ = ["Blur", "Chain", "Downsample", "Grayscale", "Identity", "LinearOperator", "Mask", "gaussian_kernel", "measure", "motion_kernel"]


class LinearOperator:
    """Base of the operators, and the identity's behaviour wherever one does not differ from it."""

    norm2 = 1.0

    def fitted(self, size: tuple[int, int], like: torch.Tensor) -> LinearOperator:
        """The operator for pictures of `size` (h, w), its tensors on the device and in the dtype of `like`, out of inference mode."""
        return self

    def measured_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(h, w) of A x for x of `size`."""
        return size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def adjoint(self, y: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Aᵀ y for x of `size` (h, w)."""
        raise NotImplementedError


class Identity(LinearOperator):
    """Everything is measured."""

    def forward(self, x):
        return x

    def adjoint(self, y, size):
        return y


@dataclass(frozen=True, eq=False)
class Mask(LinearOperator):
    """A = diag(known). known: `(1 or b, h, w)`, 1 where the value is measured, of any size.

    A smaller grid takes the least value of its area, so that a latent cell counts as known only when all of its pixels are.
    """

    known: torch.Tensor

    def fitted(self, size, like):
        known = self.known.reshape(-1, 1, *self.known.shape[-2:]).float()
        if known.shape[-2] >= size[0] and known.shape[-1] >= size[1]:
            known = -adaptive_max_pool2d(-known, size)
        else:
            known = interpolate(known, size=size, mode="nearest")
        return Mask(known.clamp(0, 1).to(like)[:, 0].clone())

    def _over(self, x):
        return self.known.reshape(-1, *[1] * (x.ndim - 3), *self.known.shape[-2:])

    def forward(self, x):
        return x * self._over(x)

    def adjoint(self, y, size):
        return y * self._over(y)


@dataclass(frozen=True)
class Downsample(LinearOperator):
    """The mean of factor × factor squares. Rows and columns left over at the end are not measured. AᵀA has the eigenvalue 1/factor²."""

    factor: int

    @property
    def norm2(self) -> float:
        return 1 / self.factor**2

    def measured_size(self, size):
        measured = (size[0] // self.factor, size[1] // self.factor)
        if min(measured) < 1:
            remedy = "Take a smaller factor or a larger picture."
            raise input_error("Flow Operator", "factor", self.factor, f"at most {min(size)}, the picture's shorter side", remedy)
        return measured

    def forward(self, x):
        self.measured_size(x.shape[-2:])
        return avg_pool2d(x.flatten(0, -3), self.factor).unflatten(0, x.shape[:-2])

    def adjoint(self, y, size):
        spread = y.repeat_interleave(self.factor, -2).repeat_interleave(self.factor, -1) / self.factor**2
        return pad(spread, (0, size[1] - spread.shape[-1], 0, size[0] - spread.shape[-2]))


@dataclass(frozen=True, eq=False)
class Blur(LinearOperator):
    """Correlation with a kernel `(k, l)` of odd sides and absolute sum 1, zeros beyond the edge; norm2 is at most 1."""

    kernel: torch.Tensor

    def __post_init__(self):
        if self.kernel.ndim != 2 or any(side % 2 == 0 for side in self.kernel.shape) or not float(self.kernel.abs().sum()) > 0:
            allowed = "a kernel of two odd sides that is not all zero"
            raise input_error("Flow Operator", "kernel", tuple(self.kernel.shape), allowed, "Crop or pad the kernel.")

    def fitted(self, size, like):
        return replace(self, kernel=(self.kernel.double() / self.kernel.double().abs().sum()).to(like).clone())

    def _correlate(self, x, kernel):
        planes = x.flatten(0, -3).unsqueeze(1)  # (b·c·…, 1, h, w)
        out = conv2d(planes, kernel[None, None], padding=(kernel.shape[0] // 2, kernel.shape[1] // 2))
        return out.squeeze(1).unflatten(0, x.shape[:-2])

    def forward(self, x):
        return self._correlate(x, self.kernel)

    def adjoint(self, y, size):
        return self._correlate(y, self.kernel.flip(0, 1))


class Grayscale(LinearOperator):
    """Brightness (Rec. 601) in all three channels of a colour picture."""

    weights = (0.299, 0.587, 0.114)
    norm2 = 3 * sum(weight**2 for weight in weights)

    def _weights(self, x):
        if x.shape[1] != 3:
            remedy = "Compare in pixels: use Flow Pixel Cost."
            raise input_error("Flow Operator", "kind", f"grayscale of {x.shape[1]} channels", "pictures of 3 channels", remedy)
        return x.new_tensor(self.weights).reshape(1, 3, *[1] * (x.ndim - 2))

    def forward(self, x):
        return (self._weights(x) * x).sum(1, keepdim=True).expand_as(x)

    def adjoint(self, y, size):
        return self._weights(y) * y.sum(1, keepdim=True)


@dataclass(frozen=True)
class Chain(LinearOperator):
    """One operator after another: the first of `parts` sees the picture."""

    parts: tuple[LinearOperator, ...]

    @property
    def norm2(self) -> float:
        return math.prod(part.norm2 for part in self.parts)

    def _sizes(self, size):
        sizes = [tuple(size)]
        for part in self.parts:
            sizes.append(part.measured_size(sizes[-1]))
        return sizes

    def fitted(self, size, like):
        return Chain(tuple(part.fitted(before, like) for part, before in zip(self.parts, self._sizes(size))))

    def measured_size(self, size):
        return self._sizes(size)[-1]

    def forward(self, x):
        for part in self.parts:
            x = part.forward(x)
        return x

    def adjoint(self, y, size):
        for part, before in reversed(list(zip(self.parts, self._sizes(size)))):
            y = part.adjoint(y, before)
        return y


def gaussian_kernel(side: int, sigma: float) -> torch.Tensor:
    """`(side, side)`, sum 1, float64; sigma in pixels."""
    line = torch.exp(-0.5 * ((torch.arange(side, dtype=torch.float64) - side // 2) / sigma) ** 2)
    kernel = line[:, None] * line[None, :]
    return kernel / kernel.sum()


def motion_kernel(side: int, angle: float) -> torch.Tensor:
    """A line of length `side` through the middle of `(side, side)`, sum 1, float64; angle in degrees, 0 along a row, counter-clockwise.

    Points along the line are shared out to the four nearest pixels, which keeps oblique lines even.
    """
    middle, kernel = side // 2, torch.zeros(side, side, dtype=torch.float64)
    for step in torch.linspace(-middle, middle, 8 * side + 1, dtype=torch.float64).tolist():
        across = middle + step * math.cos(math.radians(angle))
        down = middle - step * math.sin(math.radians(angle))
        left, top = min(math.floor(across + 1e-9), side - 1), min(math.floor(down + 1e-9), side - 1)
        for row, share_down in ((top, 1 - (down - top)), (top + 1, down - top)):
            for column, share_across in ((left, 1 - (across - left)), (left + 1, across - left)):
                if 0 <= row < side and 0 <= column < side:
                    kernel[row, column] += share_down * share_across
    return kernel / kernel.sum()


def measure(operator: LinearOperator, image: torch.Tensor, noise: float = 0.0, seed: int = 0) -> torch.Tensor:
    """A·image + noise·n for an IMAGE `(b, h, w, 3)`: the measurement `(b, h', w', 3)`, not clamped, since clamping would bend it.

    n is drawn once, on the CPU, picture r of a batch from seed + r.
    """
    pixels = image[..., :3].movedim(-1, 1)  # (b, 3, h, w)
    measured = operator.fitted(tuple(pixels.shape[-2:]), pixels).forward(pixels)
    if noise > 0:
        drawn = [torch.randn(measured.shape[1:], generator=torch.Generator().manual_seed(seed + row)) for row in range(len(measured))]
        measured = measured + noise * torch.stack(drawn).to(measured)
    return measured.movedim(1, -1).contiguous()
