"""What Re-ttention keeps between steps: the share of mass seen and what unseen keys gave, in a chosen precision and place."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...errors import input_error

__all__ = ["DEVICES", "DTYPES", "Kept", "Storage"]

DTYPES = ("same", "bf16", "fp8_e4m3")
DEVICES = ("model", "cpu")
FP8_MAX = 448.0
SCALED = (torch.float16, torch.float8_e4m3fn)  # whose range a residual may leave


@dataclass(frozen=True)
class Storage:
    """dtype: one of DTYPES, "same" being that of the attention; device: one of DEVICES; cap: bytes, of all layers and conditions."""

    dtype: str = "same"
    device: str = "model"
    cap: int = 8 << 30

    def check(self, where: str) -> None:
        """Raises: NodeInputError for a value that is none of those."""
        for name, value, allowed in (("residual_dtype", self.dtype, DTYPES), ("residual_device", self.device, DEVICES)):
            if value not in allowed:
                raise input_error(where, name, value, ", ".join(allowed), "Choose one of these.")
        if self.cap <= 0:
            raise input_error(where, "memory_gib", self.cap / 2**30, "above 0", "Enter 8.")

    def torch_dtype(self, own: torch.dtype) -> torch.dtype:
        return {"same": own, "bf16": torch.bfloat16, "fp8_e4m3": torch.float8_e4m3fn}[self.dtype]

    def bytes_of(self, q: torch.Tensor, ratio: bool, residual: bool) -> int:
        """Of one attention with these queries (b, h, n, d), before it is stored."""
        queries = q.numel() // q.shape[-1]
        dtype = self.torch_dtype(q.dtype)
        residuals = q.numel() * dtype.itemsize
        scales = 4 * q.shape[0] * q.shape[1] * (dtype in SCALED)
        return 4 * queries * ratio + (residuals + scales) * residual


@dataclass(frozen=True, eq=False)
class Kept:
    """Statistics of one attention and one condition. step: when they were measured; shape: of its queries (b, h, n, d); log_ratio: log ρ
    (b, h, n) in fp32; stored, scale: R = stored · scale, scale (b, h, 1, 1)."""

    step: int
    shape: torch.Size
    log_ratio: torch.Tensor | None
    stored: torch.Tensor | None
    scale: torch.Tensor | None

    @classmethod
    def of(
        cls, step: int, log_ratio: torch.Tensor | None, residual: torch.Tensor | None, q: torch.Tensor, storage: Storage
    ) -> Kept:
        """Store an fp32 residual (b, h, n, d). Precisions with few exponents share one scale a head, so that none overflows."""
        dtype = storage.torch_dtype(q.dtype)
        device = q.device if storage.device == "model" else torch.device("cpu")
        stored = scale = None
        if residual is not None:
            if dtype in SCALED:
                most = FP8_MAX if dtype == torch.float8_e4m3fn else 1.0
                scale = (residual.abs().amax(dim=(-2, -1), keepdim=True) / most).clamp_min_(torch.finfo(torch.float32).tiny)
                residual, scale = residual / scale, scale.to(device)
            stored = residual.to(dtype).to(device, copy=True)
        return cls(step, q.shape, None if log_ratio is None else log_ratio.to(device, copy=True), stored, scale)

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.log_ratio, self.stored, self.scale) if x is not None)

    def ratio(self, device: torch.device, added: float, most: float) -> torch.Tensor:
        """min(ρ + added, most) in fp32, (b, h, n); 0 stays 0, since there is nothing to scale."""
        ratio = self.log_ratio.to(device).exp()
        return torch.where(ratio > 0, (ratio + added).clamp(max=most), 0.0)

    def residual(self, device: torch.device) -> torch.Tensor:
        """R in fp32, (b, h, n, d)."""
        found = self.stored.to(device).float()
        return found if self.scale is None else found * self.scale.to(device)
