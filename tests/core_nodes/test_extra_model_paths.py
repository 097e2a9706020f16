"""extra_model_paths.yaml: what ComfyUI's own example says, and files that are something else."""

from __future__ import annotations

import os
import random

import pytest
from rectiflow.errors import NodeInputError
from rectiflow.host.embedded.extra_model_paths import load_extra_path_config, parse_sections
from rectiflow.host.embedded.folder_paths import FolderPaths

EXAMPLE = """\
# a file as people keep it
a111:
    base_path: some/webui/   # where it lies

    checkpoints: models/Stable-diffusion
    loras: |
         models/Lora
         models/LyCORIS

    vae: "models/VAE # not a comment"

empty:
#commented:
#   checkpoints: nowhere
comfyui:
  base_path: '~/C o m f y'
  is_default: true
  clip: models/clip/
  custom_nodes: packs
"""


def test_an_example_in_full(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    file = tmp_path / "conf" / "extra.yaml"
    file.parent.mkdir()
    file.write_text(EXAMPLE)
    paths = FolderPaths(tmp_path)
    load_extra_path_config(str(file), paths)
    webui, comfy = tmp_path / "conf" / "some" / "webui" / "models", tmp_path / "home" / "C o m f y"
    assert paths.get_folder_paths("checkpoints")[-1] == str(webui / "Stable-diffusion")
    assert paths.get_folder_paths("loras")[-2:] == [str(webui / "Lora"), str(webui / "LyCORIS")]
    assert paths.get_folder_paths("vae")[-1] == str(webui / "VAE # not a comment")
    assert paths.get_folder_paths("text_encoders")[0] == str(comfy / "models" / "clip")
    assert paths.get_folder_paths("custom_nodes") == [str(comfy / "packs"), os.path.join(str(tmp_path), "custom_nodes")]


def test_without_a_base_path_folders_start_at_the_file(tmp_path):
    file = tmp_path / "extra.yaml"
    file.write_text("testing:\n    custom_nodes: testing_nodes\n")
    paths = FolderPaths(tmp_path / "base")
    load_extra_path_config(str(file), paths)
    assert paths.get_folder_paths("custom_nodes")[-1] == str(tmp_path / "testing_nodes")


def test_environment_variables_and_absolute_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("RECTIFLOW_TEST_DISK", str(tmp_path / "disk"))
    file = tmp_path / "extra.yaml"
    file.write_text(f"a:\n  base_path: $RECTIFLOW_TEST_DISK/x\n  vae: v\n  loras: {tmp_path}/abs\n")
    paths = FolderPaths(tmp_path)
    load_extra_path_config(str(file), paths)
    assert paths.get_folder_paths("vae")[-1] == str(tmp_path / "disk" / "x" / "v")
    assert paths.get_folder_paths("loras")[-1] == str(tmp_path / "abs")


@pytest.mark.parametrize(
    "text, line",
    [
        ("a:\n  - b\n", 2),
        ("a:\n  b: [c, d]\n", 2),
        ("a:\n  b: &x c\n", 2),
        ("a: b\n", 1),
        ("  a: b\n", 1),
        ("a:\n  b: c\n    d: e\n", 3),
        ("a:\n  b: c\n d: e\n", 3),
        ("a:\n\tb: c\n", 2),
        ("just text\n", 1),
        ('{"a": {"b": "c"}}\n', 1),
        ("a:\n  b: |9x\n", 2),
    ],
)
def test_other_yaml_is_refused_with_its_line(tmp_path, text, line):
    file = tmp_path / "extra.yaml"
    file.write_text(text)
    with pytest.raises(NodeInputError, match=rf"extra\.yaml.*line {line}:"):
        load_extra_path_config(str(file), FolderPaths(tmp_path))


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"a:\n  b: \x80\n"])
def test_what_is_no_text_is_refused(tmp_path, content):
    file = tmp_path / "extra.yaml"
    file.write_bytes(content)
    with pytest.raises(NodeInputError, match="UTF-8"):
        load_extra_path_config(str(file), FolderPaths(tmp_path))
    with pytest.raises(NodeInputError, match="absent.yaml"):
        load_extra_path_config(str(tmp_path / "absent.yaml"), FolderPaths(tmp_path))


def test_a_byte_order_mark_and_windows_line_ends(tmp_path):
    file = tmp_path / "extra.yaml"
    file.write_bytes(b"\xef\xbb\xbfa:\r\n  vae: x\r\n")
    paths = FolderPaths(tmp_path)
    load_extra_path_config(str(file), paths)
    assert paths.get_folder_paths("vae")[-1] == str(tmp_path / "x")


def test_random_text_is_read_or_refused():
    draw = random.Random(5)
    pieces = ["a", "b c", ":", ": ", "\n", "\n  ", "\n    ", "|", "#", " #", "'", '"', "-", "- ", "\t", "é", "~", "null", "[", "{}"]
    read = 0
    for _ in range(3000):
        text = "".join(draw.choices(pieces, k=draw.randint(0, 14)))
        try:
            sections = parse_sections(text)
        except NodeInputError:
            continue
        read += 1
        assert all(isinstance(value, (str, type(None))) for section in sections.values() for value in section.values())
    assert read > 100
