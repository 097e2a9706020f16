"""Re-ttention: its statistics against the equations written out, whole runs on toys of each family, and what is left behind."""

from __future__ import annotations

import gc
import math

import pytest
import torch
import torch.nn.functional as F
from rectiflow.accel.attention.dispatch import RUN, AttentionCall, RunFacts
from rectiflow.accel.attention.rettention import (
    FORMS,
    PATTERNS,
    Rettention,
    RettentionHandler,
    RettentionLog,
    attach_rettention,
    layout_for,
)
from rectiflow.accel.attention.statistics import Kept, Storage
from rectiflow.accel.cache.binding import attach as attach_cache
from rectiflow.accel.cache.interval import IntervalReuse
from rectiflow.accel.cache.policy import Limits
from rectiflow.accel.cache.report import CacheLog
from rectiflow.accel.cache.visits import CachePlan
from rectiflow.errors import NodeInputError
from rectiflow.families.tokens import TokenSpec
from rectiflow.kernels.attention_lse import attention_with_lse
from rectiflow.kernels.block_sparse_attention import block_sparse_attention, reference
from rectiflow.tests.accel.region_toys import FAMILIES, noise, sample, toy, with_ras

WHERE = "Re-ttention"
SIZE = (14, 20)  # 7 × 10 tokens; SD3's toy has positions for 10
EXACT = 1e-5  # the bound of the paper page; fp32 sums in another order
KEEP = 0.2
GRIDS = [(7, 10), (3, 5, 6)]
CLOSED = {"warmup": 0, "ramp": 0.0, "keep": KEEP, "min_tokens": 1}  # settings under which an unchanged input must give dense attention


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain(q, k, v, mask=None):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def call_of(sides, text=5, extra=3, sigma=1.0, mask=None, scale=1.0, dtype=torch.float32, rows=2, keys=(("a", 0), ("b", 1))):
    """One attention of `rows` conditions and three heads; scores grow with `scale`."""
    n = text + math.prod(sides) + extra
    q, k, v = (random(rows, 3, n, 16, seed=seed).to(dtype) for seed in (1, 2, 3))
    return AttentionCall(
        q * scale, k, v, mask, text, tuple(sides), extra, ("double_block", 0), 0, sigma, keys,
        lambda q, k, v, given=mask: plain(q, k, v, given),
    )  # fmt: skip


def handler(steps: int = 4, **options) -> RettentionHandler:
    """Of a run of one layer whose sigmas are 1, 1 − 1/steps, …"""
    sigmas = tuple((torch.arange(steps, -1, -1) / steps).tolist())
    plan = Rettention(RettentionLog(), WHERE, **{**CLOSED, "period": steps, **options})
    plan.check()
    return plan.open(RunFacts(sigmas, (1, 16, 14, 20), TokenSpec("toy", (2, 2), (), 1), None, torch.device("cpu")))


def patched(model, **options):
    log = RettentionLog()
    return attach_rettention(model, Rettention(log, WHERE, **{**CLOSED, "period": 5, **options})), log


# The equations ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sides", GRIDS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_statistics_are_those_of_the_equations(sides, pattern, form):
    """Eq. 8 to 10 on whole matrices in fp64: ρ, ρ·A^S V, and R as the exact part of the keys left out; ours beyond the mean of values."""
    call = call_of(sides)
    layout = layout_for(pattern, KEEP, sides, call.text, call.extra)
    seen = layout.mask()
    assert 0.03 < layout.share < 0.95
    q, k, v = (x.double() for x in (call.q, call.k, call.v))
    scores = q @ k.transpose(-1, -2) / 4.0
    masses = scores.exp()
    rho = (masses * seen).sum(-1) / masses.sum(-1)  # eq. 8
    reshaped = rho[..., None] * (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v)  # eq. 9
    residual = scores.softmax(-1) @ v - reshaped  # eq. 10
    torch.testing.assert_close(residual, scores.softmax(-1).masked_fill(seen, 0.0) @ v, atol=1e-12, rtol=0)
    if form == "centred":
        residual = residual - (1.0 - rho)[..., None] * v.mean(dim=2, keepdim=True)

    one = handler(pattern=pattern, form=form)
    assert torch.equal(one.attend(call), plain(call.q, call.k, call.v))  # a step that measures is dense, bit for bit
    for row, key in enumerate(call.keys):
        kept = one.kept[(call.layer, 0, key, None)]
        torch.testing.assert_close(kept.ratio(torch.device("cpu"), 0.0, 1.0), rho[row : row + 1].float(), atol=EXACT, rtol=0)
        torch.testing.assert_close(kept.residual(torch.device("cpu")), residual[row : row + 1].float(), atol=EXACT, rtol=0)
    assert one.found.ratios[0.0]["double 0"] == (pytest.approx(float(rho.mean()), abs=1e-5), 2)


@pytest.mark.parametrize("masked", [None, "keys", "pairs"])
@pytest.mark.parametrize("sides", GRIDS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_unchanged_input_gives_dense_attention(sides, pattern, masked):
    """Done 1: the sparse step after the measured one, same q, k, v, no ramp; text and tokens of reference pictures among the rows."""
    n = 5 + math.prod(sides) + 3
    mask = None
    if masked == "keys":  # padded text, as hosts add it
        mask = torch.zeros(2, 1, 1, n).index_fill_(3, torch.tensor([3, 4]), -torch.inf)
    elif masked == "pairs":
        mask = (random(n, n, seed=9) > -1.0) | torch.eye(n, dtype=torch.bool)
    first, second = (call_of(sides, sigma=sigma, mask=mask) for sigma in (1.0, 0.75))
    one = handler(pattern=pattern)
    dense = one.attend(first)
    torch.testing.assert_close(one.attend(second), dense, atol=EXACT, rtol=0)
    assert (one.measured, one.sparse) == (1, 1)
    bare = handler(pattern=pattern, use_ratio=False, use_residual=False)
    bare.attend(first)
    assert (bare.attend(second) - dense).abs().max() > 0.05


def test_all_kept_has_ratio_one_and_no_residual():
    """Done 2, on the parts: ρ = 1 and R = 0 where every key is seen. The handler leaves such a layout to the model, bit for bit."""
    call = call_of((7, 10))
    layout = layout_for("grat_block", 1.0, (7, 10), 5, 3)
    assert layout.dense
    seen, lse = block_sparse_attention(call.q, call.k, call.v, layout, with_lse=True)
    torch.testing.assert_close((lse - attention_with_lse(call.q, call.k, call.v)[1]).exp(), torch.ones(2, 3, 78), atol=1e-6, rtol=0)
    torch.testing.assert_close(seen, plain(call.q, call.k, call.v), atol=1e-6, rtol=0)
    one = handler(keep=1.0)
    assert one.attend(call) is None and not one.kept


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_scores_do_not_overflow(dtype):
    """Done 3: scores of ±200 stay logarithms. The bound is the rounding of the values, at most 4 here, to 8 or 11 bits."""
    call, later = (call_of((7, 10), sigma=sigma, scale=50.0, dtype=dtype) for sigma in (1.0, 0.75))
    scores = call.q.float() @ call.k.float().transpose(-1, -2) / 4.0
    assert scores.abs().max() > 200
    layout = layout_for("grat_block", KEEP, (7, 10), 5, 3)
    direct = scores.double().softmax(-1).masked_fill(~layout.mask(), 0.0).sum(-1).float()
    one = handler()
    dense = one.attend(call)
    kept = torch.cat([one.kept[(call.layer, 0, key, None)].ratio(torch.device("cpu"), 0.0, 1.0) for key in call.keys])
    torch.testing.assert_close(kept, direct, atol=1e-4 if dtype == torch.float32 else 2e-4, rtol=0)  # lse of 200 has 24 bits
    corrected = one.attend(later)
    assert corrected.dtype == dtype and corrected.isfinite().all()
    error = {torch.float16: 8e-3, torch.bfloat16: 6e-2, torch.float32: 2e-4}[dtype]
    assert (corrected.float() - dense.float()).abs().max() < error


@pytest.mark.parametrize("pattern", PATTERNS)
def test_without_ratio_and_residual_it_is_masked_attention(pattern):
    """Done 4."""
    call = call_of((7, 10), sigma=0.75)
    one = handler(pattern=pattern, use_ratio=False, use_residual=False)
    layout = layout_for(pattern, KEEP, (7, 10), 5, 3)
    torch.testing.assert_close(one.attend(call), reference(call.q, call.k, call.v, layout), atol=EXACT, rtol=0)
    assert not one.kept and one.measured == 0


@pytest.mark.parametrize("form", FORMS)
def test_the_ramp_grows_by_step_and_ends_at_its_most(form):
    """ρ after the measured step: unchanged at the first sparse one, then λ more at each, never above rho_max; scaling stays linear in ρ."""
    sides, most, ramp = (7, 10), 0.6, 0.15
    one = handler(steps=8, period=8, ramp=ramp, rho_max=most, use_residual=False, form=form)
    call = call_of(sides)
    one.attend(call)
    measured = torch.cat([one.kept[(call.layer, 0, key, None)].log_ratio for key in call.keys]).exp()
    sparse = reference(call.q, call.k, call.v, layout_for("grat_block", KEEP, sides, 5, 3))
    mean = call.v.mean(dim=2, keepdim=True) if form == "centred" else 0.0
    for step in range(1, 8):
        expected = (measured + ramp * (step - 1)).clamp(max=most)[..., None]
        out = one.attend(call_of(sides, sigma=1.0 - step / 8))
        torch.testing.assert_close(out, sparse * expected + (1.0 - expected) * mean, atol=EXACT, rtol=0)


def test_values_that_move_together_move_the_output_as_dense_attention():
    """A softmax adds up to one: values that all grow by c move dense attention by c. Ours does so too, the published form by ρ·c."""
    errors = {}
    for form in FORMS:
        one = handler(form=form)
        dense = one.attend(call_of((7, 10)))
        later = call_of((7, 10), sigma=0.75)
        later.v = later.v + 3.0
        errors[form] = float((one.attend(later) - dense - 3.0).abs().max())
    assert errors["centred"] < EXACT and errors["published"] > 1.0


@pytest.mark.parametrize("dtype, bound", [("same", EXACT), ("bf16", 4e-3), ("fp8_e4m3", 7e-2)])
@pytest.mark.parametrize("device", ["model", "cpu"])
def test_precisions_of_the_residual(dtype, bound, device):
    """Half a unit in the last place of values up to 1: 2⁻⁹ for bf16, 2⁻⁴ of the scaled value for fp8; and the bytes that were promised."""
    storage = Storage(dtype, device)
    one = handler(storage=storage)
    call = call_of((7, 10))
    dense = one.attend(call)
    assert (one.attend(call_of((7, 10), sigma=0.75)) - dense).abs().max() <= bound
    assert one.found.held == sum(kept.bytes for kept in one.kept.values()) == storage.bytes_of(call.q, True, True)
    per_number = {"same": 4, "bf16": 2, "fp8_e4m3": 1}[dtype]
    assert one.found.held == 2 * 3 * 78 * (16 * per_number + 4) + (2 * 3 * 4 if dtype == "fp8_e4m3" else 0)


def test_a_zero_residual_survives_eight_bits():
    q = torch.zeros(1, 1, 4, 8)
    kept = Kept.of(0, None, torch.zeros_like(q), q, Storage("fp8_e4m3"))
    assert torch.equal(kept.residual(torch.device("cpu")), q)


@pytest.mark.parametrize("sides", [(32, 32), (64, 48), (8, 16, 16)])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_layouts_keep_about_what_was_asked_for(sides, pattern):
    """Image tokens alone, away from the edges; squares and runs are whole, so a share is met within a factor of two. Three planes of a clip
    of 8 × 16 × 16 in squares of 4 are 1 − 7/8·(3/4)² = 0.508 at the least."""
    layout = layout_for(pattern, 0.1, sides)
    inside = max(layout.keys) / math.prod(sides)
    assert 0.05 < inside < (0.51 if pattern == "grat_cross" and len(sides) > 2 else 0.2)
    wide = layout_for(pattern, 0.1, sides, 7, 2)
    assert wide.keys[-1] == wide.keys[-2] == wide.tokens and max(wide.keys[:-2]) == max(layout.keys) + 9


# Whole runs ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{"keep": 1.0}, {"min_tokens": 1000}, {"period": 1}, {"warmup": 100}], ids=str)
def test_off_is_bit_identical(family, options):
    """Done 2; period 1 measures at every step and changes nothing."""
    model = toy(family)
    changed, log = patched(model, **options)
    z = noise(2, SIZE)
    assert torch.equal(sample(changed, z, steps=3), sample(model, z, steps=3))
    assert log.calls[0] == 0 and log.runs == 1 and bool(log.ratios) == ("period" in options)
    assert ("dense:" in log.text() or "no attention was reached" in log.text()) == ("period" not in options)


@pytest.mark.parametrize("family, attentions", [("flux", 4), ("sd3", 5), ("lumina2", 4)])
def test_steps_follow_the_schedule(family, attentions):
    """Nine steps: two of warm-up untouched, then one measured and two sparse in turn."""
    changed, log = patched(toy(family), warmup=2, period=3)
    out = sample(changed, noise(2, SIZE), steps=9)
    assert out.isfinite().all() and log.calls == (4 * attentions, 3 * attentions, 0) and sorted(log.ratios) == [2, 5, 8]
    assert all(len(layers) == attentions and all(0 < ratio < 1 and count == 2 for ratio, count in layers.values())
               for layers in log.ratios.values())  # fmt: skip
    text = log.text()
    assert "step 2: mean mass seen" in text and "MiB of statistics" in text


@pytest.mark.parametrize("sampler", ["heun", "dpm_2"])
def test_second_order_solvers_share_their_steps(sampler):
    """A step is read off sigma: both of its evaluations are of one period, so none counts a step that is not one."""
    changed, log = patched(toy("flux"), warmup=1, period=2)
    assert sample(changed, noise(1, SIZE), steps=6, sampler=sampler).isfinite().all()
    assert {math.floor(u) for u in log.ratios} == {1, 3, 5} and log.calls[0] > 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pattern", [[True] * 99, [True, True, False, True, True] * 30], ids=["apart", "changing"])
def test_conditions_apart_give_what_joined_ones_give(family, pattern, split):
    """Done 6. Bound: rows of another batch size add up in another order; guidance and a random network enlarge that over six steps."""
    changed, log = patched(toy(family), warmup=1, period=3)
    z = noise(2, SIZE)
    joined = sample(changed, z, steps=6)
    ratios = log.ratios
    split(pattern)
    torch.testing.assert_close(sample(changed, z, steps=6), joined, atol=2e-3, rtol=1e-3)
    for u, layers in log.ratios.items():
        for layer, (ratio, count) in layers.items():
            assert ratio == pytest.approx(ratios[u][layer][0], abs=1e-3) and count == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_its_pictures(family):
    """Texts of unequal length come in calls of their own."""
    changed, _ = patched(toy(family), warmup=1, period=2)
    z = noise(2, SIZE)
    both = sample(changed, z, steps=4, tokens=(5, 8))
    for i in range(2):
        torch.testing.assert_close(both[i : i + 1], sample(changed, z[i : i + 1], steps=4, tokens=(5, 8)), atol=2e-3, rtol=1e-3)


def flow(steps: int = 20, **options) -> torch.Tensor:
    """Eight runs of dx/dt = Σ_h A_h(x)·V_h(x) − x over 8 × 8 tokens: near ones have larger scores, values a mean in common.

    options: of the handler; none: dense.
    """
    angles = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij"), dim=-1).reshape(64, 2) * math.pi / 8
    places = torch.cat([angles.cos(), angles.sin()], dim=-1).repeat(1, 4)  # (n, d)
    to_q, to_k, to_v = random(3, 3, 16, 16, seed=5) / 4
    x = random(8, 64, 16, seed=6) + 1.0
    one = handler(steps=steps, **options) if options else None
    for step in range(steps):
        q, k, v = (torch.einsum("bnd,hde->bhne", y, weight) for y, weight in ((x + places, to_q), (x + places, to_k), (x, to_v)))
        call = AttentionCall(
            q + places, k + places, v, None, 0, (8, 8), 0, ("double_block", 0), 0, 1.0 - step / steps, (("a", 0),), plain
        )  # fmt: skip
        out = plain(call.q, call.k, call.v) if one is None else one.attend(call)
        x = x + (out.sum(dim=1) - x) / steps
    return x


@pytest.fixture(scope="module")
def error():
    """error(…): mean over the eight runs of the relative distance to the dense one."""
    dense = flow()
    return lambda **options: float(((flow(**options) - dense).flatten(1).norm(dim=1) / dense.flatten(1).norm(dim=1)).mean())


def test_each_part_lowers_the_error(error):
    """Done 5: both parts, one of the two, none. In the published form the ratio alone, or beside the residual, loses the values' mean."""
    bare = error(period=5, use_ratio=False, use_residual=False)
    residual = error(period=5, use_ratio=False)
    both, ratio = error(period=5), error(period=5, use_residual=False)
    assert both <= residual < ratio < bare
    published, published_ratio = error(period=5, form="published"), error(period=5, use_residual=False, form="published")
    assert both < residual < published < bare < published_ratio


def test_error_falls_with_the_period(error):
    """Done 5: more dense steps, less error, and none at period 1."""
    found = [error(period=period) for period in (10, 5, 2, 1)]
    assert found == sorted(found, reverse=True) and found[-1] == 0.0 < found[-2], found


def test_a_dense_step_that_a_cache_answered_is_made_up_for():
    """A cache around the model skips steps 1, 3, 5 …; the measured steps 1, 4, 7 that it takes fall on the next one it asks for."""
    changed, log = patched(toy("flux"), warmup=1, period=3)
    cached = attach_cache(changed, CachePlan(IntervalReuse(interval=2), "output", Limits(0, 0)), CacheLog(), "test")
    sample(cached, noise(1, SIZE), steps=9)
    asked = sorted(log.ratios)
    assert asked[0] == 2 and all(b - a >= 2 for a, b in zip(asked, asked[1:])) and 4 in asked and 8 in asked


@pytest.mark.parametrize("family", FAMILIES)
def test_ras_beside_it(family):
    """Partial steps are RAS's alone. Kept statistics serve its dense steps, or are measured anew when their period is over."""
    model, ras = with_ras(toy(family), start=2, resets=(4, 6))
    changed, log = patched(model, warmup=0, period=2)
    assert sample(changed, noise(2, SIZE), steps=8).isfinite().all()
    dense = sum(visit.phase == "dense" for visit in ras.last.visits)
    per_step = {"flux": 4, "sd3": 5, "lumina2": 4}[family]
    assert 0 < dense < 8 and sum(log.calls) == dense * per_step


class Failing(Exception):
    pass


def test_interrupt_then_another_size():
    """Done 7: nothing of a run is alive after it, and the next one, of another size, is what a fresh model gives."""

    def alive() -> int:
        gc.collect()
        return sum(type(found) in (Kept, RettentionHandler) for found in gc.get_objects())

    def stop(step, *rest):
        if step == 2:
            raise Failing

    before = alive()
    model = toy("flux")
    changed, log = patched(model, warmup=1, period=2)
    with pytest.raises(Failing):
        sample(changed, noise(1, SIZE), steps=4, callback=stop)
    assert alive() == before and RUN not in changed.model_options["transformer_options"] and log.runs == 1
    other = noise(2, (10, 6))
    fresh, _ = patched(model, warmup=1, period=2)
    assert torch.equal(sample(changed, other, steps=4), sample(fresh, other, steps=4)) and log.runs == 2


# Bad input -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, name", [
    ({"keep": 0.001}, "keep"), ({"keep": math.nan}, "keep"), ({"pattern": "star"}, "pattern"), ({"period": 0}, "period"),
    ({"warmup": -1}, "warmup_steps"), ({"ramp": 0.3}, "ramp"), ({"rho_max": 0.1}, "rho_max"), ({"min_tokens": -1}, "min_tokens"),
    ({"storage": Storage("int4")}, "residual_dtype"), ({"storage": Storage(device="disk")}, "residual_device"),
    ({"storage": Storage(cap=0)}, "memory_gib"), ({"form": "new"}, "form"),
])  # fmt: skip
def test_settings_that_do_not_fit_are_refused(options, name):
    with pytest.raises(NodeInputError, match=name):
        patched(toy("flux"), **options)


def test_statistics_over_the_cap_are_refused_before_they_are_kept():
    """The first attention says what all of them will need; a halved precision is the way out that the error names."""
    z = noise(1, SIZE)
    need = 4 * 2 * (2 * 75) * (32 * 4 + 4)  # layers, conditions, queries of two heads, R in fp32 and log ρ
    changed, log = patched(toy("flux"), period=2, storage=Storage(cap=1 << 16))
    with pytest.raises(NodeInputError, match="memory_gib.*fp8_e4m3"):
        sample(changed, z, steps=4)
    assert log.held == 0 and need > 1 << 16  # which is what the error compares
    changed, log = patched(toy("flux"), period=2)
    sample(changed, z, steps=4)
    assert log.held == need
    exact, log = patched(toy("flux"), period=2, storage=Storage(cap=need))
    sample(exact, z, steps=4)
    assert log.held == need


def test_break_even_is_measured_or_said_to_be_out_of_reach():
    changed, log = patched(toy("flux"), min_tokens=0)
    state = torch.get_rng_state()
    sample(changed, noise(1, (6, 8)), steps=1)
    assert "break-even on this machine" in log.text() and torch.equal(torch.get_rng_state(), state)


def test_the_node_fills_its_report(tiny):
    from rectiflow.nodes.attention import RectiflowAttentionReport, RectiflowRettention

    given = {
        "keep": 0.1, "pattern": "grat_block", "warmup_steps": 1, "period": 2, "ramp": 0.0, "rho_max": 1.0, "use_ratio": True,
        "use_residual": True, "residual_dtype": "bf16", "residual_device": "model", "memory_gib": 1.0, "min_tokens": 1,
    }  # fmt: skip
    model, report = RectiflowRettention().execute(model=tiny.model, **given)
    with pytest.raises(NodeInputError, match="report"):
        RectiflowAttentionReport().execute(report=report, after={})
    latent = tiny.sample("noto cat", tiny.noise([1]), model=model, steps=3)
    text = RectiflowAttentionReport().execute(report=report, after={"samples": latent})[0]
    assert "9 of 18 attentions sparse" in text and "step 1: mean mass seen" in text
