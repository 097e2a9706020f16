"""Runs inside ComfyUI's Python: the pruning nodes on ComfyUI's own Flux, SD3 and Wan at toy sizes; prints one JSON object.

Started by test_prune_in_comfyui.py with the pack's folder and a folder for files as its arguments.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from pathlib import Path

OUTPUT = sys.argv[2]  # ComfyUI reads the arguments next
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "samplers"))

from comfyui_editing import FAMILIES, FLUX, HUNYUAN, QWEN, SD3, WAN, Toy, load_pack  # noqa: E402  starts ComfyUI on the CPU

import torch  # noqa: E402  isort: skip
import comfy.samplers  # noqa: E402  isort: skip
import folder_paths  # noqa: E402  isort: skip

WIDER = {"target": "torch.nn.Linear", "params": {"in_features": 20, "out_features": 256}}  # SD3 is 64 wide for each block
DEEPER = {
    "Flux": {**FLUX, "depth": 3, "depth_single_blocks": 3}, "SD3": {**SD3, "depth": 4, "context_embedder_config": WIDER},
    "Wan": {**WAN, "num_layers": 4},
}  # fmt: skip
WITH_TEXT = {
    "Flux": DEEPER["Flux"], "SD3": DEEPER["SD3"], "HunyuanVideo": {**HUNYUAN, "depth": 3}, "Qwen-Image": {**QWEN, "num_layers": 3},
    "Wan": DEEPER["Wan"],
}  # fmt: skip
HOLDER = {"Flux": "single_blocks", "SD3": "joint_blocks", "Wan": "blocks"}
GONE = 1
STEPS = {"steps": 2, "batch": 2}
SHOWN = {"samples": 2, "sample_steps": 2, "cfg": 1.0}


class Case:
    """One family, its nodes, and what they are given."""

    def __init__(self, nodes: dict, name: str, sizes: dict):
        self.nodes, self.name = nodes, name
        self.toy = Toy(nodes, dataclasses.replace(FAMILIES[name], sizes=sizes), 0.1)
        self.model = self.toy.model
        self.base = {"positive": self.toy.target, "latent": {"samples": self.toy.picture}, "seed": 1, **SHOWN}

    def run(self, node: str, **inputs):
        """As a graph engine calls it: in inference mode."""
        with torch.inference_mode():
            return self.nodes[f"Rectiflow{node}"]().execute(**inputs)

    def draw(self, model) -> torch.Tensor:
        return self.toy.draw(self.toy.picture, comfy.samplers.sampler_object("euler"), self.toy.target, model)

    def skipped(self) -> dict:
        """A plan by a pattern against a network of ComfyUI that is built without the block."""
        plan, *_ = self.run("PruneScore", model=self.model, method="magnitude", remove=0.3, protect="0, -1", **self.base)
        found = json.loads(plan)
        found["kept"] = {HOLDER[self.name]: [index for index in range(found["counts"][HOLDER[self.name]]) if index != GONE]}
        before = self.draw(self.model)
        pruned, _ = self.run("ApplyPrunePlan", model=self.model, plan=json.dumps(found), enabled=True)
        ours, after = self.draw(pruned), self.draw(self.model)
        network = self.model.model.diffusion_model
        blocks = getattr(network, HOLDER[self.name])
        self.model.detach()
        setattr(network, HOLDER[self.name], torch.nn.ModuleList(block for index, block in enumerate(blocks) if index != GONE))
        theirs = self.draw(self.model)
        self.model.detach()
        setattr(network, HOLDER[self.name], blocks)
        recovered = self.run(
            "RecoverPruned", student=pruned, teacher=self.model, learns="lora", rank=2, lr=1e-3, name=f"{self.name} recovered",
            data="teacher_x0", **STEPS, **self.base,
        )  # fmt: skip
        return {
            "difference": float((ours - theirs).abs().max()), "changed": float((ours - before).abs().max()),
            "base_unchanged": torch.equal(before, after) and torch.equal(self.draw(self.model), before),
            "smaller": pruned.model_size() < self.model.model_size(),
            "recovered": bool(torch.isfinite(self.draw(recovered[0])).all()), "losses": recovered[2]["loss"],
        }  # fmt: skip

    def learned(self) -> dict:
        single = "1:2" if self.name == "Flux" else ""
        given = {"model": self.model, "double_pattern": "1:2", "single_pattern": single, "protect": "", "name": f"{self.name} depth"}
        plan, _, plot, _ = self.run("DepthPruneLearn", **given, save_every=0, **STEPS, **self.base)
        pruned, report = self.run("ApplyPrunePlan", model=self.model, plan=plan, enabled=True)
        return {"report": report, "finite": bool(torch.isfinite(self.draw(pruned)).all()), "plot": list(plot.shape)}

    def runs(self) -> dict:
        stats, _, _ = self.run("LayerProbe", model=self.model, tokens=256, ridge=1e-3, max_run=3, points=4, **self.base)
        search = {"max_run": 2, "largest_loss": 1.0, "tie": 1.0, "protect": "-1", "merge_streams": "min"}
        plan, _ = self.run("FindRedundantRuns", stats=stats, remove=0.0, **search)
        _, by_velocity = self.run("FindRedundantRuns", stats=stats, remove=0.3, **{**search, "merge_streams": "velocity"})
        distil = {"lr": 1e-3, "init": "fitted", "loss": "dir_mse", "own_share": 0.5, "name": f"{self.name} runs", "save_every": 0}
        plan, file, report, _ = self.run("DistillRuns", model=self.model, plan=plan, **distil, **STEPS, **self.base)
        base, drawn = self.draw(self.model), {}
        for name, active, start in (("all", "all", 0.0), ("none", "none", 0.0), ("late", "all", 0.5)):
            applied, _ = self.run("ApplyRuns", model=self.model, plan=plan, active_runs=active, start_percent=start, end_percent=1.0)
            drawn[name] = self.draw(applied)
        return {
            "file": (Path(folder_paths.get_output_directory()) / "rf_train" / file).is_file(), "none": torch.equal(drawn["none"], base),
            "apart": [float((drawn["all"] - base).abs().max()), float((drawn["late"] - base).abs().max()),
                      float((drawn["late"] - drawn["all"]).abs().max())],
            "finite": all(bool(torch.isfinite(latent).all()) for latent in drawn.values()),
            "base_unchanged": torch.equal(self.draw(self.model), base), "errors": json.loads(report)["velocity_error"],
            "by_velocity": by_velocity, "fitted": json.loads(report)["fitted"],
        }  # fmt: skip


    def text(self) -> dict:
        """Blocks 1 and 2 with text that stays as it is, behind modulations that do not know the time: what 2 reads is affine in what 1
        does. As patches, so that they lie on the weights only while the host runs."""
        pack = self.nodes["RectiflowTextToLinear"].__module__.rsplit(".nodes.", 1)[0]
        parts = importlib.import_module(f"{pack}.families.text").TEXT_FAMILIES.get(self.name)
        given = {"negative": self.toy.empty, "count": 1, "max_run": 4, "runs": "1-2", "judge": "velocity", "points": 96, "tokens": 4096}
        given |= self.base
        if parts is None:
            try:
                self.run("TextToLinear", model=self.model, **given)
            except ValueError as refusal:
                return {"refused": str(refusal)}
        whole, away = self.draw(self.model), {}
        self.model.detach()
        for number in (1, 2):
            block = self.model.model.diffusion_model.get_submodule(f"{parts.holder}.{number}")
            layers = dict(block.named_modules())
            last = [name for name, layer in layers.items() if name.startswith(parts.mlp) and isinstance(layer, torch.nn.Linear)][-1]
            made = [name for name, layer in layers.items() if name.startswith(parts.modulation) and isinstance(layer, torch.nn.Linear)]
            for name in (parts.proj, last, *made):
                for part in ("weight", "bias")[: 1 if name in made else 2]:
                    key = f"diffusion_model.{parts.holder}.{number}.{name}.{part}"
                    away[key] = ("diff", (-getattr(layers[name], part).detach().clone(),))
        planted = self.model.clone()
        assert len(planted.add_patches(away)) == len(away)
        expected = self.draw(planted)
        linear, report, plot = self.run("TextToLinear", model=planted, **given)
        drawn = self.draw(linear)
        comfy.model_management.load_models_gpu([linear])
        linear.partially_unload(torch.device("cpu"), 1 << 40)
        unloaded = self.draw(linear)
        turns = [torch.equal(self.draw(of), first) for _ in range(4) for of, first in ((planted, expected), (linear, drawn))]
        plain, *_ = self.run("TextToLinear", model=self.model, **given)
        return {
            "error": float((drawn - expected).norm() / expected.norm()), "planted": float((expected - whole).norm() / whole.norm()),
            "plain": float((self.draw(plain) - whole).norm() / whole.norm()), "turns": sum(turns), "unloaded": torch.equal(unloaded, drawn),
            "bytes": linear.model_size() / planted.model_size(), "report": report,
            "plot": list(plot.shape), "whole": torch.equal(self.draw(self.model), whole),
        }  # fmt: skip


def main() -> None:
    nodes = load_pack()
    folder_paths.set_output_directory(OUTPUT)
    found = {}
    for name in DEEPER:
        case = Case(nodes, name, DEEPER[name])
        found[name] = {"skipped": case.skipped(), "learned": case.learned(), "runs": case.runs()}
    found["text"] = {name: Case(nodes, name, sizes).text() for name, sizes in WITH_TEXT.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
