"""Tensor helpers, progress, previews, conditioning helpers."""

from __future__ import annotations

import pytest
import torch
from rectiflow.host.embedded import node_helpers, utils
from rectiflow.host.embedded.context import Host, HostSettings, use_host
from rectiflow.host.embedded.latent_formats import SD3, SD15, SDXL, Flux, LatentFormat
from rectiflow.host.embedded.latent_preview import Latent2RGBPreviewer, get_previewer
from rectiflow.host.embedded.model_management import InterruptProcessingException, MemoryManager


def host(**settings) -> Host:
    settings = HostSettings(device="cpu", **settings)
    return Host(paths=None, registry=None, memory=MemoryManager(settings), settings=settings)


def picture(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


def test_repeat_to_batch_size_cuts_and_repeats():
    tensor = torch.arange(3.0)
    assert utils.repeat_to_batch_size(tensor, 2).tolist() == [0, 1]
    assert utils.repeat_to_batch_size(tensor, 7).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert utils.repeat_to_batch_size(tensor, 3) is tensor
    assert utils.repeat_to_batch_size(torch.zeros(1, 4, 2, 2), 16, dim=1).shape == (1, 16, 2, 2)


def test_resize_to_batch_size_spreads_evenly():
    tensor = torch.arange(4.0)
    assert utils.resize_to_batch_size(tensor, 2).tolist() == [0, 3]
    assert utils.resize_to_batch_size(tensor, 8).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert utils.resize_to_batch_size(tensor, 1).tolist() == [0] and utils.resize_to_batch_size(tensor, 4).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("mask", "latent"), [((1, 32, 32), (2, 4, 8, 8)), ((1, 1, 8, 8), (1, 16, 8, 8)), ((3, 5, 4), (1, 4, 3, 8, 6)), ((2, 1, 10), (2, 3, 7))]
)
def test_reshape_mask_takes_the_latents_shape(mask, latent):
    shaped = utils.reshape_mask(torch.ones(mask), torch.Size(latent))
    assert shaped.shape == latent and torch.all(shaped == 1)


def test_reshape_mask_keeps_halves():
    mask = torch.zeros(1, 16, 16)
    mask[:, :, 8:] = 1
    shaped = utils.reshape_mask(mask, torch.Size((1, 4, 8, 8)))
    assert torch.all(shaped[..., :4] == 0) and torch.all(shaped[..., 4:] == 1)


@pytest.mark.parametrize("method", ["nearest-exact", "bilinear", "area", "bicubic", "lanczos", "bislerp"])
@pytest.mark.parametrize("crop", ["disabled", "center"])
def test_common_upscale_keeps_a_constant(method, crop):
    resized = utils.common_upscale(torch.full((1, 3, 6, 10), 0.2), 8, 5, method, crop)
    assert resized.shape == (1, 3, 5, 8)
    torch.testing.assert_close(resized, torch.full_like(resized, 0.2), atol=2e-3 if method == "lanczos" else 1e-5, rtol=0)


def test_common_upscale_crops_the_middle():
    wide = torch.arange(8.0).expand(1, 1, 4, 8)
    assert utils.common_upscale(wide, 4, 4, "nearest-exact", "center")[0, 0, 0].tolist() == [2, 3, 4, 5]


def test_common_upscale_of_frames_equals_each_frame():
    video = picture(2, 3, 4, 6, 6)
    resized = utils.common_upscale(video, 9, 3, "bilinear", "disabled")
    assert resized.shape == (2, 3, 4, 3, 9)
    for frame in range(4):
        assert torch.equal(resized[:, :, frame], utils.common_upscale(video[:, :, frame], 9, 3, "bilinear", "disabled"))


def test_bislerp_keeps_the_length_of_vectors_of_equal_length():
    samples = torch.nn.functional.normalize(torch.randn(1, 4, 5, 7, generator=torch.Generator().manual_seed(0)), dim=1)
    lengths = utils.bislerp(samples, 14, 10).norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths), atol=1e-4, rtol=0)


def test_bislerp_of_opposite_and_zero_vectors_is_finite():
    samples = torch.tensor([1.0, -1.0, 0.0, 0.0]).reshape(1, 1, 1, 4)
    assert torch.isfinite(utils.bislerp(samples, 9, 3)).all()


def test_attention_mask_resizes_the_image_part_only():
    text, grid = 2, (2, 3)
    mask = torch.ones(1, text + 6, text + 6)
    mask[:, :text, text:] = 0.25
    resized = utils.upscale_dit_mask(mask, grid, (4, 6))
    assert resized.shape == (1, text + 24, text + 24)
    assert torch.all(resized[:, :text, text:] == 0.25) and torch.all(resized[:, text:] == 1) and torch.all(resized[:, :text, :text] == 1)
    assert utils.upscale_dit_mask(mask, grid, grid) is mask
    assert utils.upscale_dit_mask(mask[0], grid, (4, 6)).shape == (1, 26, 26)


def test_dotted_attributes():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert utils.get_attr(model, "0.weight") is model[0].weight
    old = utils.set_attr(model, "0.bias", None)
    assert model[0].bias is None and old.shape == (2,)
    utils.set_attr_param(model, "0.weight", torch.ones(2, 2))
    assert isinstance(model[0].weight, torch.nn.Parameter) and not model[0].weight.requires_grad
    storage = model[0].weight.data_ptr()
    utils.copy_to_param(model, "0.weight", torch.zeros(2, 2))
    assert model[0].weight.data_ptr() == storage and model[0].weight.sum() == 0


def test_state_dict_helpers():
    sd = {"a.x": torch.zeros(4), "b.y": torch.zeros(2, dtype=torch.float16), "a.z": torch.zeros(1, dtype=torch.float16)}
    assert utils.calculate_parameters(sd) == 7 and utils.calculate_parameters(sd, "a.") == 5
    assert utils.weight_dtype(sd) == torch.float32 and utils.weight_dtype(sd, "b.") == torch.float16
    assert utils.weight_dtype({}) is None
    assert set(utils.state_dict_prefix_replace(dict(sd), {"a.": "c."}, filter_keys=True)) == {"c.x", "c.z"}
    assert set(utils.state_dict_prefix_replace(dict(sd), {"a.": ""})) == {"x", "z", "b.y"}


@pytest.mark.parametrize("size", [(5, 7), (16, 16), (33, 20)])
def test_tiles_of_a_pointwise_function_equal_the_whole(size):
    samples = picture(2, 3, *size)
    calls = []

    def double(part):
        calls.append(part.shape)
        return torch.nn.functional.interpolate(part * 2, scale_factor=2, mode="nearest")

    tiled = utils.tiled_scale(samples, double, tile_x=16, tile_y=16, overlap=4, upscale_amount=2)
    torch.testing.assert_close(tiled, double(samples), atol=1e-5, rtol=1e-5)
    assert len(calls) - 1 == 2 * utils.get_tiled_scale_steps(size[1], size[0], 16, 16, 4)
    assert all(shape[2] <= 16 and shape[3] <= 16 for shape in calls[:-1])


# Progress and previews


def test_progress_goes_to_the_host_of_its_time_and_is_capped():
    first, second, seen = host(), host(), []
    first.progress_hook = lambda value, total, preview, node_id=None: seen.append((value, total, preview, node_id))
    with use_host(first):
        bar = utils.ProgressBar(3, node_id="7")
    with use_host(second):
        bar.update(1)
        bar.update(1)
        bar.update_absolute(9, 5, "preview")
    assert seen == [(1, 3, None, "7"), (2, 3, None, "7"), (5, 5, "preview", "7")]


def test_a_progress_bar_stops_on_request_once():
    active = host()
    with use_host(active):
        bar = utils.ProgressBar(2)
        active.interrupt.set()
        with pytest.raises(InterruptProcessingException):
            bar.update(1)
        bar.update(1)
        assert bar.current == 1


@pytest.mark.parametrize("latent_format", [SD15(), SDXL(), SD3(), Flux()])
def test_latent_formats_round_trip_and_preview(latent_format):
    latent = torch.randn(1, latent_format.latent_channels, 4, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(latent_format.process_out(latent_format.process_in(latent)), latent)
    assert torch.tensor(latent_format.latent_rgb_factors).shape == (latent_format.latent_channels, 3)
    with use_host(host()):
        image = get_previewer(torch.device("cpu"), latent_format).decode_latent_to_preview(latent)
    assert image.size == (6, 4) and image.mode == "RGB"


def test_latent_format_constants():
    assert (SD3().scale_factor, SD3().shift_factor, Flux().scale_factor, Flux().shift_factor) == (1.5305, 0.0609, 0.3611, 0.1159)
    assert (SD15().scale_factor, SDXL().scale_factor, LatentFormat().scale_factor) == (0.18215, 0.13025, 1.0)
    latent = torch.ones(1)
    assert Flux().process_in(latent).item() == pytest.approx((1 - 0.1159) * 0.3611)
    assert SD15().process_in(latent).item() == pytest.approx(0.18215)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_preview_is_the_linear_map(dtype):
    image = Latent2RGBPreviewer([[1.0, 0.0, -1.0]], [0.0, 0.5, 0.0]).decode_latent_to_preview(torch.full((1, 1, 2, 2), 1.0, dtype=dtype))
    assert image.getpixel((0, 0)) == (255, 191, 0)
    video = Latent2RGBPreviewer([[1.0, 1.0, 1.0]]).decode_latent_to_preview(torch.zeros(1, 1, 3, 2, 4))
    assert video.size == (4, 2)


def test_previews_can_be_off_or_impossible():
    with use_host(host(preview_method="none")):
        assert get_previewer(None, Flux()) is None
    with use_host(host()):
        assert get_previewer(None, LatentFormat()) is None
    with use_host(host(preview_method="taesd2")), pytest.raises(ValueError, match="taesd2.*auto, latent2rgb, none"):
        get_previewer(None, Flux())


def test_conditioning_set_values_copies_and_appends():
    states = torch.zeros(1, 2, 3)
    original = [[states, {"guidance": 3.5}]]
    changed = node_helpers.conditioning_set_values(original, {"guidance": 2.0, "x": [1]})
    again = node_helpers.conditioning_set_values(changed, {"x": [2]}, append=True)
    assert original[0][1] == {"guidance": 3.5} and changed[0][1]["guidance"] == 2.0 and changed[0][0] is states
    assert again[0][1]["x"] == [1, 2] and changed[0][1]["x"] == [1]
    assert node_helpers.conditioning_set_values(original, {"new": 1}, append=True)[0][1]["new"] == 1


def test_dtype_names():
    assert [node_helpers.string_to_torch_dtype(name) for name in ("fp32", "bf16", "fp16", "int4")] == [
        torch.float32, torch.bfloat16, torch.float16, None,
    ]  # fmt: skip
