"""The same pack and the same graphs inside a real ComfyUI, found under a folder name that is not ours."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from rectiflow.host.embedded import run_graph
from rectiflow.nodes import NODE_CLASS_MAPPINGS
from rectiflow.tests.contract.comfyui_server import LINK_NAME
from rectiflow.workflows.build import api_graph, graph_names, object_info
from safetensors.torch import load_file

pytestmark = pytest.mark.comfyui

# The two hosts add up attention and matrix products in different orders, in fp32 on the CPU, over 28 guided steps.
LATENT_TOLERANCE = 1e-4
SAMPLED_CLASSES = ("KSampler", "SamplerCustom", "SamplerCustomAdvanced")


@pytest.fixture(scope="module")
def infos(comfyui_server) -> tuple[dict, dict]:
    return comfyui_server.get("/object_info"), object_info()


@pytest.mark.parametrize("class_id", sorted(NODE_CLASS_MAPPINGS))
def test_the_node_registers_with_the_table_it_has_here(class_id, infos):
    there, here = (dict(info[class_id]) for info in infos)
    assert there.pop("python_module") == f"custom_nodes.{LINK_NAME}"
    here.pop("python_module")
    # A newer core may say more of a node; what both say is equal.
    assert {key: there[key] for key in here if key in there} == {key: value for key, value in here.items() if key in there}
    assert {"input", "input_order", "output", "output_name", "category", "description"} <= there.keys() & here.keys()


@pytest.mark.parametrize("name", graph_names())
def test_the_graph_gives_the_same_picture_and_latent(name, comfyui_server, embedded):
    graph = with_saved_latents(api_graph(name))
    here = run_graph(graph, embedded)
    there = comfyui_server.run(graph)
    for node_id, shown in here.outputs.items():
        for kind, files in shown.items():
            for mine, other in zip(files, there["outputs"][node_id][kind], strict=True):
                compare(path_of(mine, embedded.paths.get_directory_by_type("output")), path_of(other, comfyui_server.folder / "output"))


def with_saved_latents(graph: dict) -> dict:
    """The graph with a SaveLatent on every sampler's output."""
    graph = copy.deepcopy(graph)
    samplers = [key for key, node in graph.items() if node["class_type"] in SAMPLED_CLASSES]
    assert samplers
    for key in samplers:
        graph[f"latent_of_{key}"] = {"class_type": "SaveLatent", "inputs": {"samples": [key, 0], "filename_prefix": f"contract/{key}"}}
    return graph


def path_of(shown: dict, output: str | Path) -> Path:
    assert shown["type"] == "output"
    return Path(output, shown["subfolder"], shown["filename"])


def compare(here: Path, there: Path) -> None:
    if here.suffix == ".latent":
        ours, theirs = (load_file(path)["latent_tensor"] for path in (here, there))
        torch.testing.assert_close(ours, theirs, atol=LATENT_TOLERANCE, rtol=0)
    else:
        ours, theirs = (numpy.asarray(Image.open(path), dtype=numpy.int16) for path in (here, there))
        assert abs(ours - theirs).max() <= 1  # a value on the edge between two 8-bit levels may fall either way


def test_help_pages_and_templates_are_found(comfyui_server):
    """ComfyUI serves the pages from the pack's web folder and lists the graphs as templates under the folder's name."""
    templates = comfyui_server.get("/workflow_templates")
    assert sorted(templates[LINK_NAME]) == graph_names()
    page = comfyui_server.text(f"/extensions/{LINK_NAME}/docs/RectiflowLoadTiny.md")
    assert page.startswith("# Load Tiny Model")
    picture = comfyui_server.raw(f"/api/workflow_templates/{LINK_NAME}/text_to_image.jpg")
    assert picture[:3] == b"\xff\xd8\xff"


def test_bad_widgets_reach_the_person_as_our_message(comfyui_server):
    """An error of ours comes out of ComfyUI as the sentence that names node, input, value and remedy."""
    widgets = {"labels": "", "columns": 0, "scale": 1, "method": "nearest", "gap": 8, "font_size": 16, "dark": False}
    graph = {
        "1": {"class_type": "RectiflowPictureGrid", "inputs": widgets},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "never"}},
    }
    with pytest.raises(AssertionError, match="Picture Grid: input 'image_1' got None"):
        comfyui_server.run(graph)
