"""Entropy of regions and grain maps: against a plain loop, at their ends, and as the mask of region-adaptive sampling."""

from __future__ import annotations

import math
import time

import pytest
import torch
from rectiflow.accel.region.density import density, enlarged, fine_regions, region_means
from rectiflow.errors import NodeInputError


def picture(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def plain_entropy(values: list[float], bins: int, sigma: float) -> float:
    weights = [sum(math.exp(-((x - j / (bins - 1)) ** 2) / (2 * sigma**2)) for x in values) for j in range(bins)]
    shares = [weight / sum(weights) for weight in weights]
    return -sum(share * math.log(share) for share in shares if share > 0)


@pytest.mark.parametrize("size, side, bins", [((8, 12), 4, 0), ((9, 10), 4, 0), ((8, 8), 8, 20)])
def test_entropy_is_that_of_the_plain_loops(size, side, bins):
    image = picture(1, *size)
    found = density(image, side, 0.05, bins)
    for row in range(found.shape[1]):
        for column in range(found.shape[2]):
            region = image[0, row * side : (row + 1) * side, column * side : (column + 1) * side]
            expected = plain_entropy(region.flatten().tolist(), bins or side * side, 0.05)
            assert float(found[0, row, column]) == pytest.approx(expected, abs=1e-5)


def test_a_flat_region_has_the_least_entropy_and_even_noise_the_most():
    """Levels at the bins themselves are even to the last bit but for the two ends, which lack neighbours on one side."""
    ramp = torch.linspace(0.0, 1.0, 256).view(16, 16)
    both = torch.stack((torch.full((16, 16), 128 / 255), (0.25 * ramp + 0.4), ramp))
    flat, narrow, even = density(both, 16).flatten().tolist()
    assert flat < narrow < even <= math.log(256) and even == pytest.approx(math.log(256), abs=0.01)
    assert all(flat <= value <= even for value in density(picture(1, 64, 64), 16).flatten().tolist())


def test_the_chunks_do_not_matter(monkeypatch):
    image = picture(2, 40, 56)
    whole = density(image, 8)
    monkeypatch.setattr("rectiflow.accel.region.density._CHUNK", 1)
    torch.testing.assert_close(density(image, 8), whole, rtol=0, atol=1e-6)


def test_a_picture_of_1024_takes_less_than_two_seconds():
    image = picture(1, 1024, 1024)
    seconds = []
    for _ in range(3):
        start = time.thread_time()
        density(image, 16)
        seconds.append(time.thread_time() - start)
    assert min(seconds) < 2.0, "processor time of one core"


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_the_share_of_fine_regions_is_the_one_asked_for(share):
    """Equal scores too, within one region of the 6 · 7."""
    for scores in (picture(2, 6, 7), torch.zeros(2, 6, 7)):
        fine = fine_regions(scores, "share", share)
        assert all(abs(int(rows.sum()) - share * 42) <= 0.5 for rows in fine)
    assert (fine_regions(picture(2, 6, 7), "threshold", 0.5) == (picture(2, 6, 7) > 0.5)).all()


def test_smoothing_removes_single_regions():
    lonely = torch.zeros(1, 5, 5)
    lonely[0, 2, 2] = 1.0
    assert int(fine_regions(lonely, "threshold", 0.5).sum()) == 1 and not fine_regions(lonely, "threshold", 0.5, smooth=1).any()
    block = torch.zeros(1, 5, 5)
    block[0, :, :3] = 1.0
    assert torch.equal(fine_regions(block, "threshold", 0.5, smooth=3), block > 0.5)


def test_regions_go_to_pictures_and_back():
    regions = picture(2, 3, 4)
    maps = enlarged(regions, 5, (14, 18))
    assert maps.shape == (2, 14, 18)
    torch.testing.assert_close(region_means(maps, 5), regions, rtol=0, atol=1e-6)


@pytest.mark.parametrize("given", [("most", 0.5), ("share", 1.5), ("threshold", -0.1)])
def test_settings_that_do_not_fit_are_refused(given):
    with pytest.raises(NodeInputError):
        fine_regions(picture(1, 4, 4), *given)
    with pytest.raises(ValueError, match="sigma"):
        density(picture(1, 4, 4), 2, sigma=0.0)


def nodes():
    from rectiflow.nodes import token_tools

    return token_tools


def test_nodes_take_a_picture_or_a_latent():
    node = nodes().RectiflowInformationDensityMap()
    given = {"region": 8, "sigma": 0.01, "bins": 0, "source": "luma"}
    half = torch.zeros(1, 32, 48, 3)
    half[:, :, 24:] = picture(1, 32, 24, 3)
    shares, colours, mean = node.execute(image=half, **given)
    assert shares.shape == (1, 32, 48) and colours.shape == (1, 32, 48, 3) and mean > 0
    assert shares[..., :24].max() < shares[..., 24:].min() <= 1.0
    latent = {"samples": half[..., :1].permute(0, 3, 1, 2).expand(-1, 4, -1, -1)}
    assert node.execute(latent=latent, **given)[0].shape == (1, 32, 48)
    clip = {"samples": latent["samples"][:, :, None].expand(-1, -1, 3, -1, -1)}
    torch.testing.assert_close(node.execute(latent=clip, **given)[0], node.execute(latent=latent, **given)[0])
    for wrong in ({}, {"image": half, "latent": latent}, {"image": half[:, :4]}):
        with pytest.raises(NodeInputError):
            node.execute(**wrong, **given)


def test_a_grain_map_is_computed_at_every_step(tiny):
    """The fine half of a picture, as region_mask: its tokens are in every step of a run that leaves out two thirds."""
    from rectiflow.nodes.region import RectiflowRegionAdaptiveSampling

    half = torch.zeros(1, 64, 64, 3)
    half[:, 40:, 40:] = picture(1, 24, 24, 3)
    density_map = nodes().RectiflowInformationDensityMap().execute(region=8, sigma=0.01, bins=0, source="luma", image=half)[0]
    given = {"mode": "share", "fine_share": 9 / 64, "threshold": 0.5, "region": 8, "smooth": 0}
    fine, share = nodes().RectiflowGrainMap().execute(density=density_map, **given)
    assert share == 9 / 64 and fine[:, 40:, 40:].all() and float(fine.mean()) == pytest.approx(9 / 64)
    settings = {
        "sample_ratio": 0.34, "start_step": 1, "end_step": 1000, "reset_steps": "", "metric": "random", "focus": "low_std",
        "starvation": 0.1, "kv_cache": "full", "high_ratio": 1.0, "ratio_slope": 0, "ratio_period": 0, "inactive_order": 0, "cell": 1,
        "kv_dtype": "same", "kv_device": "model", "max_mib": 256, "overlay": False,
    }  # fmt: skip
    model, state = RectiflowRegionAdaptiveSampling().execute(model=tiny.model, **settings, region_mask=fine)
    tiny.sample("noto cat", tiny.noise([1]), model=model, steps=4)
    corner = torch.zeros(8, 8, dtype=torch.bool)
    corner[5:, 5:] = True
    for step, active in state.last.masks:
        assert active.view(8, 8)[corner].all() and (step == 0 or int(active.sum()) < 64)
