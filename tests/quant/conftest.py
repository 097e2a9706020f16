"""The tiny model, loaded once on a host whose output folder is the session's own, and the shortest ways to quantise, save and load it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rectiflow import NODE_CLASS_MAPPINGS
from rectiflow.accel.prune.apply import stack_under
from rectiflow.accel.prune.identity import model_hash
from rectiflow.accel.prune.select import plan_without
from rectiflow.host.embedded import HostSettings, make_host, use_host
from rectiflow.tests.contract.tiny_runs import TinyRuns

QUANTIZE = {
    "weight_bits": "8", "act_bits": "8", "group_size": "32", "method": "tlq", "rotation": "hadamard", "j_threshold": 1.0,
    "smooth_alpha": 0.5, "protect_down": True, "keep_below_db": 0.0, "include": r"_blocks\.0\.(img|lin)", "exclude": "", "lora": "before",
    "seed": 0,
}  # fmt: skip


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class QuantRuns(TinyRuns):
    """Nodes by name, and what they are mostly given: six layers of the first blocks are quantised unless told otherwise."""

    def __init__(self, host, root: Path):
        super().__init__(host)
        self.output = root / "output"
        self.start = self.noise([1])

    def node(self, name: str, **inputs):
        with use_host(self.host), torch.inference_mode():
            return NODE_CLASS_MAPPINGS[name]().execute(**inputs)

    def quantized(self, model=None, **changed):
        return self.node("RectiflowQuantize", model=model or self.model, **{**QUANTIZE, **changed})[0]

    def stats(self, layers: str):
        shown = {"positive": self.conditioning("noto cat on white"), "latent_image": {"samples": torch.zeros(1, 16, 8, 8)}}
        sigmas = torch.linspace(1, 0, 3)
        return self.node("RectiflowQuantCalibrate", model=self.model, sigmas=sigmas, seed=0, num_runs=1, layers=layers, **shown)[0]

    def save(self, model, form: str = "rectiflow", dtype: str = "same", prefix: str = "test/model") -> str:
        return self.node("RectiflowSaveCompressed", model=model, filename_prefix=prefix, format=form, dtype=dtype)[0]

    def load(self, path: str, **options):
        return self.node("RectiflowLoadCompressed", path=path, **options)[0]

    def file(self, path: str) -> Path:
        return self.output / path

    def latent(self, model, steps: int = 2, cfg: float = 1.0, seed: int = 1) -> torch.Tensor:
        return self.sample("noto cat on white", self.noise([seed]), model=model, steps=steps, cfg=cfg)

    def twenty_turns(self, model, kind: type) -> None:
        """The whole model and `model` in turn are bit-equal each time, and no module of this kind stays on the network."""
        expected = self.latent(self.model, steps=1), self.latent(model, steps=1)
        for _ in range(10):
            assert torch.equal(self.latent(self.model, steps=1), expected[0]) and torch.equal(self.latent(model, steps=1), expected[1])
        self.model.detach()
        assert not any(isinstance(module, kind) for module in self.model.model.modules())

    def velocity_error(self, model, prompt: str = "noto rocket on blue") -> float:
        """‖v − v_t‖/‖v_t‖ over one Euler step from noises that no test trains on."""
        noise, prompts = self.noise([31, 32, 33]), [prompt] * 3
        sigmas = torch.tensor([0.8, 0.0])
        wanted, found = (self.sample(prompts, noise, model=each, sigmas=sigmas, cfg=1.0) for each in (self.model, model))
        return float((found - wanted).norm() / wanted.norm())

    def pruned(self, *paths: str, model=None):
        stack = stack_under(self.model, "test")
        plan = plan_without(tuple(stack.at(path) for path in paths), stack, model_hash(self.model), "test")
        return self.node("RectiflowApplyPrunePlan", model=model or self.model, plan=plan.to_json(), enabled=True)[0]


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> QuantRuns:
    root = tmp_path_factory.mktemp("quant")
    made = make_host(root, settings=HostSettings(device="cpu", dtype="fp32"))
    with use_host(made):
        return QuantRuns(made, root)


def rank_two(model, names, size: float = 0.02) -> dict[str, tuple]:
    """Patches as a LoRA of rank 2 gives them for these layers; the same numbers at every call."""
    model.detach()  # sizes are the whole layers', not those of what lies on the network at the moment
    generator = torch.Generator().manual_seed(7)
    patches = {}
    for name in names:
        layer = model.model.diffusion_model.get_submodule(name)
        up = torch.randn(layer.out_features, 2, generator=generator) * size
        patches[f"diffusion_model.{name}.weight"] = ("diff", (up @ torch.randn(2, layer.in_features, generator=generator),))
    return patches


def with_lora(model, whole, names, size: float = 0.02):
    """A clone of MODEL `model` with that LoRA; whole: the model that has layers of that name."""
    patched = model.clone()
    taken = patched.add_patches(rank_two(whole, names, size))
    assert len(taken) == len(names)
    return patched
