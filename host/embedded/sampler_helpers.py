"""What stands around a run: conditions made flat, models loaded and let go."""

from __future__ import annotations

import math
import uuid
from collections import defaultdict
from typing import Any

import torch

from ...errors import input_error
from . import model_management
from .patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers, merge_nested_dicts
from .utils import reshape_mask

__all__ = [
    "convert_cond", "prepare_mask", "get_models_from_cond", "get_additional_models", "cleanup_additional_models", "estimate_memory",
    "prepare_sampling", "cleanup_models", "prepare_model_patcher", "move_wrappers",
]  # fmt: skip

Conds = dict[str, list[dict[str, Any]]]
UNSUPPORTED = {"hooks": "weights that change with the schedule", "gligen": "GLIGEN boxes"}


def prepare_mask(noise_mask: torch.Tensor, shape: torch.Size, device: Any) -> torch.Tensor:
    """A noise mask at the latent's size, on `device`."""
    return reshape_mask(noise_mask, shape).to(device)


def convert_cond(cond: list) -> list[dict[str, Any]]:
    """CONDITIONING entries as flat dicts with `cross_attn`, `model_conds` and a `uuid` that names the condition for one run."""
    flat = []
    for states, options in cond:
        entry = {**options, "model_conds": options.get("model_conds", {}), "uuid": uuid.uuid4()}
        if states is not None:
            entry["cross_attn"] = states
        flat.append(entry)
    return flat


def get_models_from_cond(cond: list[dict[str, Any]], model_type: str) -> list[Any]:
    """Everything that conditions hold under `model_type`, single or in lists."""
    models = []
    for entry in cond:
        if model_type in entry:
            held = entry[model_type]
            models += held if isinstance(held, list) else [held]
    return models


def get_additional_models(conds: Conds, dtype: torch.dtype | None) -> tuple[list[Any], float]:
    """The models that conditions bring, and the bytes their control objects need while running."""
    controls = list(dict.fromkeys(control for entries in conds.values() for control in get_models_from_cond(entries, "control")))
    models = [model for control in controls for model in control.get_models()]
    models += [model for entries in conds.values() for model in get_models_from_cond(entries, "additional_models")]
    return models, sum(control.inference_memory_requirements(dtype) for control in controls)


def cleanup_additional_models(models: Any) -> None:
    for model in models:
        if hasattr(model, "cleanup"):
            model.cleanup()


def estimate_memory(model: Any, noise_shape: torch.Size, conds: Conds) -> tuple[float, float]:
    """Bytes of one call with conditions joined, and of one call with a single condition."""
    every, largest = defaultdict(list), {}
    for entries in conds.values():
        for cond in entries:
            for name, shape in model.model.extra_conds_shapes(**cond).items():
                every[name].append(shape)
                if name not in largest or math.prod(shape) > math.prod(largest[name][0]):
                    largest[name] = [shape]
    joined = model.model.memory_required([noise_shape[0] * 2, *noise_shape[1:]], cond_shapes=every)
    single = model.model.memory_required([noise_shape[0], *noise_shape[1:]], cond_shapes=largest)
    return joined, single


def prepare_sampling(model: Any, noise_shape: torch.Size, conds: Conds, model_options: dict | None = None) -> tuple[Any, Conds, list]:
    """Load the model and what its conditions bring; returns (BaseModel, conds, further models)."""
    wrappers = get_all_wrappers(WrappersMP.PREPARE_SAMPLING, model_options or {}, is_model_options=True)
    return WrapperExecutor.new_executor(_prepare_sampling, wrappers).execute(model, noise_shape, conds, model_options=model_options)


def _prepare_sampling(model: Any, noise_shape: torch.Size, conds: Conds, model_options: dict | None = None) -> tuple[Any, Conds, list]:
    models, inference_memory = get_additional_models(conds, model.model_dtype())
    models += model.get_nested_additional_models()
    joined, single = estimate_memory(model, noise_shape, conds)
    model_management.load_models_gpu(
        [model, *models], memory_required=joined + inference_memory, minimum_memory_required=single + inference_memory
    )
    return model.model, conds, models


def cleanup_models(conds: Conds, models: list) -> None:
    cleanup_additional_models(models)
    cleanup_additional_models({control for entries in conds.values() for control in get_models_from_cond(entries, "control")})


def prepare_model_patcher(model: Any, conds: Conds, model_options: dict) -> None:
    """Refuse what this host cannot do, and put the patcher's wrappers and callbacks before those in transformer_options."""
    for entries in conds.values():
        for cond in entries:
            hooked_control = getattr(cond.get("control"), "extra_hooks", None) is not None
            for key, meaning in UNSUPPORTED.items():
                if cond.get(key) is not None or (key == "hooks" and hooked_control):
                    raise input_error("conditioning", key, cond.get(key), f"conditions without {meaning}", "Remove it or run in ComfyUI.")
    options = model_options["transformer_options"]
    for group, own in (("wrappers", model.wrappers), ("callbacks", model.callbacks)):
        merge_nested_dicts(options.setdefault(group, {}), own, copy_dict1=False)


def move_wrappers(model_options: dict, device: Any, dtype: torch.dtype | None = None) -> None:
    """Call `.to(device)` and `.to(dtype)` on wrappers and callbacks that are modules or otherwise own tensors."""
    options = model_options.get("transformer_options", {})
    for group in ("wrappers", "callbacks"):
        for keys in options.get(group, {}).values():
            for function in (function for functions in keys.values() for function in functions):
                for target in (device, dtype):
                    if target is not None and hasattr(function, "to"):
                        function.to(target)
