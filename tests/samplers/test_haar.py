"""The Haar bands of a latent: orthonormal, their own inverse, by hand on one square, and through the nodes."""

from __future__ import annotations

import pytest
import torch
from rectiflow.errors import NodeInputError
from rectiflow.nodes.wavelets import RectiflowLatentWaveletMerge as Merge
from rectiflow.nodes.wavelets import RectiflowLatentWaveletSplit as Split
from rectiflow.samplers.haar import BANDS, haar_merge, haar_split


def latent(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(2, 16, 16, 24), (1, 4, 2, 2), (1, 16, 3, 6, 10)])
def test_the_transform_is_orthonormal(shape):
    """Asked: reconstruction 1e-6, energy 1e-5. Numbers of size 4 round by 5e-7 in fp32, so the first is relative."""
    x = latent(*shape)
    bands = haar_split(x, "Test")
    assert all(band.shape == (*shape[:-2], shape[-2] // 2, shape[-1] // 2) for band in bands)
    torch.testing.assert_close(haar_merge(*bands, "Test"), x, atol=1e-6, rtol=1e-6)
    assert float(sum(band.square().sum() for band in bands)) == pytest.approx(float(x.square().sum()), rel=1e-5)
    other = latent(*shape, seed=1)
    products = sum((one * two).sum() for one, two in zip(bands, haar_split(other, "Test"), strict=True))
    assert float(products) == pytest.approx(float((x * other).sum()), abs=1e-5 * float(x.norm() * other.norm()))


def test_each_band_is_what_its_name_says():
    flat, down, right = torch.ones(1, 1, 4, 6), torch.ones(1, 1, 4, 6), torch.ones(1, 1, 4, 6)
    down[..., 1::2, :] = -1.0
    right[..., 1::2] = -1.0
    for picture, seen in ((flat, "LL"), (down, "LH"), (right, "HL"), (down * right, "HH")):
        for name, band in zip(BANDS, haar_split(picture, "Test"), strict=True):
            assert torch.equal(band, torch.full((1, 1, 2, 3), 2.0 if name == seen else 0.0))
    assert [float(band) for band in haar_split(torch.tensor([[[1.0, 2.0], [3.0, 8.0]]]), "Test")] == [7.0, -4.0, -3.0, 2.0]


@pytest.mark.parametrize("shape", [(1, 4, 5, 6), (1, 4, 6, 5), (1, 4)])
def test_odd_sides_are_refused_with_a_remedy(shape):
    with pytest.raises(NodeInputError, match="Latent Wavelet Split.*even"):
        Split().execute(latent={"samples": torch.zeros(shape)})


def test_the_nodes_lead_back_and_keep_what_else_a_latent_holds():
    mask = torch.ones(1, 1, 64, 48)
    given = {"samples": latent(3, 16, 8, 6), "noise_mask": mask}
    bands = Split().execute(latent=given)
    assert [sorted(band) for band in bands] == [["noise_mask", "samples"], ["samples"], ["samples"], ["samples"]]
    back = Merge().execute(LL=bands[0], LH=bands[1], HL=bands[2], HH=bands[3])[0]
    torch.testing.assert_close(back["samples"], given["samples"], atol=1e-6, rtol=1e-6)
    assert back["noise_mask"] is mask


def test_bands_of_two_latents():
    """Layout of one, detail of the other: the means of all squares are the first's, what is left of them the second's."""
    one, two = latent(2, 16, 8, 8), latent(1, 16, 8, 8, seed=1)
    low, detail = Split().execute(latent={"samples": one})[0], Split().execute(latent={"samples": two})[1:]
    mixed = Merge().execute(LL=low, LH=detail[0], HL=detail[1], HH=detail[2])[0]["samples"]
    means = torch.nn.functional.avg_pool2d
    torch.testing.assert_close(means(mixed, 2), means(one, 2), atol=1e-6, rtol=1e-5)

    def spread(x):
        return x - means(x, 2).repeat_interleave(2, -1).repeat_interleave(2, -2)

    torch.testing.assert_close(spread(mixed), spread(two).expand(2, -1, -1, -1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("name", "shape"), [("LH", (1, 16, 4, 3)), ("HH", (1, 4, 4, 4)), ("HL", (2, 16, 4, 4))])
def test_bands_of_other_sizes_are_refused_by_name(name, shape):
    bands = {band: {"samples": torch.zeros(3, 16, 4, 4)} for band in BANDS} | {name: {"samples": torch.zeros(shape)}}
    with pytest.raises(NodeInputError, match=f"'{name}'"):
        Merge().execute(**bands)
