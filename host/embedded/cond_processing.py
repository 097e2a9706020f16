"""What happens to conditions once, before the steps: areas and masks, sigma ranges, model inputs, control objects.

A processed condition is a flat dict; lists of them are held by name ("positive", "negative", or a guider's own names).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from .sampling_function import add_area_dims
from .utils import common_upscale

__all__ = [
    "process_conds", "resolve_areas_and_cond_masks_multidim", "calculate_start_end_timesteps", "encode_model_conds", "get_mask_aabb",
    "create_cond_with_same_area_if_none", "pre_run_control", "apply_empty_x_to_equal_area",
]  # fmt: skip

Cond = dict[str, Any]
MIN_AREA = 8  # latent pixels; smaller areas give the model too little to see


def get_mask_aabb(masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bounding boxes (b, 4) = (x0, y0, x1, y1), inclusive, of masks (b, h, w), and which masks are empty (b,)."""
    boxes = torch.zeros((masks.shape[0], 4), device=masks.device, dtype=torch.int)
    empty = torch.ones(masks.shape[0], device=masks.device, dtype=torch.bool)
    for i, mask in enumerate(masks):
        y, x = torch.where(mask != 0)
        if len(y):
            boxes[i] = torch.stack([x.min(), y.min(), x.max(), y.max()])
            empty[i] = False
    return boxes, empty


def _bounds_area(mask: torch.Tensor) -> tuple[int, int, int, int]:
    """(height, width, top, left) of the part of the picture that a mask (b, h, w) touches."""
    boxes, empty = get_mask_aabb(mask.abs().amax(dim=0, keepdim=True))
    if empty[0]:
        return MIN_AREA, MIN_AREA, 0, 0  # covers nothing anyway: the cheapest area will do
    left, top, right, bottom = boxes[0].tolist()
    return max(MIN_AREA, bottom - top + 1), max(MIN_AREA, right - left + 1), top, left


def resolve_areas_and_cond_masks_multidim(conditions: list[Cond], dims: tuple[int, ...], device: Any) -> None:
    """Turn relative areas into latent pixels and bring masks to the latent's size and device; replaces entries of the list."""
    dims = tuple(dims)
    for i, cond in enumerate(conditions):
        changed = dict(cond)
        if "area" in cond and cond["area"][0] == "percentage":
            shares = cond["area"][1:]
            half = len(shares) // 2
            sizes = tuple(max(1, round(shares[axis] * size)) for axis, size in enumerate(dims))
            changed["area"] = sizes + tuple(round(shares[axis + half] * size) for axis, size in enumerate(dims))
        if "mask" in cond:
            mask = cond["mask"].to(device=device)
            if mask.ndim == len(dims):
                mask = mask.unsqueeze(0)
            if tuple(mask.shape[1:]) != dims:
                channels = mask if mask.ndim >= 4 else mask.unsqueeze(1)
                channels = common_upscale(channels, dims[-1], dims[-2], "bilinear", "none")
                mask = channels if mask.ndim >= 4 else channels.squeeze(1)
            changed["mask"] = mask  # (b, h, w)
            if cond.get("set_area_to_bounds", False):
                changed["area"] = _bounds_area(mask)
        conditions[i] = changed


def _inside(area: list[int], other: list[int]) -> bool:
    """Whether `area` lies within `other`."""
    dims = max(len(area), len(other)) // 2
    area, other = add_area_dims(area, dims), add_area_dims(other, dims)
    starts = all(area[dims + axis] >= other[dims + axis] for axis in range(dims))
    return starts and all(area[axis] + area[dims + axis] <= other[axis] + other[dims + axis] for axis in range(dims))


def create_cond_with_same_area_if_none(conds: list[Cond], c: Cond) -> None:
    """Give the list a condition with the area of `c`, so that both sides of guidance see the same cut.

    It takes the model inputs of the smallest condition that covers the area; a condition without area covers everything.
    """
    if "area" not in c:
        return
    smallest = None
    for cond in conds:
        if "area" not in cond:
            smallest = smallest or cond
        elif _inside(c["area"], cond["area"]):
            size = math.prod(cond["area"][: len(cond["area"]) // 2])
            if smallest is None or "area" not in smallest or math.prod(smallest["area"][: len(smallest["area"]) // 2]) > size:
                smallest = cond
    if smallest is not None and smallest.get("area") != c["area"]:
        conds.append({**c, "model_conds": dict(smallest["model_conds"])})


def calculate_start_end_timesteps(model: Any, conds: list[Cond]) -> None:
    """Turn start_percent and end_percent (and a text encoder's own range) into sigmas; replaces entries of the list."""
    to_sigma = model.model_sampling.percent_to_sigma
    for i, cond in enumerate(conds):
        start, end = cond.get("start_percent"), cond.get("end_percent")
        if "clip_start_percent" in cond:
            start = max(cond["clip_start_percent"], 0.0 if start is None else start)
            end = min(cond["clip_end_percent"], 1.0 if end is None else end)
        limits = {}
        if start is not None:
            limits["timestep_start"] = to_sigma(start)
        if end is not None:
            limits["timestep_end"] = to_sigma(end)
        conds[i] = {**cond, **limits}


def encode_model_conds(
    model_function: Callable[..., dict], conds: list[Cond], noise: torch.Tensor, device: Any, prompt_type: str, **kwargs
) -> list[Cond]:
    """Ask the model for its inputs: every entry's dict, the latent's facts and `kwargs` go to `model.extra_conds`."""
    for i, cond in enumerate(conds):
        params = {**kwargs, **cond, "device": device, "noise": noise}
        params.setdefault("width", noise.shape[3] * 8 if noise.ndim >= 4 else None)
        params.setdefault("height", noise.shape[2] * 8)
        params.setdefault("prompt_type", prompt_type)
        conds[i] = {**cond, "model_conds": {**cond["model_conds"], **model_function(**params)}}
    return conds


def pre_run_control(model: Any, conds: list[Cond]) -> None:
    """Tell control objects the model and how percents become sigmas."""
    for cond in conds:
        if "control" in cond:
            cond["control"].pre_run(model, model.model_sampling.percent_to_sigma)


def apply_empty_x_to_equal_area(conds: list[Cond], uncond: list[Cond], name: str, uncond_fill_func: Callable) -> None:
    """Put what the positive side has under `name` on the negative side too, unless that has its own; areas are left out.

    With more sources than places the later ones win.
    """
    sources = [cond[name] for cond in conds if "area" not in cond and cond.get(name) is not None]
    places = [i for i, cond in enumerate(uncond) if "area" not in cond]
    if not sources or not places or any(uncond[i].get(name) is not None for i in places):
        return
    for source in range(len(sources)):
        place = places[source % len(places)]
        uncond[place] = {**uncond[place], name: uncond_fill_func(sources, source)}


def process_conds(
    model: Any, noise: torch.Tensor, conds: dict[str, list[Cond]], device: Any, latent_image: torch.Tensor | None = None,
    denoise_mask: torch.Tensor | None = None, seed: int | None = None,
) -> dict[str, list[Cond]]:  # fmt: skip
    """Prepare all conditions of a guider for `model`; the lists in `conds` are replaced, their dicts copied."""
    for name in conds:
        conds[name] = list(conds[name])
        resolve_areas_and_cond_masks_multidim(conds[name], noise.shape[2:], device)
    for entries in conds.values():
        calculate_start_end_timesteps(model, entries)
    if hasattr(model, "extra_conds"):
        for name, entries in conds.items():
            facts = {"latent_image": latent_image, "denoise_mask": denoise_mask, "seed": seed}
            conds[name] = encode_model_conds(model.extra_conds, entries, noise, device, name, **facts)
    for name, entries in conds.items():
        for cond in entries:
            for other in conds:
                if other != name:
                    create_cond_with_same_area_if_none(conds[other], cond)
    for entries in conds.values():
        pre_run_control(model, entries)
    for name in conds:
        if "positive" in conds and name != "positive":
            shared = [cond for cond in conds["positive"] if cond.get("control_apply_to_uncond", False)]
            apply_empty_x_to_equal_area(shared, conds[name], "control", lambda sources, i: sources[i])
    return conds
