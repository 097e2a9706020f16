"""Every graph that ships: it runs on the embedded host, and its interface form is the same graph as its API twin."""

from __future__ import annotations

import json
import re

import pytest
from PIL import Image
from rectiflow import NODE_CLASS_MAPPINGS
from rectiflow.host.embedded import run_graph
from rectiflow.workflows.build import FOLDER, NOTES, api_graph, graph_names, object_info, to_ui, written

SIZES = {
    "text_to_image": (384, 384),
    "image_to_image": (664, 356),
    "inpainting": (992, 356),
    "samplers_side_by_side": (1328, 292),
}

ROOM = {"samplers", "schedules", "inversion", "editing", "steering", "guidance", "masks", "predictions", "metrics", "pictures"}
SAMPLERS = {"KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced"}
WITHOUT_GRAPH = {"RectiflowClipVisionScore"}  # no CLIP image encoder ships


@pytest.fixture(scope="module")
def info() -> dict:
    return object_info()


def test_the_promised_graphs_are_there():
    assert set(SIZES) <= set(graph_names())
    assert {path.stem for path in FOLDER.glob("*.json")} == set(graph_names()) == set(NOTES)


def test_every_node_of_the_samplers_room_is_in_a_graph_that_its_help_page_names():
    pages = FOLDER.parent / "web" / "docs"
    missing = []
    for class_id, node in NODE_CLASS_MAPPINGS.items():
        if node.GROUP not in ROOM or class_id in WITHOUT_GRAPH:
            continue
        named = re.findall(r"`workflows/(\w+)\.json`", (pages / f"{class_id}.md").read_text(encoding="utf-8"))
        if not any(class_id == entry["class_type"] for name in named for entry in api_graph(name).values()):
            missing.append(class_id)
    assert not missing


@pytest.mark.parametrize("name", graph_names())
def test_the_graph_runs_and_saves_a_picture(name, embedded):
    result = run_graph(api_graph(name), embedded)
    saved = [file for file in result.files if not file.name.startswith("ComfyUI_temp_")]  # previews are shown, not kept
    assert len(saved) == 1
    with Image.open(saved[0]) as picture:
        assert picture.size == SIZES.get(name, picture.size)
        assert json.loads(picture.text["prompt"]) == api_graph(name)
        low, high = picture.convert("L").getextrema()
        assert high - low > 100  # not one flat colour


@pytest.mark.parametrize("name", graph_names())
def test_the_interface_form_is_built_from_the_twin(name, info):
    built = written(to_ui(name, api_graph(name), info, NOTES[name]))
    assert (FOLDER / f"{name}.json").read_text(encoding="utf-8") == built, "run python -m rectiflow.workflows.build"


@pytest.mark.parametrize("name", graph_names())
def test_converting_the_interface_form_gives_the_twin(name, embedded):
    from rectiflow.host.embedded.execution.graph_files import load_graph

    converted = load_graph(FOLDER / f"{name}.json", embedded.registry).prompt
    twin = api_graph(name)
    assert {key: (node["class_type"], node["inputs"]) for key, node in converted.items()} == {
        key: (node["class_type"], node["inputs"]) for key, node in twin.items()
    }


@pytest.mark.parametrize("name", graph_names())
def test_a_picture_for_the_template_browser(name):
    with Image.open(FOLDER / f"{name}.jpg") as picture:
        assert picture.format == "JPEG"
        assert min(picture.size) >= 256


@pytest.mark.parametrize("name", graph_names())
def test_nodes_do_not_overlap_and_links_agree(name):
    """Also while samplers show what they draw: the interface adds a picture of 230 pixels below their widgets."""
    graph = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    grown = {node["id"]: 30 + 230 * (node["type"] in SAMPLERS) for node in graph["nodes"]}
    boxes = [
        (*node["pos"], node["pos"][0] + node["size"][0], node["pos"][1] + node["size"][1] + grown[node["id"]], node["id"])
        for node in graph["nodes"]
    ]  # fmt: skip
    for number, one in enumerate(boxes):
        for other in boxes[:number]:
            apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
            assert apart, (one[4], other[4])
    nodes = {node["id"]: node for node in graph["nodes"]}
    for link, start, start_slot, end, end_slot, kind in graph["links"]:
        output, target = nodes[start]["outputs"][start_slot], nodes[end]["inputs"][end_slot]
        assert link in output["links"] and target["link"] == link
        assert output["type"] == kind and target["type"] in (kind, "*")
    assert graph["version"] == 0.4
    assert graph["last_node_id"] == max(nodes) and graph["last_link_id"] == len(graph["links"])
