"""Runs inside ComfyUI's Python: quantised and pruned models of ComfyUI's own classes, and their files; prints one JSON object.

Started by test_quant_in_comfyui.py with the pack's folder as its only argument; by itself with a folder, a file in it and a latent, to see
whether a process that has only the file draws the same.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "samplers"))
ARGUMENTS = sys.argv[1:]  # ComfyUI's start reads them too

from comfyui_editing import FAMILIES, SD3, SIGMAS, WAN, Toy, load_pack  # noqa: E402  starts ComfyUI on the CPU

import torch  # noqa: E402  isort: skip
import comfy.sample  # noqa: E402  isort: skip
import comfy.samplers  # noqa: E402  isort: skip
import folder_paths  # noqa: E402  isort: skip

QUANTIZE = {
    "weight_bits": "8", "act_bits": "8", "group_size": "16", "method": "tlq", "rotation": "hadamard", "j_threshold": 1.0,
    "smooth_alpha": 0.5, "protect_down": True, "keep_below_db": 0.0, "include": "", "exclude": "", "lora": "before", "seed": 0,
}  # fmt: skip
# Sizes that the stock loader tells from a file: Wan's heads are 128 wide, its text 4096; SD3 has a block for every 64 channels.
WIDE = {
    "Wan": replace(
        FAMILIES["Wan"], context=4096,
        sizes={**WAN, "dim": 128, "num_heads": 1, "ffn_dim": 256, "num_layers": 3, "freq_dim": 256, "text_dim": 4096},
    ),
    "SD3": replace(
        FAMILIES["SD3"],
        sizes={**SD3, "depth": 3, "context_embedder_config": {
            "target": "torch.nn.Linear", "params": {"in_features": 20, "out_features": 192}}},
    ),
}  # fmt: skip


class Runs:
    """The pack's nodes on one toy."""

    def __init__(self, nodes: dict, family):
        self.nodes, self.toy = nodes, Toy(nodes, family, 0.08)
        self.pack = nodes["RectiflowQuantize"].__module__.rsplit(".nodes.", 1)[0]

    def part(self, name: str):
        return importlib.import_module(f"{self.pack}.{name}")

    def node(self, name: str, **inputs):
        return self.nodes[name]().execute(**inputs)

    def quantized(self, model=None, **changed):
        return self.node("RectiflowQuantize", model=model or self.toy.model, **{**QUANTIZE, **changed})[0]

    def latent(self, model=None) -> torch.Tensor:
        return self.toy.draw(self.toy.picture, comfy.samplers.sampler_object("euler"), self.toy.target, model)

    def lora(self, model):
        """A diff of rank 1 on the first layer that is quantised."""
        name = next(iter(self.part("accel.quant.attach").quantised_parts(self.quantized())))
        layer = self.toy.model.model.diffusion_model.get_submodule(name)
        generator = torch.Generator().manual_seed(5)
        diff = torch.randn(layer.out_features, 1, generator=generator) @ torch.randn(1, layer.in_features, generator=generator) * 0.05
        patched = model.clone()
        assert patched.add_patches({f"diffusion_model.{name}.weight": ("diff", (diff,))})
        return patched, name, diff

    def saved_and_loaded(self, model) -> tuple[bool, bool]:
        """(the same latent, the same bytes)."""
        root = Path(folder_paths.get_output_directory())
        widgets = {"filename_prefix": "quant", "format": "rectiflow", "dtype": "same"}
        expected = self.latent(model)
        path = self.node("RectiflowSaveCompressed", model=model, **widgets)[0]
        loaded = self.node("RectiflowLoadCompressed", path=path)[0]
        again = self.node("RectiflowSaveCompressed", model=loaded, **widgets)[0]
        return torch.equal(self.latent(loaded), expected), (root / path).read_bytes() == (root / again).read_bytes()

    def pruned(self, *paths: str):
        apply, select, identity = (self.part(f"accel.prune.{name}") for name in ("apply", "select", "identity"))
        stack = apply.stack_under(self.toy.model, "test")
        plan = select.plan_without(tuple(stack.at(path) for path in paths), stack, identity.model_hash(self.toy.model), "test")
        return self.node("RectiflowApplyPrunePlan", model=self.toy.model, plan=plan.to_json(), enabled=True)[0]


def family_answers(runs: Runs) -> dict:
    error = runs.part("accel.quant.error").sqnr
    plain, eight = runs.latent(), runs.quantized()
    first = runs.latent(eight)
    found = {"db": error(plain, first)}
    found["in_turn"] = all(torch.equal(runs.latent(), plain) and torch.equal(runs.latent(eight), first) for _ in range(3))
    found["smaller"] = eight.model_size() < runs.toy.model.model_size() and eight.clone().model_size() == eight.model_size()
    found["uuid"] = eight.patches_uuid != runs.toy.model.patches_uuid
    return found


def unloaded_answers(runs: Runs) -> dict:
    """A LoRA on codes of 16-bit activations, in memory and after the patcher was made to unload: functions on the layer take over."""
    model, name, diff = runs.lora(runs.quantized(act_bits="16", lora="bypass"))
    layer = runs.part("accel.quant.attach").quantised_parts(model)[name]
    x = torch.randn(8, layer.in_features, generator=torch.Generator().manual_seed(6))
    plain = layer(x)
    model.patch_model(device_to=torch.device("cpu"))
    loaded = layer(x)
    freed = model.partially_unload(torch.device("cpu"), 1e30)
    functions, short = len(layer.weight_function), layer(x)
    model.unpatch_model(torch.device("cpu"))
    exact, size = x @ diff.t(), float((x @ diff.t()).norm())
    return {
        "freed": freed > 0, "functions": functions, "loaded": float((loaded - plain - exact).norm()) / size,
        "short": float((short - plain - exact).norm()) / size, "restored": torch.equal(layer(x), plain),
    }  # fmt: skip


def file_answers(runs: Runs, gone: str) -> dict:
    pruned = runs.pruned(gone)
    four = runs.quantized(pruned, weight_bits="4", lora="requant")
    with_lora = runs.lora(runs.quantized(weight_bits="4", lora="requant"))[0]
    return {"pruned": runs.saved_and_loaded(pruned), "pruned_4": runs.saved_and_loaded(four), "lora": runs.saved_and_loaded(with_lora)}


class Tiny(Runs):
    """The tiny model in place of a toy."""

    def __init__(self, nodes: dict):
        self.nodes, self.pack = nodes, nodes["RectiflowQuantize"].__module__.rsplit(".nodes.", 1)[0]
        model, clip, _ = nodes["RectiflowLoadTiny"]().execute()
        self.toy = type("Model", (), {"model": model})
        self.prompt, self.empty = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("noto cat on white", ""))

    def latent(self, model=None) -> torch.Tensor:
        noise = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(1))
        euler, none = comfy.samplers.sampler_object("euler"), torch.zeros_like(noise)
        model = model or self.toy.model
        return comfy.sample.sample_custom(model, noise, 1.0, euler, SIGMAS, self.prompt, self.prompt, none, disable_pbar=True, seed=0)

    def fresh_process(self, model) -> dict:
        """Saved here; loaded and drawn in a process of its own."""
        root = Path(folder_paths.get_output_directory())
        torch.save(self.latent(model), root / "expected.pt")
        path = self.node("RectiflowSaveCompressed", model=model, filename_prefix="fresh", format="rectiflow", dtype="same")[0]
        command = [sys.executable, __file__, ARGUMENTS[0], str(root), path, "expected.pt"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.strip().splitlines()[-1])

    def sensitive(self, model) -> dict:
        """As few layers as needed for one decibel more: how many, what was told, and that the model that was measured stays."""
        shown = {
            "positive": self.prompt, "negative": self.empty, "latent_image": {"samples": torch.zeros(1, 16, 8, 8)},
            "sigmas": torch.linspace(1, 0, 3), "cfg": 3.0, "seed": 2,
        }  # fmt: skip
        before = self.latent(model)
        given = self.node("RectiflowQuantReport", reference=self.toy.model, model=model, **shown)[2]
        kept, _, told = self.node("RectiflowKeepSensitiveLayers", reference=self.toy.model, model=model, target_db=given + 1, **shown)
        now = self.node("RectiflowQuantReport", reference=self.toy.model, model=kept, **shown)[2]
        parts = self.part("accel.quant.attach").quantised_parts(kept).values()
        kept_count = sum(part.act_bits == 16 for part in parts)
        return {"gain": now - given, "off": abs(now - told), "count": kept_count, "same": torch.equal(self.latent(model), before)}


    def directions(self) -> dict:
        """W8A4 with and without directions: decibels gained; and a file of them with a LoRA in the codes."""
        shown = {"positive": self.prompt, "latent_image": {"samples": torch.zeros(1, 16, 16, 16)}, "sigmas": torch.linspace(1, 0, 5)}
        layers = r"single_blocks\.0\."
        stats = self.node("RectiflowQuantCalibrate", model=self.toy.model, seed=0, num_runs=1, layers=layers, **shown)[0]
        given = {"stats": stats, "include": layers, "act_bits": "4", "protect_down": False, "group_size": "32"}
        bare, beside = (self.quantized(directions=count, lora="requant", **given) for count in (0, 16))
        asked = {**shown, "negative": self.empty, "cfg": 1.0, "seed": 2}
        found = [self.node("RectiflowQuantReport", reference=self.toy.model, model=model, **asked)[2] for model in (bare, beside)]
        return {"gain": found[1] - found[0], "file": self.saved_and_loaded(self.lora(beside)[0])}


def tiny_answers(nodes: dict) -> dict:
    runs = Tiny(nodes)
    pruned = runs.pruned("double_blocks.1", "single_blocks.3")
    error = runs.part("accel.quant.error").sqnr
    eight = runs.quantized(group_size="32", include=r"_blocks\.[02]\.")
    chain = runs.lora(runs.quantized(pruned, weight_bits="4", group_size="32", include=r"_blocks\.0\.", lora="requant"))[0]
    return {
        "db": error(runs.latent(), runs.latent(runs.quantized(group_size="32"))),
        "pruned_4": runs.saved_and_loaded(runs.quantized(pruned, weight_bits="4", group_size="32", include=r"_blocks\.0\.")),
        "sensitive": runs.sensitive(eight), "directions": runs.directions(), "fresh": runs.fresh_process(chain),
    }  # fmt: skip


def from_file(nodes: dict, folder: str, path: str, expected: str) -> dict:
    folder_paths.set_output_directory(folder)
    runs = Tiny(nodes)
    loaded = runs.node("RectiflowLoadCompressed", path=path)[0]
    return {"equal": torch.equal(runs.latent(loaded), torch.load(Path(folder) / expected, weights_only=True))}


def main() -> None:
    nodes = load_pack()
    if len(ARGUMENTS) > 1:
        print(json.dumps(from_file(nodes, *ARGUMENTS[1:])))
        return
    folder_paths.set_output_directory(tempfile.mkdtemp())
    found = {"families": {name: family_answers(Runs(nodes, family)) for name, family in FAMILIES.items()}}
    found["unloaded"] = unloaded_answers(Runs(nodes, FAMILIES["Flux"]))
    gone = {"Wan": "blocks.1", "SD3": "joint_blocks.1"}
    found["files"] = {name: file_answers(Runs(nodes, WIDE[name]), path) for name, path in gone.items()}
    found["tiny"] = tiny_answers(nodes)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
