"""What can be kept of a model, and what it weighs: read from the network and one size of latent, before anything is sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...errors import NodeInputError
from ...families.arch import ArchSpec, arch_spec
from ...families.decoupled import decoupled_spec
from ...families.gated import gated_modules

__all__ = ["Inspection", "inspect_model"]


@dataclass(frozen=True)
class Inspection:
    """name: class of the transformer; latent: (c, h, w) of one picture; width: of a token, 0 if unknown; patch: latent cells along a
    token's side, 0 if unknown; modules: attentions and MLPs that can be kept one by one, 0 for families without; encoder: whether a
    condition a token is handed to a decoder."""

    name: str
    arch: ArchSpec | None
    latent: tuple[int, int, int]
    width: int
    patch: int
    modules: int = 0
    encoder: bool = False

    @property
    def targets(self) -> tuple[str, ...]:
        blocks = () if self.arch is None else ("last_block", "block_delta")
        return ("output", *blocks, *("modules",) * bool(self.modules), *("condition",) * self.encoder)

    def bytes_per_factor(self, target: str) -> int | None:
        """Of one condition and one picture, in float32; None where the token size is not known. A forecast of order m keeps m + 1."""
        channels, height, width = self.latent
        if target == "output":
            return 4 * channels * height * width
        if not self.width or not self.patch or target in ("modules", "condition"):
            return None  # modules depend on the text's length
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
            count = f"{self.modules} outputs of attention and MLP, " if target == "modules" else ""
            lines.append(f"{target}: {count}{weight}")
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
    arch, latent = arch_spec(network), (channels, height // cell, width // cell)
    encoder = decoupled_spec(network) is not None
    return Inspection(type(network).__name__, arch, latent, token, patch, _module_count(network, arch), encoder)


def _module_count(network: Any, arch: ArchSpec | None) -> int:
    try:
        streams = gated_modules(network, arch, "Cache Inspect")
    except NodeInputError:  # the family's blocks are built otherwise, which is what is asked here
        return 0
    return sum(len(stream.modules) for block in streams.values() for stream in block)
