"""Pictures palette: the labelled grid that comparisons end in, and the example pictures that ship with the graphs."""

from __future__ import annotations

from ..errors import input_error
from .declare import Node, Output, boolean, choice, integer, socket, text

SLOTS = 8
# The largest side of a grid: ComfyUI's own limit for a picture's side.
MAX_SIDE = 16384


class RectiflowPictureGrid(Node):
    """Lays up to eight pictures or batches out side by side, each with a caption under it."""

    TITLE = "Picture Grid"
    GROUP = "pictures"
    SEARCH_ALIASES = ["compare", "side by side", "contact sheet", "XY plot"]
    INPUTS = (
        text(
            "labels",
            "",
            "One caption a line: line 1 belongs to image_1 and so on. When batches are linked and there are as many lines as pictures, "
            "each picture takes a line.",
            multiline=True,
        ),
        integer("columns", 0, 0, 64, "Pictures in a row; 0 chooses a square."),
        integer("scale", 4, 1, 32, "Enlarges every picture by this whole number."),
        choice("method", ("nearest", "bilinear", "bicubic"), "How pictures are enlarged; nearest keeps single pixels visible."),
        integer("gap", 8, 0, 256, "Pixels between the pictures.", advanced=True),
        integer("font_size", 16, 6, 128, "Height of the captions in pixels.", advanced=True),
        boolean("dark", False, "Light captions on near-black instead of dark ones on white.", advanced=True),
        *(socket(f"image_{number}", "IMAGE", "A picture or a batch of pictures.", optional=True) for number in range(1, SLOTS + 1)),
    )
    OUTPUTS = (Output("IMAGE", "grid", "One picture that holds all of them."),)

    def run(self, labels: str, columns: int, scale: int, method: str, gap: int, font_size: int, dark: bool, **slots):
        from ..metrics.picture_grid import GridLayout, captions_for, picture_grid

        used = {number: slots[f"image_{number}"] for number in range(1, SLOTS + 1) if slots.get(f"image_{number}") is not None}
        pictures = [picture[..., :3] for batch in used.values() for picture in batch]
        if not pictures:
            raise input_error(self.TITLE, "image_1", None, f"1 to {SLOTS} linked pictures", "Link at least one IMAGE.")
        side = scale * max(max(picture.shape[:2]) for picture in pictures)
        across = columns or round(len(pictures) ** 0.5 + 0.49)
        if side * max(across, -(-len(pictures) // across)) > MAX_SIDE:
            allowed = f"a grid of at most {MAX_SIDE} pixels a side"
            raise input_error(self.TITLE, "scale", scale, allowed, "Lower the scale or change the columns.")
        lines = [line.strip() for line in labels.strip("\n").split("\n")]
        captions = captions_for([len(batch) for batch in used.values()], tuple(used), lines)
        return (picture_grid(pictures, captions, GridLayout(columns, scale, method, gap, font_size, dark)),)


class RectiflowExamplePicture(Node):
    """A 64×64 picture that ships with Rectiflow, and the region of it that the inpainting example repaints."""

    TITLE = "Example Picture"
    GROUP = "pictures"
    SEARCH_ALIASES = ["sample image", "test picture"]
    INPUTS = (choice("picture", ("smiling cat", "smiling face"), "Pictures of the Noto set that the tiny model was not trained on."),)
    OUTPUTS = (
        Output("IMAGE", "image", "The picture on white, 64×64."),
        Output("MASK", "mask", "1 where the example repaints: the upper part of the face."),
    )

    def run(self, picture: str):
        from ..tiny.pictures import load_picture

        return load_picture(picture)
