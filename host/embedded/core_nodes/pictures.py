"""Nodes that load and save pictures. IMAGE is (b, h, w, c) in 0..1."""

from __future__ import annotations

import os
import secrets
import time

from .. import folder_paths
from ..context import current_host
from .declare import IMAGE, MASK, CoreNode, combo, text, tip

_HIDDEN = {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"}


def input_files(content_types: tuple[str, ...] = ()) -> list[str]:
    """Files at the top of the input folder, sorted; links that lead out of it are not offered, since they would be refused."""
    folder = folder_paths.get_input_directory()
    if not os.path.isdir(folder):
        return []
    with os.scandir(folder) as entries:
        inside = (entry for entry in entries if not entry.is_symlink() or folder_paths.is_inside(folder, entry.path))
        names = sorted(entry.name for entry in inside if entry.is_file())
    return folder_paths.filter_files_content_types(names, content_types) if content_types else names


class _PictureReader(CoreNode):
    """What every node with a picture file as its input needs: the file's content is its change token."""

    @classmethod
    def IS_CHANGED(cls, image, **_):
        from .picture_files import file_digest, picture_path

        return file_digest(picture_path(cls.DISPLAY_NAME, "image", image))

    @classmethod
    def VALIDATE_INPUTS(cls, image):
        return True if folder_paths.exists_annotated_filepath(image) else f"Invalid image file: {image}"


class LoadImage(_PictureReader):
    """A picture file as IMAGE, and its transparency as MASK; animations become a batch."""

    DISPLAY_NAME = "Load Image"
    CATEGORY = "image"
    REQUIRED = {"image": lambda: combo(*input_files(("image",)), image_upload=True)}
    RETURN_TYPES = ("IMAGE", "MASK")
    FUNCTION = "load_image"

    def load_image(self, image):
        from .picture_files import read_frames

        return read_frames(self.DISPLAY_NAME, "image", image)


class LoadImageOutput(LoadImage):
    """LoadImage for the output folder; the interface fetches the list of files."""

    DISPLAY_NAME = "Load Image (from Outputs)"
    DESCRIPTION = (
        "Load an image from the output folder. When the refresh button is clicked, the node will update the image list and "
        "automatically select the first image, allowing for easy iteration."
    )
    EXPERIMENTAL = True
    REQUIRED = {
        "image": (
            "COMBO",
            {
                "image_upload": True,
                "image_folder": "output",
                "remote": {"route": "/internal/files/output", "refresh_button": True, "control_after_refresh": "first"},
            },
        )
    }


class LoadImageMask(_PictureReader):
    """One channel of a picture file as MASK."""

    DISPLAY_NAME = "Load Image (as Mask)"
    CATEGORY = "mask"
    REQUIRED = {
        "image": lambda: combo(*input_files(), image_upload=True),
        "channel": combo("alpha", "red", "green", "blue"),
    }
    RETURN_TYPES = ("MASK",)
    FUNCTION = "load_image"

    def load_image(self, image, channel):
        from .picture_files import read_channel

        return (read_channel(self.DISPLAY_NAME, "image", image, channel),)


class SaveImage(CoreNode):
    """Pictures as PNG files with the graph in them.

    The attributes set in __init__ are ComfyUI's, which packs change in subclasses: folder, locator type, text appended to the
    prefix, zlib level.
    """

    DISPLAY_NAME = "Save Image"
    DESCRIPTION = "Saves the input images to your ComfyUI output directory."
    CATEGORY = "image"
    REQUIRED = {
        "images": tip(IMAGE, "The images to save."),
        "filename_prefix": text(
            default="ComfyUI",
            tooltip="The prefix for the file to save. This may include formatting information such as %date:yyyy-MM-dd% or "
            "%Empty Latent Image.width% to include values from nodes.",
        ),
    }
    HIDDEN = _HIDDEN
    OUTPUT_NODE = True
    FUNCTION = "save_images"

    def __init__(self):
        self.output_dir = folder_paths.get_output_directory()
        self.type = "output"
        self.prefix_append = ""
        self.compress_level = 4

    def save_images(self, images, filename_prefix="ComfyUI", prompt=None, extra_pnginfo=None):
        from .picture_files import png_text, save_pngs

        node = self.DISPLAY_NAME or type(self).__name__
        graph = None if current_host().settings.disable_metadata else png_text(node, prompt, extra_pnginfo)
        prefix = filename_prefix + self.prefix_append
        return {"ui": {"images": save_pngs(node, images, prefix, self.output_dir, self.type, graph, self.compress_level)}}


class PreviewImage(SaveImage):
    """Pictures in the temp folder, which is emptied when the host starts and stops."""

    DISPLAY_NAME = "Preview Image"
    REQUIRED = {"images": IMAGE}

    def __init__(self):
        self.output_dir = folder_paths.get_temp_directory()
        self.type = "temp"
        # not from `random`: file names must not shift what a graph draws from a seed
        self.prefix_append = "_temp_" + "".join(secrets.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(5))
        self.compress_level = 1


class MaskPreview(PreviewImage):
    """A mask as a grey preview."""

    DISPLAY_NAME = None
    CATEGORY = "mask"
    RELATIVE_PYTHON_MODULE = "comfy_extras.nodes_mask"
    REQUIRED = {"mask": MASK}
    FUNCTION = "execute"

    def __init__(self):
        super().__init__()
        self.compress_level = 4

    def execute(self, mask, filename_prefix="ComfyUI", prompt=None, extra_pnginfo=None):
        from .mask import as_picture

        return self.save_images(as_picture(mask), filename_prefix, prompt, extra_pnginfo)


class SaveImageWebsocket(CoreNode):
    """Pictures as PNG over the socket, one preview message each; nothing is written."""

    CATEGORY = "api/image"
    RELATIVE_PYTHON_MODULE = "custom_nodes.websocket_image_save"
    REQUIRED = {"images": IMAGE}
    OUTPUT_NODE = True
    FUNCTION = "save_images"

    def save_images(self, images):
        from ..utils import ProgressBar
        from .picture_files import to_pictures

        progress = ProgressBar(len(images))
        for step, picture in enumerate(to_pictures("SaveImageWebsocket", images)):
            progress.update_absolute(step, len(images), ("PNG", picture, None))
        return {}

    @classmethod
    def IS_CHANGED(cls, images):
        return time.time()
