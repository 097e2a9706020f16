"""Caches among what a graph does around a model: ControlNets, context windows, weight hooks, LoRA, a sampling within a sampling,
compiled blocks. Users' reports of other caches begin here; each stands as a test of its own."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch
from rectiflow.accel.cache.binding import attach
from rectiflow.accel.cache.policy import Limits
from rectiflow.accel.cache.report import CacheLog
from rectiflow.accel.cache.taylor import TaylorSeer
from rectiflow.accel.cache.visits import CachePlan
from rectiflow.host import KSAMPLER, CFGGuider
from rectiflow.nodes import NODE_CLASS_MAPPINGS as NODES

PROMPT = "noto cat on blue"
TARGETS = ("output", "last_block", "block_delta")
STEPS = 8
TEN = torch.linspace(1, 0, 11)
CHANGE = 0.75  # sigma below which something changes in a run of ten steps: at the fourth, which interval 4 after two would forecast


def distance(a, b) -> float:
    return float((a - b).norm() / b.norm())


def decisions(log) -> str:
    return "".join("F" if visit.decision == "full" else "." for visit in log.last.visits)


class Residuals:
    """What a ControlNet hands to the host: a residual a block, the last one too, larger at lower sigma."""

    def __init__(self, network, strength: float, tokens: int = 64):
        draw, counts = torch.Generator().manual_seed(7), (len(network.double_blocks), len(network.single_blocks))
        self.parts = [[strength * torch.randn(1, tokens, network.hidden_size, generator=draw) for _ in range(n)] for n in counts]

    def get_control(self, x, sigma, inputs, count, options):
        double, single = ([part * (1.5 - sigma[0]) for part in parts] for parts in self.parts)
        return {"input": double, "output": single}

    def get_models(self):
        return []

    def pre_run(self, model, percent_to_sigma):
        pass

    def inference_memory_requirements(self, dtype):
        return 0

    def cleanup(self):
        pass


def draw(tiny, model, sampler, sigmas, control=None, seed=3):
    positive, negative = tiny.conditioning(PROMPT), tiny.conditioning("")
    if control is not None:
        positive, negative = ([[text, {**extra, "control": control}] for text, extra in entries] for entries in (positive, negative))
    guider, noise = CFGGuider(model), tiny.noise([seed])
    guider.set_conds(positive, negative)
    guider.set_cfg(3.0)
    with torch.inference_mode():
        return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=0)


def twice(model, x, sigmas, extra_args=None, callback=None, disable=None):
    for sigma in sigmas[:-1]:
        denoised = model(x, sigma * x.new_ones(len(x)), **(extra_args or {}))
    return denoised


@pytest.mark.parametrize("target", [*TARGETS, "modules"])
def test_a_controlnet_counts_once_on_a_skipped_step(tiny, cached, target):
    """The incident: residuals lost, or added to a forecast that holds them. Two evaluations at one x and sigma must be one value."""
    control = Residuals(tiny.model.model.diffusion_model, 0.2)
    model, log = cached(target, interval=2, warmup_steps=0, tail_steps=0)
    standing = torch.tensor([0.7, 0.7, 0.7])
    plain = draw(tiny, tiny.model, KSAMPLER(twice, {}), standing, control)
    assert distance(plain, draw(tiny, tiny.model, KSAMPLER(twice, {}), standing)) > 0.01, "the residuals are seen"
    found = draw(tiny, model, KSAMPLER(twice, {}), standing, control)
    assert log.last.hit_ratio == 0.5
    torch.testing.assert_close(found, plain, atol=2e-5, rtol=0)  # a few roundings of float32 of values up to 4


class Windows:
    """A host's context windows: each a call of its own on a part of the latent's width, put together again. moving: they shift once."""

    def __init__(self, moving: bool):
        self.moving = moving

    def should_use_context(self, *_):
        return True

    def execute(self, calc, model, conds, x, sigma, options):
        middle = 8 + (4 if self.moving and float(sigma[0]) < CHANGE else 0)
        out = [torch.zeros_like(x) for _ in conds]
        for start, end in ((0, middle), (middle, 16)):
            window = SimpleNamespace(index_list=list(range(start, end)))
            inside = {**options, "transformer_options": {**options["transformer_options"], "context_window": window}}
            for whole, part in zip(out, calc(model, conds, x[..., start:end], sigma, inside)):
                whole[..., start:end] = part
        return out


@pytest.mark.parametrize("target", TARGETS)
def test_context_windows_have_histories_of_their_own(tiny, cached, target):
    """Halves as windows are the halves drawn alone; windows that move are computed when they are new."""
    noise, halves = tiny.noise([1]), []
    model, log = cached(target, interval=3)
    model.model_options["context_handler"] = Windows(False)
    whole = tiny.sample(PROMPT, noise, steps=STEPS, model=model)
    assert decisions(log) == "FF..F..F" and log.last.calls == 2 * STEPS
    for part in noise.split(8, dim=3):
        alone, _ = cached(target, interval=3)
        halves.append(tiny.sample(PROMPT, part, steps=STEPS, model=alone))
    torch.testing.assert_close(whole, torch.cat(halves, dim=3), atol=1e-4, rtol=0)
    model, log = cached(target, interval=4)
    model.model_options["context_handler"] = Windows(True)
    assert bool(torch.isfinite(tiny.sample(PROMPT, noise, sigmas=TEN, model=model)).all())
    assert decisions(log).startswith("FF.F..") and log.last.visits[3].reason == "no history"


@pytest.mark.parametrize("target", TARGETS)
def test_weights_that_a_hook_changes_are_computed_anew(tiny, cached, target, monkeypatch):
    """Hook LoRA with keyframes: the strength changes within the run, and what was kept of other weights is no history."""
    hook = SimpleNamespace(strength=1.0)
    model, log = cached(target, interval=4)

    def keyframes(executor, x, t, *args, **kwargs):
        hook.strength = 1.0 if float(t[0]) > CHANGE else 0.4
        patcher = executor.class_obj.inner_model.current_patcher
        monkeypatch.setattr(patcher, "current_hooks", SimpleNamespace(hooks=[hook]), raising=False)
        return executor(x, t, *args, **kwargs)

    model.add_wrapper_with_key("predict_noise", "keyframes", keyframes)
    tiny.sample(PROMPT, tiny.noise([1]), model=model, sigmas=TEN)
    assert decisions(log).startswith("FF.F..") and log.last.visits[3].reason == "no history"


def test_a_lora_changes_weights_once_and_no_history(tiny, cached):
    """Patched weights stay as they are through a run: as many steps forecast as without, and Cache Off is the patched model."""
    name = "diffusion_model.single_blocks.0.linear2.weight"
    patched = tiny.model.clone()
    size = tiny.model.model.diffusion_model.single_blocks[0].linear2.weight.shape
    patched.add_patches({name: ("diff", (0.05 * torch.randn(size, generator=torch.Generator().manual_seed(1)),))}, 1.0)
    noise = tiny.noise([1])
    plain, with_lora = (tiny.sample(PROMPT, noise, steps=STEPS, model=model) for model in (tiny.model, patched))
    model, log = cached("last_block", interval=2, model=patched)
    near = tiny.sample(PROMPT, noise, steps=STEPS, model=model)
    assert distance(plain, with_lora) > 0.01 and decisions(log) == "FF.F.F.F"
    assert distance(near, with_lora) < 0.2
    off, _ = cached("last_block", interval=1, model=patched)
    assert torch.equal(tiny.sample(PROMPT, noise, steps=STEPS, model=off), with_lora)


def test_a_sampling_within_a_sampling_has_a_run_of_its_own(tiny, cached):
    """Another cached model samples in the middle of a step: both are what they are alone. (One network cannot sample within itself in
    either host.)"""
    other, _, _ = NODES["RectiflowLoadTiny"]().execute()
    (outer, log), (inner, inner_log) = cached("last_block", interval=3), cached("output", interval=2, model=other)
    assert inner.model is not outer.model
    noise = tiny.noise([1])
    alone = tiny.sample(PROMPT, noise, steps=STEPS, model=outer), tiny.sample(PROMPT, noise, steps=4, model=inner)
    previews = []

    def preview(executor, *args, **kwargs):
        if len(previews) < 2:
            previews.append(None)
            previews[-1] = tiny.sample(PROMPT, noise, steps=4, model=inner)
        return executor(*args, **kwargs)

    model = outer.clone()
    model.add_wrapper_with_key("predict_noise", "preview", preview)
    assert torch.equal(tiny.sample(PROMPT, noise, steps=STEPS, model=model), alone[0])
    assert len(previews) == 2 and all(torch.equal(found, alone[1]) for found in previews)
    assert decisions(log) == "FF..F..F" and decisions(inner_log) == "FF.F"


def test_an_attention_override_and_a_new_one_have_histories_of_their_own(tiny, cached):
    """The same override all along is no news; another one at a later step is another model, and computed."""

    def override(function, *args, **kwargs):
        return function(*args, **kwargs)

    watched = tiny.model.clone()
    watched.model_options["transformer_options"]["optimized_attention_override"] = override
    model, log = cached("last_block", interval=4, model=watched)
    same = tiny.sample(PROMPT, tiny.noise([1]), model=model, sigmas=TEN)
    assert decisions(log) == "FF...F...F"
    plain, _ = cached("last_block", interval=4)
    assert torch.equal(same, tiny.sample(PROMPT, tiny.noise([1]), model=plain, sigmas=TEN))

    def switching(executor, x, t, *args, **kwargs):
        options = args[0] if args else kwargs["model_options"]
        inside = options["transformer_options"]
        chosen = override if float(t[0]) > CHANGE else lambda function, *a, **k: function(*a, **k)
        inside["optimized_attention_override"] = later.setdefault(float(t[0]) > CHANGE, chosen)
        return executor(x, t, *args, **kwargs)

    later: dict = {}
    model, log = cached("last_block", interval=4, model=watched)
    model.add_wrapper_with_key("predict_noise", "switching", switching)
    tiny.sample(PROMPT, tiny.noise([1]), model=model, sigmas=TEN)
    assert log.last.visits[3].reason == "no history" and log.last.visits[2].decision == "forecast"


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
def test_compiled_blocks_and_a_cache_work_together(tiny):
    """One block compiled by inductor, as the core's node compiles listed modules: skipped with the others, run where it was."""
    network = tiny.model.model.diffusion_model
    quick = {"cpp.simdlen": 1}  # scalar code compiles in a fraction of the time
    compiled = torch.compile(network.single_blocks[1], backend="inductor", dynamic=False, options=quick)
    model, found = tiny.model.clone(), []
    model.add_object_patch("diffusion_model.single_blocks.1", compiled)
    for on in (model, tiny.model):
        log = CacheLog()
        cached = attach(on, CachePlan(TaylorSeer(1, interval=2), "last_block", Limits(2, 1)), log, "test")
        found.append(tiny.sample(PROMPT, tiny.noise([1]), steps=6, cfg=1.0, model=cached))
        assert decisions(log) == "FF.F.F"
    assert distance(*found) < 1e-4  # fused operations round otherwise
