"""The latent codec against its equations, and the VAE object against the protocol of stock nodes."""

from __future__ import annotations

import pytest
import torch
from rectiflow.errors import NodeInputError
from rectiflow.tiny.codec import LinearCodec
from rectiflow.tiny.pictures import PICTURES, load_picture
from rectiflow.tiny.vae import TinyVAE
from rectiflow.tiny.weights import load_weights


@pytest.fixture(scope="module")
def codec() -> LinearCodec:
    weights = load_weights()
    return LinearCodec(weights.codec_basis, weights.codec_scale, weights.codec_mean)


@pytest.fixture(scope="module")
def vae(codec) -> TinyVAE:
    return TinyVAE(codec)


def test_encoding_equals_the_written_formula(codec):
    """z = ((P − mean) @ basis) / scale on one cell, with P laid out colour·16 + row·4 + column by hand."""
    generator = torch.Generator().manual_seed(0)
    rgb = torch.rand(1, 3, 8, 12, generator=generator) * 2 - 1
    z = codec.encode(rgb)
    assert z.shape == (1, 16, 2, 3)
    for row in range(2):
        for column in range(3):
            cell = rgb[0, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].reshape(48)
            expected = ((cell - codec.mean) @ codec.basis) / codec.scale
            torch.testing.assert_close(z[0, :, row, column], expected, atol=1e-5, rtol=1e-5)


def test_encode_undoes_decode(codec):
    """The basis is orthonormal to 2e-6, so the identity holds to a few fp32 roundings."""
    z = torch.randn(2, 16, 5, 7, generator=torch.Generator().manual_seed(1)) * 3
    torch.testing.assert_close(codec.encode(codec.decode(z)), z, atol=5e-5, rtol=1e-5)


def test_decode_of_encode_is_a_projection(codec):
    rgb = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    once = codec.decode(codec.encode(rgb))
    torch.testing.assert_close(codec.decode(codec.encode(once)), once, atol=1e-5, rtol=0)
    lost = (rgb - once).square().sum()
    kept = (once - codec.decode(torch.zeros(1, 16, 4, 4))).square().sum()
    whole = (rgb - codec.decode(torch.zeros(1, 16, 4, 4))).square().sum()
    torch.testing.assert_close(lost + kept, whole, rtol=1e-4, atol=0)  # Pythagoras: the projection is orthogonal


@pytest.mark.parametrize("name", PICTURES)
def test_real_pictures_survive_at_the_stated_quality(vae, name):
    """Training pictures reconstruct at 33.4 dB in the mean; these two, of the same kind but not among them, at 29.9 and 30.6 dB."""
    image, _ = load_picture(name)
    error = (vae.decode(vae.encode(image)) - image).square().mean()
    assert -10 * torch.log10(error) > 29


def test_preview_factors_give_the_mean_colour_of_a_cell(codec):
    z = torch.randn(1, 16, 6, 4, generator=torch.Generator().manual_seed(3))
    factors, offsets = codec.preview_factors()
    seen = z.movedim(1, -1) @ torch.tensor(factors) + torch.tensor(offsets)
    true = torch.nn.functional.avg_pool2d(codec.decode(z), 4).movedim(1, -1)
    torch.testing.assert_close(seen, true, atol=1e-5, rtol=1e-5)


def test_gradients_pass_both_ways_even_when_loaded_in_inference_mode():
    with torch.inference_mode():
        weights = load_weights()
    codec = LinearCodec(weights.codec_basis, weights.codec_scale, weights.codec_mean)
    z = torch.zeros(1, 16, 2, 2, requires_grad=True)
    codec.encode(codec.decode(z)).square().sum().backward()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize(("height", "width"), [(64, 64), (67, 65), (8, 15), (71, 8), (200, 120)])
def test_pictures_are_cropped_to_the_centre_multiple_of_eight(vae, height, width):
    image = torch.rand(2, height, width, 3, generator=torch.Generator().manual_seed(4))
    latent = vae.encode(image)
    assert latent.shape == (2, 16, height // 8 * 2, width // 8 * 2)
    top, left = height % 8 // 2, width % 8 // 2
    centre = image[:, top : top + height // 8 * 8, left : left + width // 8 * 8]
    torch.testing.assert_close(latent, vae.encode(centre), atol=0, rtol=0)


def test_batch_equals_singles_and_tiles_equal_the_whole(vae):
    image = torch.rand(3, 24, 32, 3, generator=torch.Generator().manual_seed(5))
    latent = vae.encode(image)
    for index in range(3):
        torch.testing.assert_close(vae.encode(image[index : index + 1]), latent[index : index + 1], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(vae.encode_tiled(image, tile_x=8, tile_y=8, overlap=4), latent, atol=0, rtol=0)
    torch.testing.assert_close(vae.decode_tiled(latent, tile_x=4, tile_y=4, overlap=1), vae.decode(latent), atol=0, rtol=0)


def test_alpha_is_dropped_and_results_are_ordinary_images(vae):
    image = torch.rand(1, 16, 16, 4, generator=torch.Generator().manual_seed(6))
    torch.testing.assert_close(vae.encode(image), vae.encode(image[..., :3]), atol=0, rtol=0)
    decoded = vae.decode(vae.encode(image) * 10)
    assert decoded.shape == (1, 16, 16, 3)
    assert decoded.dtype == torch.float32
    assert decoded.min() >= 0 and decoded.max() <= 1


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (1, 16, 1, 8, 8), (16, 8, 8)])
def test_latents_of_another_model_are_refused_by_shape(vae, shape):
    with pytest.raises(NodeInputError, match="16"):
        vae.decode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 7, 64, 3), (1, 64, 64, 1), (64, 64, 3)])
def test_pictures_that_cannot_be_coded_are_refused(vae, shape):
    with pytest.raises(NodeInputError, match="pixels"):
        vae.encode(torch.zeros(shape))


def test_the_protocol_that_stock_nodes_read(vae):
    assert vae.downscale_ratio == vae.upscale_ratio == vae.spacial_compression_encode() == vae.spacial_compression_decode() == 4
    assert vae.temporal_compression_decode() is None
    assert vae.latent_channels == 16
    assert set(vae.get_sd()) == {"basis", "scale", "mean"}
