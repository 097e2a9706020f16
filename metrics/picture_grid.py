"""Pictures side by side with a caption under each: the layout that comparisons and reports share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

__all__ = ["CellCaption", "GridLayout", "captions_for", "picture_grid"]

LINE_SPACING = 1.25  # line pitch in font sizes: Pillow's own font reaches from 0.25 below to 0.95 above its base line


@dataclass(frozen=True)
class GridLayout:
    """How a grid is drawn.

    columns: pictures in a row; 0 takes the smallest square that holds them all.
    scale: whole-number factor by which every picture is enlarged.
    method: "nearest" (pixels stay visible), "bilinear" or "bicubic".
    gap: pixels between pictures and around the grid.
    font_size: height of the captions in pixels.
    dark: light text on near-black instead of dark text on white.
    """

    columns: int = 0
    scale: int = 1
    method: str = "nearest"
    gap: int = 8
    font_size: int = 14
    dark: bool = False

    @property
    def paper(self) -> tuple[int, int, int]:
        return (24, 24, 27) if self.dark else (255, 255, 255)

    @property
    def ink(self) -> tuple[int, int, int]:
        return (235, 235, 235) if self.dark else (30, 30, 34)


@dataclass(frozen=True)
class CellCaption:
    """The lines of one caption, already broken to the width of the column."""

    lines: tuple[str, ...]


def captions_for(batch_sizes: Sequence[int], slots: Sequence[int], lines: Sequence[str]) -> list[str]:
    """One caption a picture from the lines a user wrote.

    Line k belongs to slot k (counted from 1), and the pictures of a batch share it, numbered; when a batch is present and
    there are exactly as many lines as pictures, each picture takes the next line instead.

    Args:
        batch_sizes: pictures in each slot that is in use.
        slots: the numbers of those slots, from 1.
        lines: the caption lines.
    """
    pictures = sum(batch_sizes)
    if len(lines) == pictures and max(batch_sizes) > 1:
        return list(lines)
    captions: list[str] = []
    for size, slot in zip(batch_sizes, slots):
        line = lines[slot - 1] if slot <= len(lines) else ""
        captions += [line] * size if size == 1 or not line else [f"{line} {number}" for number in range(1, size + 1)]
    return captions


def picture_grid(pictures: Sequence[Tensor], captions: Sequence[str], layout: GridLayout = GridLayout()) -> Tensor:
    """Lay pictures out in rows, each centred in its cell with its caption below.

    Args:
        pictures: tensors (h, w, 3) in 0…1, of any sizes; cells take the largest height and width.
        captions: one text a picture; without any text no room is left for captions.
        layout: columns, enlargement, spacing and colours.

    Returns:
        (1, H, W, 3) in 0…1, fp32 on the CPU.
    """
    cells = [_enlarged(picture, layout) for picture in pictures]
    height = max(cell.shape[0] for cell in cells)
    width = max(cell.shape[1] for cell in cells)
    columns = min(layout.columns or _square_side(len(cells)), len(cells))
    rows = -(-len(cells) // columns)
    broken = [_broken(caption, width, layout.font_size) for caption in captions]
    pitch = round(layout.font_size * LINE_SPACING)
    text_height = max((len(caption.lines) for caption in broken), default=0) * pitch

    paper = torch.tensor(layout.paper, dtype=torch.float32) / 255.0
    canvas = paper.expand(
        layout.gap + rows * (height + text_height + layout.gap), layout.gap + columns * (width + layout.gap), 3
    ).clone()  # (H, W, 3)
    for number, (cell, caption) in enumerate(zip(cells, broken)):
        top = layout.gap + number // columns * (height + text_height + layout.gap)
        left = layout.gap + number % columns * (width + layout.gap)
        y, x = top + (height - cell.shape[0]) // 2, left + (width - cell.shape[1]) // 2
        canvas[y : y + cell.shape[0], x : x + cell.shape[1]] = cell
        if caption.lines:
            canvas[top + height : top + height + text_height, left : left + width] = _drawn(caption, width, text_height, pitch, layout)
    return canvas.unsqueeze(0)


def _square_side(count: int) -> int:
    side = 1
    while side * side < count:
        side += 1
    return side


def _enlarged(picture: Tensor, layout: GridLayout) -> Tensor:
    picture = picture.detach().to("cpu", torch.float32)
    if layout.scale == 1:
        return picture.clamp(0.0, 1.0)
    smooth = {} if layout.method == "nearest" else {"align_corners": False}
    planes = interpolate(picture.movedim(-1, 0).unsqueeze(0), scale_factor=layout.scale, mode=layout.method, **smooth)  # (1, 3, h, w)
    return planes[0].movedim(0, -1).clamp(0.0, 1.0)  # bicubic overshoots


def _font(size: int):
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _broken(caption: str, width: int, font_size: int) -> CellCaption:
    """Break at spaces so that each line fits; a word longer than the column is cut with an ellipsis."""
    font = _font(font_size)
    lines: list[str] = []
    line = ""
    for word in caption.split():
        longer = f"{line} {word}".strip()
        if line and font.getlength(longer) > width:
            lines.append(line)
            longer = word
        line = longer
    if line:
        lines.append(line)
    return CellCaption(tuple(_fitted(text, width, font) for text in lines))


def _fitted(text: str, width: int, font) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _drawn(caption: CellCaption, width: int, height: int, pitch: int, layout: GridLayout) -> Tensor:
    import numpy
    from PIL import Image, ImageDraw

    strip = Image.new("RGB", (width, height), layout.paper)
    draw = ImageDraw.Draw(strip)
    font = _font(layout.font_size)
    for number, line in enumerate(caption.lines):
        draw.text(((width - font.getlength(line)) / 2, number * pitch), line, fill=layout.ink, font=font)
    return torch.from_numpy(numpy.asarray(strip, dtype=numpy.float32) / 255.0)  # (height, width, 3)
