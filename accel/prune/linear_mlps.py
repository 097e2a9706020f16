"""MLPs of blocks as linear maps (the width distillation of PPCL, arXiv 2511.16156).

    MLP(x) ≈ x Wᵀ + b       W, b by ridge regression over tokens of the model's own samples; where the residual is least, the map stays

Theirs takes the place of norm, modulation, MLP and gate, F(h) + h ≈ T(h). Ours stands where the MLP stood, behind the modulation and in
front of the gate: the block's own code runs on, in every family whose MLP is a module of its own, and what depends on the time stays
exact, for the price of the second half of the modulation's weights. MLPs that share their layers with attention (Flux's single blocks)
have no such place.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import input_error
from ...families.width import width_groups
from ..modules import NETWORK, seen_modules
from .apply import exchange, plan_of, stack_under
from .identity import original_part
from .probes import few_tokens, ridge_map, ridge_maps

__all__ = [
    "BEFORE_CODES", "RIDGES", "STREAMS", "LinearMlp", "MlpTokens", "NoText", "fitted_map", "has_whole_weights", "linear_like",
    "linear_parts", "mlp_paths", "put_layer", "with_learnt", "with_maps",
]  # fmt: skip

STREAMS = ("both", "image", "text")
HELD_OUT = 4  # every fourth token judges the map that the others make
BEFORE_CODES = "Link this node before Quantize, or load the model in 16 bits."
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the mean square of an input channel; text has few different tokens and wants more


class LinearMlp(nn.Module):
    """x (…, d) → x Wᵀ + b, in the place of an MLP. layer: of the host's own class of linear layers."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.map = layer

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.map(x)


class NoText(nn.Module):
    """x → zeros of its shape, where a block's text is changed by a map of its run alone (text_runs.py)."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros_like(x)


def has_whole_weights(layer: nn.Module) -> bool:
    """Whether it is a linear layer of 16 bits or more: a sum or a product put into fewer would be rounded without a scale."""
    return isinstance(layer, nn.Linear) and layer.weight.element_size() > 1


def linear_parts(model: Any) -> dict[str, LinearMlp]:
    """The maps of MODEL as this clone sees them, by the path of the MLP they stand for."""
    return {name: module for name, module in seen_modules(model) if isinstance(module, LinearMlp)}


def mlp_paths(model: Any, where: str) -> dict[str, str]:
    """Path of each MLP that a map can stand for → "image" or "text", in running order.

    Raises: NodeInputError for a family that is not known, a plan of widths, quantised MLPs, and a model without such MLPs.
    """
    stack, seen, plan = stack_under(model, where), dict(seen_modules(model)), plan_of(model)
    if plan is not None and plan.width:
        remedy = "Take one of the two out: neurons of an MLP that is a map cannot be left out."
        raise input_error(where, "model", "a model with masked or narrow blocks", "blocks of full width", remedy)
    found = {}
    for group in width_groups(stack, lambda path: original_part(model, path)):
        if group.is_heads:
            continue
        path = _holder([span.layer for span in (*group.rows, *group.columns)])
        while isinstance(seen.get(path), nn.ModuleList):
            path = path.rpartition(".")[0]
        if path == group.path or path not in seen or isinstance(seen[path], (LinearMlp, NoText)):
            continue
        layers = [module for name, module in seen.items() if name.startswith(f"{path}.") and has_whole_weights(module)]
        if len(layers) < 2:
            raise input_error(where, "model", f"{path} in few bits", "MLPs in 16 or 32 bits", BEFORE_CODES)
        found[path] = "text" if group.kind == "txt_ffn" else "image"
    if not found:
        allowed = "blocks whose MLP shares no layer with attention: Flux's double blocks, SD3, Qwen-Image, Wan, LTX-Video, Lumina 2"
        raise input_error(where, "model", f"no such MLP in {stack.family}", allowed, "Remove this node.")
    return found


def _holder(layers: Sequence[str]) -> str:
    """The longest path that all of these layers lie under."""
    parts = list(zip(*(layer.split(".") for layer in layers)))
    same = next((place for place, names in enumerate(parts) if len(set(names)) > 1), len(parts))
    return ".".join(layers[0].split(".")[:same])


class MlpTokens:
    """The same few tokens of every image before and after each MLP, on the CPU. per_call: tokens kept of each image in a call."""

    def __init__(self, per_call: int, seed: int):
        self.per_call, self.seed = per_call, seed
        self.seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def hook(self, path: str) -> Callable:
        def keep(module: nn.Module, args: tuple, output: Tensor) -> None:
            pair = tuple(few_tokens(tokens, self.per_call, self.seed) for tokens in (args[0], output))
            self.seen.setdefault(path, []).append(pair)

        return keep

    def tokens(self, path: str) -> tuple[Tensor, Tensor]:
        """Inputs (n, d) and outputs (n, e)."""
        before, after = zip(*self.seen[path])
        return torch.cat(before), torch.cat(after)


def fitted_map(inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor, float]:
    """(W (e, d), b (e,), residual) of inputs (n, d) and outputs (n, e).

    residual: ‖y − ŷ‖²/‖y‖² on every fourth token by the map of the others, with the ridge of RIDGES that leaves least. The map that is
    handed out has that ridge and knows all tokens.
    """
    judged = torch.arange(len(inputs)) % HELD_OUT == 0
    wanted = outputs[judged].double()

    def residual(trial: Tensor) -> float:
        left = wanted - inputs[judged].double() @ trial[:-1] - trial[-1]
        return float(left.square().sum() / wanted.square().sum().clamp_min(1e-30))

    residuals = dict(zip(RIDGES, map(residual, ridge_maps(inputs[~judged], outputs[~judged], RIDGES))))
    best = min(RIDGES, key=residuals.__getitem__)
    whole = ridge_map(inputs, outputs, best).float()
    return whole[:-1].T.contiguous(), whole[-1].clone(), residuals[best]


def with_maps(model: Any, maps: Mapping[str, tuple[Tensor, Tensor]]) -> Any:
    """A clone of MODEL with maps (W, b) in the place of the MLPs at these paths."""
    seen, patched, size = dict(seen_modules(model)), model.clone(), model.model_size()
    for path, (weight, bias) in maps.items():
        own = [layer for layer in seen[path].modules() if isinstance(layer, nn.Linear)][-1]
        with torch.inference_mode(False):
            layer = linear_like(own, weight, bias)
        size += exchange(patched, path, LinearMlp(layer))
    patched.size = size
    patched.patches_uuid = uuid.uuid4()  # an object patch alone does not tell the host that the network changes
    return patched


def with_learnt(model: Any, learnt: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """(MODEL with what was learnt on its maps summed into them, the other tensors). learnt: as a LoRA file has it, lora_up and lora_down or
    diff and diff_b: a file's loader goes by the layers of the network as it was loaded and knows no map."""
    rest, patched = dict(learnt), None
    for path, part in linear_parts(model).items():
        if not isinstance(part.map, nn.Linear):  # in few bits: no place for a sum
            continue
        prefix = f"{NETWORK}{path}.map."
        own = {key.removeprefix(prefix): rest.pop(key) for key in learnt if key.startswith(prefix)}
        if not own:
            continue
        weight, bias = part.map.weight.float(), None if part.map.bias is None else part.map.bias.float()
        if "lora_up.weight" in own:
            up, down = own["lora_up.weight"].to(weight), own["lora_down.weight"].to(weight)
            weight = weight + float(own["alpha"]) / len(down) * (up @ down)
        if "diff" in own:
            weight = weight + own["diff"].to(weight)
        if "diff_b" in own:
            bias = bias + own["diff_b"].to(bias)
        patched = patched or model.clone()
        with torch.inference_mode(False):
            made = linear_like(part.map, weight.clone(), None if bias is None else bias.clone())
        patched.add_object_patch(NETWORK + path, LinearMlp(made))
    if patched is None:
        return model, rest
    patched.patches_uuid = uuid.uuid4()
    return patched, rest


def put_layer(patched: Any, name: str, layer: nn.Module) -> None:
    """An object patch with `layer` in the place of the one called `name`. Hosts put their objects back in the order in which they were
    exchanged, so that none may lie in another: that of a map comes with a map of its own."""
    owner = patched.object_patches.get(NETWORK + name.removesuffix(".map"))
    if name.endswith(".map") and isinstance(owner, LinearMlp):
        patched.add_object_patch(NETWORK + name.removesuffix(".map"), LinearMlp(layer))
    else:
        patched.add_object_patch(NETWORK + name, layer)


def linear_like(own: nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer of the class, dtypes and place of `own` with other weights."""
    with torch.device("meta"):
        made = type(own)(weight.shape[1], weight.shape[0], bias=bias is not None)
    made.weight = nn.Parameter(weight.to(own.weight), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.to(own.weight if own.bias is None else own.bias), requires_grad=False)
    return made
