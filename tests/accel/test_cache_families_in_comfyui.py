"""Caches inside a real ComfyUI on its own classes: every family of its transformers at toy size, with blocks where it offers them."""

from __future__ import annotations

import pytest
from rectiflow.tests.in_comfyui import answers_of

pytestmark = pytest.mark.comfyui

# Patches of ComfyUI 0.3.64 at the toys' depths; 0: the class offers none, and only the output can be kept.
BLOCKS = {
    "Flux": 4, "SD3": 2, "HunyuanVideo": 4, "Wan": 2, "Qwen-Image": 2, "LTX-Video": 2, "Chroma": 4, "Wan VACE": 2, "Wan Camera": 2,
    "AuraFlow": 4, "Mochi": 3, "Stable Audio": 2, "HunyuanDiT": 4, "Hunyuan3D 2": 4, "Hunyuan3D 2.1": 4, "Lumina 2": 0, "OmniGen 2": 0,
    "PixArt": 0, "HiDream": 0, "ACE-Step": 0, "Cosmos Predict2": 0, "Cosmos": 0,
}  # fmt: skip
WITH_BLOCKS = [name for name, blocks in BLOCKS.items() if blocks]


@pytest.fixture(scope="module")
def answers():
    return answers_of("accel/comfyui_families.py")


@pytest.mark.parametrize("family", BLOCKS)
def test_output_is_kept_for_every_family(answers, family):
    found = answers[family]
    assert found["finite"] and found["moves"], "the toy itself draws something"
    output = found["output"]
    assert output["no_op"] and output["near"] and output["forecasts"] == 2 and not output["notes"]
    assert output["identity"] < 1e-6, "divided by sigma and multiplied again, in float32"


@pytest.mark.parametrize("family", WITH_BLOCKS)
def test_blocks_put_back_at_their_own_step_give_the_computed_answer(answers, family):
    found = answers[family]
    assert found["blocks"] == BLOCKS[family]
    for target in ("last_block", "block_delta", "block_deltatail"):
        kept = found[target]
        assert kept["no_op"] and kept["near"] and kept["forecasts"] == 2 and not kept["notes"], target
        # The last block's tokens go back as they are; a difference is taken and added again, over one evaluation, in float32.
        assert kept["identity"] <= (0 if target == "last_block" else 1e-6), target


@pytest.mark.parametrize("family", [name for name, blocks in BLOCKS.items() if not blocks])
def test_families_without_block_patches_are_refused_block_targets(answers, family):
    assert answers[family]["blocks"] == 0 and "Set granularity to output" in answers[family]["refused"]
