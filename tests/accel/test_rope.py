"""Rotary positions beyond the training size: the papers' vectors, what stays the model's own, and whole runs."""

from __future__ import annotations

import math

import pytest
import torch
from rectiflow.accel.attention.length_scale import LENGTH_SCALES, length_factor
from rectiflow.accel.attention.rope import KEY, RopePlan, ScaledRotary, attach
from rectiflow.accel.attention.rope_spectrum import (
    METHODS,
    RopeScaling,
    amplitude,
    plain_frequencies,
    scaled_frequencies,
    snapped,
)
from rectiflow.errors import NodeInputError
from rectiflow.families.rotary import rotary_spec

THETA = 10000.0
SMALL = (8, 8)  # tokens of the tiny model's training size


def ratios(method: str, channels: int, length: float, s: float, t: float = 1.0, **options) -> torch.Tensor:
    found = scaled_frequencies(RopeScaling(method, **options), channels, THETA, length, s, t)
    return found / plain_frequencies(channels, THETA)


@pytest.mark.parametrize(("t", "expected"), [
    (0.0, (1, 0.5, 0.5, 0.5, 0.5, 0.5)), (0.3, (1, 0.8831, 0.7798, 0.6082, 0.5, 0.5)),
    (0.5, (1, 0.9269, 0.8591, 0.738, 0.5048, 0.5)), (1.0, (1, 0.9622, 0.9259, 0.8572, 0.7071, 0.5196)),
])  # fmt: skip
def test_time_aware_vectors_of_lumina_next(t, expected):
    found = ratios("time_aware", 36, 64, 2.0, t)[[0, 1, 2, 4, 9, 17]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-4)  # printed to four places


def test_time_aware_is_continuous_in_time():
    tables = torch.stack([ratios("time_aware", 36, 64, 3.0, t / 400) for t in range(401)])
    # The exponent is steepest near t = 0, where the floor 1/s hides it; a jump would be as large as 1 − 1/s = 0.67.
    assert (tables[1:] - tables[:-1]).abs().max() < 0.05
    assert (tables[1:] >= tables[:-1] - 1e-12).all()


def test_frequency_aware_interpolates_waves_longer_than_the_training_size():
    found, omega = ratios("frequency_aware", 56, 64, 2.0), plain_frequencies(56, THETA)
    longer = 64 * omega / (2 * math.pi) < 1 - 1e-9
    assert longer.any() and not longer.all()
    torch.testing.assert_close(found[longer], torch.full_like(found[longer], 0.5), rtol=0, atol=1e-12)
    assert (found[~longer] > 0.5).all()


def test_vision_ntk_vector_of_fit():
    found = scaled_frequencies(RopeScaling("vision_ntk"), 36, THETA, 16, 20 / 16)
    torch.testing.assert_close(found[1:3], torch.tensor([0.591667, 0.350069], dtype=torch.float64), rtol=0, atol=1e-6)
    last = scaled_frequencies(RopeScaling("position_interpolation"), 36, THETA, 16, 20 / 16)[-1]
    assert abs(found[-1] - last) < 1e-9


def test_vision_yarn_vector_of_fit():
    found = ratios("vision_yarn", 36, 16, 20 / 16)
    torch.testing.assert_close(found[:4], torch.tensor([1, 0.9, 0.8, 0.8], dtype=torch.float64), rtol=0, atol=1e-12)


def test_resonance_vector_of_ultraflux():
    expected = [0.981748, 0.683258, 0.480267, 0.376123, 0.273085, 0.172924, 0.081909, 0.065498, 0.035984]
    plan = RopeScaling("resonance_yarn")
    found, omega = scaled_frequencies(plan, 56, THETA, 64, 2.0), plain_frequencies(56, THETA)
    torch.testing.assert_close(found[:9], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(found[8:], omega[8:] / 2, rtol=1e-12, atol=0)
    assert amplitude(plan, (2.0, 1.0)) == (pytest.approx(1.069315, abs=1e-6), 1.0)


@pytest.mark.parametrize(("snap", "count"), [("code", 8), ("paper", 28)])
def test_snapped_pairs_close_their_phase(snap, count):
    turns = 64 * snapped(plain_frequencies(56, THETA), 64, snap) / (2 * math.pi)
    whole = (turns - turns.round()).abs() <= 1e-9
    assert int((whole & (turns > 0.5)).sum()) == count


def test_yarn_blend_keeps_fast_and_divides_slow_pairs():
    found = ratios("resonance_yarn", 56, 64, 2.0, snap="off", blend="yarn")
    turns = 64 * plain_frequencies(56, THETA) / (2 * math.pi)
    assert (found[turns >= 1.25] == 1).all()
    torch.testing.assert_close(found[turns <= 0.75], torch.full_like(found[turns <= 0.75], 0.5), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_frequencies_at_scale_one_are_the_models(method):
    assert torch.equal(scaled_frequencies(RopeScaling(method), 28, THETA, 16, 1.0, 0.4), plain_frequencies(28, THETA))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("channels", [2, 8, 28, 56, 128])
def test_frequencies_are_finite_and_between_interpolated_and_plain(method, channels):
    for length in (7, 16, 64, 512):
        for s in (1.01, 2.0, 16.0, 64.0):
            for t in (0.0, 0.31, 1.0):
                found = ratios(method, channels, length, s, t, snap="off")
                # Lumina's NTK form divides the last pair by less than s, and no method by more, or speeds a pair up.
                assert torch.isfinite(found).all() and found.max() <= 1 + 1e-9 and found.min() >= 1 / s - 1e-9


def test_time_switch_changes_once():
    low, high = ratios("time_switch", 28, 16, 2.0, 0.29), ratios("time_switch", 28, 16, 2.0, 0.3)
    assert (low == 0.5).all() and torch.equal(high, ratios("ntk", 28, 16, 2.0))


def test_scales_of_a_size():
    assert RopeScaling(trained=(16, 16)).scales((16, 28)) == (1.0, 1.75)
    assert RopeScaling(trained=(16, 16), share="longest_side").scales((8, 28)) == (1.75, 1.75)
    assert RopeScaling(trained=(16, 16), share="area").scales((16, 64)) == (2.0, 2.0)
    assert RopeScaling(trained=(16, 16)).scales((8, 12)) == (1.0, 1.0)
    for share in ("per_axis", "longest_side", "area"):
        assert RopeScaling(trained=(16, 16), share=share).scales((32, 32)) == (2.0, 2.0)


def test_length_factors():
    assert length_factor("paper_log", 16384, 4096) == pytest.approx(1.1667, abs=1e-4)
    assert length_factor("lumina_sqrt", 16384, 4096) == pytest.approx(math.sqrt(7 / 6))
    assert length_factor("paper_log", 400, 256) == pytest.approx(1.0805, abs=1e-4)
    assert length_factor("fit_code", 400, 256) == pytest.approx(1.2055, abs=1e-4)
    assert all(length_factor(kind, 256, 256) == 1.0 for kind in LENGTH_SCALES)


def ids(rows: int, columns: int) -> torch.Tensor:
    places = torch.zeros(rows, columns, 3)
    places[..., 1] += torch.arange(rows)[:, None]
    places[..., 2] += torch.arange(columns)
    return torch.cat((torch.zeros(8, 3), places.flatten(0, 1))).expand(2, -1, -1)


def table(tiny, plan: RopePlan, rows: int, columns: int, sigma=(0.7, 0.7)) -> torch.Tensor:
    from rectiflow.accel.attention.rope import RopeCall, running

    embedder = attach(tiny.model, plan, "test").get_model_object("diffusion_model.pe_embedder")
    with running(RopeCall((rows, columns), torch.tensor(sigma))):
        return embedder(ids(rows, columns))


def test_only_the_axis_beyond_the_training_size_changes(tiny):
    found = table(tiny, RopePlan(RopeScaling("resonance_yarn", SMALL)), 8, 28)
    plain = tiny.model.get_model_object("diffusion_model.pe_embedder")(ids(8, 28))
    assert torch.equal(found[..., :18, :, :], plain[..., :18, :, :])  # 4 pairs of time, 14 of rows
    assert not torch.equal(found[..., 18:, :, :], plain[..., 18:, :, :])


def test_a_sample_has_the_table_of_its_own_sigma(tiny):
    plan = RopePlan(RopeScaling("time_aware", SMALL))
    both = table(tiny, plan, 32, 32, (0.9, 0.2))
    assert torch.equal(both[0], table(tiny, plan, 32, 32, (0.9, 0.9))[0])
    assert torch.equal(both[1], table(tiny, plan, 32, 32, (0.2, 0.2))[1])


def test_a_table_is_the_embedders_at_interpolated_places(tiny):
    found = table(tiny, RopePlan(RopeScaling("position_interpolation", SMALL)), 32, 32)
    places = ids(32, 32).clone()
    plain = tiny.model.get_model_object("diffusion_model.pe_embedder")(places / 4)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-6)  # fp32 of the same angles


@pytest.mark.parametrize("method", METHODS)
def test_a_run_at_the_training_size_is_untouched(tiny, method):
    model = attach(tiny.model, RopePlan(RopeScaling(method, SMALL), "paper_log"), "test")
    noise = tiny.noise([1])
    assert torch.equal(tiny.sample("noto cat", noise, model=model, steps=2), tiny.sample("noto cat", noise, steps=2))


def test_none_is_off_at_any_size(tiny):
    model, noise = attach(tiny.model, RopePlan(RopeScaling("none", SMALL)), "test"), tiny.noise([1], (96, 64))
    assert torch.equal(tiny.sample("noto cat", noise, model=model, steps=2), tiny.sample("noto cat", noise, steps=2))


@pytest.mark.parametrize("method", ["time_aware", "resonance_yarn"])
def test_guidance_joined_or_split_and_batches_agree(tiny, method):
    model = attach(tiny.model, RopePlan(RopeScaling(method, SMALL)), "test")
    noise = tiny.noise([1, 2], (96, 72))
    both = tiny.sample(["noto cat", "noto rocket"], noise, model=model, steps=3)
    for place, prompt in enumerate(("noto cat", "noto rocket")):
        alone = tiny.sample(prompt, noise[place : place + 1], model=model, steps=3)
        torch.testing.assert_close(both[place : place + 1], alone, rtol=0, atol=2e-4)  # the order of sums in matrix products
    assert not torch.allclose(both, tiny.sample(["noto cat", "noto rocket"], noise, steps=3), atol=1e-2)


def test_an_interrupted_run_and_another_size_leave_nothing(tiny):
    model = attach(tiny.model, RopePlan(RopeScaling("time_aware", SMALL)), "test")
    fresh = tiny.sample("noto cat", tiny.noise([3], (64, 96)), model=model, steps=2)

    def stop(*args, **kwargs):
        raise InterruptedError

    broken = model.clone()
    broken.add_wrapper_with_key("diffusion_model", "stop", stop)
    with pytest.raises(InterruptedError):
        tiny.sample("noto cat", tiny.noise([3], (128, 128)), model=broken, steps=2)
    assert torch.equal(tiny.sample("noto cat", tiny.noise([3], (64, 96)), model=model, steps=2), fresh)
    assert not isinstance(tiny.model.get_model_object("diffusion_model.pe_embedder"), ScaledRotary)
    assert KEY not in tiny.model.wrappers.get("apply_model", {})


@pytest.mark.parametrize(("options", "name"), [
    ({"method": "rope"}, "method"), ({"share": "both"}, "scale_from"), ({"snap": "yes"}, "snap"), ({"blend": "mix"}, "blend"),
    ({"trained": (0, 16)}, "train_rows"), ({"trained": (16, 6)}, "train_columns"), ({"scale": 0.5}, "scale"),
    ({"scale": float("nan")}, "scale"), ({"watershed": -0.1}, "watershed"), ({"blend": "yarn", "alpha": 1.25, "beta": 0.75}, "alpha"),
])  # fmt: skip
def test_bad_settings_are_named(tiny, options, name):
    with pytest.raises(NodeInputError, match=f"'{name}'"):
        attach(tiny.model, RopePlan(RopeScaling(**options)), "test")


def test_a_second_patch_and_an_unknown_attention_scale_are_refused(tiny):
    with pytest.raises(NodeInputError, match="'attention_scale'"):
        attach(tiny.model, RopePlan(RopeScaling(), "log"), "test")
    once = attach(tiny.model, RopePlan(RopeScaling()), "test")
    with pytest.raises(NodeInputError, match="Keep one of these"):
        attach(once, RopePlan(RopeScaling()), "test")


def test_families_are_found_by_their_embedder_or_refused_by_name():
    class Embedder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.theta, self.axes_dim = 10000.0, [16, 24, 24]

        def forward(self, ids):
            return ids

    class MMDiT(torch.nn.Module):
        patch_size = 2

    class Wan(torch.nn.Module):
        patch_size = (1, 2, 2)

        def __init__(self):
            super().__init__()
            self.rope_embedder = Embedder()

    spec = rotary_spec(Wan(), "test")
    assert (spec.name, spec.axes, spec.patch) == ("rope_embedder", (16, 24, 24), (2, 2))
    with pytest.raises(NodeInputError, match="MMDiT"):
        rotary_spec(MMDiT(), "test")
