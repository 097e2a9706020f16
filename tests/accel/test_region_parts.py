"""The parts of RAS by themselves: schedule, selection, starvation, grid, forecast, and the moves of tokens."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from rectiflow.accel.region.drift import Drift
from rectiflow.accel.region.grid import TokenGrid
from rectiflow.accel.region.history import VelocityHistory
from rectiflow.accel.region.plan import RegionPlan
from rectiflow.accel.region.schedule import drop_counts, parse_steps, steps_from_percent
from rectiflow.accel.region.select import choose, focus_metric, left_out, scores
from rectiflow.errors import NodeInputError
from rectiflow.kernels.token_gather import gather_tokens, scatter_tokens, write_tokens
from rectiflow.tests.models.small_models import random

# Schedule --------------------------------------------------------------------------------------------------------------------


def test_the_published_schedule():
    """Done 4: T 30, start 4, resets 12 and 22, n 4096, ratio .5, slope 256 every 4."""
    expected = [0] * 4 + [1280] * 4 + [1536] * 4 + [0] + [1792] * 3 + [2048] * 4 + [2304] * 2 + [0, 2304] + [2560] * 4 + [2816] * 2
    assert drop_counts(4096, 30, 0.5, 4, 1000, (12, 22), 256, 4) == expected


def test_a_constant_schedule_is_not_rounded():
    assert drop_counts(100, 6, 0.25, 2, 5, (3,)) == [0, 0, 75, 0, 75, 0]


@pytest.mark.parametrize("tokens", (1, 7, 64, 1024, 4097))
@pytest.mark.parametrize("ratio", (0.05, 0.3, 1.0))
@pytest.mark.parametrize("slope", (-1024, 0, 999))
@pytest.mark.parametrize("period", (0, 1, 5))
def test_a_schedule_leaves_at_least_one_token(tokens, ratio, slope, period):
    counts = drop_counts(tokens, 20, ratio, 2, 18, (9,), slope, period)
    assert len(counts) == 20 and all(0 <= count < max(tokens, 1) for count in counts)
    assert counts[:2] == [0, 0] and counts[9] == 0 and counts[18:] == [0, 0]
    if ratio == 1.0:
        assert not any(counts)


def test_reset_steps_are_read_and_refused():
    assert parse_steps(" 22, 12,12 ", "node") == (12, 22) and parse_steps("", "node") == ()
    for text in ("12;22", "a", "-3", "1.5", "12 22"):
        with pytest.raises(NodeInputError, match="reset_steps"):
            parse_steps(text, "node")
    assert steps_from_percent(28, 0.14, "0.43, 0.73", "node") == (4, (12, 20))
    for text in ("2", "x", "0.1 0.2", "-0.1", "nan"):
        with pytest.raises(NodeInputError, match="reset_percents"):
            steps_from_percent(28, 0.1, text, "node")


# Selection -------------------------------------------------------------------------------------------------------------------


def test_the_metric_is_the_unbiased_channel_deviation_of_a_token():
    v = random(2, 5, 6, 4)
    grid = TokenGrid.of((6, 4), (2, 2), "test")
    std = v.std(dim=1, unbiased=True)
    expected = std.reshape(2, 3, 2, 2, 2).mean(dim=(2, 4)).flatten(1)
    torch.testing.assert_close(focus_metric(v, grid, "std"), expected)
    norm = v.square().sum(dim=1).sqrt().reshape(2, 3, 2, 2, 2).mean(dim=(2, 4)).flatten(1)
    torch.testing.assert_close(focus_metric(v, grid, "l2norm"), norm)
    assert torch.equal(focus_metric(v, grid, "random", 3), focus_metric(v, grid, "random", 3))
    assert focus_metric(v[:, :1], grid, "std").isfinite().all()  # one channel has no deviation


def test_focus_picks_the_end_it_names():
    m = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    none = torch.zeros(1, 4)
    assert choose(scores(m, none, "low_std", 0.1), 2, "low_std").tolist() == [[0, 1]]
    assert choose(scores(m, none, "high_std", 0.1), 2, "high_std").tolist() == [[2, 3]]
    assert choose(scores(m, none, "reference", 0.1), 2, "reference", 1.0).tolist() == [[0, 1]]
    assert choose(scores(m, none, "reference", 0.1), 2, "reference", 0.0).tolist() == [[2, 3]]
    assert choose(scores(m, none, "reference", 0.1), 2, "reference", 0.5).tolist() == [[1, 2]]


def test_reference_feeds_starvation_where_ours_ends_it():
    """The page's trap: with high_ratio 1 the published rule drops a dropped token again; our two directions pull it back."""
    m, left = torch.ones(1, 2), torch.tensor([[5.0, 0.0]])
    assert left_out(scores(m, left, "reference", 0.5), 1, "reference", 1.0).tolist() == [[True, False]]
    for focus in ("low_std", "high_std"):
        assert left_out(scores(m, left, focus, 0.5), 1, focus, 1.0).tolist() == [[False, True]]


@pytest.mark.parametrize("focus", ["low_std", "high_std"])
@pytest.mark.parametrize("n, ratio, k, spread", [(64, 0.25, 0.1, 1), (60, 0.1, 1.0, 1), (64, 0.25, 0.5, 4), (49, 0.5, 0.2, 2)])
def test_no_token_starves(focus, n, ratio, k, spread):
    """Done 4: on a metric that stays, inactivity is bounded by a round of all tokens plus the drops that make up for the metric's range.

    A token i waits while others of higher priority are taken; its priority grows by k a drop, so after log(m_max/m_min)/k drops it is level
    with any other, and level tokens take turns: at most ceil(n/a) steps.
    """
    m = torch.linspace(0.0, 1.0, n).mul(math.log(spread)).exp()[None]
    left, idle, longest = torch.zeros(1, n), torch.zeros(n), 0.0
    count = drop_counts(n, 1, ratio, 0, 1, ())[0]
    bound = math.ceil(n / (n - count)) * (1 + math.ceil(math.log(spread) / k))
    for _ in range(200):
        active = choose(scores(m, left, focus, k), count, focus)[0]
        gone = torch.ones(n, dtype=torch.bool).index_fill(0, active, False)
        left, idle = left + gone, torch.where(gone, idle + 1, 0.0)
        longest = max(longest, float(idle.max()))
        assert gone.sum() == count
    assert longest <= bound
    if spread == 1.0:
        assert left.max() - left.min() <= 1  # a metric without preference: strict turns


def test_masks_force_tokens_in_and_out():
    m = torch.rand(2, 40, generator=torch.Generator().manual_seed(0))
    score = scores(m, torch.zeros(2, 40), "low_std", 0.1)
    always = torch.zeros(2, 40, dtype=torch.bool)
    always[0, 30:] = always[1, :4] = True
    never = torch.zeros(2, 40, dtype=torch.bool)
    never[:, 10:25] = True
    for focus, count in itertools.product(("low_std", "high_std", "reference"), (0, 10, 20, 39)):
        index = choose(score, count, focus, 0.5, always, never)
        chosen = torch.zeros(2, 40, dtype=torch.bool).scatter_(1, index, True)
        assert (chosen & always).sum() == always.sum() and not (chosen & never).any() and index.shape[1] >= 10
        assert (index[:, 1:] > index[:, :-1]).all()
    assert choose(score, 20, "low_std", 1.0, torch.ones(2, 40, dtype=torch.bool)).shape == (2, 40)


def test_expected_change_is_the_rate_of_the_last_two_computed_velocities_by_what_has_passed():
    grid, drift = TokenGrid.of((2, 4), (2, 2), "test"), None
    first, second = torch.zeros(1, 3, 2, 4), torch.zeros(1, 3, 2, 4)
    second[..., 2:] = 0.1  # each cell of the second token moves by 0.1·√3 over 0.2 of sigma
    drift = Drift(grid)
    drift.update(first, 0.9, None)
    assert drift.rate is None
    drift.update(second, 0.7, None)
    rate = 0.1 * math.sqrt(3) / 0.2
    torch.testing.assert_close(drift.expected(0.6), torch.tensor([[0.0, 0.1 * rate]]))
    drift.update(second + 7.0, 0.7, None)  # a second evaluation at one sigma
    torch.testing.assert_close(drift.expected(0.6), torch.tensor([[0.0, 0.1 * rate]]))
    drift.update(second + 8.0, 0.6, torch.tensor([[True, False]]))
    torch.testing.assert_close(drift.expected(0.4), torch.tensor([[0.2 * math.sqrt(3) / 0.1, 0.3 * rate]]))


def test_tokens_take_turns_by_how_fast_they_move():
    """Rates 1 to 4 that stay: a token is computed as often as its rate says, and none waits for ever."""
    grid = TokenGrid.of((1, 40), (1, 1), "test")
    rates = torch.tensor([1.0, 2.0, 3.0, 4.0]).repeat(10)
    drift, computed, counts = Drift(grid), None, torch.zeros(40)
    for step in range(502):
        sigma = 1.0 - step / 600
        drift.update((rates * sigma)[None, None, None], sigma, computed)
        if step:
            index = choose(scores(drift.expected(sigma - 1 / 600), torch.zeros(1, 40), "high_std", 0.0), 38, "high_std")
            computed = torch.zeros(1, 40, dtype=torch.bool).scatter_(1, index, True)
            counts += computed[0]
    by_rate = counts.reshape(10, 4).sum(dim=0)
    torch.testing.assert_close(by_rate / by_rate.sum(), rates[:4] / 10, atol=0, rtol=0.05)
    assert counts.min() > 5


# Grid ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape, patch", [((6, 8), (2, 2)), ((7, 5), (2, 2)), ((3, 5, 7), (1, 2, 2)), ((1, 1), (2, 2))])
def test_tokens_and_cells_map_both_ways(shape, patch):
    grid = TokenGrid.of(shape, patch, "test")
    assert grid.count == math.prod(grid.sides)
    tokens = random(2, grid.count, seed=1)
    cells = grid.spread(tokens)
    assert cells.shape == (2, 1, *shape)
    for how in ("mean", "max", "min"):
        torch.testing.assert_close(grid.pool(cells[:, 0], how), tokens)


def test_a_cell_that_does_not_divide_the_grid_is_refused():
    grid = TokenGrid.of((12, 16), (2, 2), "test")
    assert grid.cells_of(2, "test") == (3, 4)
    for side in (4, 5, 0):
        with pytest.raises(NodeInputError, match="cell.*divides both 6 and 8"):
            grid.cells_of(side, "test")
    squares = grid.mean_of_cells(random(1, 48), 2).reshape(6, 8)
    assert torch.equal(squares[0::2], squares[1::2]) and torch.equal(squares[:, 0::2], squares[:, 1::2])


def test_masks_that_do_not_fit_are_refused():
    grid = TokenGrid.of((12, 16), (2, 2), "test")
    assert grid.from_mask(torch.ones(96, 128), 1, "test", "region_mask").shape == (1, 12, 16)
    assert grid.from_mask(torch.ones(2, 95, 128), 2, "test", "region_mask").shape == (2, 12, 16)
    for mask in (torch.ones(3, 96, 128), torch.ones(1, 128, 96), torch.ones(5), torch.ones(1, 1, 12, 16), torch.ones(1, 60, 128)):
        with pytest.raises(NodeInputError, match="region_mask"):
            grid.from_mask(mask, 2, "test", "region_mask")


# Forecast of tokens left out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_velocity_of_that_degree_in_sigma_is_continued_exactly(order):
    """Each cell has its own history: it is computed at its own sigmas, and still the polynomial is exact."""
    coefficients = [random(1, 3, 4, 4, seed=i) for i in range(order + 1)]

    def v(sigma):
        return sum(c * sigma**i for i, c in enumerate(coefficients))

    history, generator = VelocityHistory(order), torch.Generator().manual_seed(0)
    for i in range(order + 1):
        history.update(v(1.0 - 0.1 * i), 1.0 - 0.1 * i, None)
    for sigma in (0.6, 0.55, 0.4):
        computed = torch.rand(1, 1, 4, 4, generator=generator) > 0.5
        torch.testing.assert_close(history.predict(sigma), v(sigma), atol=2e-4, rtol=0)  # divided differences over 0.05 in fp32
        history.update(torch.where(computed, v(sigma), torch.nan), sigma, computed)
    torch.testing.assert_close(history.predict(0.2), v(0.2), atol=1e-3, rtol=0)


def test_a_second_value_at_one_sigma_replaces_the_first():
    history = VelocityHistory(1)
    for sigma, value in ((1.0, 1.0), (0.8, 5.0), (0.8, 2.0)):
        history.update(torch.full((1, 1, 2, 2), value), sigma, None)
    torch.testing.assert_close(history.predict(0.6), torch.full((1, 1, 2, 2), 3.0))


def test_history_keeps_no_tensor_it_was_given():
    v = torch.ones(1, 1, 2, 2)
    history = VelocityHistory(0)
    history.update(v, 1.0, None)
    v.zero_()
    history.predict(0.5).zero_()
    assert torch.equal(history.predict(0.5), torch.ones(1, 1, 2, 2))


# Moves of tokens -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape, dim", [((2, 7, 3), 1), ((2, 4, 7, 3), 2), ((2, 4, 7, 3), -2), ((1, 7, 5, 2, 2), 1), ((3, 7), 1)])
@pytest.mark.parametrize("shared", [True, False])
def test_gather_scatter_and_write_are_indexing(shape, dim, shared):
    x, axis = random(*shape), dim % len(shape)
    batch = 1 if shared else shape[0]
    index = torch.stack([torch.randperm(7, generator=torch.Generator().manual_seed(i))[:4] for i in range(batch)])
    rows = gather_tokens(x, index, dim)
    filled = scatter_tokens(rows, index, 7, dim)
    cache = torch.full(shape, 9.0)
    assert write_tokens(cache, index, rows, dim) is cache
    for b in range(shape[0]):
        places = index[0 if shared else b].tolist()
        for j, place in enumerate(places):
            taken = x[b].select(axis - 1, place)
            for moved in (rows[b].select(axis - 1, j), filled[b].select(axis - 1, place), cache[b].select(axis - 1, place)):
                assert torch.equal(moved, taken)
        for place in set(range(7)) - set(places):
            assert not filled[b].select(axis - 1, place).any() and (cache[b].select(axis - 1, place) == 9.0).all()


def test_eight_bit_caches_are_written_byte_by_byte():
    cache = random(2, 6, 3).to(torch.float8_e4m3fn)
    rows = random(2, 2, 3, seed=1).to(torch.float8_e4m3fn)
    write_tokens(cache, torch.tensor([[0, 5], [2, 3]]), rows)
    assert torch.equal(cache[1, 2:4].float(), rows[1].float()) and torch.equal(cache[0, 5].float(), rows[0, 1].float())


def test_an_index_of_another_batch_is_refused():
    with pytest.raises(ValueError, match="does not fit"):
        gather_tokens(random(3, 5, 2), torch.zeros(2, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="does not fit"):
        write_tokens(random(3, 5, 2), torch.zeros(3, dtype=torch.long), random(3, 1, 2))


def test_a_kernel_that_is_asked_for_is_not_exchanged_in_silence():
    """Triton moves tensors whose tokens lie on one axis and writes into contiguous ones; where it is named, it says so."""
    pytest.importorskip("triton")
    index, mixed = torch.tensor([[2, 0]]), (random(2, 5, 3), random(2, 4, 5, 3))
    rows = gather_tokens(mixed, index, -2)
    assert all(torch.equal(part, x.index_select(-2, index[0])) for part, x in zip(rows, mixed))
    with pytest.raises(ValueError, match="tokens lie on one axis, got 1, 2"):
        gather_tokens(mixed, index, -2, "triton")
    turned = random(2, 3, 5).transpose(1, 2)
    with pytest.raises(ValueError, match="contiguous"):
        write_tokens(turned, index, rows[0], 1, "triton")


# Settings --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [
    {"ratio": 0.0}, {"ratio": math.nan}, {"high_ratio": -0.1}, {"starvation": 5.0}, {"order": 3}, {"period": 65}, {"cell": 0},
    {"metric": "mean"}, {"focus": "std"}, {"start": 9, "end": 8}, {"slope": 64}, {"focus": "reference", "cell": 2}, {"start": -1},
])  # fmt: skip
def test_settings_that_do_not_fit_are_refused(wrong):
    with pytest.raises(NodeInputError, match="allowed"):
        RegionPlan(**wrong).check("node")
