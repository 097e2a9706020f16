"""Quantised layers on a MODEL: one object patch a layer, and what a patcher does not find out by itself.

A patcher counts a model's bytes once, before any patch, and tells two clones apart by their weights' uuid, which object patches do not
change. Both are set here: the size, so that memory is planned for what is there, and a new uuid, so that a switch between clones unloads
the layers that go and loads those that come.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

from ...errors import input_error
from ..modules import NETWORK, own_weight, seen_modules
from ..prune.compact import NarrowWeights
from ..prune.linear_mlps import put_layer
from .linear import QuantLinear

__all__ = ["chosen_layers", "put_on", "quantised_parts", "with_activations"]


def _expression(where: str, name: str, text: str) -> re.Pattern | None:
    try:
        return re.compile(text) if text.strip() else None
    except re.error as error:
        raise input_error(where, name, text, f"a regular expression ({error})", "Correct it, or leave the field empty.") from error


def chosen_layers(model: Any, include: str, exclude: str, where: str) -> dict[str, nn.Linear]:
    """The linear layers of MODEL's numbered blocks, as this clone sees them, whose names both expressions let through.

    Layers that are quantised already and blocks that are left out are not among them.

    Raises: NodeInputError for an expression that cannot be read, and one that matches no layer.
    """
    wanted, unwanted = _expression(where, "include", include), _expression(where, "exclude", exclude)
    found = {}
    for name, layer in seen_modules(model):
        if not isinstance(layer, nn.Linear) or not re.search(r"\.\d+\.", name):
            continue
        if (wanted is None or wanted.search(name)) and not (unwanted and unwanted.search(name)):
            if layer.weight.is_floating_point() and layer.weight.element_size() > 1:
                found[name] = layer
    if not found:
        remedy = "Leave include empty for every linear layer of the blocks; layers that are quantised already are no longer among them."
        raise input_error(where, "include", include, "a part of the names of linear layers in 16 or 32 bits", remedy)
    return found


def quantised_parts(model: Any) -> dict[str, QuantLinear]:
    """The quantised layers of MODEL as this clone sees them, by name, in the network's order."""
    return {name: module for name, module in seen_modules(model) if isinstance(module, QuantLinear)}


def put_on(model: Any, layers: Mapping[str, QuantLinear], inside: Collection[str], layer_of: Callable[[str], nn.Linear]) -> Any:
    """A clone of MODEL with these layers. inside: names of those whose weight patches and wrappers are in the codes already."""
    patched = model.clone()
    saved = 0
    for name, layer in layers.items():
        saved += layer_of(name).weight.nbytes - layer.nbytes
        if isinstance(layer_of(name), NarrowWeights):
            layer.cut_to(layer_of(name).cut, layer_of(name).full)
        put_layer(patched, name, layer)
        if name in inside:
            patched.patches.pop(f"{NETWORK}{name}.weight", None)
            patched.weight_wrapper_patches.pop(f"{NETWORK}{name}.weight", None)
    patched.size = model.model_size() - saved
    patched.patches_uuid = uuid.uuid4()
    return patched


def with_activations(model: Any, names: Collection[str], act_bits: int) -> Any:
    """A clone of MODEL whose quantised layers of these names take activations of `act_bits`; codes are shared, patches stay."""
    patched, parts = model.clone(), quantised_parts(model)
    with torch.inference_mode(False), torch.no_grad():
        for name in names:
            part = parts[name]
            bias = None if part.bias is None else own_weight(model, name, part, "bias")
            made = part.with_activations(act_bits, own_weight(model, name, part), bias)
            put_layer(patched, name, made)
    patched.patches_uuid = uuid.uuid4()
    return patched
