"""Codecs behind the VAE protocol: shapes, ranges, tiles, batches, videos, halves, and the files they come from."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))
from rectiflow.host.embedded import make_host, model_management, sd, use_host  # noqa: E402
from rectiflow.host.embedded.context import HostSettings  # noqa: E402
from rectiflow.host.embedded.ldm.autoencoder_kl import AutoencoderKL, AutoencoderParams  # noqa: E402
from rectiflow.host.embedded.ldm.taesd import TAESD  # noqa: E402
from rectiflow.host.embedded.model_detection import autoencoder_params  # noqa: E402
from small_models import filled, random  # noqa: E402

KL = AutoencoderParams(z_channels=16, widths=(32, 64), res_blocks=1)


@pytest.fixture(scope="module", autouse=True)
def host(tmp_path_factory):
    with use_host(make_host(tmp_path_factory.mktemp("host"), settings=HostSettings(device="cpu"))) as active:
        yield active


def kl(**sizes) -> AutoencoderKL:
    return filled(AutoencoderKL(AutoencoderParams(**{**KL.__dict__, **sizes})), 0.05)


def taesd(channels: int = 16) -> dict[str, torch.Tensor]:
    return filled(TAESD(channels), 0.05).state_dict() | {"vae_scale": torch.tensor(1.5), "vae_shift": torch.tensor(0.1)}


def pictures(batch: int = 2, height: int = 16, width: int = 24) -> torch.Tensor:
    return torch.rand(batch, height, width, 3, generator=torch.Generator().manual_seed(0))


CODECS = {
    "kl": lambda: kl().state_dict(),
    "kl with quantisation": lambda: kl(z_channels=4, quant_conv=True).state_dict(),
    "taesd 4": lambda: taesd(4),
    "taesd 16": taesd,
    "pixels": lambda: {"pixel_space_vae": torch.tensor(1.0)},
}


@pytest.mark.parametrize("name, prefix", [
    (name, prefix) for name in CODECS for prefix in (("",) if name == "pixels" else ("", "first_stage_model.", "vae."))
])  # fmt: skip
def test_shapes_and_ranges(name, prefix):
    vae = sd.VAE(sd={prefix + key: tensor for key, tensor in CODECS[name]().items()})
    image = pictures()
    latent = vae.encode(image)
    ratio = vae.downscale_ratio
    assert latent.shape == (2, vae.latent_channels, 16 // ratio, 24 // ratio) and latent.dtype == torch.float32
    decoded = vae.decode(latent)
    assert decoded.shape == image.shape and decoded.min() >= 0 and decoded.max() <= 1
    assert (ratio, vae.latent_channels) == {
        "kl": (2, 16), "kl with quantisation": (2, 4), "taesd 4": (8, 4), "taesd 16": (8, 16), "pixels": (1, 3)
    }[name]  # fmt: skip


@pytest.mark.parametrize("name", CODECS)
def test_a_batch_equals_its_pictures(name):
    vae, image = sd.VAE(sd=CODECS[name]()), pictures(3)
    latent = vae.encode(image)
    for i in range(3):
        torch.testing.assert_close(vae.encode(image[i : i + 1]), latent[i : i + 1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(vae.decode(latent[i : i + 1]), vae.decode(latent)[i : i + 1], rtol=1e-5, atol=1e-5)


def test_batches_shrink_to_memory(host):
    vae, image = sd.VAE(sd=taesd()), pictures(5)
    seen = []
    plain = vae.first_stage_model.decode
    vae.first_stage_model.decode = lambda z: (seen.append(len(z)), plain(z))[1]
    latent = vae.encode(image)
    whole = vae.decode(latent)
    with host.memory.reporting_free(int(2.5 * vae.memory_used_decode(latent.shape, torch.float32))):
        split = vae.decode(latent)
    assert seen == [5, 2, 2, 1]
    torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-5)


def test_out_of_memory_goes_on_in_tiles_and_says_so(caplog):
    vae, latent = sd.VAE(sd=taesd()), random(1, 16, 4, 6)
    expected = vae.decode_tiled(latent)
    plain, calls = vae.first_stage_model.decode, []

    def fails_once(z: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(z.shape[-2:]))
        if len(calls) == 1:
            raise torch.OutOfMemoryError("as if")
        return plain(z)

    vae.first_stage_model.decode = fails_once
    assert torch.equal(vae.decode(latent), expected)
    assert calls == [(4, 6)] * 4, "the whole picture, then one tile of each of three shapes"
    assert "going on in tiles" in caplog.text


def test_tiles_equal_the_whole_where_a_codec_is_local():
    vae, image = sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)}), pictures(2, 40, 56)
    latent = vae.encode(image)
    torch.testing.assert_close(vae.encode_tiled(image, tile_x=16, tile_y=16, overlap=4), latent, rtol=0, atol=1e-6)
    torch.testing.assert_close(vae.decode_tiled(latent, tile_x=16, tile_y=16, overlap=4), image, rtol=0, atol=1e-6)


@pytest.mark.parametrize("overlap", [-1, 16, 64])
def test_absurd_overlaps_are_refused(overlap):
    with pytest.raises(ValueError, match="overlap"):
        sd.VAE(sd=taesd()).decode_tiled(torch.zeros(1, 16, 40, 40), tile_x=32, tile_y=32, overlap=overlap)


def test_pictures_are_cropped_to_the_ratio_from_the_middle():
    vae, image = sd.VAE(sd=taesd()), pictures(1, 21, 35)
    assert torch.equal(vae.vae_encode_crop_pixels(image), image[:, 2:18, 1:33])
    assert torch.equal(vae.encode(image), vae.encode(image[:, 2:18, 1:33]))
    with pytest.raises(ValueError, match="at least 8×8"):
        vae.encode(pictures(1, 7, 30))


def test_alpha_is_dropped():
    vae, image = sd.VAE(sd=taesd()), pictures()
    assert torch.equal(vae.encode(torch.cat((image, image[..., :1]), dim=-1)), vae.encode(image))


@pytest.mark.parametrize("shape", [(16, 24, 3), (1, 16, 24), (1, 16, 24, 2)])
def test_what_is_no_picture_is_refused(shape):
    with pytest.raises(ValueError, match="VAE Encode"):
        sd.VAE(sd=taesd()).encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(16, 4, 4), (1, 4, 4, 4), (1, 3, 2, 2, 2, 2)])
def test_what_is_no_latent_is_refused(shape):
    with pytest.raises(ValueError, match="VAE Decode"):
        sd.VAE(sd=taesd()).decode(torch.zeros(shape))


def test_videos_are_folded_into_the_batch():
    vae, film = sd.VAE(sd=taesd()), pictures(6).reshape(2, 3, 16, 24, 3)
    latent = vae.encode(film)
    assert latent.shape == (2, 16, 3, 2, 3)
    torch.testing.assert_close(latent[1, :, 2], vae.encode(film[1, 2:])[0], rtol=1e-5, atol=1e-5)
    decoded = vae.decode(latent)
    assert decoded.shape == film.shape
    torch.testing.assert_close(decoded[1, 2:], vae.decode(latent[1:, :, 2]), rtol=1e-5, atol=1e-5)
    assert vae.decode_tiled(latent, tile_x=16, tile_y=16, overlap=2).shape == film.shape
    assert vae.encode_tiled(film, tile_x=32, tile_y=32, overlap=8).shape == latent.shape


def test_halves():
    state = taesd()
    encoder, decoder = (
        sd.VAE(sd={key.partition(".")[2]: tensor for key, tensor in state.items() if key.startswith(f"taesd_{half}.")})
        for half in ("encoder", "decoder")
    )
    whole = sd.VAE(sd={key: tensor for key, tensor in state.items() if key.startswith("taesd_")})
    latent = whole.encode(pictures())
    assert torch.equal(encoder.encode(pictures()), latent)
    assert torch.equal(decoder.decode(latent), whole.decode(latent))
    with pytest.raises(ValueError, match="only the encoder"):
        encoder.decode(latent)
    with pytest.raises(ValueError, match="only the decoder"):
        decoder.encode(pictures())
    only = sd.VAE(sd={key: tensor for key, tensor in kl().state_dict().items() if key.startswith("decoder.")})
    assert only.decode(torch.zeros(1, 16, 4, 4)).shape == (1, 8, 8, 3)
    with pytest.raises(ValueError, match="only the decoder"):
        only.encode(pictures())


def test_sizes_come_from_shapes():
    for sizes in ({}, {"z_channels": 4, "quant_conv": True}, {"widths": (32, 32, 64), "res_blocks": 2}):
        params = AutoencoderParams(**{**KL.__dict__, **sizes})
        state = AutoencoderKL(params).state_dict()
        assert autoencoder_params(state) == params
        assert autoencoder_params({key: tensor for key, tensor in state.items() if not key.startswith("decoder.")}) == params


def test_the_published_autoencoder_has_its_names_and_ratio():
    """ch 128, multipliers 1 2 4 4, two blocks: Flux's ae.safetensors has 244 tensors."""
    with torch.device("meta"):
        state = AutoencoderKL(AutoencoderParams(z_channels=16, widths=(128, 256, 512, 512), res_blocks=2)).state_dict()
    assert len(state) == 244
    for name in ("encoder.down.1.block.0.nin_shortcut.weight", "encoder.down.2.downsample.conv.bias", "decoder.up.3.block.2.conv1.weight",
                 "decoder.mid.attn_1.proj_out.bias", "decoder.up.1.upsample.conv.weight", "encoder.norm_out.bias"):  # fmt: skip
        assert name in state
    assert sum(tensor.numel() for tensor in state.values()) == 83_819_683


@pytest.mark.parametrize("state, words", [
    ({"decoder.up_blocks.0.resnets.0.norm1.weight": torch.zeros(1)}, "AutoencoderKL in diffusers"),
    ({"decoder.middle.0.residual.0.gamma": torch.zeros(1)}, "Wan video codec"),
    ({"decoder.conv_in.weight": torch.zeros(1, 16, 3, 3, 3), "decoder.mid.attn_1.q.weight": torch.zeros(1)}, "video codec"),
    ({"joint_blocks.0.context_block.attn.qkv.weight": torch.zeros(1)}, "SD3 transformer"),
    ({"text_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(1)}, "CLIP-L"),
    ({"x": torch.zeros(1)}, "unknown layout"),
])  # fmt: skip
def test_other_files_are_refused_by_name(tmp_path, state, words):
    path = str(tmp_path / "their vae.safetensors")
    save_file(state, path)
    with pytest.raises(ValueError, match=f"their vae.*{words}"):
        sd.load_vae(path)


def test_missing_weights_are_named():
    state = kl().state_dict()
    del state["decoder.up.0.block.1.conv2.bias"]
    with pytest.raises(ValueError, match=r"'decoder\.up\.0\.block\.1\.conv2\.bias'"):
        sd.VAE(sd=state)


def test_an_interruption_stops_between_batches(host):
    vae = sd.VAE(sd=taesd())
    host.interrupt.set()
    with pytest.raises(model_management.InterruptProcessingException):
        vae.decode(torch.zeros(1, 16, 2, 2))
    assert not host.interrupt.is_set()


def test_an_empty_vae_says_so():
    for call in (lambda vae: vae.decode(torch.zeros(1, 4, 2, 2)), lambda vae: vae.encode(pictures()), lambda vae: vae.get_sd()):
        with pytest.raises(ValueError, match="no latent codec"):
            call(sd.VAE(sd={}))
