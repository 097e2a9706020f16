"""Which model this is: a hash of its weights as they were loaded, whatever patches lie on the network at the moment."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

__all__ = ["NETWORK", "model_hash", "original_module", "original_parameters", "original_part", "original_weight"]

NETWORK = "diffusion_model."  # where a host's model keeps the transformer
SAMPLE = 64  # numbers of each weight that are hashed


def original_module(model: Any, path: str) -> nn.Module:
    """The module at `path` below the network as it was loaded, also while another one hangs in its place."""
    name = NETWORK + path
    return model.object_patches_backup[name] if name in model.object_patches_backup else model.model.get_submodule(name)


def original_part(model: Any, path: str) -> Any:
    """The module or number at `path` below the network as it was loaded, also inside of a block that another one stands for.

    Raises: AttributeError where there is none.
    """
    found, name = model.model.diffusion_model, NETWORK[:-1]
    for part in filter(None, path.split(".")):
        name = f"{name}.{part}"
        found = model.object_patches_backup[name] if name in model.object_patches_backup else getattr(found, part)
    return found


def original_weight(model: Any, path: str, name: str = "weight") -> Tensor | None:
    """The weight, or the bias, of the layer at `path` as it was loaded, without merged LoRAs."""
    value = getattr(original_part(model, path), name)
    parts = f"{NETWORK}{path}".split(".")
    away = any(".".join(parts[:count]) in model.object_patches_backup for count in range(2, len(parts) + 1))
    return None if value is None else _unpatched(model, f"{NETWORK}{path}.{name}", value, away)


def _unpatched(model: Any, name: str, value: Tensor, away: bool) -> Tensor:
    """What the host has put aside for `value`. away: another module stands in the place of its own, and what is put aside is that one's."""
    kept = None if away else model.backup.get(name)
    return value if kept is None else kept.weight


def original_parameters(model: Any) -> Iterator[tuple[str, Tensor]]:
    """(name below the network, weight) of MODEL `model`, without object patches and without merged LoRAs."""
    swapped = {name: value for name, value in model.object_patches_backup.items() if isinstance(value, nn.Module)}

    def walk(module: nn.Module, name: str, away: bool) -> Iterator[tuple[str, Tensor]]:
        module, away = swapped.get(name, module), away or name in swapped
        for own, value in module.named_parameters(recurse=False):
            full = f"{name}.{own}"
            yield full[len(NETWORK) :], _unpatched(model, full, value, away)
        for child, inner in module.named_children():
            yield from walk(inner, f"{name}.{child}", away)

    yield from walk(model.model.diffusion_model, NETWORK[:-1], False)


def model_hash(model: Any) -> str:
    """16 hexadecimal digits of SHA-256 over names, shapes and the first numbers of every weight, in the order of the names."""
    digest = hashlib.sha256()
    for name, value in sorted(original_parameters(model), key=lambda pair: pair[0]):
        sample = value.detach().flatten()[:SAMPLE].float().cpu().contiguous()
        digest.update(f"{name}{tuple(value.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]
