"""32 real pictures that the tiny model was not trained on: `bench/pictures/held_out.png`, eight to a row, 64×64, on white.

    python bench/held_out.py --twitter emoji-datasource-twitter-16.0.0.tgz --google emoji-datasource-google-16.0.0.tgz

makes the sheet again from the two packages (`npm pack emoji-datasource-twitter@16.0.0` fetches one) and refuses to where a picture is not
the one whose hash stands in `held_out.csv`. That list holds name, style, caption and the SHA-256 of a picture's 64·64·3 bytes. A caption
says the nearest thing the model has words for; none of the names is among the 125 it learned. Licences: bench/pictures/README.md.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy
from PIL import Image

FOLDER = Path(__file__).with_name("pictures")
SHEET, LIST = FOLDER / "held_out.png", FOLDER / "held_out.csv"
SIDE, PER_ROW = 64, 8
PACKAGES = {"twemoji": "twitter", "noto": "google"}


@dataclass(frozen=True)
class HeldOut:
    """name: the emoji's short name in the package; style: twemoji or noto; caption: the prompt; sha256: of the RGB bytes."""

    name: str
    style: str
    caption: str
    sha256: str


def held_out() -> list[HeldOut]:
    """The list, in the order of the sheet."""
    with open(LIST, newline="") as file:
        return [HeldOut(**row) for row in csv.DictReader(file)]


def load_held_out() -> list[tuple[HeldOut, numpy.ndarray]]:
    """Every picture of the sheet, `(64, 64, 3)` uint8.

    Raises: ValueError when one is not the picture of the list.
    """
    with Image.open(SHEET) as sheet:
        pixels = numpy.asarray(sheet.convert("RGB"))
    found = []
    for place, entry in enumerate(held_out()):
        top, left = SIDE * (place // PER_ROW), SIDE * (place % PER_ROW)
        picture = pixels[top : top + SIDE, left : left + SIDE]
        check(entry, picture)
        found.append((entry, picture))
    return found


def check(entry: HeldOut, picture: numpy.ndarray) -> None:
    digest = hashlib.sha256(numpy.ascontiguousarray(picture).tobytes()).hexdigest()
    if entry.sha256 != digest:
        raise ValueError(f"{entry.style} {entry.name}: the picture's hash is {digest}, the list says {entry.sha256}")


def from_package(archive: tarfile.TarFile, package: str, names: list[str]) -> list[numpy.ndarray]:
    """The 64-pixel pictures of these short names, composed on white."""
    files = {name: entry["image"] for entry in json.load(archive.extractfile("package/emoji.json")) for name in entry["short_names"]}
    pictures = []
    for name in names:
        with Image.open(io.BytesIO(archive.extractfile(f"package/img/{package}/64/{files[name]}").read())) as picture:
            rgba = picture.convert("RGBA")
        paper = Image.new("RGBA", rgba.size, "white")
        pictures.append(numpy.asarray(Image.alpha_composite(paper, rgba).convert("RGB")))
    return pictures


def build(archives: dict[str, Path]) -> None:
    """Write the sheet from the packages, style → file."""
    entries, pictures = held_out(), {}
    for style, path in archives.items():
        mine = [entry for entry in entries if entry.style == style]
        with tarfile.open(path) as archive:
            for entry, picture in zip(mine, from_package(archive, PACKAGES[style], [entry.name for entry in mine]), strict=True):
                check(entry, picture)
                pictures[entry] = picture
    rows = [numpy.concatenate([pictures[entry] for entry in entries[at : at + PER_ROW]], 1) for at in range(0, len(entries), PER_ROW)]
    Image.fromarray(numpy.concatenate(rows)).save(SHEET, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for package in PACKAGES.values():
        parser.add_argument(f"--{package}", type=Path, required=True, help=f"the archive of emoji-datasource-{package} 16.0.0")
    arguments = parser.parse_args()
    build({style: getattr(arguments, package) for style, package in PACKAGES.items()})


if __name__ == "__main__":
    main()
