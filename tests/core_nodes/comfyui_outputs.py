"""Run inside real ComfyUI: `python comfyui_outputs.py COMFYUI FOLDER` writes what its nodes make of cases.py and of the picture
files in FOLDER/input, as FOLDER/outputs.pt."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path


def main(comfyui: str, folder: Path) -> None:
    here = str(Path(__file__).parent)
    sys.argv = ["main.py", "--cpu"]
    sys.path[:] = [comfyui, here, *(entry for entry in sys.path if entry not in ("", here))]
    import comfy.options

    comfy.options.enable_args_parsing()
    import utils.extra_config  # noqa: F401, I001  (before `nodes`, which puts a folder with another `utils` first on the path)
    import cases
    import folder_paths
    import nodes
    import PIL
    import torch

    folder_paths.set_input_directory(str(folder / "input"))
    folder_paths.set_output_directory(str(folder / "comfyui"))
    asyncio.run(nodes.init_builtin_extra_nodes())

    def call(class_id, inputs):
        cls = nodes.NODE_CLASS_MAPPINGS[class_id]
        if hasattr(cls, "define_schema"):
            return cases.plain(cls.execute(**inputs).result)
        return cases.plain(getattr(cls(), cls.FUNCTION)(**inputs))

    with torch.inference_mode():
        outputs = {str(number): call(class_id, inputs) for number, class_id, inputs in cases.all_cases()}
        pictures, channels = {}, {}
        for file in sorted((folder / "input").iterdir()):
            pictures[file.name] = call("LoadImage", {"image": file.name})
            channels[file.name] = {
                channel: call("LoadImageMask", {"image": file.name, "channel": channel}) for channel in ("alpha", "red", "green", "blue")
            }
        extra = {"workflow": {"nodes": [1, "ü"]}, "other": 3}
        saved = call("SaveImage", {"images": cases.image(5, 3) * 1.2 - 0.1, "filename_prefix": "sub/a_%width%x%height%",
                                   "prompt": {"1": {"class_type": "X"}}, "extra_pnginfo": extra})  # fmt: skip
    torch.save(
        {"pillow": PIL.__version__, "outputs": outputs, "pictures": pictures, "channels": channels, "saved": saved}, folder / "outputs.pt"
    )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
