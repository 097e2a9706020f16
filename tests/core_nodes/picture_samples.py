"""Picture files of the kinds that LoadImage treats differently, made with Pillow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

EXIF_ORIENTATION = 0x0112


def levels(seed: int, height: int = 12, width: int = 18, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def write_samples(folder: Path) -> None:
    Image.fromarray(levels(1)).save(folder / "rgb.png")
    Image.fromarray(levels(2, channels=4)).save(folder / "rgba.png")
    Image.fromarray(levels(3)[..., 0]).save(folder / "grey.png")
    Image.fromarray(levels(4, channels=2)).save(folder / "grey_alpha.png")
    deep = levels(5)[..., 0].astype(np.uint16) * 257
    Image.fromarray(deep).save(folder / "grey16.png")
    Image.fromarray(deep.astype(np.int32)).save(folder / "grey32.tif")
    Image.fromarray(levels(6)[..., 0] > 127).save(folder / "bits.png")
    palette = Image.fromarray(levels(7)).quantize(16)
    palette.save(folder / "palette.png")
    palette.save(folder / "palette_transparent.png", transparency=3)
    Image.fromarray(levels(8)).convert("CMYK").save(folder / "cmyk.jpg")
    for orientation in (1, 3, 6, 8, 5):
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = orientation
        Image.fromarray(levels(9)).save(folder / f"turned_{orientation}.jpg", exif=exif)
    Image.fromarray(levels(10)).save(folder / "photo.webp", lossless=True)
    frames = [Image.fromarray(levels(20 + i)) for i in range(3)]
    frames[0].save(folder / "frames.gif", save_all=True, append_images=frames[1:], duration=50)
    frames[0].save(folder / "frames.webp", save_all=True, append_images=frames[1:], lossless=True)
    frames[0].save(folder / "pages.tif", save_all=True, append_images=[Image.fromarray(levels(30, 5, 5)), *frames[1:]])
    frames[0].save(folder / "stereo.mpo", format="MPO", save_all=True, append_images=frames[1:])
    clear = [Image.fromarray(levels(40 + i, channels=4)) for i in range(2)]
    clear[0].save(folder / "clear.png", save_all=True, append_images=clear[1:])
    whole = folder / "whole.jpg"
    Image.fromarray(levels(11, 64, 64)).save(whole, quality=95)
    (folder / "cut.jpg").write_bytes(whole.read_bytes()[:2500])
    (folder / "cut.png").write_bytes((folder / "rgb.png").read_bytes()[:-200])
