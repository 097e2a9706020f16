"""Training inside a real ComfyUI: the same losses and, after it, the same pictures as here; its own nodes save and load what was learnt."""

from __future__ import annotations

import json

import pytest
from rectiflow.host.embedded import run_graph
from rectiflow.tests.contract.test_comfyui import both_hosts_agree, decoded, ksampler, shown, stock

pytestmark = pytest.mark.comfyui

EMPTY = ("RectiflowEmptyLatent", {"vae": ["load", 2], "width": 64, "height": 64, "batch_size": 1})
DATA = ("RectiflowLatentDataset", {"latents": ["encode", 0], "positive": ["yes", 0]})
ENCODE = ("VAEEncode", {"pixels": ["picture", 0], "vae": ["load", 2]})
OPTIM = {
    "kind": "adamw", "lr": 0.003, "muon_lr": 0.02, "warmup": 0, "schedule": "constant", "decay_steps": 0, "floor": 0.0,
    "weight_decay": 0.01, "clip": 1.0,
}  # fmt: skip


def trained(name: str, **inputs) -> tuple[str, dict]:
    return "RectiflowTrain", {
        "model": ["load", 0], "data": ["data", 0], "steps": 4, "batch": 2, "name": name, "resume": "new", "dtype": "fp32", "ema": 0.0,
        "optim": ["optim", 0], "validate_every": 2, **inputs,
    }  # fmt: skip


def graph(name: str, **inputs) -> dict:
    return stock(
        encode=ENCODE, data=DATA, optim=("RectiflowTrainOptimizer", OPTIM), train=trained(name, **inputs), empty=EMPTY,
        sample=ksampler(["empty", 0], model=["train", 0], steps=4), decode=decoded(["sample", 0]), save=shown(["decode", 0]),
    )  # fmt: skip


@pytest.mark.parametrize("inputs", [{"checkpointing": True}, {"checkpointing": False, "negative": ["no", 0], "cond_dropout": 0.5}])
def test_what_was_learnt_draws_the_same_on_both_hosts(inputs, comfyui_server, embedded):
    both_hosts_agree(graph("agree", **inputs), comfyui_server, embedded)


def test_the_losses_are_the_same(comfyui_server, embedded):
    asked = graph("losses") | {"show": {"class_type": "PreviewAny", "inputs": {"source": ["train", 5]}}}
    found = [run_graph(asked, embedded).outputs["show"]["text"][0], comfyui_server.run(asked)["outputs"]["show"]["text"][0]]
    here, there = map(json.loads, found)
    assert here["mean_loss"] == pytest.approx(there["mean_loss"], rel=1e-4)
    assert here["validation"]["bins"] == pytest.approx(there["validation"]["bins"], rel=1e-4)
    assert here["parameters"] == there["parameters"] and here["steps"] == there["steps"] == 4


def test_with_required_inputs_alone(comfyui_server):
    asked = stock(
        encode=ENCODE, data=DATA, train=("RectiflowTrain", {"model": ["load", 0], "data": ["data", 0], "steps": 2}),
        show=("PreviewAny", {"source": ["train", 5]}),
    )  # fmt: skip
    assert json.loads(comfyui_server.run(asked)["outputs"]["show"]["text"][0])["steps"] == 2
