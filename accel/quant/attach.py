"""Quantised layers on a MODEL: one object patch a layer, and what a patcher does not find out by itself.

A patcher counts a model's bytes once, before any patch, and tells two clones apart by their weights' uuid, which object patches do not
change. Both are set here: the size, so that memory is planned for what is there, and a new uuid, so that a switch between clones unloads
the layers that go and loads those that come.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ...errors import input_error
from .linear import QuantLinear
from .recipe import linear_layers

__all__ = ["PREFIX", "chosen_layers", "own_weight", "put_on", "quantised_parts"]

PREFIX = "diffusion_model."


def chosen_layers(model: Any, include: str, exclude: str, where: str) -> dict[str, nn.Linear]:
    """The linear layers of MODEL's blocks, as this clone sees them, whose names both expressions let through.

    Raises: NodeInputError for an expression that cannot be read, one that matches no layer, and a model that is quantised already.
    """
    import re

    patterns = []
    for name, text in (("include", include), ("exclude", exclude)):
        try:
            patterns.append(re.compile(text) if text.strip() else None)
        except re.error as error:
            raise input_error(where, name, text, f"a regular expression ({error})", "Correct it, or leave the field empty.") from error
    wanted, unwanted = patterns
    if quantised_parts(model):
        remedy = "Link the model before its Quantize node, or the file it was quantised from."
        raise input_error(where, "model", "a model with quantised layers", "a model in 16 or 32 bits", remedy)
    found = {}
    for name, _ in linear_layers_of(model):
        if (wanted is None or wanted.search(name)) and not (unwanted and unwanted.search(name)):
            layer = model.get_model_object(PREFIX + name)
            if layer.weight.is_floating_point() and layer.weight.element_size() > 1:
                found[name] = layer
    if not found:
        remedy = "Leave include empty for every linear layer of the blocks."
        raise input_error(where, "include", include, "a part of the names of this model's linear layers", remedy)
    return found


def linear_layers_of(model: Any) -> list[tuple[str, nn.Module]]:
    """`linear_layers`, also where another clone's quantised layers lie on the shared network at the moment."""
    transformer = model.get_model_object("diffusion_model")
    names = {name for name, _ in linear_layers(transformer)}
    names |= {name for name, module in transformer.named_modules() if isinstance(module, QuantLinear)}
    ordered = [name for name, _ in transformer.named_modules() if name in names]
    seen = [(name, model.get_model_object(PREFIX + name)) for name in ordered]
    return [(name, layer) for name, layer in seen if isinstance(layer, nn.Linear)]


def quantised_parts(model: Any) -> dict[str, QuantLinear]:
    """The quantised layers of MODEL as this clone sees them, by name, in the network's order."""
    found = {}
    for name, module in model.get_model_object("diffusion_model").named_modules():
        patch = model.object_patches.get(PREFIX + name)
        if isinstance(patch, QuantLinear):
            found[name] = patch
        elif isinstance(module, QuantLinear) and isinstance(own := model.get_model_object(PREFIX + name), QuantLinear):
            found[name] = own
    return found


def own_weight(model: Any, name: str, layer: nn.Linear) -> torch.Tensor:
    """A layer's weight before any patch, also while the network is loaded with patches."""
    kept = model.backup.get(f"{PREFIX}{name}.weight")
    weight = layer.weight.data
    return kept.weight if kept is not None and kept.weight.shape == weight.shape and kept.weight.dtype == weight.dtype else weight


def put_on(model: Any, layers: Mapping[str, QuantLinear], merged: bool, shape_of: Callable[[str], nn.Linear]) -> Any:
    """A clone of MODEL with these layers. merged: its weight patches on them are in the codes already and are dropped."""
    patched = model.clone()
    saved = 0
    for name, layer in layers.items():
        saved += shape_of(name).weight.nbytes - layer.nbytes
        patched.add_object_patch(PREFIX + name, layer)
        if merged:
            patched.patches.pop(f"{PREFIX}{name}.weight", None)
    patched.size = model.model_size() - saved
    patched.patches_uuid = uuid.uuid4()
    return patched
