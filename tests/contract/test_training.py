"""Training inside a real ComfyUI: the same losses and, after it, the same pictures as here; its own nodes save and load what was learnt."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
from rectiflow.host import get_output_directory
from rectiflow.host.embedded import run_graph, use_host
from rectiflow.tests.contract.test_comfyui import both_hosts_agree, decoded, ksampler, shown, stock
from rectiflow.train.checkpoints import RunFolder

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


def report_of(name: str, **inputs) -> dict:
    return graph(name, **inputs) | {"show": {"class_type": "PreviewAny", "inputs": {"source": ["train", 5]}}}


def test_a_run_begun_here_goes_on_there(comfyui_server, embedded):
    """Two of four steps on this host, the folder copied, the rest inside ComfyUI: the losses of four steps on one host."""
    whole = json.loads(run_graph(report_of("whole"), embedded).outputs["show"]["text"][0])
    run_graph(report_of("moved", steps_this_run=2), embedded)
    with use_host(embedded):
        source = Path(get_output_directory()) / "rf_train" / "moved"
    shutil.copytree(source, comfyui_server.folder / "output" / "rf_train" / "moved")
    entry = comfyui_server.run(report_of("moved", resume="auto"))
    moved = json.loads(entry["outputs"]["show"]["text"][0])
    assert moved["steps"] == 4 and any("resumed at step 2" in note for note in moved["notes"])
    assert moved["mean_loss"] == pytest.approx(whole["mean_loss"], rel=1e-4)


def test_an_interrupt_through_the_api_leaves_a_checkpoint(comfyui_server):
    """The next queue goes on from it."""
    folder = RunFolder(comfyui_server.folder / "output" / "rf_train" / "stopped")
    queued = comfyui_server.queue(report_of("stopped", steps=10_000, save_every=1, validate_every=0))
    deadline = time.monotonic() + 120
    while not folder.steps() and time.monotonic() < deadline:
        time.sleep(0.2)
    comfyui_server.post("/interrupt", {})
    assert comfyui_server.wait(queued)["status"]["status_str"] == "error"
    kept, complaints = folder.newest()
    assert not complaints and kept.step >= 1
    more = report_of("stopped", steps=kept.step + 1, save_every=0, validate_every=0, resume="auto")
    assert json.loads(comfyui_server.run(more)["outputs"]["show"]["text"][0])["steps"] == kept.step + 1


def test_the_wavelet_loss_is_the_same_on_both_hosts(comfyui_server, embedded):
    """With the nodes that split and merge a latent in front of it: the data set is a latent that was taken apart and joined."""
    wavelet = {"kind": "huber_wavelet", "weighting": "none", "c_scale": 0.00054, "delta": 1.0, "beta": 0.5}
    asked = graph("wavelet", loss=["loss", 0]) | stock(
        loss=("RectiflowTrainLoss", wavelet), bands=("RectiflowLatentWaveletSplit", {"latent": ["encode", 0]}),
        joined=("RectiflowLatentWaveletMerge", {"LL": ["bands", 0], "LH": ["bands", 1], "HL": ["bands", 2], "HH": ["bands", 3]}),
        data=("RectiflowLatentDataset", {"latents": ["joined", 0], "positive": ["yes", 0]}),
    )  # fmt: skip
    both_hosts_agree(asked, comfyui_server, embedded)


PAIRS = {
    "solver": ("RectiflowFlowODESampler", {"solver": "euler", "start_from": "noise", "last_step": "euler"}),
    "grid": ("RectiflowUniformFlowSigmas", {"steps": 4, "start": 1.0, "end": 0.0}),
    "pairs": ("RectiflowFlowPairGenerator", {
        "model": ["load", 0], "positive": ["yes", 0], "negative": ["no", 0], "cfg": 2.0, "sampler": ["solver", 0], "sigmas": ["grid", 0],
        "latent": ["empty", 0], "count": 2, "seed": 0, "path": "contract/pairs", "batch": 2,
    }),
    "data": ("RectiflowPairDataset", {"pairs": ["pairs", 0], "positive": ["yes", 0]}),
    "flow": ("RectiflowTrainTarget", {"kind": "annealing_reflow", "teacher_cfg": 1.0, "anneal_steps": 2, "annealing": "linear"}),
    "once": ("RectiflowTrainTarget", {
        "kind": "flow_guided_distill", "teacher_cfg": 1.0, "anneal_steps": 0, "annealing": "linear", "teacher": ["train", 0],
    }),
}  # fmt: skip


def test_pairs_reflow_and_one_step_are_the_same_on_both_hosts(comfyui_server, embedded):
    asked = stock(
        empty=EMPTY, optim=("RectiflowTrainOptimizer", OPTIM), **PAIRS, train=trained("flow", steps=2, target=["flow", 0]),
        again=trained("once", steps=2, target=["once", 0], model=["train", 0]),
        sample=ksampler(["empty", 0], model=["again", 0], steps=1, cfg=1.0), decode=decoded(["sample", 0]), save=shown(["decode", 0]),
    )  # fmt: skip
    both_hosts_agree(asked, comfyui_server, embedded)
