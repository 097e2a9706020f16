"""Which positions of a video the flow makes and which are given: frame masks, block masks, and the way from pixels to latent cells.

Mask family of VDT, arXiv 2305.13311: one model predicts, interpolates, completes or draws freely under a binary mask. 1 means generate, 0
means given, as in ComfyUI's noise_mask. Given positions are presented to the model as samplers/known_part.py says.

A causal video codec turns pixel frame 0 into latent frame 0 and every further group of `stride` pixel frames into one latent frame. A
latent cell is given only if all its pixels are given in all its frames, so masks go from pixels to cells by the maximum. The cells' mask
is built here, 5-D, at the latent's own size: a host would smear a (t, h, w) pixel mask over time, since it resizes trilinearly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..errors import input_error

__all__ = [
    "COMBINATIONS", "TASKS", "Strides", "VideoMask", "block_mask", "build_mask", "combine_masks", "feathered", "latent_mask",
    "mask_report", "masked_velocity_loss", "parse_frames", "paste_known", "place_known", "training_mask",
]

TASKS = ("predict", "backward", "interpolate", "unconditional", "single_frame", "arbitrary", "spatial", "outpaint", "custom")
COMBINATIONS = ("union", "intersection", "difference", "invert")
ATTEMPTS = 10_000  # draws of a rectangle; a few dozen cover half of any grid that holds a block at all


@dataclass(frozen=True)
class Strides:
    """Pixels behind one latent cell: `time` frames (the first cell has one), `height`, `width`."""

    time: int = 4
    height: int = 8
    width: int = 8

    @classmethod
    def parse(cls, text: str) -> Strides:
        """From "4x8x8"."""
        return cls(*(int(part) for part in text.split("x")))

    def frames(self, latent_frames: int) -> int:
        return (latent_frames - 1) * self.time + 1

    def latent_frame(self, frame: int) -> int:
        """The latent frame that holds a pixel frame."""
        return -(-frame // self.time)


@dataclass(frozen=True)
class VideoMask:
    """What to generate. Frames are pixel frames; `min_block` counts latent cells; the random tasks draw from `seed` on the CPU.

    task:
        predict        all but the first `given` frames
        backward       all but the last `given` frames
        interpolate    all but frames 0, step, 2·step, …
        unconditional  everything
        single_frame   all but frame `frame_index` (−1: drawn)
        arbitrary      each frame with probability `p_generate`
        spatial        random blocks over `spatial_ratio` of the picture, the same in frames start_gap … T − end_gap − 1; other frames given
        outpaint       a border of `spatial_ratio` of the picture, in the same frames
        custom         all but the frames of `frame_list`
    """

    task: str = "predict"
    given: int = 8
    step: int = 4
    frame_index: int = -1
    frame_list: str = ""
    p_generate: float = 0.8
    spatial_ratio: float = 0.5
    min_block: int = 4
    start_gap: int = 0
    end_gap: int = 0
    seed: int = 0


def parse_frames(text: str, frames: int, where: str = "VideoMask") -> list[int]:
    """Frame numbers from "0,16,32-40,-1"; a negative number counts from the end, a range includes both ends.

    Raises:
        NodeInputError: something is no number, or lies outside 0 … frames − 1.
    """
    allowed = f"whole numbers from {-frames} to {frames - 1} and ranges such as 4-7, separated by commas"
    found: set[int] = set()
    for part in (part.strip() for part in text.split(",")):
        if not part:
            continue
        first, dash, last = part[1:].partition("-")
        try:
            start = int(part[0] + first)
            stop = int(last) if dash else start
        except ValueError:
            raise input_error(where, "frame_list", text, allowed, f"'{part}' is neither.") from None
        start, stop = (number + frames if number < 0 else number for number in (start, stop))
        if not 0 <= start <= stop < frames:
            raise input_error(where, "frame_list", text, allowed, f"'{part}' is not inside the video.")
        found.update(range(start, stop + 1))
    return sorted(found)


def build_mask(plan: VideoMask, latent_frames: int, height: int, width: int, strides: Strides, where: str = "VideoMask") -> torch.Tensor:
    """The mask of `plan` over pixel frames and latent cells, `(frames, height, width)` float32 of 0 and 1.

    Args:
        latent_frames, height, width: size of the latent; frames = (latent_frames − 1)·strides.time + 1.

    Raises:
        NodeInputError: unknown task, frames outside the video, a block larger than the share it may cover.
    """
    if plan.task not in TASKS:
        raise input_error(where, "task", plan.task, ", ".join(TASKS), "Pick one of them.")
    frames = strides.frames(latent_frames)
    generator = torch.Generator().manual_seed(plan.seed)
    if plan.task in ("spatial", "outpaint"):
        return _in_frames(plan, frames, _area(plan, height, width, generator, where), where)
    generated = torch.ones(frames)
    if plan.task == "predict":
        generated[: plan.given] = 0
    elif plan.task == "backward":
        generated[max(frames - plan.given, 0) :] = 0
    elif plan.task == "interpolate":
        generated[:: plan.step] = 0
    elif plan.task == "single_frame":
        generated[_one_frame(plan.frame_index, frames, generator, where)] = 0
    elif plan.task == "arbitrary":
        generated = (torch.rand(frames, generator=generator) < plan.p_generate).float()
    elif plan.task == "custom":
        generated[parse_frames(plan.frame_list, frames, where)] = 0
    return generated[:, None, None].expand(frames, height, width).clone()


def _one_frame(index: int, frames: int, generator: torch.Generator, where: str) -> int:
    if index >= frames:
        raise input_error(where, "frame_index", index, f"-1 (drawn) to {frames - 1}", "Choose a frame of this video.")
    return int(torch.randint(frames, (), generator=generator)) if index < 0 else index


def _area(plan: VideoMask, height: int, width: int, generator: torch.Generator, where: str) -> torch.Tensor:
    if plan.task == "spatial":
        return block_mask(height, width, plan.spatial_ratio, plan.min_block, generator, where)
    kept = math.sqrt(1 - plan.spatial_ratio)
    inner_height, inner_width = round(height * kept), round(width * kept)
    top, left = (height - inner_height) // 2, (width - inner_width) // 2
    border = torch.ones(height, width)
    border[top : top + inner_height, left : left + inner_width] = 0
    return border


def _in_frames(plan: VideoMask, frames: int, area: torch.Tensor, where: str) -> torch.Tensor:
    end = frames - plan.end_gap  # not a slice [a : −b], which is empty for b = 0
    if plan.start_gap >= end:
        got, remedy = (plan.start_gap, plan.end_gap), "Lower the gaps."
        raise input_error(where, "start_gap, end_gap", got, f"gaps that leave some of {frames} frames", remedy)
    mask = torch.zeros(frames, *area.shape)
    mask[plan.start_gap : end] = area
    return mask


def block_mask(
    height: int, width: int, ratio: float, min_block: int, generator: torch.Generator, where: str = "VideoMask"
) -> torch.Tensor:
    """Random rectangles until less than one smallest block is missing from `ratio` of the area: `(height, width)` of 0 and 1.

    Areas are uniform between `min_block` and what is missing, aspect ratios log-uniform in [0.3, 1/0.3].
    """
    mask = torch.zeros(height, width)
    wanted = round(ratio * height * width)
    if 0 < wanted < min_block:
        raise input_error(where, "min_block", min_block, f"1 to {wanted} cells (spatial_ratio of the latent)", "Use smaller blocks.")
    for _ in range(ATTEMPTS):
        missing = wanted - int(mask.sum())
        if missing < max(min_block, 1):
            return mask
        chance = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        area = min_block + chance[0] * (missing - min_block)
        aspect = 0.3 ** (1 - 2 * chance[1])
        rows, columns = max(round(math.sqrt(area * aspect)), 1), max(round(math.sqrt(area / aspect)), 1)
        if rows > height or columns > width:
            continue
        top, left = int(chance[2] * (height - rows + 1)), int(chance[3] * (width - columns + 1))
        block = mask[top : top + rows, left : left + columns]
        if int((block == 0).sum()) <= missing:
            block.fill_(1)
    got = f"{int(mask.sum())} of {wanted} cells covered"
    raise input_error(where, "min_block", got, "blocks that fit into the latent", "Use smaller blocks or another spatial_ratio.")


def latent_mask(pixels: torch.Tensor, latent_frames: int, height: int, width: int, where: str = "VideoMask") -> torch.Tensor:
    """A mask over pixel frames as one over latent cells: a cell is given only if all its pixels are.

    Args:
        pixels: `(frames, H, W)` or `(H, W)`, one frame that holds for all; H and W whole multiples of height and width (or equal to them).

    Returns:
        `(latent_frames, height, width)`, the maximum over each cell's pixels and frames.

    Raises:
        NodeInputError: the sizes do not divide, or the frames are not those of a causal codec.
    """
    pixels = pixels if pixels.ndim == 3 else pixels[None]
    frames, tall, wide = pixels.shape
    if tall % height or wide % width:
        allowed = f"height and width that are whole multiples of the latent's {height} and {width}"
        raise input_error(where, "mask", tuple(pixels.shape), allowed, "Make the mask at the size of the video.")
    pixels = F.max_pool2d(pixels[:, None].float(), (tall // height, wide // width))[:, 0]  # (frames, height, width)
    if frames == 1:
        return pixels.expand(latent_frames, height, width).clone()
    stride = (frames - 1) // max(latent_frames - 1, 1)
    if latent_frames == 1 or frames != (latent_frames - 1) * stride + 1:
        allowed = f"1 frame, or {latent_frames - 1}·n + 1 frames for a whole n (n = 4 for Wan and Hunyuan, 8 for LTX)"
        raise input_error(where, "mask", f"{frames} frames", allowed, "Make the mask with Video Mask from this latent.")
    groups = pixels[1:].reshape(latent_frames - 1, stride, height, width).amax(dim=1)
    return torch.cat([pixels[:1], groups])


def feathered(mask: torch.Tensor, cells: int) -> torch.Tensor:
    """Soften the edge inside the generated part: values rise from 1/(cells + 1) to 1 over `cells` cells; given cells stay 0.

    mask: `(t, h, w)`. Only rows and columns count, frames keep hard borders in time.
    """
    total, eroded = mask, mask
    for _ in range(cells):
        eroded = -F.max_pool2d(-eroded[:, None], 3, stride=1, padding=1)[:, 0]
        total = total + eroded
    return total / (cells + 1)


def combine_masks(kind: str, first: torch.Tensor, second: torch.Tensor | None, where: str = "VideoMaskCombine") -> torch.Tensor:
    """Two masks `(t, h, w)` as one: union (generate where either does), intersection, difference (first without second), invert (of first).

    A mask of one frame holds for all frames of the other.
    """
    if kind not in COMBINATIONS:
        raise input_error(where, "operation", kind, ", ".join(COMBINATIONS), "Pick one of them.")
    if kind == "invert":
        return 1 - first
    if second is None:
        raise input_error(where, "second", None, f"a MASK, since {kind} takes two", "Connect a second mask or choose invert.")
    if first.shape[1:] != second.shape[1:] or 1 not in (len(first), len(second)) and len(first) != len(second):
        remedy = "Make both masks from the same latent."
        raise input_error(where, "second", tuple(second.shape), f"the size of the first mask, {tuple(first.shape)}", remedy)
    first, second = torch.broadcast_tensors(first, second)
    other = 1 - second if kind == "difference" else second
    return torch.maximum(first, other) if kind == "union" else torch.minimum(first, other)


def mask_report(mask: torch.Tensor, cells: torch.Tensor) -> str:
    """Two lines on a mask: over pixel frames `(frames, h, w)` and over latent frames `(t, h, w)`."""

    def runs(given: list[int]) -> str:
        starts = [number for number in given if number - 1 not in given]
        ends = [number for number in given if number + 1 not in given]
        return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends)) or "none"

    def line(name: str, part: torch.Tensor) -> str:
        whole = [number for number, frame in enumerate(part) if not frame.any()]
        return f"{name}: {len(part)}, given whole: {runs(whole)}; generated: {100 * float(part.mean()):.1f} % of the cells"

    return line("pixel frames", mask) + "\n" + line("latent frames", cells)


def place_known(samples: torch.Tensor, known: torch.Tensor, mask: torch.Tensor, where: str = "VideoMask") -> torch.Tensor:
    """`samples` with the given frames taken from `known`.

    Args:
        samples: `(b, c, t, h, w)`.
        known: `(b or 1, c, k, h, w)`: k = t takes every position from `known`; k = number of latent frames with a given cell puts them
            there in their order (the first frames of a video that is to go on, the key frames of an interpolation).
        mask: `(t, h, w)`, 0 given.
    """
    places = (mask == 0).flatten(1).any(dim=1).nonzero().flatten()
    sizes_fit = known.ndim == samples.ndim and known.shape[3:] == samples.shape[3:] and known.shape[0] in (1, samples.shape[0])
    fits = sizes_fit and known.shape[2] in (samples.shape[2], len(places)) and (known.shape[1] == samples.shape[1] or not samples.any())
    if not fits:
        size = "×".join(map(str, samples.shape[3:]))
        allowed = f"{len(places)} frames (those given) or {samples.shape[2]} (all), of {size} cells and the same channels"
        raise input_error(where, "known", tuple(known.shape), allowed, "Encode as many frames as are given, at the size of the video.")
    known = known.to(samples).expand(samples.shape[0], *known.shape[1:])
    if known.shape[2] == samples.shape[2]:
        return known.clone()
    placed = samples.new_zeros(samples.shape[0], known.shape[1], *samples.shape[2:])
    if known.shape[1] == samples.shape[1]:
        placed.copy_(samples)
    placed[:, :, places] = known
    return placed


def paste_known(generated: torch.Tensor, known: torch.Tensor, mask: torch.Tensor, where: str = "PasteKnown") -> torch.Tensor:
    """generated·mask + known·(1 − mask); where the mask is 0 the known value bit for bit, where it is 1 the generated one.

    Args:
        generated, known: `(b, c, …)` of one shape (known may have batch 1). mask: broadcasts over them.
    """
    if generated.shape[1:] != known.shape[1:] or known.shape[0] not in (1, generated.shape[0]):
        allowed = f"the shape of the generated latent, {tuple(generated.shape)}"
        raise input_error(where, "known", tuple(known.shape), allowed, "Connect the latent that the run started from.")
    known, mask = known.to(generated), mask.to(generated)
    mixed = generated * mask + known * (1 - mask)
    return torch.where(mask == 0, known, torch.where(mask == 1, generated, mixed))


def training_mask(frames: int, height: int, width: int, generator: torch.Generator, min_block: int = 4) -> torch.Tensor:
    """A mask drawn as VDT trains: completion with probability 0.2, else one of the six frame tasks; `(frames, height, width)`.

    For a model's own frames and cells (no codec strides). Half the frames are given where VDT gives 8 of 16.
    """
    strides = Strides(1, 1, 1)
    seed = int(torch.randint(2**31, (), generator=generator))
    if float(torch.rand((), generator=generator)) < 0.2:
        gaps = torch.randint(4, (2,), generator=generator).clamp_max((frames - 1) // 2).tolist()
        plan = VideoMask("spatial", min_block=min_block, start_gap=gaps[0], end_gap=gaps[1], seed=seed)
    else:
        task = TASKS[int(torch.randint(6, (), generator=generator))]
        plan = VideoMask(task, given=frames // 2, seed=seed)
    return build_mask(plan, frames, height, width, strides, "training_mask")


def masked_velocity_loss(predicted: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean square error over generated positions only; averaging over all would reward copying.

    predicted, target: `(b, c, t, h, w)`; mask: broadcasts over them, 1 where the loss counts. 0 for a mask without such positions.
    """
    mask = mask.expand_as(predicted)
    return ((predicted - target) ** 2 * mask).sum() / mask.sum().clamp_min(1)
