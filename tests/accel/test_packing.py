"""Pictures of several sizes in one sequence: each comes out as it does alone, in one model call a step for all."""

from __future__ import annotations

import pytest
import torch
from rectiflow import NODE_CLASS_MAPPINGS as NODES
from rectiflow.accel.attention.context_drop import ContextDrop, DropLog, attach_context_drop
from rectiflow.accel.attention.packing import Packing, attach_packing
from rectiflow.accel.attention.rope import RopePlan
from rectiflow.accel.attention.rope import attach as scaled
from rectiflow.accel.attention.rope_spectrum import RopeScaling
from rectiflow.errors import NodeInputError
from rectiflow.tests.accel.region_toys import noise, sample, toy, with_ras

SIZES = ((6, 8), (4, 10), (8, 4))
WHERE = "Pack Latents"


def noises(batch: int = 1, sizes=SIZES) -> list[torch.Tensor]:
    return [noise(batch, size, seed=seed) for seed, size in enumerate(sizes)]


def test_a_strip_is_taken_apart_bit_for_bit_and_a_token_is_a_patch():
    given = noises(2)
    packing = Packing.of(given, (2, 2), WHERE)
    strip = packing.strip(given)
    assert strip.shape == (2, 16, 2, 2 * (12 + 10 + 8)) and packing.counts == [12, 10, 8]
    for picture, back in zip(given, packing.pictures(strip), strict=True):
        assert torch.equal(picture, back)
    assert torch.equal(strip[..., 2 * 5 : 2 * 6], given[0][:, :, 2:4, 2:4])  # token 5 of 3 × 4: second row, second column
    ids = packing.ids(torch.zeros(1, 30, 3))
    assert ids[0, 5].tolist() == [0, 1, 1] and ids[0, 12].tolist() == [0, 0, 0] and ids[0, -1].tolist() == [0, 3, 1]


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_a_packed_run_is_the_separate_runs(sampler):
    """Asked: 1e-5 in fp32; with guidance, a batch of two and texts of unequal length. Relative to the largest number, about 4."""
    model, given = toy("flux"), noises(2)
    packed, strip, packing = attach_packing(model, given, WHERE)
    together = packing.pictures(sample(packed, strip, steps=3, sampler=sampler, tokens=(5, 8)))
    for start, found in zip(given, together, strict=True):
        alone = sample(model, start, steps=3, sampler=sampler, tokens=(5, 8))
        assert float((found - alone).abs().max()) < 1e-5 * float(alone.abs().max())


def test_without_the_blocks_pictures_see_each_other():
    """What the handler is for: the same strip on the plain model is another picture."""
    model, given = toy("flux"), noises()
    packed, strip, packing = attach_packing(model, given, WHERE)
    found, plain = sample(packed, strip, steps=2), sample(model, strip, steps=2)
    assert float((found - plain).abs().max()) > 1e-2


def test_a_picture_does_not_depend_on_its_neighbours():
    model, (first, second, third) = toy("flux"), noises()
    packed, strip, packing = attach_packing(model, [first, second, third], WHERE)
    other, changed, _ = attach_packing(model, [first, -2.0 * second, third], WHERE)
    one, two = packing.pictures(sample(packed, strip, steps=2)), packing.pictures(sample(other, changed, steps=2))
    assert torch.equal(one[0], two[0]) and torch.equal(one[2], two[2]) and not torch.equal(one[1], two[1])


def test_the_nodes_draw_the_tiny_model_at_three_sizes(tiny):
    pack, unpack = NODES["RectiflowPackLatents"](), NODES["RectiflowUnpackLatents"]()
    starts = [tiny.noise([seed], size) for seed, size in enumerate(((64, 64), (64, 96), (96, 64)))]
    inputs = {f"latent_{number}": {"samples": start} for number, start in enumerate(starts, start=1)}
    model, latent, packing = pack.execute(model=tiny.model, **inputs)
    drawn = tiny.sample("noto cat", latent["samples"], model=model, steps=2)
    listed = unpack.execute(latent={"samples": drawn}, packing=packing, index=0)[0]
    assert [tuple(part["samples"].shape[-2:]) for part in listed] == [(16, 16), (16, 24), (24, 16)]
    for number, start in enumerate(starts, start=1):
        single = unpack.execute(latent={"samples": drawn}, packing=packing, index=number)[0]
        assert len(single) == 1 and torch.equal(single[0]["samples"], listed[number - 1]["samples"])
        alone = tiny.sample("noto cat", start, steps=2)
        assert float((single[0]["samples"] - alone).abs().max()) < 2e-5 * float(alone.abs().max())
    with pytest.raises(NodeInputError, match="'index'"):
        unpack.execute(latent={"samples": drawn}, packing=packing, index=4)
    with pytest.raises(NodeInputError, match="'latent'"):
        unpack.execute(latent={"samples": drawn[..., :-2]}, packing=packing, index=1)
    with pytest.raises(NodeInputError, match="noise mask"):
        pack.execute(model=tiny.model, latent_1={"samples": starts[0], "noise_mask": torch.ones(1, 64, 64)})


def test_what_would_mix_pictures_is_refused():
    model, given = toy("flux"), noises()
    for family in ("sd3", "lumina2"):
        with pytest.raises(NodeInputError, match="Flux, whose positions"):
            attach_packing(toy(family), given, WHERE)
    with pytest.raises(NodeInputError, match="RoPE"):
        attach_packing(scaled(model, RopePlan(RopeScaling()), "test"), given, WHERE)
    for wrong in (noise(2, (4, 4)), noise(1, (5, 4)), torch.zeros(1, 16, 3, 4, 4)):
        with pytest.raises(NodeInputError, match="'latent_2'"):
            attach_packing(model, [given[0], wrong], WHERE)
    packed, strip, _ = attach_packing(model, given, WHERE)
    with pytest.raises(NodeInputError, match="strip of 60×2"):
        sample(packed, given[0], steps=1)
    with pytest.raises(NodeInputError, match="another node"):
        sample(attach_context_drop(packed, ContextDrop(DropLog(), "Context Drop", min_tokens=1)), strip, steps=1)
    with pytest.raises(NodeInputError, match="region-adaptive"):
        sample(with_ras(packed)[0], strip, steps=4)
