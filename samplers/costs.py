"""What steering drives down: squared distances to measurements, in latents or through the decoder, and differentiable scores.

"Steering Rectified Flow Models in the Vector Field for Controlled Image Generation" (FlowChef), arXiv 2412.00100. The cost looks at the
clean picture D = x − s·v that the model predicts; v counts as a constant, so dD/dx = 1 and the gradient with respect to x is the one with
respect to D: no backward pass enters the model. Each cost gives the step of one picture that `beta` scales:

    latent least squares   AᵀR/|A|²              R = A·D − y: the closed form; with beta 1 a tight A is met exactly
    pixel least squares    t·g, g = JᵀAᵀR        R = A·dec(D) − y, J the decoder's derivative, t = <R, Q>/<Q, Q> with Q ≈ A·J·g: the
                                                 best step along g for a linear decoder
    score                  −g/rms(g)             g = ∇score: moves the latent by beta in root mean square

Everything is per picture, so beta does not depend on batch or resolution, unlike the learning rates of the released code. Layers of hosts
add in place, which autograd refuses; saved tensors may therefore be overwritten (they are copied when that happens).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import allow_mutation_on_saved_tensors
from torch.func import functional_call

from ..errors import input_error
from .operators import LinearOperator

__all__ = ["CostPart", "LatentMeasurement", "LatentSpace", "PixelDecoder", "PixelMeasurement", "Score", "gradable"]

EDGE = 1e-6  # so that a sigma rounded to float32 stays on its side of a window's end
# Memory of a decoding with gradients over the host's estimate for one without; measured 2.7 on AutoencoderKL at 16×16 latents.
KEPT_LAYERS = 3
PROBE = 1e-2  # length of the trial step for t, as a share of the latent's: large beside rounding, small beside a decoder's bends

Step = Callable[[torch.Tensor], torch.Tensor]
Load = Callable[[list, float], None]  # (patchers, bytes that a run of them needs): on their devices, all of them at once


def _same(latent: torch.Tensor) -> torch.Tensor:
    return latent


@dataclass(frozen=True)
class LatentSpace:
    """Between the codec's latents and the model's, and the host's MODEL, which must stay loaded beside a decoder."""

    to_model: Callable[[torch.Tensor], torch.Tensor] = _same
    to_codec: Callable[[torch.Tensor], torch.Tensor] = _same
    model_patcher: Any = None

    @property
    def held(self) -> list:
        return [] if self.model_patcher is None else [self.model_patcher]


def _own(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A copy that autograd can keep; tensors born in inference mode cannot be saved for a backward pass."""
    return tensor.to(like.device, like.dtype).clone()


def gradable(module: torch.nn.Module) -> Callable[..., torch.Tensor]:
    """The module as a function that gradients pass through: weights that a graph loaded in inference mode are copied for as long as the
    function lives, since autograd cannot keep them."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    own = {name: tensor.detach().clone() for name, tensor in tensors.items() if tensor.is_inference()}
    return lambda *args, **kwargs: functional_call(module, own, args, kwargs)


def _dot(a: torch.Tensor, b: torch.Tensor, ndim: int) -> torch.Tensor:
    """<a, b> of each picture, shaped `(b, 1, …)` with `ndim` axes."""
    return (a * b).flatten(1).sum(1).reshape(-1, *[1] * (ndim - 1))


def _fits(target: torch.Tensor, wanted: tuple[int, ...], node: str, name: str, remedy: str) -> None:
    if target.shape[1:] != wanted[1:] or target.shape[0] not in (1, wanted[0]):
        raise input_error(node, name, tuple(target.shape), f"{wanted}, or a batch of 1", remedy)


def _mask_fits(operator: LinearOperator, rows: int, node: str) -> None:
    known = getattr(operator, "known", None)
    for part in getattr(operator, "parts", ()):
        _mask_fits(part, rows, node)
    if known is not None and known.shape[0] not in (1, rows):
        raise input_error(node, "operator", f"{known.shape[0]} masks", f"1 mask or {rows}, one a picture", "Link one mask.")


@dataclass(frozen=True, eq=False)
class LatentMeasurement:
    """½|A·D − A·target|² in the model's latent space; target: LATENT samples `(1 or b, c, …, h, w)` of the codec."""

    operator: LinearOperator
    target: torch.Tensor

    def bind(self, space: LatentSpace, x: torch.Tensor) -> Step:
        target = _own(space.to_model(self.target), x)
        _fits(target, tuple(x.shape), "Flow Latent Cost", "latent", "Encode a picture of the run's size with the model's VAE.")
        size = tuple(x.shape[-2:])
        operator = self.operator.fitted(size, x)
        _mask_fits(operator, x.shape[0], "Flow Latent Cost")
        measured = operator.forward(target)
        return lambda clean: operator.adjoint(operator.forward(clean) - measured, size) / operator.norm2


class PixelDecoder:
    """A VAE's decoder as a differentiable map from latents to pixels in 0…1, without the clamp that would stop gradients.

    Args:
        vae: VAE of the host; its `first_stage_model.decode` gives pixels in −1…1.
        load: puts patchers on their devices; is told the memory that one decoding with gradients takes.

    Raises:
        NodeInputError: the VAE has no decoder, or scales its output in another way than pictures do.
    """

    def __init__(self, vae: Any, load: Load, node: str = "Flow Pixel Cost"):
        if getattr(vae, "first_stage_model", None) is None:
            raise input_error(node, "vae", "a VAE without a decoder", "a VAE that decodes", "Link a Load VAE node.")
        scaled = vae.process_output(torch.tensor([-1.0, 0.0, 1.0]))
        if not torch.allclose(scaled.float().cpu(), torch.tensor([0.0, 0.5, 1.0]), atol=1e-6):
            raise input_error(node, "vae", type(vae.first_stage_model).__name__, "a VAE of pictures in −1…1", "Steer in latent space.")
        self.vae, self.load = vae, load

    def memory(self, x: torch.Tensor) -> float:
        """Bytes of decoding one picture of `x` with gradients; pictures are decoded one at a time."""
        return KEPT_LAYERS * self.vae.memory_used_decode((1, *x.shape[1:]), self.vae.vae_dtype)

    def bind(self, space: LatentSpace, x: torch.Tensor) -> Step:
        """Model-space latents `(b, c, …, h, w)` → pixels `(b, 3, …, H, W)`."""
        self.load([self.vae.patcher, *space.held], self.memory(x))
        codec, vae = gradable(_Decode(self.vae.first_stage_model)), self.vae

        def decode(latent: torch.Tensor) -> torch.Tensor:
            z = space.to_codec(latent).to(vae.device, vae.vae_dtype)
            return (codec(z).to(latent.device, latent.dtype) + 1) / 2

        return decode


class _Decode(torch.nn.Module):
    """`decode` as a forward, for functional_call."""

    def __init__(self, codec: torch.nn.Module):
        super().__init__()
        self.codec = codec

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.codec.decode(z)


def _row_by_row(step: Callable[[torch.Tensor, int], torch.Tensor]) -> Step:
    """Decoders keep every layer for the way back: one picture at a time bounds that memory, and keeps pictures apart."""
    return lambda clean: torch.cat([step(clean[row : row + 1], row) for row in range(clean.shape[0])])


@dataclass(frozen=True, eq=False)
class PixelMeasurement:
    """½|A·dec(D) − y|² in pixels of 0…1; y: IMAGE `(1 or b, h, w, 3)` as the operator left it; for a video the frames of one."""

    operator: LinearOperator
    target: torch.Tensor
    decoder: PixelDecoder

    def bind(self, space: LatentSpace, x: torch.Tensor) -> Step:
        decode = self.decoder.bind(space, x)
        with torch.no_grad():
            shape = decode(x[:1]).shape
        size = tuple(shape[-2:])
        operator = self.operator.fitted(size, x)
        _mask_fits(operator, x.shape[0], "Flow Pixel Cost")
        y = _own(self.target[..., :3], x).movedim(-1, 1)
        if x.ndim == 5:
            y = y.movedim(0, 1).unsqueeze(0)
        remedy = "Link what Apply Flow Operator made of a picture of the run's size."
        _fits(y, (x.shape[0], *shape[1:-2], *operator.measured_size(size)), "Flow Pixel Cost", "image", remedy)

        def step(clean: torch.Tensor, row: int) -> torch.Tensor:
            part = _row_of(operator, row)
            target = y[row : row + 1] if y.shape[0] > 1 else y
            latent = clean.clone().requires_grad_()
            with allow_mutation_on_saved_tensors():
                picture = decode(latent)
                residual = part.forward(picture.detach()) - target
                (g,) = torch.autograd.grad(picture, latent, part.adjoint(residual, size))
            with torch.no_grad():
                length = _dot(g, g, g.ndim).sqrt()
                if float(length) == 0:
                    return g
                trial = PROBE * _dot(clean, clean, g.ndim).sqrt().clamp_min(PROBE) / length
                moved = (part.forward(picture) - part.forward(decode(clean - trial * g))) / trial
                return _dot(residual, moved, g.ndim) / _dot(moved, moved, g.ndim).clamp_min(torch.finfo(g.dtype).tiny) * g

        return _row_by_row(step)


def _row_of(operator: LinearOperator, row: int) -> LinearOperator:
    """The operator for one picture of the batch: a mask a picture is cut, all others are shared."""
    if hasattr(operator, "parts"):
        return type(operator)(tuple(_row_of(part, row) for part in operator.parts))
    known = getattr(operator, "known", None)
    return operator if known is None or known.shape[0] == 1 else type(operator)(known[row : row + 1])


@dataclass(frozen=True, eq=False)
class Score:
    """−score(dec(D)) of any differentiable `score`: IMAGE `(b, h, w, 3)` → `(b,)`, larger is better. Without a decoder it sees latents.

    A score that needs a model on its device has a method `prepared(load)`, which gives the callable for one run.
    """

    score: Callable[[torch.Tensor], torch.Tensor]
    decoder: PixelDecoder | None = None

    def bind(self, space: LatentSpace, x: torch.Tensor) -> Step:
        decode = None if self.decoder is None else self.decoder.bind(space, x)
        score = self.score
        if hasattr(score, "prepared"):
            through = self.decoder
            score = score.prepared(lambda models: through.load([*models, through.vae.patcher, *space.held], through.memory(x)))

        def step(clean: torch.Tensor, row: int) -> torch.Tensor:
            latent = clean.clone().requires_grad_()
            with allow_mutation_on_saved_tensors():
                value = score(latent if decode is None else decode(latent).movedim(1, -1).flatten(0, -4))
                if not (isinstance(value, torch.Tensor) and value.requires_grad):
                    remedy = "Compute it from the picture with torch operations, outside torch.no_grad()."
                    raise input_error("Flow Score Cost", "score", type(value).__name__, "a value that depends on the picture", remedy)
                (g,) = torch.autograd.grad(value.sum(), latent)
            rms = g.square().mean().sqrt()
            return -g / rms if float(rms) > 0 else torch.zeros_like(g)

        return _row_by_row(step)


@dataclass(frozen=True, eq=False)
class CostPart:
    """One cost with its schedule: active for sigma_lo < sigma <= sigma_hi, scaled from beta at sigma_hi to beta_end at sigma_lo."""

    cost: LatentMeasurement | PixelMeasurement | Score
    beta: float
    beta_end: float
    sigma_hi: float = 1.0
    sigma_lo: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.sigma_lo < self.sigma_hi <= 1:
            got = (self.sigma_lo, self.sigma_hi)
            raise input_error("Flow cost", "sigma_lo, sigma_hi", got, "0 <= sigma_lo < sigma_hi <= 1", "0 and 1 steer in every step.")

    def weight(self, sigma: float) -> float:
        """The relaxation at `sigma`; 0 outside the window."""
        if not self.sigma_lo + EDGE < sigma <= self.sigma_hi + EDGE:
            return 0.0
        passed = (self.sigma_hi - sigma) / (self.sigma_hi - self.sigma_lo)
        return self.beta + passed * (self.beta_end - self.beta)
