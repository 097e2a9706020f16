"""Progress, resizing and tensor helpers under ComfyUI's names."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .context import current_host
from .model_management import throw_exception_if_processing_interrupted
from .safetensors_file import load_torch_file

__all__ = [
    "ProgressBar", "common_upscale", "lanczos", "bislerp", "repeat_to_batch_size", "resize_to_batch_size", "reshape_mask",
    "upscale_dit_mask", "get_attr", "set_attr", "set_attr_param", "copy_to_param", "load_torch_file", "calculate_parameters",
    "weight_dtype", "state_dict_prefix_replace", "tiled_scale", "tiled_scale_multidim", "get_tiled_scale_steps",
]  # fmt: skip


class ProgressBar:
    """Reports the progress of one node to the host that is current where the bar is made.

    Each update first looks at the interrupt flag, so that a node that only moves its bar can be stopped too.
    """

    def __init__(self, total: int, node_id: str | None = None):
        self.total = total
        self.current = 0
        self.node_id = node_id
        self.hook = current_host().progress_hook

    def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
        """`preview` is ("JPEG" or "PNG", PIL image, largest side in pixels) or None."""
        throw_exception_if_processing_interrupted()
        if total is not None:
            self.total = total
        self.current = min(value, self.total)
        if self.hook is not None:
            self.hook(self.current, self.total, preview, node_id=self.node_id)

    def update(self, value: int) -> None:
        self.update_absolute(self.current + value)


# Resizing -----------------------------------------------------------------------------------------------------------------


def lanczos(samples: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """Lanczos resize of (b, c, h, w) in 0..1 through 8-bit Pillow pictures."""
    resized = []
    for sample in samples:
        pixels = np.clip(255.0 * sample.movedim(0, -1).cpu().numpy(), 0, 255).astype(np.uint8)
        picture = Image.fromarray(pixels).resize((width, height), resample=Image.Resampling.LANCZOS)
        resized.append(torch.from_numpy(np.array(picture).astype(np.float32) / 255.0).movedim(-1, 0))
    return torch.stack(resized).to(samples.device, samples.dtype)


def _slerp(start: torch.Tensor, end: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
    """Turn from `start` to `end` (n, c) by `ratio` (n, 1): directions on the arc between them, lengths on the line."""
    length_start, length_end = start.norm(dim=-1, keepdim=True), end.norm(dim=-1, keepdim=True)
    unit_start = torch.where(length_start == 0, 0, start / length_start)
    unit_end = torch.where(length_end == 0, 0, end / length_end)
    cosine = (unit_start * unit_end).sum(1, keepdim=True)  # (n, 1)
    angle = torch.acos(cosine)
    direction = (torch.sin((1 - ratio) * angle) * unit_start + torch.sin(ratio * angle) * unit_end) / torch.sin(angle)
    turned = direction * (length_start * (1 - ratio) + length_end * ratio)
    turned = torch.where(cosine > 1 - 1e-5, start, turned)  # the same direction: no arc
    return torch.where(cosine < 1e-5 - 1, start * (1 - ratio) + end * ratio, turned)  # opposite: every arc is as good


def _slerp_axis(samples: torch.Tensor, new_size: int) -> torch.Tensor:
    """Stretch the last axis of (b, c, h, w) with neighbours blended by `_slerp` over the channels."""
    old_size = samples.shape[-1]
    positions = torch.arange(old_size, dtype=torch.float32, device=samples.device).reshape(1, 1, 1, -1)
    following = (positions + 1).clamp(max=old_size - 1)
    left = F.interpolate(positions, size=(1, new_size), mode="bilinear")
    right = F.interpolate(following, size=(1, new_size), mode="bilinear").to(torch.int64).flatten()
    ratio = (left - left.floor()).flatten()
    left = left.to(torch.int64).flatten()
    start = samples[..., left].movedim(1, -1)  # (b, h, new, c)
    end = samples[..., right].movedim(1, -1)
    ratio = ratio.expand(start.shape[:-1]).reshape(-1, 1)
    channels = samples.shape[1]
    return _slerp(start.reshape(-1, channels), end.reshape(-1, channels), ratio).reshape(start.shape).movedim(-1, 1)


def bislerp(samples: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """Bilinear resize of (b, c, h, w) with spherical blending of the channel vectors, which keeps a latent's contrast."""
    stretched = _slerp_axis(samples.float(), width)
    return _slerp_axis(stretched.transpose(-1, -2), height).transpose(-1, -2).to(samples.dtype)


def _centre_crop(samples: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """The largest middle part with the aspect of width × height."""
    old_width, old_height = samples.shape[-1], samples.shape[-2]
    old_aspect, new_aspect = old_width / old_height, width / height
    left = round((old_width - old_width * (new_aspect / old_aspect)) / 2) if old_aspect > new_aspect else 0
    top = round((old_height - old_height * (old_aspect / new_aspect)) / 2) if old_aspect < new_aspect else 0
    return samples.narrow(-2, top, old_height - 2 * top).narrow(-1, left, old_width - 2 * left)


def common_upscale(samples: torch.Tensor, width: int, height: int, upscale_method: str, crop: str) -> torch.Tensor:
    """Resize the last two axes of (b, c, h, w) or (b, c, t, h, w).

    upscale_method: "bislerp", "lanczos" or a mode of torch's interpolate; crop: "center", or anything else for none.
    """
    frames = None
    if samples.ndim > 4:
        batch, channels = samples.shape[:2]
        frames = samples.shape[2:-2]
        samples = samples.reshape(batch, channels, -1, *samples.shape[-2:]).movedim(2, 1)
        samples = samples.reshape(-1, channels, *samples.shape[-2:])  # (b·t, c, h, w)
    if crop == "center":
        samples = _centre_crop(samples, width, height)
    if upscale_method == "bislerp":
        resized = bislerp(samples, width, height)
    elif upscale_method == "lanczos":
        resized = lanczos(samples, width, height)
    else:
        resized = F.interpolate(samples, size=(height, width), mode=upscale_method)
    if frames is None:
        return resized
    resized = resized.reshape(batch, -1, channels, height, width).movedim(2, 1)
    return resized.reshape(batch, channels, *frames, height, width)


# Batches and masks --------------------------------------------------------------------------------------------------------


def repeat_to_batch_size(tensor: torch.Tensor, batch_size: int, dim: int = 0) -> torch.Tensor:
    """Cut `dim` to `batch_size`, or fill it by repeating the tensor from its start."""
    present = tensor.shape[dim]
    if present < batch_size:
        repeats = [1] * tensor.ndim
        repeats[dim] = math.ceil(batch_size / present)
        tensor = tensor.repeat(repeats)
    return tensor if tensor.shape[dim] == batch_size else tensor.narrow(dim, 0, batch_size)


def resize_to_batch_size(tensor: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Pick entries of the batch so that `batch_size` of them are spread evenly over the old ones."""
    present = tensor.shape[0]
    if present == batch_size or batch_size <= 1:
        return tensor[:batch_size]
    if batch_size < present:
        scale = (present - 1) / (batch_size - 1)
        chosen = [min(round(i * scale), present - 1) for i in range(batch_size)]
    else:
        scale = present / batch_size
        chosen = [min(math.floor((i + 0.5) * scale), present - 1) for i in range(batch_size)]
    return tensor[chosen]


_MASK_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


def reshape_mask(input_mask: torch.Tensor, output_shape: Sequence[int]) -> torch.Tensor:
    """Bring a mask to the latent's `output_shape`: resized, repeated over channels and batch."""
    dims = len(output_shape) - 2
    if dims == 2:
        input_mask = input_mask.reshape((-1, 1) + tuple(input_mask.shape[-2:]))
    elif dims == 3 and input_mask.ndim < 5:
        input_mask = input_mask.reshape((1, 1, -1) + tuple(input_mask.shape[-2:]))
    mask = F.interpolate(input_mask, size=tuple(output_shape[2:]), mode=_MASK_MODES[dims])
    if mask.shape[1] < output_shape[1]:
        mask = mask.repeat((1, output_shape[1]) + (1,) * dims)[:, : output_shape[1]]
    return repeat_to_batch_size(mask, output_shape[0])


def upscale_dit_mask(mask: torch.Tensor, img_size_in: tuple[int, int], img_size_out: tuple[int, int]) -> torch.Tensor:
    """Resize the image part of an attention mask (b, q, k) or (q, k) over [text, image] tokens to another token grid."""
    if tuple(img_size_in) == tuple(img_size_out):
        return mask
    if mask.ndim == 2:
        mask = mask.unsqueeze(0)
    if mask.ndim != 3:
        raise ValueError(f"an attention mask is (b, q, k) or (q, k), not {list(mask.shape)}")
    text = mask.shape[1] - img_size_in[0] * img_size_in[1]

    def resize_last(part: torch.Tensor) -> torch.Tensor:  # (b, n, h·w) → (b, n, h'·w')
        grid = part.unflatten(-1, tuple(img_size_in))
        return F.interpolate(grid, size=tuple(img_size_out), mode="bilinear").flatten(-2)

    over_keys = torch.cat([mask[:, :, :text], resize_last(mask[:, :, text:])], dim=2)
    image_rows = resize_last(over_keys[:, text:].transpose(1, 2)).transpose(1, 2)
    return torch.cat([over_keys[:, :text], image_rows], dim=1)


# Dotted attributes and state dicts ----------------------------------------------------------------------------------------


def get_attr(obj: Any, attr: str) -> Any:
    """`get_attr(model, "diffusion_model.img_in.weight")`."""
    for name in attr.split("."):
        obj = getattr(obj, name)
    return obj


def set_attr(obj: Any, attr: str, value: Any) -> Any:
    """Set a dotted attribute and return what it was."""
    path, _, name = attr.rpartition(".")
    owner = get_attr(obj, path) if path else obj
    previous = getattr(owner, name)
    setattr(owner, name, value)
    return previous


def set_attr_param(obj: Any, attr: str, value: torch.Tensor) -> Any:
    return set_attr(obj, attr, torch.nn.Parameter(value, requires_grad=False))


def copy_to_param(obj: Any, attr: str, value: torch.Tensor) -> None:
    """Overwrite a parameter's storage in place."""
    get_attr(obj, attr).data.copy_(value)


def calculate_parameters(sd: dict[str, torch.Tensor], prefix: str = "") -> int:
    return sum(tensor.nelement() for key, tensor in sd.items() if key.startswith(prefix))


def weight_dtype(sd: dict[str, torch.Tensor], prefix: str = "") -> torch.dtype | None:
    """The dtype that holds most of the state dict's elements; None for an empty one."""
    elements: dict[torch.dtype, int] = {}
    for key, tensor in sd.items():
        if key.startswith(prefix):
            elements[tensor.dtype] = elements.get(tensor.dtype, 0) + tensor.nelement()
    return max(elements, key=elements.get) if elements else None


def state_dict_prefix_replace(state_dict: dict, replace_prefix: dict[str, str], filter_keys: bool = False) -> dict:
    """Rename prefixes in place; with `filter_keys` return a new dict that holds the renamed entries only."""
    out = {} if filter_keys else state_dict
    for prefix, replacement in replace_prefix.items():
        for key in [key for key in state_dict if key.startswith(prefix)]:
            out[replacement + key[len(prefix) :]] = state_dict.pop(key)
    return out


# Tiles --------------------------------------------------------------------------------------------------------------------


def get_tiled_scale_steps(width: int, height: int, tile_x: int, tile_y: int, overlap: int) -> int:
    rows = 1 if height <= tile_y else math.ceil((height - overlap) / (tile_y - overlap))
    columns = 1 if width <= tile_x else math.ceil((width - overlap) / (tile_x - overlap))
    return rows * columns


def _tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    return list(range(0, size - overlap, tile - overlap)) if size > tile else [0]


def _feather(weight: torch.Tensor, width: int) -> None:
    """Let the tile's weight rise over `width` at both ends of each spatial axis, in place."""
    for axis in range(2, weight.ndim):
        if width < weight.shape[axis]:
            for depth in range(width):
                for place in (depth, weight.shape[axis] - 1 - depth):
                    weight.narrow(axis, place, 1).mul_((depth + 1) / width)


def tiled_scale_multidim(
    samples: torch.Tensor, function: Callable, tile: Sequence[int] = (64, 64), overlap: int = 8, upscale_amount: float = 4,
    out_channels: int = 3, output_device: Any = "cpu", pbar: ProgressBar | None = None,
) -> torch.Tensor:  # fmt: skip
    """Run `function` over overlapping tiles of (b, c, …) and blend the results.

    `upscale_amount` is output pixels per input pixel (1/8 for an encoder); `tile` and `overlap` are in input pixels.
    """
    sizes_out = [round(size * upscale_amount) for size in samples.shape[2:]]
    outputs = []
    for sample in samples.split(1):
        total = torch.zeros([1, out_channels, *sizes_out], device=output_device)
        weights = torch.zeros_like(total)
        starts = [_tile_starts(size, tile[axis], overlap) for axis, size in enumerate(sample.shape[2:])]
        for corner in torch.cartesian_prod(*(torch.tensor(axis) for axis in starts)).reshape(-1, len(starts)).tolist():
            part, view, view_weight = sample, total, weights
            for axis, start in enumerate(corner):
                start = max(0, min(sample.shape[axis + 2] - overlap, start))
                part = part.narrow(axis + 2, start, min(tile[axis], sample.shape[axis + 2] - start))
                corner[axis] = round(start * upscale_amount)
            result = function(part).to(output_device)
            weight = torch.ones_like(result)
            if any(len(axis) > 1 for axis in starts):
                _feather(weight, round(overlap * upscale_amount))
            for axis, start in enumerate(corner):
                view = view.narrow(axis + 2, start, result.shape[axis + 2])
                view_weight = view_weight.narrow(axis + 2, start, result.shape[axis + 2])
            view.add_(result * weight)
            view_weight.add_(weight)
            if pbar is not None:
                pbar.update(1)
        outputs.append(total / weights)
    return torch.cat(outputs)


def tiled_scale(
    samples: torch.Tensor, function: Callable, tile_x: int = 64, tile_y: int = 64, overlap: int = 8, upscale_amount: float = 4,
    out_channels: int = 3, output_device: Any = "cpu", pbar: ProgressBar | None = None,
) -> torch.Tensor:  # fmt: skip
    """`tiled_scale_multidim` over height and width."""
    return tiled_scale_multidim(samples, function, (tile_y, tile_x), overlap, upscale_amount, out_channels, output_device, pbar)
