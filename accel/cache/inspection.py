"""What can be kept of a model, and what it weighs: read from the network and one size of latent, before anything is sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...families.arch import ArchSpec, arch_spec

__all__ = ["Inspection", "inspect_model"]


@dataclass(frozen=True)
class Inspection:
    """name: class of the transformer; latent: (c, h, w) of one picture; width: of a token, 0 if unknown; patch: latent cells along a
    token's side, 0 if unknown."""

    name: str
    arch: ArchSpec | None
    latent: tuple[int, int, int]
    width: int
    patch: int

    @property
    def targets(self) -> tuple[str, ...]:
        return ("output",) if self.arch is None else ("output", "last_block", "block_delta")

    def bytes_per_factor(self, target: str) -> int | None:
        """Of one condition and one picture, in float32; None where the token size is not known. A forecast of order m keeps m + 1."""
        channels, height, width = self.latent
        if target == "output":
            return 4 * channels * height * width
        if not self.width or not self.patch:
            return None
        return 4 * self.width * -(-height // self.patch) * -(-width // self.patch)

    def text(self) -> str:
        lines = [f"{self.name}: " + ("no block patches" if self.arch is None else f"{self.arch.family}, blocks {self.arch.layout}")]
        if self.arch is not None:
            lines.append({"first": "text before the image", "last": "text behind the image", "apart": "text in an attention of its own"}[
                self.arch.layout.text
            ])  # fmt: skip
            if self.arch.long_skips:
                lines.append("late blocks read early ones: a range of block_delta ends at the last block")
        for target in self.targets:
            size = self.bytes_per_factor(target)
            weight = "size not known before sampling" if size is None else f"{size / 2**20:.3f} MiB a factor, picture and condition (fp32)"
            lines.append(f"{target}: {weight}")
        return "\n".join(lines)


def inspect_model(model: Any, width: int, height: int) -> Inspection:
    """Of MODEL `model`, for pictures of width × height pixels.

    One latent cell is 8 pixels wide, or as many as the model's latent format says.
    """
    network = model.get_model_object("diffusion_model")
    latent_format = getattr(model.model, "latent_format", None)
    cell = int(getattr(latent_format, "spacial_downscale_ratio", None) or getattr(latent_format, "downscale", None) or 8)
    channels = int(getattr(latent_format, "latent_channels", 4))
    token = next((int(getattr(network, name)) for name in ("hidden_size", "dim", "inner_dim") if hasattr(network, name)), 0)
    patch = getattr(network, "patch_size", 0)
    patch = int(patch[-1] if isinstance(patch, (tuple, list)) else patch)
    return Inspection(type(network).__name__, arch_spec(network), (channels, height // cell, width // cell), token, patch)
