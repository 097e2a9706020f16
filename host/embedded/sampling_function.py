"""From a latent and its conditions to one denoised prediction: areas, batches, guidance.

The conditions of one step are joined into as few model calls as shapes and free memory allow. A joined batch holds them in reverse
order, so the unconditional one comes first; when memory is short each takes its own call, in the same order.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from . import model_management
from .patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers, merge_nested_dicts
from .utils import repeat_to_batch_size

__all__ = [
    "CondChunk", "get_area_and_mult", "cond_equal_size", "can_concat_cond", "cond_cat", "calc_cond_batch", "cfg_function",
    "sampling_function", "add_area_dims",
]  # fmt: skip

WHOLE_AXIS = 2**31  # an area's size on an axis that it does not restrict
AREA_FEATHER = 8  # latent pixels over which an area's weight rises from its edge


class CondChunk(NamedTuple):
    """One condition, cut to its area and ready to be batched."""

    input_x: torch.Tensor
    mult: torch.Tensor
    conditioning: dict[str, Any]
    area: list[int] | None
    control: Any
    patches: dict | None
    uuid: Any
    hooks: Any


def add_area_dims(area: list[int], num_dims: int) -> list[int]:
    """Put unrestricted leading axes (sizes, then offsets) before an area of fewer dimensions than the latent."""
    present = len(area) // 2
    missing = max(0, num_dims - present)
    return [WHOLE_AXIS] * missing + list(area[:present]) + [0] * missing + list(area[present:])


def _narrow(tensor: torch.Tensor, area: list[int] | None, first_axis: int = 2) -> torch.Tensor:
    """The part of `tensor` inside `area` = [sizes…, offsets…]."""
    if area is not None:
        dims = len(area) // 2
        for axis in range(dims):
            tensor = tensor.narrow(first_axis + axis, area[dims + axis], area[axis])
    return tensor


def _resolve_area(cond: dict, shape: torch.Size) -> list[int] | None:
    """The condition's area clipped to the latent, or None for the whole of it."""
    if "area" not in cond:
        return None
    dims = len(shape) - 2
    area = add_area_dims(list(cond["area"]), dims)
    half = len(area) // 2
    area = area[:dims] + area[half : half + dims]
    for axis in range(dims):
        area[axis] = min(shape[axis + 2] - area[dims + axis], area[axis])
    return area


def _feather(mult: torch.Tensor, area: list[int], shape: torch.Size) -> None:
    """Let the weight rise over a few latent pixels at those edges of an area that lie inside the picture, in place."""
    dims = len(area) // 2
    for axis in range(dims):
        size, offset = area[axis], area[dims + axis]
        ramp = min(AREA_FEATHER, mult.shape[axis + 2] // 4)
        for depth in range(ramp):
            weight = (1.0 / ramp) * (depth + 1)
            if offset != 0:
                mult.narrow(axis + 2, depth, 1).mul_(weight)
            if size + offset < shape[axis + 2]:
                mult.narrow(axis + 2, size - 1 - depth, 1).mul_(weight)


def get_area_and_mult(conds: dict, x_in: torch.Tensor, timestep_in: torch.Tensor) -> CondChunk | None:
    """Cut the latent to the condition's area and weigh it; None when the condition does not hold at this sigma.

    Args:
        conds: one processed condition (timestep_start ≥ sigma ≥ timestep_end, area, strength, mask, mask_strength, model_conds).
        x_in: (b, c, …) in model latent space.
        timestep_in: sigmas (b,).
    """
    if timestep_in[0] > conds.get("timestep_start", math.inf) or timestep_in[0] < conds.get("timestep_end", -math.inf):
        return None
    area = _resolve_area(conds, x_in.shape)
    input_x = _narrow(x_in, area)
    strength = conds.get("strength", 1.0)
    if "mask" in conds:
        mask = _narrow(conds["mask"][: input_x.shape[0]], area, first_axis=1) * conds.get("mask_strength", 1.0)  # (b, …)
        mult = repeat_to_batch_size(mask, input_x.shape[0]).unsqueeze(1).expand(input_x.shape) * strength
    else:
        mult = torch.ones_like(input_x) * strength
        if area is not None:
            _feather(mult, area, x_in.shape)
    conditioning = {name: value.process_cond(batch_size=x_in.shape[0], area=area) for name, value in conds["model_conds"].items()}
    return CondChunk(input_x, mult, conditioning, area, conds.get("control"), None, conds["uuid"], conds.get("hooks"))


def cond_equal_size(c1: dict[str, Any], c2: dict[str, Any]) -> bool:
    """Whether two sets of model inputs can be joined."""
    return c1 is c2 or (c1.keys() == c2.keys() and all(value.can_concat(c2[name]) for name, value in c1.items()))


def can_concat_cond(c1: CondChunk, c2: CondChunk) -> bool:
    """Whether two conditions fit into one model call."""
    return (
        c1.input_x.shape == c2.input_x.shape
        and c1.control is c2.control
        and c1.patches is c2.patches
        and cond_equal_size(c1.conditioning, c2.conditioning)
    )


def cond_cat(c_list: list[dict[str, Any]]) -> dict[str, Any]:
    """Join model inputs name by name."""
    by_name = defaultdict(list)
    for inputs in c_list:
        for name, value in inputs.items():
            by_name[name].append(value)
    return {name: values[0].concat(values[1:]) for name, values in by_name.items()}


def _default_chunks(
    to_run: list[tuple[CondChunk, int]], defaults: list[list[dict]], x_in: torch.Tensor, timestep: torch.Tensor
) -> list[tuple[CondChunk, int]]:
    """Conditions marked "default" fill what the others of their kind leave uncovered."""
    chunks = []
    for kind, conds in enumerate(defaults):
        if not conds:
            continue
        uncovered = torch.ones_like(x_in)
        for chunk, chunk_kind in to_run:
            if chunk_kind == kind:
                _narrow(uncovered, chunk.area).sub_(chunk.mult)
        uncovered = F.relu(uncovered)
        if torch.any(uncovered > 0):
            found = (get_area_and_mult(cond, x_in, timestep) for cond in conds)
            chunks += [(chunk._replace(mult=_narrow(uncovered, chunk.area)), kind) for chunk in found if chunk is not None]
    return chunks


def _choose_batch(model: Any, to_run: list[tuple[CondChunk, int]], free_memory: float) -> list[int]:
    """Places in `to_run`, highest first, of the conditions that share the next model call.

    All that fit the first one when memory allows, else a half, a third, … of them, at last a single one.
    """
    first = to_run[0][0]
    fitting = [place for place, (chunk, _) in enumerate(to_run) if can_concat_cond(chunk, first)][::-1]
    for parts in range(1, len(fitting) + 1):
        batch = fitting[: len(fitting) // parts]
        cond_shapes = defaultdict(list)
        for place in batch:
            for name, value in to_run[place][0].conditioning.items():
                cond_shapes[name].append(value.size())
        shape = [len(batch) * first.input_x.shape[0], *first.input_x.shape[1:]]
        if model.memory_required(shape, cond_shapes=cond_shapes) * 1.5 < free_memory:
            return batch
    return fitting[:1]


def _transformer_options(model: Any, chunks: list[CondChunk], kinds: list[int], timestep: torch.Tensor, model_options: dict) -> dict:
    """The dict that blocks see, built anew for each model call."""
    options = model.current_patcher.apply_hooks(hooks=chunks[0].hooks)
    options = merge_nested_dicts(options, model_options.get("transformer_options", {}), copy_dict1=False)
    options["cond_or_uncond"] = list(kinds)
    options["uuids"] = [chunk.uuid for chunk in chunks]
    options["sigmas"] = timestep
    return options


def _run_batch(
    model: Any, chunks: list[CondChunk], kinds: list[int], timestep: torch.Tensor, model_options: dict
) -> tuple[torch.Tensor, ...]:
    """One model call over joined conditions; returns the denoised part of each."""
    input_x = torch.cat([chunk.input_x for chunk in chunks])  # (chunks·b, c, …)
    timesteps = torch.cat([timestep] * len(chunks))
    inputs = cond_cat([chunk.conditioning for chunk in chunks])
    options = _transformer_options(model, chunks, kinds, timestep, model_options)
    inputs["transformer_options"] = options
    control = chunks[0].control
    if control is not None:
        inputs["control"] = control.get_control(input_x, timesteps, inputs, len(chunks), options)
    if "model_function_wrapper" in model_options:
        call = {"input": input_x, "timestep": timesteps, "c": inputs, "cond_or_uncond": list(kinds)}
        output = model_options["model_function_wrapper"](model.apply_model, call)
    else:
        output = model.apply_model(input_x, timesteps, **inputs)
    return output.chunk(len(chunks))


def calc_cond_batch(model: Any, conds: list[list[dict] | None], x_in: torch.Tensor, timestep: torch.Tensor, model_options: dict) -> list:
    """The denoised prediction of each list of conditions; zeros for None.

    Where conditions of one list overlap they are averaged by mask, strength and area weight.

    Args:
        model: the BaseModel, inside a run.
        conds: usually [positive, negative], each processed by `process_conds`.
        x_in: (b, c, …); timestep: sigmas (b,).
    """
    handler = model_options.get("context_handler")
    if handler is not None and handler.should_use_context(model, conds, x_in, timestep, model_options):
        return handler.execute(_calc_cond_batch_outer, model, conds, x_in, timestep, model_options)
    return _calc_cond_batch_outer(model, conds, x_in, timestep, model_options)


def _calc_cond_batch_outer(model: Any, conds: list, x_in: torch.Tensor, timestep: torch.Tensor, model_options: dict) -> list:
    wrappers = get_all_wrappers(WrappersMP.CALC_COND_BATCH, model_options, is_model_options=True)
    return WrapperExecutor.new_executor(_calc_cond_batch, wrappers).execute(model, conds, x_in, timestep, model_options)


def _calc_cond_batch(model: Any, conds: list, x_in: torch.Tensor, timestep: torch.Tensor, model_options: dict) -> list:
    totals = [torch.zeros_like(x_in) for _ in conds]
    weights = [torch.full_like(x_in, 1e-37) for _ in conds]  # not zero: uncovered places divide to 0
    to_run: list[tuple[CondChunk, int]] = []
    for kind, entries in enumerate(conds):
        for cond in entries or ():
            chunk = None if "default" in cond else get_area_and_mult(cond, x_in, timestep)
            if chunk is not None:
                to_run.append((chunk, kind))
    defaults = [[cond for cond in entries or () if "default" in cond] for entries in conds]
    to_run += _default_chunks(to_run, defaults, x_in, timestep)
    model.current_patcher.prepare_state(timestep)

    while to_run:
        batch = [to_run.pop(place) for place in _choose_batch(model, to_run, model_management.get_free_memory(x_in.device))]
        chunks, kinds = [chunk for chunk, _ in batch], [kind for _, kind in batch]
        for output, chunk, kind in zip(_run_batch(model, chunks, kinds, timestep, model_options), chunks, kinds):
            _narrow(totals[kind], chunk.area).add_(output * chunk.mult)
            _narrow(weights[kind], chunk.area).add_(chunk.mult)
    return [total.div_(weight) for total, weight in zip(totals, weights)]


def cfg_function(
    model: Any, cond_pred: torch.Tensor, uncond_pred: torch.Tensor, cond_scale: float, x: torch.Tensor, timestep: torch.Tensor,
    model_options: dict | None = None, cond: Any = None, uncond: Any = None,
) -> torch.Tensor:  # fmt: skip
    """Classifier-free guidance (Ho & Salimans 2022): uncond + scale·(cond − uncond), with the hooks that replace and follow it.

    A `sampler_cfg_function` sees and returns differences from x (x − denoised); post functions see and return denoised.
    """
    model_options = model_options or {}
    common = {
        "cond_scale": cond_scale, "sigma": timestep, "input": x, "model": model, "model_options": model_options,
        "cond_denoised": cond_pred, "uncond_denoised": uncond_pred,
    }  # fmt: skip
    if "sampler_cfg_function" in model_options:
        differences = {"cond": x - cond_pred, "uncond": x - uncond_pred, "timestep": timestep, "input_cond": cond, "input_uncond": uncond}
        denoised = x - model_options["sampler_cfg_function"]({**common, **differences})
    else:
        denoised = uncond_pred + (cond_pred - uncond_pred) * cond_scale
    for function in model_options.get("sampler_post_cfg_function", []):
        denoised = function({**common, "denoised": denoised, "cond": cond, "uncond": uncond})
    return denoised


def sampling_function(
    model: Any, x: torch.Tensor, timestep: torch.Tensor, uncond: Any, cond: Any, cond_scale: float,
    model_options: dict | None = None, seed: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """The guided denoised prediction. At scale 1 the unconditional one is not computed, unless `disable_cfg1_optimization` is set."""
    model_options = model_options or {}
    skip_uncond = math.isclose(cond_scale, 1.0) and not model_options.get("disable_cfg1_optimization", False)
    conds = [cond, None if skip_uncond else uncond]
    if "sampler_calc_cond_batch_function" in model_options:
        args = {"conds": conds, "input": x, "sigma": timestep, "model": model, "model_options": model_options}
        predictions = model_options["sampler_calc_cond_batch_function"](args)
    else:
        predictions = calc_cond_batch(model, conds, x, timestep, model_options)
    for function in model_options.get("sampler_pre_cfg_function", []):
        predictions = function(
            {
                "conds": conds, "conds_out": predictions, "cond_scale": cond_scale, "timestep": timestep, "input": x, "sigma": timestep,
                "model": model, "model_options": model_options,
            }
        )  # fmt: skip
    return cfg_function(model, predictions[0], predictions[1], cond_scale, x, timestep, model_options, cond=cond, uncond=conds[1])
