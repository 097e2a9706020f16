"""PSNR, SSIM and MSE: figures recorded from scikit-image 0.26, closed forms, masks, batches and refusals."""

from __future__ import annotations

import math

import pytest
import torch
from rectiflow.errors import NodeInputError
from rectiflow.metrics.fidelity import figures, mse, psnr, ssim, ssim_map
from rectiflow.tests.metrics.pictures import blob, noisy, shifted, textured

# (picture, reference): MSE, PSNR, gaussian SSIM, uniform SSIM as scikit-image 0.26.0 prints them for these pictures in float64:
# mean_squared_error, peak_signal_noise_ratio(data_range=1), structural_similarity(channel_axis=-1, data_range=1, gaussian_weights=True,
# sigma=1.5, use_sample_covariance=False), structural_similarity(channel_axis=-1, data_range=1).
PAIRS = {
    "noisy blob": (noisy(blob()), blob()),
    "shifted blob": (shifted(blob()), blob()),
    "texture for a blob": (textured(), blob()),
    "shifted texture": (shifted(textured()), textured()),
    "faint noise": (noisy(blob(), 0.01), blob()),
    "barely larger than the window": (noisy(blob(11, 13)), blob(11, 13)),
}
RECORDED = {
    "noisy blob": (0.003352817752540936, 24.745900526603258, 0.3594843294895858, 0.38585120285246877),
    "shifted blob": (0.003794215083641843, 24.208780537870553, 0.9659479601934495, 0.9285732244054373),
    "texture for a blob": (0.10316829968185133, 9.864537270125988, 0.011708435393194305, 0.01064276910504141),
    "shifted texture": (0.1664323583631542, 7.787622327787668, 0.004308520396141381, 0.00784845856443671),
    "faint noise": (8.382044381352338e-06, 50.76650043988288, 0.9946903815090976, 0.9950931370214341),
    "barely larger than the window": (0.0031544091433364794, 25.01081977091686, 0.6746558288103527, 0.7223483046263458),
}


@pytest.mark.parametrize("name", PAIRS)
def test_figures_are_scikit_images(name):
    """Both work in float64, so they agree to rounding; the contract asks for 1e-4."""
    image, reference = (picture.unsqueeze(0) for picture in PAIRS[name])
    error, decibels, gaussian, uniform = RECORDED[name]
    assert float(mse(image, reference)) == pytest.approx(error, rel=1e-9)
    assert float(psnr(image, reference)) == pytest.approx(decibels, abs=1e-8)
    assert float(ssim(image, reference, window="gaussian")) == pytest.approx(gaussian, abs=1e-8)
    assert float(ssim(image, reference, window="uniform")) == pytest.approx(uniform, abs=1e-8)


@pytest.mark.parametrize("name", PAIRS)
def test_an_installed_scikit_image_says_the_same(name):
    skimage = pytest.importorskip("skimage.metrics")
    image, reference = (picture.float() for picture in PAIRS[name])
    arrays = (reference.numpy(), image.numpy())
    gaussian = skimage.structural_similarity(
        *arrays, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1, channel_axis=-1
    )
    assert float(ssim(image[None], reference[None])) == pytest.approx(gaussian, abs=1e-4)
    uniform = skimage.structural_similarity(*arrays, data_range=1, channel_axis=-1)
    assert float(ssim(image[None], reference[None], window="uniform")) == pytest.approx(uniform, abs=1e-4)
    assert float(psnr(image[None], reference[None])) == pytest.approx(skimage.peak_signal_noise_ratio(*arrays, data_range=1), abs=1e-4)


def test_equal_pictures_are_perfect():
    picture = textured().unsqueeze(0)
    found = figures(picture, picture)
    assert float(found.mse) == 0 and float(found.psnr) == math.inf
    assert float(found.ssim) == pytest.approx(1, abs=1e-12)


def test_a_constant_offset_has_closed_forms():
    """Flat pictures: PSNR of an offset d is −20·log10(d); SSIM is its luminance term, since no window has variance."""
    one, other = torch.full((1, 20, 20, 3), 0.4), torch.full((1, 20, 20, 3), 0.5)
    found = figures(one, other)
    assert float(found.psnr) == pytest.approx(20, abs=1e-5)
    assert float(found.ssim) == pytest.approx((2 * 0.4 * 0.5 + 1e-4) / (0.4**2 + 0.5**2 + 1e-4), abs=1e-6)


def test_figures_are_symmetric_and_scale_with_the_data_range():
    one, other = noisy(blob()).unsqueeze(0), blob().unsqueeze(0)
    there, back = figures(one, other), figures(other, one)
    scaled = figures(one * 255, other * 255, data_range=255)
    for name in ("psnr", "ssim"):
        assert float(getattr(there, name)) == pytest.approx(float(getattr(back, name)), abs=1e-12)
        assert float(getattr(there, name)) == pytest.approx(float(getattr(scaled, name)), abs=1e-10)


def test_a_batch_is_its_pictures_one_by_one():
    batch, reference = torch.stack([noisy(blob()), shifted(blob()), textured()]), blob().unsqueeze(0)
    together = figures(batch, reference)
    for number, picture in enumerate(batch):
        alone = figures(picture[None], reference)
        assert float(together.psnr[number]) == pytest.approx(float(alone.psnr), abs=1e-12)
        assert float(together.ssim[number]) == pytest.approx(float(alone.ssim), abs=1e-12)


def test_a_full_mask_changes_nothing_and_a_region_sees_only_itself():
    reference = blob().unsqueeze(0)
    image = reference.clone()
    image[:, :, :20] = noisy(blob())[:, :20]  # 20 columns are spoilt
    whole = figures(image, reference)
    everywhere = figures(image, reference, torch.ones(1, 40, 52))
    assert float(everywhere.psnr) == pytest.approx(float(whole.psnr), abs=1e-10)
    assert float(everywhere.ssim) == pytest.approx(float(whole.ssim), abs=1e-12)
    clean = torch.zeros(1, 40, 52)
    clean[:, :, 20:] = 1
    found = figures(image, reference, clean)
    assert float(found.mse) == 0 and float(found.share) == pytest.approx(32 / 52)
    spoilt = figures(image, reference, 1 - clean)
    assert float(spoilt.mse) * 20 / 52 == pytest.approx(float(whole.mse), rel=1e-12)
    away = clean.clone()
    away[:, :, :25] = 0  # the 11-wide window of a centre at column 25 reaches to column 20
    assert float(figures(image, reference, away).ssim) == pytest.approx(1, abs=1e-12)


def test_ssim_map_leaves_out_the_margin_of_its_window():
    picture = textured().unsqueeze(0)
    assert ssim_map(picture, picture).shape == (1, 30, 42)
    assert ssim_map(picture, picture, "uniform").shape == (1, 34, 46)


PICTURE = torch.rand(2, 20, 24, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("inputs", "message"), [
    ({"image": PICTURE[0]}, "'image'"),
    ({"image": PICTURE[:0]}, "'image'"),
    ({"image": PICTURE / 0}, "finite"),
    ({"reference": PICTURE[:, :18]}, "'reference'"),
    ({"reference": PICTURE[..., :1]}, "'reference'"),
    ({"reference": PICTURE.repeat(2, 1, 1, 1)}, "batch of 1 or 2"),
    ({"mask": torch.ones(1, 20, 20)}, "'mask'"),
    ({"mask": torch.ones(3, 20, 24)}, "'mask'"),
    ({"mask": torch.full((1, 20, 24), 2.0)}, "0 to 1"),
    ({"mask": torch.full((1, 20, 24), float("nan"))}, "0 to 1"),
    ({"mask": torch.zeros(1, 20, 24)}, "'mask'"),
    ({"window": "square"}, "gaussian, uniform"),
    ({"image": PICTURE[:, :8], "reference": PICTURE[:, :8]}, "at least 11×11"),
])
def test_what_cannot_be_measured_is_refused_by_name(inputs, message):
    with pytest.raises(NodeInputError, match=f"here: .*{message}"):
        figures(**{"image": PICTURE, "reference": PICTURE, **inputs}, where="here")


def test_a_mask_that_only_touches_the_edge_has_no_ssim():
    edge = torch.zeros(1, 20, 24)
    edge[:, :, 0] = 1
    assert float(mse(PICTURE[:1], PICTURE[1:], edge)) > 0
    with pytest.raises(NodeInputError, match="larger mask"):
        ssim(PICTURE[:1], PICTURE[1:], edge)
