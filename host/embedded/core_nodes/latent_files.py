"""Latents as files: safetensors under the ending .latent, in ComfyUI's layout."""

from __future__ import annotations

import json

from ....errors import input_error
from .. import folder_paths
from ..context import current_host
from .declare import LATENT, CoreNode, combo, text

_SD15_SCALE = 0.18215  # files without a version mark hold latents in Stable Diffusion 1's model space


class SaveLatent(CoreNode):
    """A latent in the output folder, with the graph in its header."""

    CATEGORY = "_for_testing"
    REQUIRED = {"samples": LATENT, "filename_prefix": text(default="latents/ComfyUI")}
    HIDDEN = {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"}
    OUTPUT_NODE = True
    FUNCTION = "save"

    def save(self, samples, filename_prefix="ComfyUI", prompt=None, extra_pnginfo=None):
        import safetensors.torch
        import torch

        from ..safe_files import write_new_file
        from .picture_files import save_path

        metadata = None
        if not current_host().settings.disable_metadata:
            metadata = {"prompt": "" if prompt is None else json.dumps(prompt)}
            metadata |= {str(key): json.dumps(value) for key, value in (extra_pnginfo or {}).items()}
        tensors = {"latent_tensor": samples["samples"].contiguous(), "latent_format_version_0": torch.tensor([])}
        content = safetensors.torch.save(tensors, metadata)
        folder, name, counter, subfolder = save_path("SaveLatent", filename_prefix, folder_paths.get_output_directory())
        filename, _ = write_new_file(folder, lambda count: f"{name}_{count:05}_.latent", counter, lambda file: file.write(content))
        return {"ui": {"latents": [{"filename": filename, "subfolder": subfolder, "type": "output"}]}}


def _latent_files() -> list[str]:
    from .pictures import input_files

    return [name for name in input_files() if name.endswith(".latent")]


class LoadLatent(CoreNode):
    """A latent from the input folder."""

    CATEGORY = "_for_testing"
    REQUIRED = {"latent": lambda: combo(*_latent_files())}
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "load"

    def load(self, latent):
        from ..utils import load_torch_file
        from .picture_files import picture_path

        tensors = load_torch_file(picture_path("LoadLatent", "latent", latent))
        if "latent_tensor" not in tensors:
            raise input_error("LoadLatent", "latent", latent, "a file written by SaveLatent (with a latent_tensor)", "Choose another file.")
        scale = 1.0 if "latent_format_version_0" in tensors else 1.0 / _SD15_SCALE
        return ({"samples": tensors["latent_tensor"].float() * scale},)

    @classmethod
    def IS_CHANGED(cls, latent):
        from .picture_files import file_digest, picture_path

        return file_digest(picture_path("LoadLatent", "latent", latent))

    @classmethod
    def VALIDATE_INPUTS(cls, latent):
        return True if folder_paths.exists_annotated_filepath(latent) else f"Invalid latent file: {latent}"
