"""Which parameters learn, as additions to a frozen model's weights.

Everything that learns on a host's MODEL is a difference put on with the host's own weight wrappers, so that the model itself is never
written to:
    lora     W + (alpha / rank)·up @ down           (Hu et al. 2022), up starts at zero
    blocks   W + D and b + d, D and d start at zero, on the layers of the chosen blocks
    all      the same on every layer
    biases   b + d alone
What was learnt is exported under the names that stock LoRA loaders read: lora_up, lora_down, alpha; diff and diff_b.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..accel.modules import seen_modules
from ..errors import input_error
from ..families.blocks import block_layout, parse_blocks
from .draws import seeded

__all__ = ["KINDS", "NETWORK", "Additions", "ParamSubset", "attach", "attach_to", "block_prefix", "merge_into"]

KINDS = ("lora", "blocks", "all", "biases")
NETWORK = "diffusion_model."  # where a host's model keeps the transformer


@dataclass(frozen=True)
class ParamSubset:
    """What learns.

    Args:
        kind: one of KINDS. rank, alpha: of lora; alpha 0 stands for rank, a scale of 1.
        include, exclude: regular expressions over layer names such as "double_blocks.0.img_attn.qkv"; empty matches all, or none.
        blocks: "double:0-2, single:4-", empty for all. Layers outside of the blocks learn only without a range.
    """

    kind: str = "lora"
    rank: int = 8
    alpha: float = 0.0
    include: str = ""
    exclude: str = ""
    blocks: str = ""

    def __post_init__(self):
        where = "Train Parameters"
        if self.kind not in KINDS:
            raise input_error(where, "kind", self.kind, ", ".join(KINDS), "Choose one of these.")
        if not 1 <= self.rank <= 4096:
            raise input_error(where, "rank", self.rank, "1 to 4096", "8 to 32 are usual.")
        if not 0.0 <= self.alpha <= 65536.0:
            raise input_error(where, "alpha", self.alpha, "0 (the rank) to 65536", "Correct the number.")
        for name in ("include", "exclude"):
            try:
                re.compile(getattr(self, name))
            except re.error as error:
                allowed = f"a regular expression ({error})"
                raise input_error(where, name, getattr(self, name), allowed, "Escape signs such as brackets.") from None

    @property
    def scale(self) -> float:
        return (self.alpha or self.rank) / self.rank


class LowRank(nn.Module):
    """W → W + scale·up @ down, for a weight (out, …) seen as a matrix."""

    active = True

    def __init__(self, shape: Sequence[int], subset: ParamSubset, generator: torch.Generator):
        super().__init__()
        out, inputs = shape[0], math.prod(shape[1:])
        rank = min(subset.rank, out, inputs)
        self.scale = (subset.alpha or subset.rank) / subset.rank
        bound = inputs**-0.5
        self.down = nn.Parameter((torch.rand((rank, inputs), generator=generator) * 2.0 - 1.0) * bound)
        self.up = nn.Parameter(torch.zeros(out, rank))

    def forward(self, weight: Tensor) -> Tensor:
        if not self.active:
            return weight
        update = (self.up * self.scale) @ self.down
        return (weight + update.view(weight.shape)).to(weight.dtype)  # in fp32, rounded once, as a loader of the file does

    def exported(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rank = torch.tensor(float(self.down.shape[0]))
        return {"lora_up.weight": values["up"], "lora_down.weight": values["down"], "alpha": self.scale * rank}


class Difference(nn.Module):
    """W → W + D."""

    active = True

    def __init__(self, shape: Sequence[int], name: str):
        super().__init__()
        self.name = name
        self.difference = nn.Parameter(torch.zeros(*shape))

    def forward(self, value: Tensor) -> Tensor:
        return (value + self.difference).to(value.dtype) if self.active else value

    def exported(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {self.name: values["difference"]}


@dataclass(frozen=True)
class Additions:
    """What was put on a model: "<layer>.weight" or "<layer>.bias" → the module that learns."""

    modules: dict[str, LowRank | Difference]

    @contextmanager
    def switched_off(self):
        """Inside, the network answers as if nothing had been put on it."""
        for module in self.modules.values():
            module.active = False
        try:
            yield
        finally:
            for module in self.modules.values():
                module.active = True

    def params(self) -> dict[str, nn.Parameter]:
        return {f"{key}.{name}": value for key, module in self.modules.items() for name, value in module.named_parameters()}

    def to(self, device: torch.device) -> None:
        for module in self.modules.values():
            module.to(device)

    def export(self, values: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The tensors of a LoRA file from parameter values by name (the average, say)."""
        found = {}
        for key, module in self.modules.items():
            own = {name: values[f"{key}.{name}"] for name, _ in module.named_parameters()}
            layer = key.rsplit(".", 1)[0]
            for name, value in module.exported(own).items():
                found[f"{NETWORK}{layer}.{name}"] = value.detach().to("cpu", dtype).contiguous().clone()
        return found


def attach(patcher: Any, subset: ParamSubset, seed: int, where: str) -> Additions:
    """Put what learns onto MODEL `patcher` (a clone of the caller's) with weight wrappers.

    Raises: NodeInputError where nothing is chosen.
    """
    wanted = _layer_filter(patcher.get_model_object("diffusion_model"), subset, where)
    modules: dict[str, LowRank | Difference] = {}
    for name, layer in seen_modules(patcher):
        if not hasattr(layer, "weight_function") or getattr(layer, "weight", None) is None or not wanted(name):
            continue
        modules |= _for_layer(name, layer, subset, seed)
    if not modules:
        allowed = "a choice that matches at least one layer, such as include empty"
        raise input_error(where, "params", subset.include or subset.blocks, allowed, "Look at the layer names in the model's checkpoint.")
    for key, module in modules.items():
        patcher.add_weight_wrapper(f"{NETWORK}{key}", module)
    return Additions(modules)


def attach_to(module: nn.Module, prefix: str, subset: ParamSubset, seed: int) -> dict[str, LowRank | Difference]:
    """Put what learns straight onto the layers of `module`, which hangs on no network and belongs to the caller.

    Returns "<prefix>.<layer>.weight" or "….bias" → what learns. The choice of layers in `subset` is not asked.
    """
    found: dict[str, LowRank | Difference] = {}
    for name, layer in module.named_modules():
        if hasattr(layer, "weight_function") and getattr(layer, "weight", None) is not None:
            for key, made in _for_layer(f"{prefix}.{name}", layer, subset, seed).items():
                getattr(layer, f"{key.rpartition('.')[2]}_function").append(made)
                found[key] = made
    return found


@torch.no_grad()
def merge_into(module: nn.Module) -> None:
    """Write what `attach_to` put on the layers of `module` into their weights, and take it off."""
    for layer in module.modules():
        for part in ("weight", "bias"):
            functions = getattr(layer, f"{part}_function", [])
            for function in functions:
                value = getattr(layer, part)
                value.copy_(function(value))
            if functions:
                setattr(layer, f"{part}_function", [])


def _for_layer(name: str, layer: Any, subset: ParamSubset, seed: int) -> dict[str, LowRank | Difference]:
    bias = getattr(layer, "bias", None)
    shape = getattr(layer, "handed_out", layer.weight.shape)  # a layer of codes or factors hands its functions the whole weight
    if subset.kind == "lora":
        return {f"{name}.weight": LowRank(shape, subset, seeded(seed, "lora", name))} if len(shape) > 1 else {}
    found = {}
    if subset.kind != "biases":
        found[f"{name}.weight"] = Difference(shape, "diff")
    if bias is not None:
        found[f"{name}.bias"] = Difference(bias.shape, "diff_b")
    return found


def _layer_filter(network: Any, subset: ParamSubset, where: str) -> Callable[[str], bool]:
    include, exclude = re.compile(subset.include), re.compile(subset.exclude)
    prefixes: tuple[str, ...] = ()
    if subset.blocks.strip() or subset.kind == "blocks":
        layout = block_layout(network, where)
        text = subset.blocks.strip() or ", ".join(layout.counts)
        prefixes = tuple(block_prefix(network, kind, index) for kind, index in parse_blocks(text, layout, where))

    def wanted(name: str) -> bool:
        in_blocks = not prefixes or name.startswith(prefixes)
        return in_blocks and bool(include.search(name)) and not (subset.exclude and exclude.search(name))

    return wanted


def block_prefix(network: Any, kind: str, index: int) -> str:
    """("double_block", 3) → the name under which the network holds that block, with a dot."""
    for holder in ("double_blocks", "joint_blocks", "transformer_blocks", "blocks") if kind == "double_block" else ("single_blocks",):
        if hasattr(network, holder):
            return f"{holder}.{index}."
    raise ValueError(f"{type(network).__name__} has no blocks of kind {kind}")
