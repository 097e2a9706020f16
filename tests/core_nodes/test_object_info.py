"""Ids, inputs, defaults, outputs and texts of the core nodes are those of a recorded ComfyUI 0.3.64."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rectiflow.host.embedded.core_nodes import NODE_CLASS_MAPPINGS
from rectiflow.host.embedded.core_nodes.declare import AnyType

# Entries of /object_info of a ComfyUI 0.3.64 without any model or input file, for the nodes that we have.
RECORDED = json.loads(Path(__file__).with_name("object_info_core.json").read_text(encoding="utf-8"))
# Shipped beside ComfyUI as a custom node, hence not in the recording.
UNRECORDED = {"SaveImageWebsocket"}


def as_json(value):
    return json.dumps(value, sort_keys=True)


def test_every_core_node_is_recorded():
    assert set(NODE_CLASS_MAPPINGS) - set(RECORDED) == UNRECORDED
    assert set(RECORDED) <= set(NODE_CLASS_MAPPINGS)


@pytest.mark.parametrize("class_id", sorted(RECORDED))
def test_object_info_equals_the_recording(host, class_id):
    assert as_json(host.registry.object_info(class_id)) == as_json(RECORDED[class_id])


@pytest.mark.parametrize(
    "class_id, name, folder, file",
    [
        ("CheckpointLoaderSimple", "ckpt_name", "models/checkpoints", "a.safetensors"),
        ("UNETLoader", "unet_name", "models/unet", "flux/dev.sft"),
        ("CLIPLoader", "clip_name", "models/clip", "t5.safetensors"),
        ("DualCLIPLoader", "clip_name2", "models/text_encoders", "l.safetensors"),
        ("VAELoader", "vae_name", "models/vae", "ae.safetensors"),
        ("LoraLoader", "lora_name", "models/loras", "x.safetensors"),
        ("LoadImage", "image", "input", "cat.png"),
        ("LoadLatent", "latent", "input", "a.latent"),
    ],
)
def test_drop_downs_list_the_installed_files(host, tmp_path, class_id, name, folder, file):
    path = tmp_path / folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    (path.parent / "notes.txt").touch()
    offered = host.registry.object_info(class_id)["input"]["required"][name][0]
    assert file in offered
    assert "notes.txt" not in offered


def test_tiny_autoencoders_are_offered_when_both_halves_are_there(host, tmp_path):
    folder = tmp_path / "models" / "vae_approx"
    folder.mkdir(parents=True)
    (folder / "taef1_decoder.safetensors").touch()
    assert NODE_CLASS_MAPPINGS["VAELoader"].vae_list() == ["pixel_space"]
    (folder / "taef1_encoder.safetensors").touch()
    assert NODE_CLASS_MAPPINGS["VAELoader"].vae_list() == ["taef1", "pixel_space"]


def test_tables_are_copies():
    table = NODE_CLASS_MAPPINGS["KSampler"].INPUT_TYPES()["required"]
    table["sampler_name"][0].clear()
    table["seed"][1]["default"] = 5
    fresh = NODE_CLASS_MAPPINGS["KSampler"].INPUT_TYPES()["required"]
    assert fresh["sampler_name"][0][0] == "euler"
    assert fresh["seed"][1]["default"] == 0


def test_inputs_are_the_parameters_of_the_method():
    import inspect

    for class_id, cls in NODE_CLASS_MAPPINGS.items():
        parameters = inspect.signature(getattr(cls, cls.FUNCTION)).parameters
        declared = {*cls.REQUIRED, *cls.OPTIONAL, *cls.HIDDEN}
        assert declared <= set(parameters), class_id
        assert all(p.default is not p.empty for name, p in parameters.items() if name not in {*cls.REQUIRED, "self"}), class_id


def test_any_type_fits_every_type():
    assert not AnyType("*") != "MASK"
    assert not "MASK" != AnyType("*")  # noqa: SIM202
    assert {AnyType("*"): 1}["*"] == 1


def test_listing_the_nodes_imports_neither_torch_nor_pillow():
    code = (
        "import sys, rectiflow.host.embedded.core_nodes as core\n"
        "core.NODE_CLASS_MAPPINGS['KSampler'].INPUT_TYPES()\n"
        "print({'torch', 'PIL', 'numpy'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.stdout.strip() == "set()", ran.stdout + ran.stderr
