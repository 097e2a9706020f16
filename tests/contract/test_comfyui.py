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

# The two hosts add up attention and matrix products in different orders, in fp32 on the CPU, over 28 guided steps: up to 2.6e-4 measured,
# at twice the training side on a processor with AVX-512.
LATENT_TOLERANCE = 5e-4
# Training that begins where a layer was solved: Adam divides gradients near zero by their own size, so that their last bits become steps.
# Measured 1.1e-3 of latents up to 3.
SOLVED_TOLERANCE = 3e-3
SOLVED = {"RectiflowDistillRuns"}
# Rounded activations: a number on the edge between two codes falls either way, and the rest of the run follows. Measured 9e-3 at 8 bits.
ROUNDED_TOLERANCE = 2e-2  # root mean square over the latent's own
ROUNDING = {"RectiflowQuantize", "RectiflowLoadCompressed"}
SAMPLED_CLASSES = {"KSampler": 0, "SamplerCustom": 0, "SamplerCustomAdvanced": 0, "RectiflowEditCompare": 0, "RectiflowModelCompare": 3}
SECONDS_IN_PICTURES = {"RectiflowModelCompare"}  # captions that no two runs have alike; the latents are compared
# These hand out pictures only, so the pictures are what is compared.
SAMPLING_INSIDE = {"RectiflowFlowStraightness", "RectiflowSolverCompare"}


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
    both_hosts_agree(api_graph(name), comfyui_server, embedded)


def both_hosts_agree(graph: dict, comfyui_server, embedded) -> None:
    graph = with_saved_latents(graph)
    rounded, solved = (any(node["class_type"] in kinds for node in graph.values()) for kinds in (ROUNDING, SOLVED))
    here = run_graph(graph, embedded)
    there = comfyui_server.run(graph)
    for node_id, shown in here.outputs.items():
        source = graph[node_id]["inputs"].get("images", [""])[0]
        if source in graph and graph[source]["class_type"] in SECONDS_IN_PICTURES:
            continue
        for kind, files in shown.items():
            if kind == "text":  # reports hold seconds
                continue
            for mine, other in zip(files, there["outputs"][node_id][kind], strict=True):
                if mine["type"] == other["type"] == "temp":  # previews; what they show is drawn from what is compared
                    continue
                mine = path_of(mine, embedded.paths.get_directory_by_type("output"))
                compare(mine, path_of(other, comfyui_server.folder / "output"), rounded, SOLVED_TOLERANCE if solved else LATENT_TOLERANCE)


def with_saved_latents(graph: dict) -> dict:
    """The graph with a SaveLatent on every sampler's output."""
    graph = copy.deepcopy(graph)
    samplers = [key for key, node in graph.items() if node["class_type"] in SAMPLED_CLASSES]
    assert samplers or SAMPLING_INSIDE & {node["class_type"] for node in graph.values()}
    for key in samplers:
        latent = [key, SAMPLED_CLASSES[graph[key]["class_type"]]]
        graph[f"latent_of_{key}"] = {"class_type": "SaveLatent", "inputs": {"samples": latent, "filename_prefix": f"contract/{key}"}}
    return graph


def path_of(shown: dict, output: str | Path) -> Path:
    assert shown["type"] == "output"
    return Path(output, shown["subfolder"], shown["filename"])


def compare(here: Path, there: Path, rounded: bool, tolerance: float) -> None:
    if here.suffix == ".latent":
        ours, theirs = (load_file(path)["latent_tensor"] for path in (here, there))
        if rounded:
            assert (ours - theirs).norm() <= ROUNDED_TOLERANCE * theirs.norm()
            return
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)
    elif not rounded:
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


def stock(**nodes: tuple[str, dict]) -> dict:
    """A graph around the tiny model: node id → (class, inputs)."""
    text = "noto fox on green"
    common = {
        "load": ("RectiflowLoadTiny", {}),
        "yes": ("CLIPTextEncode", {"text": text, "clip": ["load", 1]}),
        "no": ("CLIPTextEncode", {"text": "", "clip": ["load", 1]}),
        "picture": ("RectiflowExamplePicture", {"picture": "smiling face"}),
    }
    return {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in {**common, **nodes}.items()}


def ksampler(latent: list, **changed) -> tuple[str, dict]:
    widgets = {"seed": 5, "steps": 4, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    links = {"model": ["load", 0], "positive": ["yes", 0], "negative": ["no", 0], "latent_image": latent}
    return "KSampler", {**widgets, **links, **changed}


def decoded(latent: list) -> tuple[str, dict]:
    return "VAEDecode", {"samples": latent, "vae": ["load", 2]}


def shown(image: list) -> tuple[str, dict]:
    return "SaveImage", {"images": image, "filename_prefix": "contract/picture"}


TILES = {"tile_size": 64, "overlap": 16, "temporal_size": 64, "temporal_overlap": 8}
# The tiny model through stock nodes that touch other corners of MODEL, CLIP and VAE than the shipped graphs do.
STOCK_GRAPHS = {
    "an empty latent of four channels is widened": stock(
        empty=("EmptyLatentImage", {"width": 128, "height": 128, "batch_size": 2}),
        sample=ksampler(["empty", 0]),
        decode=decoded(["sample", 0]),
        save=shown(["decode", 0]),
    ),
    "inpainting through the VAE with a grown mask": stock(
        encode=("VAEEncodeForInpaint", {"pixels": ["picture", 0], "vae": ["load", 2], "mask": ["picture", 1], "grow_mask_by": 6}),
        sample=ksampler(["encode", 0]),
        decode=decoded(["sample", 0]),
        save=shown(["decode", 0]),
    ),
    "guidance of the Flux kind is taken and changes nothing": stock(
        guided=("FluxGuidance", {"conditioning": ["yes", 0], "guidance": 7.0}),
        zeroed=("ConditioningZeroOut", {"conditioning": ["no", 0]}),
        empty=("RectiflowEmptyLatent", {"vae": ["load", 2], "width": 64, "height": 64, "batch_size": 1}),
        sample=ksampler(["empty", 0], positive=["guided", 0], negative=["zeroed", 0]),
        decode=decoded(["sample", 0]),
        save=shown(["decode", 0]),
    ),
    "a shifted flow and a second order solver": stock(
        shifted=("ModelSamplingSD3", {"model": ["load", 0], "shift": 3.0}),
        encode=("VAEEncode", {"pixels": ["picture", 0], "vae": ["load", 2]}),
        sample=ksampler(["encode", 0], model=["shifted", 0], sampler_name="heun", scheduler="beta", denoise=0.6),
        decode=("VAEDecodeTiled", {"samples": ["sample", 0], "vae": ["load", 2], **TILES}),
        save=shown(["decode", 0]),
    ),
    "another size, a batch of repeats and a stochastic solver": stock(
        empty=("RectiflowEmptyLatent", {"vae": ["load", 2], "width": 96, "height": 32, "batch_size": 1}),
        repeat=("RepeatLatentBatch", {"samples": ["empty", 0], "amount": 2}),
        sample=ksampler(["repeat", 0], sampler_name="euler_ancestral", cfg=1.0),
        decode=decoded(["sample", 0]),
        save=shown(["decode", 0]),
    ),
}


@pytest.mark.parametrize("what", STOCK_GRAPHS)
def test_the_tiny_model_goes_through_stock_nodes_alike(what, comfyui_server, embedded):
    both_hosts_agree(STOCK_GRAPHS[what], comfyui_server, embedded)
