"""The network as one clone of a MODEL sees it, whatever another clone has put on it at the moment."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

__all__ = ["NETWORK", "bytes_of", "own_weight", "seen_bytes", "seen_modules"]

NETWORK = "diffusion_model."  # where a host's model keeps the transformer


def seen_modules(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """(name below the network, module) of MODEL `model`, a parent before its children; the network itself is ""."""

    def walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        yield name[len(NETWORK) :], module
        for child, inner in module.named_children():
            full = f"{name}.{child}"
            yield from walk(model.object_patches.get(full, model.object_patches_backup.get(full, inner)), full)

    yield from walk(model.get_model_object(NETWORK[:-1]), NETWORK[:-1])


def own_weight(model: Any, name: str, module: nn.Module, part: str = "weight") -> Tensor:
    """A parameter of a module of `seen_modules` before any weight patch, also while the network is loaded with patches."""
    key = f"{NETWORK}{name}.{part}" if name else NETWORK + part
    weight = getattr(module, part).data
    if key in model.backup:  # a copy of what lies on the network now: another clone's module there has a weight of its own
        try:
            present = model.model.get_submodule(f"{NETWORK}{name}" if name else NETWORK[:-1])
        except AttributeError:
            present = None
        if present is module:
            return model.backup[key].weight
    return weight


def bytes_of(module: nn.Module) -> int:
    """Of parameters and buffers, those that are shared once."""
    tensors = {id(value): value for value in (*module.parameters(), *module.buffers())}
    return sum(value.numel() * value.element_size() for value in tensors.values())


def seen_bytes(model: Any, path: str) -> int:
    """Of what this clone has at `path` and below; held_bytes of a module is what it keeps beside its parameters and buffers."""
    own = [module for name, module in seen_modules(model) if name == path or name.startswith(f"{path}.")]
    tensors = {id(v): v for module in own for v in (*module.parameters(recurse=False), *module.buffers(recurse=False))}
    return sum(value.numel() * value.element_size() for value in tensors.values()) + sum(getattr(m, "held_bytes", 0) for m in own)
