"""Mixed grains in whole runs, on toys of each family and on the tiny model; what cells compute is in test_grain_cells.py."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from rectiflow.accel.attention.context_drop import ContextDrop, DropLog, attach_context_drop
from rectiflow.accel.cache.binding import attach as attach_cache
from rectiflow.accel.cache.interval import IntervalReuse
from rectiflow.accel.cache.policy import Limits
from rectiflow.accel.cache.report import CacheLog
from rectiflow.accel.cache.visits import CachePlan
from rectiflow.accel.region.cells import BLOCK, grain_cells
from rectiflow.accel.region.grid import TokenGrid
from rectiflow.accel.region.mixed_binding import RUN, GrainLog, attach_mixed_grain, call_flops
from rectiflow.accel.region.mixed_grain import MixedGrain
from rectiflow.errors import NodeInputError
from rectiflow.families.tokens import token_spec
from rectiflow.host.embedded.ldm.common import EmbedND
from rectiflow.metrics.fidelity import relative_errors
from rectiflow.tests.accel.region_toys import noise, sample, toy, with_ras
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

WHERE = "Mixed-Grain Tokens"
SIZE = (14, 20)  # 7 × 10 tokens; SD3's toy has positions for 10
FAMILIES = ("flux", "sd3")  # those with block patches


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def half() -> torch.Tensor:
    """A MASK over 7 × 10 tokens: the left half is coarse. With cells of 2: 3 × 2 cells, 46 fine tokens."""
    mask = torch.ones(1, 7, 10)
    mask[..., :5] = 0.0
    return mask


def grained(model, mask=None, **changed):
    log = GrainLog()
    plan = MixedGrain(half() if mask is None else mask, **{"first": 1, "start": 0.0, **changed})
    return attach_mixed_grain(model, plan, log, WHERE), log


def shut(network: torch.nn.Module, gates: str) -> None:
    """Blocks add nothing where their modulation answers with zeros."""
    found = [weight for name, weight in network.named_parameters() if re.match(gates, name)]
    assert found
    with torch.no_grad():
        for weight in found:
            weight.zero_()


@pytest.mark.parametrize("family", FAMILIES)
def test_fine_everywhere_is_bit_identical(family):
    model, x = toy(family), noise(2, SIZE)
    plain = sample(model, x)
    patched, log = grained(model, torch.ones(1, 7, 10))
    assert torch.equal(sample(patched, x), plain)
    assert log.share == 1.0 and log.calls[0] == 0 and "no region of the map is coarse" in log.text()
    outside, log = grained(model, start=0.999)
    assert torch.equal(sample(outside, x), plain) and log.calls[0] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_of_the_range_see_merged_tokens_and_others_all(family):
    """Every block, with a patch of another node at each: 46 fine tokens and 6 cells are 52 of 70."""
    model = toy(family)
    spec = token_spec(model.get_model_object("diffusion_model"), "test")
    seen = {}

    def watching(key):
        def patch(args, extra):
            seen.setdefault(key, set()).add((args["img"].shape[1], BLOCK in args["transformer_options"]))
            return extra["original_block"](args)

        return patch

    for key in spec.blocks:
        model.set_model_patch_replace(watching(key), "dit", *key)
    patched, log = grained(model, first=1, last=2)
    assert sample(patched, noise(2, SIZE)).isfinite().all()
    text = [5 if key[0] == "single_block" else 0 for key in spec.blocks]
    for place, key in enumerate(spec.blocks):
        inside = 1 <= place <= 2
        assert seen[key] == {((52 if inside else 70) + text[place], inside)}
    assert log.tokens == (70, 52) and log.cells == (46, 6) and log.calls == (8, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_that_add_nothing_give_the_dense_answer(family):
    """Done 4 through a whole model: with all gates of the range shut, merged and dense runs are the same to the bit."""
    model, x = toy(family), noise(1, SIZE)
    shut(model.model.diffusion_model, r"double_blocks\.1\..*_mod\.lin|single_blocks\.0\.modulation|joint_blocks\.[12]\..*adaLN")
    patched, log = grained(model, first=1, last=2)
    assert torch.equal(sample(patched, x), sample(model, x)) and log.calls[0] == 8


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("first", [0, 1, 2])
def test_tokens_equal_inside_cells_are_drawn_as_the_dense_model_draws_them(family, first):
    """A latent of one colour per cell, no positions that tell its tokens apart, weighted keys: merging changes nothing but rounding."""
    model = toy(family)
    network = model.model.diffusion_model
    if family == "sd3":
        network.pos_embed.data.zero_()
    else:
        network.pe_embedder.forward = lambda ids: EmbedND.forward(network.pe_embedder, torch.zeros_like(ids))
    x = noise(2, SIZE)
    x[:, :, :12, :8] = x[:, :, :12:4, :8:4].repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    plain = sample(model, x, steps=3)
    for unmerge in ("delta", "copy"):
        patched, log = grained(model, first=first, unmerge=unmerge)
        torch.testing.assert_close(sample(patched, x, steps=3), plain, atol=1e-4, rtol=0)
        assert log.calls[0] == 3
    unweighted, _ = grained(model, first=first, weigh=False)
    assert (sample(unweighted, x, steps=3) - plain).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [
    {"merge": "centre", "unmerge": "copy"}, {"position": "first"}, {"side": 3}, {"first": 0, "last": 0}, {"first": 3},
])  # fmt: skip
def test_joined_and_split_conditions_agree_in_every_form(family, options):
    """Batch of two pictures with maps of their own, conditions of one and of two lengths."""
    model, x = toy(family), noise(2, SIZE)
    mask = torch.cat((half(), torch.ones(1, 7, 10)))
    mask[1, :, 4:8] = 0.0  # as many cells as the left half has, of 2 × 2 and of 3 × 3
    patched, log = grained(model, mask, **options)
    together = sample(patched, x)
    assert log.calls[0] == 8
    apart = torch.cat([sample(grained(model, mask[i : i + 1], **options)[0], x[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(together, apart, atol=5e-5, rtol=1e-5)  # fp32 sums in another order: up to 2.4e-5 by processor
    assert sample(patched, x, tokens=(5, 8)).isfinite().all() and len(log.flops) == 2
    assert (together - sample(model, x)).abs().max() > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_controlnet_residuals_follow_the_tokens(family):
    """One that is constant in cells acts as in the dense model: on blocks that add nothing, merged and dense answers agree."""
    model = toy(family)
    network = model.model.diffusion_model
    tokens, width = 70, network.hidden_size
    cells = grain_cells(half().flatten(1), TokenGrid((7, 10), (1, 1)), 2)
    residuals = [random(2, tokens, width, seed=50 + i) for i in range(4)]
    for residual in residuals:
        residual[:, cells.coarse[0]] = residual[:, cells.coarse[0][:, :1]]
    control = {"input": residuals[:2], "output": residuals[2:]} if family == "flux" else {"output": residuals}

    def with_control(executor, *args, **kwargs):
        given = dict(zip(("x", "t", "c_concat", "c_crossattn", "control", "transformer_options"), args))
        return executor(given["x"], given["t"], given["c_concat"], given["c_crossattn"], control, given["transformer_options"], **kwargs)

    def controlled(model):
        model = model.clone()
        model.add_wrapper_with_key("apply_model", "a control", with_control)
        return model

    x = noise(1, SIZE)
    free = sample(controlled(model), x, steps=2)
    assert (free - sample(model, x, steps=2)).abs().max() > 1e-2
    patched, log = grained(controlled(model))
    assert sample(patched, x, steps=2).isfinite().all() and log.calls == (2, 0) and not log.notes
    shut(network, r"double_blocks.*_mod\.lin|.*modulation\.lin|joint_blocks.*adaLN")
    patched, log = grained(controlled(model))
    torch.testing.assert_close(sample(patched, x, steps=2), sample(controlled(model), x, steps=2), atol=2e-5, rtol=0)
    assert log.calls == (2, 0)


def test_reference_pictures_stay_whole_behind_merged_tokens():
    model, x = toy("flux"), noise(1, SIZE)
    entry = [[random(1, 5, 20, seed=5), {"pooled_output": random(1, 12, seed=6), "reference_latents": [random(1, 16, 4, 6, seed=7)]}]]
    patched, log = grained(model)
    lengths = []

    def watch(args, extra):
        lengths.append(args["img"].shape[1])
        return extra["original_block"](args)

    patched.set_model_patch_replace(watch, "dit", "double_block", 1)
    found = sample(patched, x, positive=entry, steps=2)
    assert found.isfinite().all() and not log.notes and set(lengths) == {52, 52 + 6}
    assert (found - sample(model, x, positive=entry, steps=2)).abs().max() > 1e-4


def test_masks_of_attention_are_merged_like_the_tokens():
    """Text that no image token sees, and the other way round, in a mask over text and image."""
    model, x = toy("flux"), noise(1, SIZE)
    mask = torch.zeros(1, 75, 75)
    mask[:, 5:, :5] = mask[:, :5, 5:] = -1e4
    given = {"pooled_output": random(1, 12, seed=6), "attention_mask": mask, "attention_mask_img_shape": (7, 10)}

    def drawn_with(text_seed: int, model):
        return sample(model, x, positive=[[random(1, 5, 20, seed=text_seed), given]], steps=2, cfg=1.0)

    patched, log = grained(model)
    torch.testing.assert_close(drawn_with(5, patched), drawn_with(8, patched), atol=1e-6, rtol=0)
    assert log.calls == (2, 0) and not log.notes
    assert (drawn_with(5, patched) - drawn_with(5, model)).abs().max() > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("blocks", [(0, 200), (1, 2), (2, 200)])
def test_report_and_counter_agree_on_tokens_and_flops(family, blocks):
    """Done 6; the bound is that of test_cost: SD3's last block does not attend for the text's sake."""
    model, x = toy(family), noise(1, SIZE)
    transformer = model.get_model_object("diffusion_model")
    spec = token_spec(transformer, "test")
    plan = MixedGrain(half(), first=blocks[0], last=blocks[1], start=0.0)
    cells = grain_cells(half().flatten(1), TokenGrid((7, 10), (1, 1)), 2)
    log = GrainLog()
    patched = attach_mixed_grain(model, plan, log, WHERE)
    counted = []
    for drawn_by in (patched, model):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            sample(drawn_by, x, steps=1)
        counted.append(counter.get_total_flops() / 2)  # two conditions
    assert log.flops == {5: call_flops(transformer, spec, plan, cells, 5)}
    merged, whole = log.flops[5]
    assert merged == pytest.approx(counted[0], rel=0.015) and whole == pytest.approx(counted[1], rel=0.01)
    assert log.tokens[1] == 46 + 6 and f"{merged / whole:.1%}" in log.text()


def test_error_falls_with_the_share_of_fine_cells(tiny):
    """Done 7: mean over eight seeds, the share of fine cells drawn by each picture's own detail."""
    shares = (0.0, 0.25, 0.5, 0.75, 1.0)
    x = tiny.noise(range(8))
    plain = tiny.sample("noto cat", x, steps=4)
    detail = F.avg_pool2d(plain.std(dim=1, keepdim=True), 4)[:, 0]  # of a cell, 2 × 2 tokens of 2 × 2
    errors = []
    for share in shares:
        order = detail.flatten(1).argsort(dim=1, descending=True)
        fine = torch.zeros(8, 16).scatter_(1, order[:, : int(16 * share)], 1.0).view(8, 4, 4)
        model, log = grained(tiny.model, fine, first=2, start=0.25)
        z = tiny.sample("noto cat", x, model=model, steps=4)
        errors.append(float(relative_errors(z, plain).mean()))
        assert log.tokens == (64, 16 + int(48 * share))
    assert errors == sorted(errors, reverse=True) and errors[-1] == 0.0 < errors[-2], errors


# A run's life, and other nodes


def test_a_run_leaves_nothing_behind_and_an_interrupt_too():
    model, x = toy("flux"), noise(1, SIZE)
    patched, log = grained(model)

    def stop(step, *rest):
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(patched, x, callback=stop)
    assert RUN not in patched.model_options["transformer_options"] and log.runs == 1 and log.calls == (3, 0)
    sample(patched, noise(2, (7, 10)), steps=2)  # 4 × 5 tokens of the same aspect
    assert log.tokens == (20, 20 - 3 * 2) and log.calls == (2, 0)
    assert torch.equal(sample(patched, x), sample(grained(model)[0], x))
    assert log.runs == 3 and log.calls == (8, 0)


def test_steps_between_the_shares_merge_and_an_inversion_merges_at_the_same_noise():
    model, x = toy("flux"), noise(1, SIZE)
    patched, log = grained(model, start=0.25, end=0.75)
    seen = []

    def watch(args, extra):
        if BLOCK in args["transformer_options"]:
            seen.append(float(args["transformer_options"]["sigmas"][0]))
        return extra["original_block"](args)

    patched.set_model_patch_replace(watch, "dit", "double_block", 1)
    for sigmas in (torch.linspace(1.0, 0.0, 9), torch.linspace(0.0, 1.0, 9)):
        seen.clear()
        sample(patched, x, sigmas=sigmas)
        assert sorted(seen) == [0.375, 0.5, 0.625, 0.75] and log.calls == (4, 4)


def test_beside_context_drop_blocks_outside_the_range_drop_keys():
    model, x = toy("flux"), noise(1, SIZE)

    def drop(model):
        log = DropLog()
        return attach_context_drop(model, ContextDrop(log, "test", layers="all", min_tokens=1)), log

    inner, first = drop(model)
    one, log = grained(inner, first=2)
    outer, _ = grained(model, first=2)
    two, second = drop(outer)
    torch.testing.assert_close(sample(one, x, steps=2), sample(two, x, steps=2), atol=1e-6, rtol=0)
    assert first.calls == second.calls == (4, 0) and log.calls == (2, 0)  # two of four blocks, two steps


def test_caches_of_whole_answers_stand_outside_and_others_are_refused():
    model, x = toy("flux"), noise(1, SIZE)

    def cached(target):
        return attach_cache(model, CachePlan(IntervalReuse(interval=2), target, Limits()), CacheLog(), "test")

    patched, log = grained(cached("output"))
    assert sample(patched, x).isfinite().all() and 0 < sum(log.calls) < 8
    with pytest.raises(NodeInputError, match="granularity"):
        sample(grained(cached("last_block"))[0], x)


def test_what_does_not_fit_is_refused():
    model = toy("flux")
    for changed, name in (
        ({"first": 4}, "block_start"), ({"first": 2, "last": 1}, "block_end"), ({"start": 0.5, "end": 0.5}, "start_percent"),
        ({"merge": "sum"}, "merge"), ({"unmerge": "none"}, "unmerge"), ({"position": "last"}, "position"), ({"side": 1}, "grain"),
    ):  # fmt: skip
        with pytest.raises(NodeInputError, match=name):
            grained(model, **changed)
    with pytest.raises(NodeInputError, match="NextDiT"):
        grained(toy("lumina2"))
    with pytest.raises(NodeInputError, match="mixed grains"):
        grained(grained(model)[0])
    with pytest.raises(NodeInputError, match="mixed"):
        grained(with_ras(model)[0])
    with pytest.raises(NodeInputError, match="mixed-grain"):
        with_ras(grained(model)[0])
    with pytest.raises(NodeInputError, match="grain_map"):
        sample(grained(model, torch.ones(1, 7, 30))[0], noise(1, SIZE))
