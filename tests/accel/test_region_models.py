"""RAS on toy transformers of each family: what a call over part of the tokens returns, token by token."""

from __future__ import annotations

import pytest
import torch
from rectiflow.tests.accel.region_toys import FAMILIES, OneVisit
from rectiflow.tests.models.small_models import random

CONSISTENT = 1e-4  # the bound of the paper page; fp32 sums in another order come to about 1e-6


def some_tokens(batch: int, count: int, share: float, seed: int = 0) -> torch.Tensor:
    """(b, a) sorted indices, another set a sample."""
    drawn = torch.rand(batch, count, generator=torch.Generator().manual_seed(seed))
    return drawn.argsort(dim=1)[:, : max(1, int(share * count))].sort(dim=1).values


@pytest.fixture
def visit():
    made = []

    def make(*args, **kwargs):
        made.append(OneVisit(*args, **kwargs))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch, conditions, size", [(1, 1, (6, 8)), (2, 2, (6, 8)), (2, 1, (7, 5)), (1, 2, (7, 11))])
def test_filled_cache_gives_the_dense_output_on_computed_tokens(visit, family, batch, conditions, size):
    """Done 2: the same x and sigma, any set of tokens, batches, joined conditions, sides that the patch does not divide."""
    one = visit(family, batch, conditions, size)
    dense = one.call()
    for share in (0.1, 0.4, 0.9):
        index = some_tokens(batch, one.grid.count, share, seed=int(10 * share))
        out = one.call(index=index)
        assert (out - dense)[one.cells(index)].abs().max() <= CONSISTENT


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kv", ["full", "none"])
def test_all_tokens_in_another_order_equal_dense(visit, family, kv):
    """Done 3: the set is all tokens, permuted; positions travel with them."""
    one = visit(family, kv=kv)
    dense = one.call()
    index = torch.randperm(one.grid.count, generator=torch.Generator().manual_seed(1))[None]
    torch.testing.assert_close(one.call(index=index), dense, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_left_out_keep_their_velocity(visit, family):
    """At another sigma and x: v of the cells left out is bit for bit what it was, x − sigma·v."""
    one = visit(family, 2)
    filled = one.call(0.6)
    v = (one.x - filled) / 0.6
    one.x = one.x + 0.1
    index = some_tokens(2, one.grid.count, 0.5)
    out = one.call(0.3, index)
    outside = ~one.cells(index)
    assert torch.equal(out[outside], (one.x - 0.3 * v)[outside])
    assert (out - (one.x - 0.3 * v))[~outside].abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_stale_keys_are_attended_and_fresh_ones_written(visit, family):
    """Two visits: the second sees the rows the first wrote. With every token computed once, nothing of the fill is left."""
    one, other = visit(family), visit(family)
    one.call(0.9)
    other.call(0.6)
    even = torch.arange(0, one.grid.count, 2)[None]
    odd = torch.arange(1, one.grid.count, 2)[None]
    for layer in one.run.store.rows:
        assert not torch.equal(one.run.store.rows[layer][0], other.run.store.rows[layer][0])
    first = {layer: pair[0].clone() for layer, pair in one.run.store.rows.items()}
    one.call(0.6, even)
    one.call(0.6, odd)
    for layer, pair in one.run.store.rows.items():
        assert not torch.equal(pair[0], first[layer])
    # The first block's keys come from x alone, so they are those of the dense pass.
    start = min(one.run.store.rows, key=lambda item: str(item[1]))
    torch.testing.assert_close(one.run.store.rows[start][0], other.run.store.rows[start][0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_condition_has_its_own_rows_joined_or_split(visit, family):
    """Filled joined, used one by one and the other way round: the same values."""
    joined, index = visit(family, 2, 2), None
    joined.call(0.9)
    index = some_tokens(2, joined.grid.count, 0.5, seed=4)
    together = joined.call(0.6, index)
    apart = visit(family, 2, 2)
    whole = {name: value for name, value in apart.given.items() if isinstance(value, torch.Tensor)}
    x, parts = apart.x, []
    for sigma, chosen in ((0.9, None), (0.6, index)):
        parts = []
        for place in range(2):
            rows = slice(2 * place, 2 * place + 2)
            apart.x = x[rows]
            apart.given.update({name: value[rows] for name, value in whole.items()})
            apart.conditions = 1
            parts.append(apart.call(sigma, chosen, options={"uuids": [place], "cond_or_uncond": [place]}))
    torch.testing.assert_close(torch.cat(parts), together, atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_controlnet_residuals_are_gathered(visit, family):
    """Residuals of every block and, for Flux, of both kinds; the last one meets tokens at full length."""
    one = visit(family, 2, 2)
    rows, tokens = one.x.shape[0], one.grid.count
    width = one.model.model.diffusion_model.hidden_size
    made = [random(rows, tokens, width, seed=50 + i) for i in range(4)]
    control = {"input": made[:2], "output": made[2:]} if family == "flux" else {"output": [made[0], None, made[1], made[2]]}
    plain = one.call()
    dense = one.call(control={name: list(part) for name, part in control.items()})
    assert (dense - plain).abs().max() > 1e-2
    index = some_tokens(2, tokens, 0.4)
    before = [part.clone() for part in made]
    out = one.call(index=index, control=control)
    assert (out - dense)[one.cells(index)].abs().max() <= CONSISTENT
    assert all(torch.equal(a, b) for a, b in zip(before, made))


def test_a_controlnet_of_another_length_makes_the_call_whole(visit):
    one = visit("flux")
    control = {"input": [random(1, 7, 64)], "output": []}
    dense = one.call(control=control)
    assert torch.equal(one.call(index=some_tokens(1, one.grid.count, 0.5), control=control), dense)
    assert any("residual of 7 tokens" in note for note in one.run.record.notes)


def test_reference_pictures_stay_whole(visit):
    one = visit("flux", 2)
    one.given["ref_latents"] = [random(2, 16, 4, 6, seed=71)]
    dense = one.call()
    index = some_tokens(2, one.grid.count, 0.3)
    assert (one.call(index=index) - dense)[one.cells(index)].abs().max() <= CONSISTENT


@pytest.mark.parametrize("shape", [(29, 29), (2, 29, 29), (2, 1, 29, 29)])
@pytest.mark.parametrize("kv", ["full", "none"])
def test_attention_masks_lose_the_rows_of_tokens_left_out(visit, shape, kv):
    one = visit("flux", 2, size=(8, 12), kv=kv)
    mask = torch.where(random(*shape, seed=5) > 0.8, -1e4, 0.0)
    one.given["attention_mask"] = mask
    index = some_tokens(2, one.grid.count, 0.5)
    dense = one.call()
    everything = torch.arange(one.grid.count).expand(2, -1)
    torch.testing.assert_close(one.call(index=everything), dense, atol=1e-5, rtol=0)
    if kv == "full":
        assert (one.call(index=index) - dense)[one.cells(index)].abs().max() <= CONSISTENT


def test_patches_of_other_nodes_stay_inside_and_are_called(visit):
    """A block patch, an attention override and a post_input patch that were there before."""
    one = visit("flux")
    seen = []

    def patch(args, extra):
        seen.append(args["img"].shape[1])
        return extra["original_block"](args)

    def override(func, *args, **kwargs):
        seen.append("attention")
        return func(*args, **kwargs)

    options = {
        "patches_replace": {"dit": {("double_block", 0): patch}}, "optimized_attention_override": override,
        "patches": {"post_input": [lambda given: {**given, "img": given["img"] * 1.0}]},
    }  # fmt: skip
    dense = one.call(options=options)
    index = some_tokens(1, one.grid.count, 0.5)
    seen.clear()
    out = one.call(index=index, options=options)
    assert seen.count("attention") == 4 and index.shape[1] in seen
    assert (out - dense)[one.cells(index)].abs().max() <= CONSISTENT


@pytest.mark.parametrize("dtype, worst", [(torch.bfloat16, 0.02), (torch.float8_e4m3fn, 0.25)])
def test_smaller_cache_types_round_only_the_tokens_left_out(visit, dtype, worst):
    one = visit("lumina2", dtype=dtype)
    dense = one.call()
    index = some_tokens(1, one.grid.count, 0.5)
    error = (one.call(index=index) - dense)[one.cells(index)].abs().max()
    assert 0 < error < worst
    everything = torch.arange(one.grid.count)[None]
    torch.testing.assert_close(one.call(index=everything), dense, atol=1e-5, rtol=0)


def test_repeated_heads_are_kept_once(visit):
    one = visit("lumina2")
    one.call()
    network = one.model.model.diffusion_model
    assert one.spec.kv_repeat == 2
    assert one.run.store.nbytes == 2 * 4 * one.grid.count * (network.dim // 2) * 4 == one.run.store.peak


def test_cache_on_the_cpu_is_a_copy_of_the_rows(visit):
    one = visit("sd3", device="cpu")
    dense = one.call()
    index = some_tokens(1, one.grid.count, 0.5)
    assert (one.call(index=index) - dense)[one.cells(index)].abs().max() <= CONSISTENT
