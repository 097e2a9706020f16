"""Quantised and pruned models inside a real ComfyUI: its classes at toy sizes, its patcher's partial unload, its loader on our files."""

from __future__ import annotations

import pytest
from rectiflow.tests.in_comfyui import answers_of

pytestmark = pytest.mark.comfyui


@pytest.fixture(scope="module")
def answers():
    return answers_of("quant/comfyui_quant.py")


@pytest.mark.parametrize("family", ["Flux", "SD3", "HunyuanVideo", "Wan", "Qwen-Image", "LTX-Video"])
def test_eight_bits_on_every_family(answers, family):
    """Random weights, four guided steps: 20 dB left of the latent. Branches in turn are the same bits each time."""
    found = answers["families"][family]
    assert found["db"] > 20
    assert found["in_turn"] and found["smaller"] and found["uuid"]


def test_a_lora_stays_exact_when_memory_is_short(answers):
    """The patcher puts its function behind those on the layer; loaded the LoRA lies in factors (a thousandth), unloaded in the sum."""
    found = answers["unloaded"]
    assert found["freed"] and found["functions"] == 1 and found["restored"]
    assert found["loaded"] < 2e-3 and found["short"] < 1e-4


@pytest.mark.parametrize("family", ["Wan", "SD3"])
@pytest.mark.parametrize("kind", ["pruned", "pruned_4", "lora"])
def test_files_come_back_bit_for_bit(answers, family, kind):
    assert answers["files"][family][kind] == [True, True]


def test_the_tiny_model(answers):
    assert answers["tiny"]["db"] > 30
    assert answers["tiny"]["pruned_4"] == [True, True]


def test_a_fresh_process_gives_the_same_latent(answers):
    """Pruned, quantised, with a LoRA rounded into the codes, saved; the other process has the file alone."""
    assert answers["tiny"]["fresh"] == {"equal": True}


def test_sensitive_layers_are_kept(answers):
    found = answers["tiny"]["sensitive"]
    assert found["gain"] >= 1 and found["off"] < 1e-3 and found["same"] and 0 < found["count"] < 20


def test_directions_beside_the_codes(answers):
    """One block at W8A4 with a LoRA rounded into the codes."""
    found = answers["tiny"]["directions"]
    assert found["gain"] > 1 and found["file"] == [True, True]
