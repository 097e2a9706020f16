"""A third-party V1 pack as people write them for ComfyUI: it imports ComfyUI's names only. The tests load it as custom nodes."""

import asyncio
import time

import comfy.model_management
import comfy.samplers
import folder_paths
import torch
from aiohttp import web
from comfy.comfy_types import IO, ComfyNodeABC, InputTypeDict
from comfy.utils import ProgressBar
from comfy_api.v0_0_2 import ComfyAPISync
from comfy_execution.graph import ExecutionBlocker
from comfy_execution.graph_utils import GraphBuilder, is_link
from PIL import Image
from server import PromptServer

import nodes

WEB_DIRECTORY = "./web"


@PromptServer.instance.routes.get("/testing/ping")
async def ping(request):
    return web.json_response({"pong": True, "input": folder_paths.get_input_directory()})


def mark_prompt(body):
    if body.get("extra_data", {}).get("mark") is True:
        body["extra_data"]["marked"] = "by a pack"
    return body


PromptServer.instance.add_on_prompt_handler(mark_prompt)


class TestingValue(ComfyNodeABC):
    @classmethod
    def INPUT_TYPES(cls) -> InputTypeDict:
        return {"required": {"value": (IO.INT, {"default": 0, "min": -100, "max": 100000})}, "optional": {"after": (IO.ANY, {})}}

    RETURN_TYPES = (IO.INT,)
    FUNCTION = "give"
    CATEGORY = "testing"

    def give(self, value, after=None):
        return (value,)


class TestingShow:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("INT", {"default": 0})}, "optional": {"name": (["a", "b"],)}}

    RETURN_TYPES = ()
    FUNCTION = "show"
    OUTPUT_NODE = True
    CATEGORY = "testing"

    def show(self, value, name="a"):
        return {"ui": {"text": [str(value)]}}


class TestingSteps:
    """Moves the progress bar, with a preview a step; never cached."""

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "steps": ("INT", {"default": 4}),
                "seconds": ("FLOAT", {"default": 0.01}),
                "preview": ("BOOLEAN", {"default": True}),
            }
        }

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"
    CATEGORY = "testing"

    @classmethod
    def IS_CHANGED(cls, **kwargs):
        return float("nan")

    def run(self, steps, seconds, preview):
        bar = ProgressBar(steps)
        # Noise, so that a preview is as large as JPEG allows.
        picture = ("JPEG", Image.effect_noise((900, 300), 100).convert("RGBA"), 512) if preview else None
        for step in range(steps):
            time.sleep(seconds)
            bar.update_absolute(step + 1, steps, picture)
        return (torch.zeros(1, 8, 8, 3),)


class TestingApiProgress:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("INT", {"default": 1})}}

    RETURN_TYPES = ("INT",)
    FUNCTION = "run"
    CATEGORY = "testing"

    def run(self, value):
        ComfyAPISync().execution.set_progress(value=1, max_value=2, preview_image=Image.new("RGB", (10, 10)))
        return (value,)


class TestingFail:
    """Fails in the way that `kind` names."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"kind": (["value", "memory", "exit", "unprintable", "none"],)}, "optional": {"after": (IO.ANY, {})}}

    RETURN_TYPES = ("INT",)
    FUNCTION = "run"
    CATEGORY = "testing"

    def run(self, kind, after=None):
        if kind == "value":
            raise ValueError("this node fails")
        if kind == "memory":
            raise comfy.model_management.OOM_EXCEPTION("no memory left")
        if kind == "exit":
            raise SystemExit(3)
        if kind == "unprintable":
            return {"ui": {"odd": [float("nan"), object(), {1, 2}]}, "result": (1,)}
        return (1,)


class TestingPicture:
    """A picture that depends on the seed alone, made slowly."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT", {"default": 0}), "size": ("INT", {"default": 64}), "seconds": ("FLOAT", {"default": 0.0})}}

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "make"
    CATEGORY = "testing"

    def make(self, seed, size, seconds):
        time.sleep(seconds)
        return (torch.rand(1, size, size, 3, generator=torch.Generator().manual_seed(seed)),)


class TestingAsync:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("INT", {"default": 1}), "seconds": ("FLOAT", {"default": 0.1})}}

    RETURN_TYPES = ("INT",)
    FUNCTION = "run"
    CATEGORY = "testing"

    async def run(self, value, seconds):
        await asyncio.sleep(seconds)
        return (value,)


class TestingExpand:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("INT", {"default": 1})}}

    RETURN_TYPES = ("INT", "INT")
    FUNCTION = "run"
    CATEGORY = "testing"

    def run(self, value):
        graph = GraphBuilder()
        inner = graph.node("TestingValue", value=value + 1)
        assert is_link(inner.out(0))
        return {"result": (inner.out(0), ExecutionBlocker(None)), "expand": graph.finalize()}


assert "SaveImage" in nodes.NODE_CLASS_MAPPINGS and nodes.MAX_RESOLUTION == 16384
assert "euler" in comfy.samplers.KSampler.SAMPLERS

_CLASSES = (
    TestingValue, TestingShow, TestingSteps, TestingApiProgress, TestingFail, TestingPicture, TestingAsync, TestingExpand,
)  # fmt: skip
NODE_CLASS_MAPPINGS = {cls.__name__: cls for cls in _CLASSES}
NODE_DISPLAY_NAME_MAPPINGS = {"TestingValue": "A Value for Tests"}
