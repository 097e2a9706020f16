"""Quantisers against closed forms and against each other: packing, rotations, grids and their error in decibels, the integer product."""

from __future__ import annotations

import pytest
import torch
from rectiflow.accel.quant.error import sqnr
from rectiflow.accel.quant.packing import pack, packed_width, unpack
from rectiflow.accel.quant.rotation import block_hadamard, dual_rotation, hadamard
from rectiflow.accel.quant.twin_log import fit_groups, fit_rows, nearest, reference_quantised, twin_levels
from rectiflow.accel.quant.uniform import clipped_grid, int8_rows, int_tokens, min_max_grid
from rectiflow.kernels.int8_linear import int8_linear, int8_linear_reference, prepare_int8

SIGMA = 0.02


def drawn(shape=(128, 1024), seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(kind: str) -> torch.Tensor:
    """(128, 1024) at σ 0.02: a normal law, one with heavier tails, and a normal one with one weight in a thousand ten times as large."""
    generator = torch.Generator().manual_seed(1)
    if kind == "normal":
        return drawn() * SIGMA
    if kind == "laplace":
        uniform = torch.rand(128, 1024, generator=generator).clamp(1e-6, 1 - 1e-6)
        return torch.distributions.Laplace(0.0, 1.0).icdf(uniform) * SIGMA / 2**0.5
    w = drawn() * SIGMA
    w[torch.rand(w.shape, generator=generator) < 0.001] *= 10
    return w


class TestPacking:
    @pytest.mark.parametrize("bits", range(1, 9))
    @pytest.mark.parametrize("count", [1, 7, 8, 33])
    def test_codes_come_back(self, bits, count):
        codes = torch.randint(0, 1 << bits, (5, count), generator=torch.Generator().manual_seed(bits))
        packed = pack(codes, bits)
        assert packed.shape == (5, packed_width(count, bits))
        assert torch.equal(unpack(packed, bits, count).long(), codes)

    def test_the_first_code_lies_in_the_lowest_bits(self):
        assert pack(torch.tensor([[1, 2, 3, 0, 0, 0, 0, 0]]), 4).tolist() == [[0x21, 0x03, 0, 0]]

    def test_what_does_not_fit_is_refused(self):
        with pytest.raises(ValueError, match="0 to 8 do not fit 3 bits"):
            pack(torch.arange(9)[None], 3)
        with pytest.raises(ValueError, match="9 bits"):
            pack(torch.zeros(1, 8, dtype=torch.uint8), 9)
        with pytest.raises(ValueError, match="rows of 3 bytes; 9 codes of 4 bits take 8"):
            unpack(torch.zeros(1, 3, dtype=torch.uint8), 4, 9)


class TestRotation:
    @pytest.mark.parametrize("width", [384, 768, 1152, 3072, 385])
    @pytest.mark.parametrize("kind", ["hadamard", "hadamard_block", "dual"])
    def test_the_layers_output_stays(self, width, kind):
        """float32: sums of up to 3072 products, each good to 6e-8."""
        x, w = drawn((32, width)), drawn((24, width), seed=1)
        rotation = {"hadamard": hadamard, "hadamard_block": block_hadamard, "dual": lambda _: dual_rotation(x.abs().amax(0))}[kind](width)
        rotated = rotation.apply(x) @ rotation.apply(w).t()
        assert (rotated - x @ w.t()).norm() < 1e-5 * (x @ w.t()).norm()

    def test_an_outlier_is_spread_evenly(self):
        """One channel alone comes out with every entry ±1/√k of it where k is a power of two."""
        x = torch.zeros(1, 1024)
        x[0, 77] = 32.0
        assert hadamard(1024).apply(x).abs().sub(1.0).abs().max() < 1e-5

    def test_seeds_say_which(self):
        x = drawn((4, 96))
        assert torch.equal(hadamard(96, 3).apply(x), hadamard(96, 3).apply(x))
        assert not torch.equal(hadamard(96, 3).apply(x), hadamard(96, 4).apply(x))

    def test_planted_outlier_channels_gain_at_least_six_decibels(self):
        """W8A8 with channels at +60, −45, +40 and +120 among 1024 of σ 0.5: 24 dB as they are, 40 and more when turned."""
        x, w = drawn((256, 1024)) * 0.5, drawn((256, 1024), seed=2) * SIGMA
        for channel, level in ((5, 60.0), (130, -45.0), (700, 40.0), (1001, 120.0)):
            x[:, channel] += level
        exact, found = x @ w.t(), {}
        for name, turn in (("plain", lambda t: t), ("hadamard", hadamard(1024).apply)):
            codes, scale = int8_rows(turn(w))
            tokens, token_scale = int_tokens(turn(x), 8)
            found[name] = sqnr(exact, tokens.float() @ codes.float().t() * token_scale * scale)
        assert found["hadamard"] >= 40
        assert found["hadamard"] >= found["plain"] + 6


class TestTwinLog:
    @pytest.mark.parametrize(
        ("kind", "bits", "rows", "group16"),
        [
            ("normal", 4, 20.35, 23.0),
            ("normal", 3, 14.6, 16.8),
            ("laplace", 4, 18.7, 22.6),
            ("outliers", 4, 18.5, 22.9),
            ("outliers", 3, 12.5, 16.3),
        ],
    )
    def test_decibels(self, kind, bits, rows, group16):
        """rows: known figures of the fitted grid, within 0.3 dB (0.5 where a row may have no outlier or two);
        group16: at least these, at bits + 0.5 a weight."""
        w = weights(kind)
        assert sqnr(w, fit_rows(w, bits).dequantised()) == pytest.approx(rows, abs=0.5 if kind == "outliers" else 0.3)
        assert sqnr(w, fit_groups(w, bits, 16).dequantised()) >= group16

    @pytest.mark.parametrize("bits", [3, 4])
    @pytest.mark.parametrize("kind", ["normal", "laplace", "outliers"])
    def test_ours_is_nearer_than_uniform_and_than_the_published_grid(self, kind, bits):
        w = weights(kind)
        ours = sqnr(w, fit_rows(w, bits).dequantised())
        clipped = sqnr(w, clipped_grid(w, bits))
        assert ours >= clipped + (0 if kind == "normal" else 1)
        assert clipped > sqnr(w, min_max_grid(w, bits))
        assert ours > sqnr(w, reference_quantised(w, bits)) + 4

    def test_the_published_grid_has_its_known_error(self):
        """12.6 dB on a normal law of σ 0.02 at 4 bits, 6.9 at 3; its absolute η makes that depend on σ."""
        w = weights("normal")
        assert sqnr(w, reference_quantised(w, 4)) == pytest.approx(12.6, abs=0.3)
        assert sqnr(w, reference_quantised(w, 3)) == pytest.approx(6.9, abs=0.3)

    def test_levels_start_near_zero_and_end_at_the_top(self):
        levels = twin_levels(torch.tensor(0.1), torch.tensor(2.0), 8)
        assert torch.all(levels[1:] > levels[:-1])
        assert 0 < float(levels[0]) < 0.1
        assert float(levels[-1]) == pytest.approx(2.0, rel=1e-6)

    @pytest.mark.parametrize("bits", [2, 3, 4])
    def test_a_dequantised_tensor_has_the_same_codes(self, bits):
        w = weights("normal")[:8]
        rows = fit_rows(w, bits)
        assert torch.equal(nearest(rows.dequantised() / rows.scale[:, None], rows.book.float()).to(torch.uint8), rows.codes)

    def test_groups_must_divide_the_rows(self):
        with pytest.raises(ValueError, match="groups of 48 do not divide rows of 1024"):
            fit_groups(weights("normal"), 4, 48)

    def test_a_row_of_zeros_stays(self):
        w = weights("normal")[:4].clone()
        w[2] = 0
        for found in (fit_rows(w, 4).dequantised(), fit_groups(w, 4, 32).dequantised()):
            assert torch.isfinite(found).all()
            assert float(found[2].abs().max()) < 1e-9


class TestInt8Linear:
    @pytest.mark.parametrize(("m", "k", "n"), [(64, 256, 128), (7, 33, 17), (1, 768, 96)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_the_product_is_the_reference(self, m, k, n, dtype):
        """Both round activations; a value within float32 of a tie may fall to either code, which moves a sum by one step."""
        x, bias = drawn((m, k)).to(dtype), drawn((n,), seed=3).to(dtype)
        weight = prepare_int8(*int8_rows(drawn((n, k), seed=2) * SIGMA))
        expected = int8_linear_reference(x, weight, bias)
        step = float(x.abs().max()) / 127 * float(weight.scale.max()) * 127
        rounding = 2**-8 * float(expected.abs().max()) if dtype is torch.bfloat16 else 1e-5
        assert (int8_linear(x, weight, bias).float() - expected.float()).abs().max() <= step + rounding
        assert int8_linear(x.view(1, m, k), weight).shape == (1, m, n)

    def test_eight_bits_end_to_end(self):
        x, w = drawn((256, 512)), drawn((128, 512), seed=2) * SIGMA
        assert sqnr(x @ w.t(), int8_linear(x, prepare_int8(*int8_rows(w)))) > 38

    def test_silence_stays_silent(self):
        out = int8_linear(torch.zeros(3, 16), prepare_int8(*int8_rows(torch.zeros(8, 16))))
        assert torch.equal(out, torch.zeros(3, 8))
