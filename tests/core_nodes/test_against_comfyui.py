"""The core nodes give what ComfyUI's give: the same calls on both, the outputs compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import PIL
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from cases import all_cases, image, plain  # noqa: E402
from picture_samples import write_samples  # noqa: E402

# Same formulas in float32, but sums may be ordered differently (a pooled window instead of a convolution, torch builds of two versions).
TOLERANCE = 2e-6
# Pillow's own Lanczos moved by up to 0.15 in single pixels from version 12 to 13: with different versions only gross errors can show.
OTHER_PILLOW_TOLERANCE = 0.2


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Outputs of real ComfyUI, from a process of its own."""
    folder = tmp_path_factory.mktemp("comfyui")
    (folder / "input").mkdir()
    write_samples(folder / "input")
    command = [os.environ.get("COMFYUI_PYTHON", sys.executable), str(Path(__file__).with_name("comfyui_outputs.py"))]
    ran = subprocess.run([*command, os.environ["COMFYUI_PATH"], str(folder)], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return folder, torch.load(folder / "outputs.pt", weights_only=True)


def differences(ours, other, where="", tolerance=TOLERANCE):
    """Every place where two nested outputs differ, as text."""
    if isinstance(ours, torch.Tensor) and isinstance(other, torch.Tensor):
        if ours.shape != other.shape or ours.dtype != other.dtype:
            return [f"{where}: {tuple(ours.shape)} {ours.dtype}, ComfyUI {tuple(other.shape)} {other.dtype}"]
        worst = (ours.double() - other.double()).abs().max().item() if ours.numel() else 0.0
        return [] if worst <= tolerance else [f"{where}: off by {worst:.2e}"]
    if isinstance(ours, dict) and isinstance(other, dict) and ours.keys() == other.keys():
        return [line for key in ours for line in differences(ours[key], other[key], f"{where}.{key}", tolerance)]
    if isinstance(ours, list) and isinstance(other, list) and len(ours) == len(other):
        return [line for index, pair in enumerate(zip(ours, other)) for line in differences(*pair, f"{where}[{index}]", tolerance)]
    return [] if ours == other and type(ours) is type(other) else [f"{where}: {ours!r}, ComfyUI {other!r}"]


@pytest.mark.comfyui
def test_same_outputs_for_the_same_inputs(theirs, call):
    wrong = []
    same_pillow = theirs[1]["pillow"] == PIL.__version__
    for number, class_id, inputs in all_cases():
        by_pillow = class_id == "FluxKontextImageScale" or inputs.get("upscale_method") == "lanczos"
        tolerance = TOLERANCE if same_pillow or not by_pillow else OTHER_PILLOW_TOLERANCE
        ours = plain(call(class_id, **inputs))
        wrong += differences(ours, theirs[1]["outputs"][str(number)], f"{number} {class_id}", tolerance)
    assert not wrong, "\n".join(wrong)


@pytest.mark.comfyui
def test_same_pictures_from_the_same_files(theirs, call, host):
    folder, outputs = theirs
    host.paths.input_directory = str(folder / "input")
    wrong = []
    for name, expected in outputs["pictures"].items():
        wrong += differences(plain(call("LoadImage", image=name)), expected, name)
        for channel, values in outputs["channels"][name].items():
            wrong += differences(plain(call("LoadImageMask", image=name, channel=channel)), values, f"{name} {channel}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.comfyui
def test_same_files_from_the_same_pictures(theirs, call, host):
    folder, outputs = theirs
    prompt, extra = {"1": {"class_type": "X"}}, {"workflow": {"nodes": [1, "ü"]}, "other": 3}
    saved = call("SaveImage", images=image(5, 3) * 1.2 - 0.1, filename_prefix="sub/a_%width%x%height%", prompt=prompt, extra_pnginfo=extra)
    assert plain(saved) == outputs["saved"]
    for locator in saved["ui"]["images"]:
        ours, theirs_file = (
            Image.open(Path(root) / locator["subfolder"] / locator["filename"])
            for root in (host.paths.output_directory, folder / "comfyui")
        )
        assert ours.tobytes() == theirs_file.tobytes()
        assert ours.text == theirs_file.text == {"prompt": json.dumps(prompt), **{key: json.dumps(value) for key, value in extra.items()}}
