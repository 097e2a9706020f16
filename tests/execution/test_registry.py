"""Where node classes come from, and how they are described."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import rectiflow
from rectiflow.host.embedded.execution.registry import NodeRegistry

NODE = '''
class {name}:
    @classmethod
    def INPUT_TYPES(cls):
        return {{"required": {{}}}}
    RETURN_TYPES = ()
    FUNCTION = "go"
'''


def write_pack(folder: Path, name: str = "Packed", **files: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "inner.py").write_text(NODE.format(name=name))
    body = f"from .inner import {name}\nNODE_CLASS_MAPPINGS = {{'{name}': {name}}}\nWEB_DIRECTORY = './web'\n"
    (folder / "__init__.py").write_text(body)
    for file, text in files.items():
        (folder / file.replace("_py", ".py")).write_text(text)
    return folder


@pytest.fixture
def registry():
    return NodeRegistry()


def test_a_folder_with_relative_imports_and_a_web_directory(registry, tmp_path):
    folder = write_pack(tmp_path / "my.pack v1.2")
    (folder / "web").mkdir()
    assert registry.load_pack(folder)
    assert list(registry) == ["Packed"] and registry.failures == {}
    assert registry.object_info("Packed")["python_module"] == "custom_nodes.my.pack v1.2"
    assert registry.web_directories == {"my.pack v1.2": str(folder / "web")}
    assert registry.pack_directories == {"my.pack v1.2": str(folder)}


def test_a_single_file(registry, tmp_path):
    file = tmp_path / "single.py"
    file.write_text(NODE.format(name="Single") + "NODE_CLASS_MAPPINGS = {'Single': Single}\nNODE_DISPLAY_NAME_MAPPINGS = {'Single': 'One'}")
    assert registry.load_pack(file)
    info = registry.object_info("Single")
    assert (info["python_module"], info["display_name"]) == ("custom_nodes.single", "One")


def test_a_folder_of_packs_loads_what_comfyui_would(registry, tmp_path):
    write_pack(tmp_path / "b_pack", "B")
    write_pack(tmp_path / "a_pack", "A")
    write_pack(tmp_path / "off.disabled", "Off")
    write_pack(tmp_path / ".hidden", "Hidden")
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "notes.txt").write_text("no pack")
    (tmp_path / "example.py.example").write_text("no pack")
    assert registry.load_folder(tmp_path) == ["a_pack", "b_pack"]
    assert list(registry) == ["A", "B"] and registry.failures == {}
    assert registry.load_folder(tmp_path / "absent") == []


FAILING = {
    "import error": ("import a_module_that_is_not_there", "ModuleNotFoundError"),
    "syntax": ("def broken(:", "SyntaxError"),
    "exit": ("raise SystemExit(3)", "SystemExit: 3"),
    "no mappings": ("x = 1", "has no NODE_CLASS_MAPPINGS"),
    "v3": ("async def comfy_entrypoint(): ...", "(V3) is not supported here"),
    "mappings of the wrong kind": ("NODE_CLASS_MAPPINGS = 5", "AttributeError"),
}


@pytest.mark.parametrize(("source", "reason"), FAILING.values(), ids=FAILING)
def test_a_pack_that_fails_is_recorded_and_the_next_one_loads(registry, tmp_path, source, reason):
    write_pack(tmp_path / "broken", __init___py=source)
    write_pack(tmp_path / "fine", "Fine")
    assert registry.load_folder(tmp_path) == ["fine"]
    assert reason in registry.failures[str(tmp_path / "broken")]


def test_a_failed_import_leaves_no_modules_behind(registry, tmp_path):
    before = set(sys.modules)
    registry.load_pack(write_pack(tmp_path / "broken", __init___py="from .inner import Packed\nraise RuntimeError('half way')"))
    assert set(sys.modules) == before


def test_an_empty_folder_is_no_pack(registry, tmp_path):
    (tmp_path / "empty").mkdir()
    assert not registry.load_pack(tmp_path / "empty")
    assert registry.failures == {str(tmp_path / "empty"): "ImportError: empty has no __init__.py"}


def test_a_pack_cannot_take_a_core_nodes_place(registry, tmp_path):
    registry.add({"Packed": int, "Other": str})
    registry.load_pack(write_pack(tmp_path / "thief"), protected=frozenset(registry))
    assert registry["Packed"] is int


def test_our_own_pack_is_not_imported_twice(registry):
    root = Path(rectiflow.__file__).parent
    before = set(sys.modules)
    assert registry.load_pack(root, "rectiflow")
    assert set(sys.modules) == before
    assert registry["RectiflowLoadTiny"] is rectiflow.NODE_CLASS_MAPPINGS["RectiflowLoadTiny"]
    assert registry.object_info("RectiflowLoadTiny")["python_module"] == "custom_nodes.rectiflow"
    assert Path(registry.web_directories["rectiflow"]).name == "web"


def test_our_own_pack_linked_into_custom_nodes_is_the_same_pack(registry, tmp_path):
    root = Path(rectiflow.__file__).resolve().parent
    (tmp_path / "anything").symlink_to(root, target_is_directory=True)
    assert registry.load_folder(tmp_path) == ["anything"]
    assert registry["RectiflowLoadTiny"] is rectiflow.NODE_CLASS_MAPPINGS["RectiflowLoadTiny"]
    assert registry.object_info("RectiflowLoadTiny")["python_module"] == "custom_nodes.anything"
    assert registry.load_pack(root)  # the same folder once more: nothing changes
    assert list(registry.pack_directories) == ["anything"]


def test_object_info_has_comfyuis_fields_in_comfyuis_order(registry):
    class Plain:
        INPUT_TYPES = classmethod(lambda cls: {"required": {"a": ("INT", {}), "b": (["x"],)}, "hidden": {"me": "UNIQUE_ID"}})
        RETURN_TYPES, FUNCTION = ("INT", "MASK"), "go"

    class Full(Plain):
        RETURN_NAMES, OUTPUT_IS_LIST, OUTPUT_TOOLTIPS = ("one", "two"), (True, False), ("first", "second")
        CATEGORY, DESCRIPTION, OUTPUT_NODE = "here", "what it does", True
        DEPRECATED = EXPERIMENTAL = API_NODE = True
        RELATIVE_PYTHON_MODULE = "comfy_extras.nodes_full"

    class Described(Plain):
        @classmethod
        def node_info(cls):
            return {"name": "said by itself"}

    registry.add({"Plain": Plain, "Full": Full, "Described": Described}, {"Full": "Full name"})
    assert registry.object_info("Plain") == {
        "input": Plain.INPUT_TYPES(), "input_order": {"required": ["a", "b"], "hidden": ["me"]}, "output": ("INT", "MASK"),
        "output_is_list": [False, False], "output_name": ("INT", "MASK"), "name": "Plain", "display_name": "Plain", "description": "",
        "python_module": "nodes", "category": "sd", "output_node": False,
    }  # fmt: skip
    full = registry.object_info("Full")
    assert list(full) == [
        "input", "input_order", "output", "output_is_list", "output_name", "name", "display_name", "description", "python_module",
        "category", "output_node", "output_tooltips", "deprecated", "experimental", "api_node",
    ]  # fmt: skip
    assert (full["display_name"], full["python_module"], full["output_node"]) == ("Full name", "comfy_extras.nodes_full", True)
    assert registry.object_info("Described") == {"name": "said by itself"}
    with pytest.raises(KeyError):
        registry.object_info("Absent")


def test_one_class_that_cannot_be_described_does_not_hide_the_others(registry):
    class Broken:
        RETURN_TYPES = ()

        @classmethod
        def INPUT_TYPES(cls):
            raise RuntimeError("no")

    class Fine:
        INPUT_TYPES = classmethod(lambda cls: {"required": {}})
        RETURN_TYPES = ()

    registry.add({"Broken": Broken, "Fine": Fine})
    assert list(registry.all_object_info()) == ["Fine"]


def test_nearest_names_ignore_case(registry):
    registry.add({"KSampler": int, "KSamplerAdvanced": int, "VAEDecode": int})
    assert registry.nearest("ksampler") == ["KSampler", "KSamplerAdvanced"]
    assert registry.nearest("VaeDecod") == ["VAEDecode"]
    assert registry.nearest("😀" * 10_000) == []
