"""Whatever is wrong with what a user gave: status 2, a message with node and input, no traceback, nothing written."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from rectiflow.tests.cli.conftest import id_of, node_of


def refused(shell, graph, *words: str, arguments: tuple[str, ...] = ()) -> str:
    """Run, and check that it was refused in one message that holds the words."""
    answer = shell.run(graph, *arguments)
    assert answer.status == 2, answer.err
    assert answer.err.startswith("rectiflow: ") and answer.err.count("rectiflow: ") == 1
    assert "Traceback" not in answer.err and not answer.out
    assert shell.written == []
    for word in words:
        assert word in answer.err, answer.err
    return answer.err


# --- files


def test_malformed_json_names_line_and_column(shell, tmp_path):
    path = tmp_path / "broken.json"
    path.write_text('{\n  "1": {\n    "class_type": "KSampler",,\n  }\n}')
    refused(shell, path, "broken.json", "line 3", "column 30")


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", ("line 1",)),
        (b"[1, 2]", ("list",)),
        (b"{}", ("nothing in it",)),
        (b'{"a": 1}', ("a prompt or a saved workflow",)),
        (b"\xff\xfe\x00", ("UTF-8",)),
        (b"[" * 200_000, ("nesting",)),
        (b'{"1": {"class_type": "KSampler", "inputs": {"steps": ' + b"9" * 5000 + b"}}}", ("numbers",)),
        (b"\x89PNG\r\n\x1a\n", ("PNG without a graph",)),
        (b"\x89PNG\r\n\x1a\n\xff\xff\xff\xfftEXtprompt\0{}", ("PNG without a graph",)),
    ],
    ids=["empty", "list", "no nodes", "other object", "not UTF-8", "deep nesting", "endless number", "empty PNG", "cut PNG"],
)
def test_files_that_hold_no_graph(shell, tmp_path, content, words):
    path = tmp_path / "graph.json"
    path.write_bytes(content)
    refused(shell, path, "graph.json", *words)


def test_an_absent_file(shell, tmp_path):
    refused(shell, tmp_path / "absent.json", "absent.json", "No such file")


def test_a_folder_instead_of_a_file(shell, tmp_path):
    refused(shell, tmp_path, str(tmp_path), "directory")


# --- graphs


def test_an_unknown_class_names_the_nearest(shell, graph):
    node_of(graph, "KSampler")["class_type"] = "KSampeler"
    refused(shell, graph, "KSampeler", "does not exist", "nearest", "KSampler")


def test_a_missing_input(shell, graph):
    del node_of(graph, "KSampler")["inputs"]["positive"]
    refused(shell, graph, "(KSampler)", "'positive'", "missing")


@pytest.mark.parametrize("name, value", [("steps", "many"), ("cfg", "high"), ("steps", [])])
def test_a_mistyped_input(shell, graph, name, value):
    node_of(graph, "KSampler")["inputs"][name] = value
    refused(shell, graph, "(KSampler)", f"'{name}'")


def test_a_link_of_the_wrong_type(shell, graph):
    node_of(graph, "KSampler")["inputs"]["model"] = [id_of(graph, "RectiflowLoadTiny"), 1]
    refused(shell, graph, "(KSampler)", "'model'", "CLIP", "MODEL")


@pytest.mark.parametrize(
    "class_type, name, value",
    [
        ("RectiflowEmptyLatent", "width", 10**9),
        ("RectiflowEmptyLatent", "height", -8),
        ("RectiflowEmptyLatent", "batch_size", 10**18),
        ("KSampler", "steps", 0),
        ("KSampler", "steps", 10**30),
        ("KSampler", "seed", -1),
        ("KSampler", "seed", 2**64),
        ("KSampler", "cfg", 1e9),
        ("KSampler", "denoise", 1.5),
        ("ImageScaleBy", "scale_by", 1e6),
    ],
)
def test_absurd_sizes(shell, graph, class_type, name, value):
    node_of(graph, class_type)["inputs"][name] = value
    refused(shell, graph, f"({class_type}", f"'{name}'")


@pytest.mark.parametrize("name, value, hint", [("sampler_name", "eular", "Nearest: euler"), ("scheduler", "", "not in list")])
def test_a_value_that_is_not_in_the_list(shell, graph, name, value, hint):
    node_of(graph, "KSampler")["inputs"][name] = value
    refused(shell, graph, "(KSampler)", f"'{name}'", repr(value), hint)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("class_type, name", [("KSampler", "cfg"), ("ImageScaleBy", "scale_by")])
def test_numbers_that_are_none(shell, graph, class_type, name, value):
    node_of(graph, class_type)["inputs"][name] = value
    refused(shell, graph, f"({class_type}", f"'{name}'", str(value), "finite")


def test_nan_from_the_command_line(shell, graph):
    refused(shell, graph, "(KSampler)", "'cfg'", "nan", arguments=("--set", "KSampler.cfg=NaN"))


def test_a_cycle(shell, graph):
    scale = node_of(graph, "ImageScaleBy")
    scale["inputs"]["image"] = [id_of(graph, "ImageScaleBy"), 0]
    refused(shell, graph, "(ImageScaleBy", "cycle")


def test_a_link_to_nothing(shell, graph):
    node_of(graph, "VAEDecode")["inputs"]["samples"] = ["99", 0]
    refused(shell, graph, "(VAEDecode", "99")


def test_a_graph_without_an_output(shell, graph):
    del graph[id_of(graph, "SaveImage")]
    refused(shell, graph, "no outputs")


def test_a_node_that_is_no_node(shell, graph):
    graph["50"] = {"inputs": {}}
    refused(shell, graph, "class_type", "#50")


def test_words_the_tiny_model_does_not_know_are_only_a_warning(shell, graph):
    answer = shell.run(graph, "--set", "Prompt.text=noto sunflwer on blue")
    assert answer.status == 0
    assert "sunflwer" in answer.err and "sunflower" in answer.err


# --- files that a graph names


def test_an_absent_picture(shell, graph):
    save = id_of(graph, "SaveImage")
    graph = {"1": {"class_type": "LoadImage", "inputs": {"image": "absent.png"}}, save: graph[save]}
    graph[save]["inputs"]["images"] = ["1", 0]
    refused(shell, graph, "(LoadImage)", "'image'", "absent.png")


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "a\0b.png"])
def test_a_picture_outside_of_its_folder(shell, graph, name):
    graph = {
        "1": {"class_type": "LoadImage", "inputs": {"image": name}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }
    refused(shell, graph, "(LoadImage)")


def test_a_name_that_leaves_the_output_folder(shell, graph, tmp_path):
    node_of(graph, "SaveImage")["inputs"]["filename_prefix"] = "../../escaped"
    refused(shell, graph, "(SaveImage", "..")
    assert not list(tmp_path.parent.rglob("*escaped*"))


def header(table: dict) -> bytes:
    text = json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


CHECKPOINTS = {
    "zero bytes": b"",
    "no safetensors": b"PK\x03\x04 this is a zip",
    "a header longer than the file": struct.pack("<Q", 2**40) + b"{}",
    "a header length beyond all bounds": struct.pack("<Q", 2**64 - 1) + b"{}",
    "a header that is no JSON": struct.pack("<Q", 8) + b"{{{{{{{{",
    "overlapping tensors": header({"a": entry([4], 0, 16), "b": entry([4], 8, 24)}) + bytes(24),
    "offsets beyond the end": header({"a": entry([1000], 0, 4000)}) + bytes(16),
    "a shape whose product overflows": header({"a": entry([2**32, 2**32], 0, 16)}) + bytes(16),
    "a negative size": header({"a": entry([-4], 0, 16)}) + bytes(16),
    "an unknown dtype": header({"a": entry([4], 0, 16, "F33")}) + bytes(16),
    "the weights of something else": header({"conv1.weight": entry([2, 2], 0, 16)}) + bytes(16),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("loader", ["UNETLoader", "CheckpointLoaderSimple", "VAELoader"])
def test_a_wrong_or_hostile_checkpoint(shell, graph, tmp_path, name, loader):
    models = tmp_path / "models"
    models.mkdir()
    (models / "bad.safetensors").write_bytes(CHECKPOINTS[name])
    config = tmp_path / "paths.yaml"
    config.write_text("here:\n  base_path: models\n  checkpoints: .\n  diffusion_models: .\n  vae: .\n")
    if loader == "VAELoader":
        graph["90"] = {"class_type": loader, "inputs": {"vae_name": "bad.safetensors"}}
        node_of(graph, "VAEDecode")["inputs"]["vae"] = ["90", 0]
    else:
        key = "unet_name" if loader == "UNETLoader" else "ckpt_name"
        graph["90"] = {"class_type": loader, "inputs": {key: "bad.safetensors"}}
        if loader == "UNETLoader":
            graph["90"]["inputs"]["weight_dtype"] = "default"
        node_of(graph, "KSampler")["inputs"]["model"] = ["90", 0]
    what = "conv1.weight" if name == "the weights of something else" else "bad.safetensors"
    refused(shell, graph, f"({loader})", what, arguments=("--extra-model-paths", str(config)))


def test_a_checkpoint_that_is_not_there(shell, graph):
    graph["90"] = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "absent.safetensors"}}
    node_of(graph, "KSampler")["inputs"]["model"] = ["90", 0]
    refused(shell, graph, "(CheckpointLoaderSimple)", "'ckpt_name'", "absent.safetensors")


# --- the command line itself


@pytest.mark.parametrize(
    "override, words",
    [
        ("nonsense", ("NODE.INPUT=VALUE",)),
        ("KSampler.seed", ("NODE.INPUT=VALUE",)),
        (".seed=1", ("NODE.INPUT=VALUE",)),
        ("Sampler.seed=1", ("no node 'Sampler'", "KSampler")),
        ("CLIPTextEncode.text=x", ("2 nodes", "give the id")),
        ("KSampler.sed=1", ("no input 'sed'", "seed")),
    ],
)
def test_overrides_that_do_not_fit(shell, graph, override, words):
    refused(shell, graph, *words, arguments=("--set", override))


def test_folders_that_cannot_be_used(shell, graph, tmp_path):
    (tmp_path / "file").touch()
    refused(shell, graph, "--input", "absent", arguments=("--input", str(tmp_path / "absent")))
    answer = shell.run(graph, "--out", str(tmp_path / "file"))
    assert answer.status == 2 and "--out" in answer.err


def test_a_device_that_is_not_there(shell, graph):
    refused(shell, graph, "cuda:99", arguments=("--device", "cuda:99"))


def test_an_unknown_command(shell):
    answer = shell.call("rnu")
    assert answer.status == 2 and "no command 'rnu'" in answer.err and "doctor" in answer.err


def test_debug_shows_the_traceback(shell, graph):
    node_of(graph, "SaveImage")["inputs"]["filename_prefix"] = "../../escaped"
    answer = shell.run(graph, "--debug")
    assert answer.status == 2 and "line " in answer.err and "safe_files" in answer.err


def test_errors_as_json(shell, graph):
    node_of(graph, "KSampler")["inputs"]["steps"] = 0
    answer = shell.run(graph, "--json")
    assert answer.status == 2 and answer.err == ""
    told = json.loads(answer.out)
    assert told["node_errors"][id_of(graph, "KSampler")]["errors"][0]["type"] == "value_smaller_than_min"
    assert "'steps'" in told["error"] and told["validation"]["type"] == "prompt_outputs_failed_validation"


def test_a_fault_of_a_node_is_no_bad_input(shell, graph, monkeypatch):
    """An exception that no check foresaw ends with status 1, still without a traceback."""

    def fail(*args, **kwargs):
        raise RuntimeError("the device fell off")

    monkeypatch.setattr(torch, "randn", fail)
    answer = shell.run(graph)
    assert answer.status == 1 and "(KSampler)" in answer.err and "the device fell off" in answer.err and "Traceback" not in answer.err
    assert shell.written == []
