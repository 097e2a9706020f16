"""A run that ends early and goes on ends where the uninterrupted one does, to the last bit, whatever ended it."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rectiflow.errors import NodeInputError
from rectiflow.tests.train.toy import Table, Toy, config, train
from rectiflow.train.checkpoints import RunFolder
from rectiflow.train.loop import Callbacks, NotFiniteError, Trainer
from rectiflow.train.optim import Optim
from rectiflow.train.params import ParamSubset
from rectiflow.train.targets import Target


def same(one: Trainer, other: Trainer) -> bool:
    weights = all(torch.equal(value, other.params[name]) for name, value in one.params.items())
    averages = all(torch.equal(value, other.ema.average[name]) for name, value in one.ema.average.items())
    losses = [record.loss for record in one.history.steps] == [record.loss for record in other.history.steps]
    return weights and averages and losses and one.done == other.done


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd", "muon"])
def test_runs_in_parts_equal_one_run(kind, tmp_path):
    optim = Optim(kind, lr=1e-2, warmup=5, muon_for="first|second", muon_not_for="")
    whole = train(optim=optim)
    for _ in range(4):
        parts = train(tmp_path / "parts", optim=optim, steps_this_run=10)
    assert same(whole, parts)


def test_kill_at_five_random_steps(tmp_path):
    """SIGKILL leaves no time for anything: the last whole checkpoint is what counts."""
    whole = train(save_every=3)
    chance = random.Random(7)
    for _ in range(5):
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("toy.py")), str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
        )
        for _ in range(chance.randint(3, 9)):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert 0 < RunFolder(tmp_path / "run").steps()[0] < 40
    assert same(whole, train(tmp_path / "run", save_every=3))


def test_a_finished_run_trains_nothing_more(tmp_path):
    train(tmp_path / "run")
    model = Toy(seed=5)
    again = train(tmp_path / "run", model)
    assert model.calls == 0 and again.done == 40 and len(again.history.steps) == 40


def test_an_interrupt_keeps_the_last_whole_step(tmp_path):
    stop_at = 13

    def interrupt():
        if trainer.done == stop_at:
            raise KeyboardInterrupt

    trainer = Trainer(Toy(), Table(), config(save_every=0), RunFolder(tmp_path / "run"), callbacks=Callbacks(interrupt=interrupt))
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert RunFolder(tmp_path / "run").steps() == [stop_at]
    assert same(train(save_every=0), train(tmp_path / "run", save_every=0))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "no tensors", "no JSON", "another step", "deep JSON", "old format"])
def test_a_damaged_newest_checkpoint_is_passed_over(damage, tmp_path):
    train(tmp_path / "run", steps_this_run=20, keep=5)
    tensors, description = RunFolder(tmp_path / "run").files(20)
    content = tensors.read_bytes()
    if damage == "truncated":
        tensors.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        tensors.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    elif damage == "empty":
        tensors.write_bytes(b"")
    elif damage == "no tensors":
        tensors.unlink()
    elif damage == "no JSON":
        description.write_text("{")
    elif damage == "another step":
        description.write_text(json.dumps(json.loads(description.read_text()) | {"step": 19}))
    elif damage == "deep JSON":
        description.write_text("[" * 100_000)
    else:
        description.write_text(json.dumps(json.loads(description.read_text()) | {"format": 99}))
    lines: list[str] = []
    trainer = Trainer(Toy(), Table(), config(keep=5), RunFolder(tmp_path / "run"), callbacks=Callbacks(log=lines.append))
    trainer.run()
    assert any("step 20 cannot be used" in line for line in lines) and "resumed at step 14" in lines
    assert same(train(), trainer)


def test_rows_after_the_checkpoint_are_dropped(tmp_path):
    """A killed run may have written losses of steps that its checkpoint has not seen, and half a line."""
    train(tmp_path / "run", steps_this_run=10)
    with open(tmp_path / "run" / "loss.csv", "a") as file:
        file.write("11,0.5,0.1,1.0,0\n12,0.4,0.")
    done = train(tmp_path / "run")
    assert [record.step for record in done.history.steps] == list(range(1, 41))


def test_old_checkpoints_go_but_the_best_stays(tmp_path):
    trainer = train(tmp_path / "run", validate_every=7, keep=2)
    best = trainer.history.best().step
    assert set(RunFolder(tmp_path / "run").steps()) == {40, 35} | ({best} if best % 7 == 0 else set())


def test_new_sets_aside_and_error_refuses(tmp_path):
    train(tmp_path / "run", steps_this_run=5)
    with pytest.raises(NodeInputError, match="error_if_exists"):
        train(tmp_path / "run", resume="error_if_exists")
    fresh = train(tmp_path / "run", resume="new", steps_this_run=3)
    assert fresh.done == 3 and RunFolder(tmp_path / "run.before-1").steps() == [5]


@pytest.mark.parametrize("changed, name", [({"seed": 1}, "seed"), ({"optim": Optim("sgd")}, "optimiser")])
def test_fields_that_cannot_change_are_named(changed, name, tmp_path):
    train(tmp_path / "run", steps_this_run=5)
    with pytest.raises(NodeInputError, match=name):
        train(tmp_path / "run", **changed)


def test_what_learns_cannot_change(tmp_path):
    train(tmp_path / "run", steps_this_run=5)

    class Other(Toy):
        def describe(self):
            return {"model": "toy", "params": ParamSubset().kind}

    with pytest.raises(NodeInputError, match="params"):
        train(tmp_path / "run", Other())


def test_rate_and_steps_may_change_and_are_told(tmp_path):
    train(tmp_path / "run", steps_this_run=5)
    lines: list[str] = []
    changed = config(steps=12, optim=Optim(lr=1e-3, warmup=5))
    trainer = Trainer(Toy(), Table(), changed, RunFolder(tmp_path / "run"), callbacks=Callbacks(log=lines.append))
    trainer.run()
    assert trainer.done == 12 and any("steps: 40 → 12" in line for line in lines) and any("optim" in line for line in lines)


def test_a_full_disk_is_found_before_the_start(tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(NodeInputError, match="MB free"):
        train(tmp_path / "run")


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    train(tmp_path / "run", steps_this_run=7)
    import safetensors.torch

    def full(tensors, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(safetensors.torch, "save_file", full)
        with pytest.raises(OSError, match="No space"):
            train(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir() if "part" in path.name] == []
    assert same(train(), train(tmp_path / "run"))


def test_steps_that_are_not_finite_are_left_out_then_the_run_ends(tmp_path):
    model = Toy()
    model.broken_from = 12
    with pytest.raises(NotFiniteError, match="10 steps in a row"):
        train(tmp_path / "run", model, save_every=5)
    kept, complaints = RunFolder(tmp_path / "run").newest()
    assert not complaints and all(torch.isfinite(value).all() for value in kept.tensors.values())
    assert kept.meta["halvings"] == 3
    assert torch.equal(kept.part("params")["first"], train(steps=40, steps_this_run=12).params["first"])


def test_pairs_are_asked_for():
    with pytest.raises(NodeInputError, match="pairs"):
        train(target=Target("reflow_pairs"))
