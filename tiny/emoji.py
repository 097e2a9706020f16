"""The training pictures of the tiny model: two emoji sets, composed on six backgrounds.

Sources (npm): emoji-datasource-twitter 16.0.0 (Twemoji graphics, CC BY 4.0, copyright Twitter, Inc and other contributors) and
emoji-datasource-google 16.0.0 (Noto Emoji, Apache License 2.0, copyright Google). docs/training.md says how to get them.

A picture is resized once to every size that a zoom may ask for, premultiplied by its opacity; a batch then costs a copy and one
blend a picture: rgb = premultiplied + (1 − opacity) · background.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import input_error
from .text import COLOURS, STYLES

__all__ = ["BACKGROUNDS", "EMOJI_SETS", "Emoji", "EmojiLook", "load_emoji"]

FRAME = 64
# Style → (folder of the npm package, name of its set of pictures).
EMOJI_SETS = {"twemoji": ("emoji-datasource-twitter", "twitter"), "noto": ("emoji-datasource-google", "google")}
BACKGROUNDS = {
    "white": (255, 255, 255), "red": (214, 48, 49), "blue": (52, 120, 220),
    "green": (60, 170, 80), "yellow": (250, 205, 60), "black": (30, 30, 34),
}  # fmt: skip


@dataclass(frozen=True)
class EmojiLook:
    """How a picture may be varied.

    largest_zoom: the picture is drawn at 1/zoom of the frame, zoom from 1 to this, and placed anywhere inside.
    mirror: probability of a mirrored picture. white: probability of the white background before the even draw of all six.
    """

    largest_zoom: float = 1.25
    mirror: float = 0.5
    white: float = 0.5

    def __post_init__(self):
        if not 1.0 <= self.largest_zoom <= 4.0:
            raise input_error("tiny recipe", "largest_zoom", self.largest_zoom, "1 to 4", "Choose how small a picture may get.")
        for name in ("mirror", "white"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise input_error("tiny recipe", name, getattr(self, name), "0 to 1", "Give a probability.")


@dataclass(frozen=True)
class Emoji:
    """Every picture at every size.

    sizes: sides in pixels, ascending up to 64. pixels: for each side s a (pictures, 4, s, s) tensor of premultiplied rgb and
    opacity, uint8. things: the words of each picture. styles: row of STYLES of each picture. digest: hash of all pixels.
    """

    sizes: tuple[int, ...]
    pixels: tuple[Tensor, ...]
    things: tuple[str, ...]
    styles: tuple[int, ...]
    digest: str

    def __len__(self) -> int:
        return len(self.things)

    def compose(self, rows: Tensor, look: EmojiLook, generator: torch.Generator) -> tuple[Tensor, list[str]]:
        """Pictures of `rows` (b,) → rgb (b, 3, 64, 64) in [−1, 1] and their captions, such as "noto cat on blue"."""
        # A fixed number of draws a picture, so that what one option uses never moves another's numbers.
        draws = torch.rand((len(rows), 6), generator=generator)
        layers = torch.zeros((len(rows), 4, FRAME, FRAME), dtype=torch.uint8)
        colours = []
        for at, (row, (size, left, top, mirror, white, colour)) in enumerate(zip(rows.tolist(), draws.tolist())):
            index = min(int(size * len(self.sizes)), len(self.sizes) - 1)
            room = FRAME - self.sizes[index]
            left, top = (min(int(place * (room + 1)), room) for place in (left, top))
            picture = self.pixels[index][row]
            layers[at, :, top : top + self.sizes[index], left : left + self.sizes[index]] = (
                picture.flip(-1) if mirror < look.mirror else picture
            )
            colours.append(COLOURS[0] if white < look.white else COLOURS[int(colour * len(COLOURS))])
        paper = torch.tensor([BACKGROUNDS[name] for name in colours], dtype=torch.float32)[:, :, None, None] / 255.0
        layers = layers.float() / 255.0
        rgb = (layers[:, :3] + (1.0 - layers[:, 3:]) * paper).clamp_(0.0, 1.0)  # resizing with Lanczos rings a little
        captions = [f"{STYLES[self.styles[row]]} {self.things[row]} on {name}" for row, name in zip(rows.tolist(), colours)]
        return rgb * 2.0 - 1.0, captions


def load_emoji(folder: Path, things: Mapping[str, str], look: EmojiLook) -> Emoji:
    """Read the pictures of `things` (words → short name of the emoji) in both sets.

    Args:
        folder: holds the two unpacked packages, `emoji-datasource-twitter` and `emoji-datasource-google`.

    Raises: NodeInputError that names what is missing and how to get it.
    """
    smallest = round(FRAME / look.largest_zoom)
    sizes = tuple(range(smallest, FRAME + 1))
    per_size: list[list[Tensor]] = [[] for _ in sizes]
    words, styles, digest = [], [], hashlib.sha256()
    for style, name in enumerate(STYLES):
        package, set_name = EMOJI_SETS[name]
        files = _picture_files(folder / package, set_name)
        for thing, short_name in things.items():
            if short_name not in files:
                raise input_error("tiny recipe", "vocabulary", short_name, f"a short name of {package} 16.0.0", "Correct the vocabulary.")
            for place, layer in zip(per_size, _sized(files[short_name], sizes)):
                place.append(layer)
            digest.update(per_size[-1][-1].numpy().tobytes())
            words.append(thing)
            styles.append(style)
    return Emoji(sizes, tuple(torch.stack(layers) for layers in per_size), tuple(words), tuple(styles), digest.hexdigest())


def _picture_files(package: Path, set_name: str) -> dict[str, Path]:
    """Short name → PNG of 64 pixels."""
    table = package / "emoji.json"
    if not table.is_file():
        remedy = (
            f"Get it with `npm pack {package.name}@16.0.0` and unpack it: "
            f"`mkdir -p {package} && tar xzf {package.name}-16.0.0.tgz --strip-components=1 -C {package}`."
        )
        raise input_error("tiny recipe", "pictures", str(package), "the folder of the unpacked npm package, with emoji.json in it", remedy)
    rows = json.loads(table.read_text(encoding="utf-8"))
    folder = package / "img" / set_name / "64"
    return {short: folder / row["image"] for row in rows for short in row["short_names"]}


def _sized(file: Path, sizes: tuple[int, ...]) -> list[Tensor]:
    """The picture at every size: premultiplied rgb and opacity (4, s, s), uint8."""
    import numpy
    from PIL import Image

    with Image.open(file) as picture:
        flat = picture.convert("RGBA").convert("RGBa")
        if flat.size != (FRAME, FRAME):
            raise input_error("tiny recipe", "pictures", f"{file.name} of {flat.size}", "pictures of 64×64", "Use the 64-pixel set.")
        scaled = [flat if size == FRAME else flat.resize((size, size), Image.Resampling.LANCZOS) for size in sizes]
    return [torch.from_numpy(numpy.array(layer)).permute(2, 0, 1).contiguous() for layer in scaled]
