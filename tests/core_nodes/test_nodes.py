"""Closed forms and invariants of the nodes that rearrange tensors; test_against_comfyui.py compares them with the original."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from rectiflow.errors import NodeInputError
from rectiflow.host.embedded.core_nodes import limits
from rectiflow.host.embedded.core_nodes.inpaint import grow_mask

sys.path.insert(0, str(Path(__file__).parent))
from cases import PixelCodec, WordClip, all_cases, blob, conditioning, image, latent, mask, plain  # noqa: E402


def snapshot(value):
    """A copy of everything in nested inputs."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: snapshot(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [snapshot(item) for item in value]
    return value


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other))
    return one == other


def test_no_node_changes_its_inputs_and_all_are_repeatable(call):
    """The graph cache hands the same tensors to many nodes."""
    for _, class_id, inputs in all_cases():
        before = snapshot(inputs)
        first = plain(call(class_id, **inputs))
        assert same(before, inputs), class_id
        assert same(first, plain(call(class_id, **inputs))), class_id


# Resizing


def test_resizing_keeps_a_flat_picture_flat_and_its_aspect(call):
    flat = torch.full((2, 24, 36, 3), 0.4)
    for method in ("nearest-exact", "bilinear", "area", "bicubic", "lanczos"):
        (scaled,) = call("ImageScale", image=flat, upscale_method=method, width=18, height=0, crop="disabled")
        assert scaled.shape == (2, 12, 18, 3)
        # lanczos goes through 8 bits, which cut 0.4 to 102/255
        assert (scaled - 0.4).abs().max() < 1e-6
    (kept,) = call("ImageScale", image=flat, upscale_method="area", width=0, height=0, crop="disabled")
    assert kept is flat


def test_area_is_the_mean_of_each_cell(call):
    picture = image(1, 1, 8, 12)
    (scaled,) = call("ImageScale", image=picture, upscale_method="area", width=6, height=4, crop="disabled")
    assert torch.allclose(scaled, picture.reshape(1, 4, 2, 6, 2, 3).mean((2, 4)), atol=1e-6)


def test_centre_crop_takes_the_middle(call):
    picture = image(1, 1, 8, 20)
    (scaled,) = call("ImageScale", image=picture, upscale_method="nearest-exact", width=8, height=8, crop="center")
    assert torch.equal(scaled, picture[:, :, 6:14])


def test_latent_sizes_are_pixels_and_at_least_64(call):
    for width, height, shape in ((128, 72, (9, 16)), (0, 80, (10, 12)), (8, 8, (8, 8)), (160, 0, (16, 20))):
        (scaled,) = call("LatentUpscale", samples=latent(1), upscale_method="bilinear", width=width, height=height, crop="disabled")
        assert tuple(scaled["samples"].shape[-2:]) == shape


def test_a_latent_scaled_by_one_is_the_same(call):
    given = latent(1, 2, noise_mask=mask(2, 2, 1, 8, 10))
    for method in ("nearest-exact", "bilinear", "area", "bicubic"):
        (scaled,) = call("LatentUpscaleBy", samples=given, upscale_method=method, scale_by=1.0)
        assert torch.allclose(scaled["samples"], given["samples"], atol=1e-6)
        assert scaled["noise_mask"] is given["noise_mask"]


# Inpainting


@pytest.mark.parametrize("size", range(1, 12))
def test_a_grown_mask_is_the_convolution_with_ones(size):
    holes = (mask(size, 3, 1, 20, 17) > 0.9).float()
    ones = torch.ones(1, 1, size, size)
    expected = torch.nn.functional.conv2d(holes, ones, padding=size // 2).clamp(0, 1)[:, :, :20, :17]
    assert torch.equal(grow_mask(holes, size), expected)


def test_inpainting_greys_the_hole_and_masks_a_little_more(call):
    picture = image(1, 1, 24, 32)
    hole = blob(24, 32, 8, 8, 8)
    (encoded,) = call("VAEEncodeForInpaint", pixels=picture, vae=PixelCodec(), mask=hole, grow_mask_by=5)
    seen = PixelCodec().decode(encoded["samples"])
    inside = hole[0, ..., None].bool().expand(24, 32, 3)
    assert torch.equal(seen[0][inside], torch.full((8 * 8 * 3,), 0.5))
    assert torch.allclose(seen[0][~inside], picture[0][~inside], atol=1e-7)
    assert torch.equal(encoded["noise_mask"], blob(24, 32, 6, 6, 12)[None])  # 2 pixels further on each side


def test_inpainting_cuts_to_whole_latent_places_at_the_centre(call):
    picture = image(1, 1, 29, 38)
    (encoded,) = call("VAEEncodeForInpaint", pixels=picture, vae=PixelCodec(), mask=torch.zeros(1, 29, 38), grow_mask_by=0)
    # rounding of (x − 0.5) + 0.5
    assert torch.allclose(PixelCodec().decode(encoded["samples"]), picture[:, 2:26, 3:35], atol=1e-7)
    assert encoded["noise_mask"].shape == (1, 1, 24, 32)


def test_alpha_is_dropped_when_encoding(call):
    picture = image(1, 2, 16, 16, 4)
    (encoded,) = call("VAEEncode", pixels=picture, vae=PixelCodec())
    (decoded,) = call("VAEDecode", samples=encoded, vae=PixelCodec())
    assert torch.equal(decoded, picture[..., :3])


def test_video_frames_become_a_batch(call):
    class Video:
        def decode(self, samples):
            return samples

    (frames,) = call("VAEDecode", samples={"samples": torch.zeros(2, 3, 4, 5, 3)}, vae=Video())
    assert frames.shape == (6, 4, 5, 3)


@pytest.mark.parametrize("node", ["VAEDecode", "VAEEncode", "VAEEncodeForInpaint", "VAEDecodeTiled", "VAEEncodeTiled"])
def test_a_missing_vae_is_said(call, host, node):
    inputs = {name: None for name in host.registry[node].REQUIRED}
    with pytest.raises(NodeInputError, match="input 'vae' got None.*Load VAE"):
        call(node, **inputs)


def test_a_missing_text_encoder_is_said(call):
    for node, inputs in (
        ("CLIPTextEncode", {"text": "a"}),
        ("CLIPTextEncodeFlux", {"clip_l": "a", "t5xxl": "b", "guidance": 1.0}),
        ("CLIPTextEncodeLumina2", {"system_prompt": "superior", "user_prompt": "b"}),
        ("CLIPSetLastLayer", {"stop_at_clip_layer": -2}),
    ):
        with pytest.raises(NodeInputError, match="input 'clip' got None.*Load CLIP"):
            call(node, clip=None, **inputs)


def test_an_encoder_without_the_wanted_part_is_said(call):
    class OnlyL(WordClip):
        parts = ("l",)

    with pytest.raises(NodeInputError, match="CLIPTextEncodeFlux: input 'clip'.*'t5xxl'; this one has l"):
        call("CLIPTextEncodeFlux", clip=OnlyL(), clip_l="a", t5xxl="b", guidance=1.0)


# Batches


def test_repeats_draw_noise_of_their_own(call):
    (repeated,) = call("RepeatLatentBatch", samples=latent(1, 2, batch_index=[3, 5]), amount=3)
    assert repeated["batch_index"] == [3, 5, 6, 8, 9, 11]
    assert torch.equal(repeated["samples"], latent(1, 2)["samples"].repeat(3, 1, 1, 1))


def test_a_picked_latent_keeps_its_noise(call):
    (picked,) = call("LatentFromBatch", samples=latent(1, 5), batch_index=3, length=9)
    assert picked["batch_index"] == [3, 4]
    (again,) = call("LatentFromBatch", samples=picked, batch_index=1, length=1)
    assert again["batch_index"] == [4]
    assert torch.equal(again["samples"], latent(1, 5)["samples"][4:])


def test_rebatching_keeps_every_sample_its_mask_and_its_noise(call):
    half = mask(3, 2, 1, 16, 16).round()
    given = [latent(1, 3), latent(2, 2, noise_mask=half, batch_index=[7, 8]), latent(3, 1, height=9)]
    (batches,) = call("RebatchLatents", latents=given, batch_size=[2])
    assert [tuple(batch["samples"].shape[:1]) for batch in batches] == [(2,), (2,), (1,), (1,)]
    assert [batch["batch_index"] for batch in batches] == [[0, 1], [2, 7], [8], [5]]
    assert "noise_mask" not in batches[0] and "noise_mask" not in batches[3]
    assert torch.equal(batches[1]["noise_mask"], torch.cat([torch.ones(1, 1, 16, 16), half[:1]]))
    assert torch.equal(torch.cat([batch["samples"] for batch in batches[:3]]), torch.cat([part["samples"] for part in given[:2]]))


def test_interpolation_ends_at_both_latents(call):
    one, other = latent(1, 3), latent(2, 3)
    for ratio, expected in ((1.0, one), (0.0, other)):
        (blended,) = call("LatentInterpolate", samples1=one, samples2=other, ratio=ratio)
        assert torch.allclose(blended["samples"], expected["samples"], atol=1e-6)  # divided by its length and multiplied again
    (zero,) = call(
        "LatentInterpolate", samples1={"samples": torch.zeros(1, 4, 2, 2)}, samples2={"samples": torch.zeros(1, 4, 2, 2)}, ratio=0.5
    )
    assert torch.equal(zero["samples"], torch.zeros(1, 4, 2, 2))


# Masks and pictures


@pytest.mark.parametrize("tapered", [True, False])
def test_growing_a_point_draws_a_diamond_or_a_square(call, tapered):
    (grown,) = call("GrowMask", mask=blob(11, 11, 5, 5, 1), expand=3, tapered_corners=tapered)
    rows, columns = torch.meshgrid(torch.arange(11) - 5, torch.arange(11) - 5, indexing="ij")
    distance = rows.abs() + columns.abs() if tapered else torch.maximum(rows.abs(), columns.abs())
    assert torch.equal(grown[0], (distance <= 3).float())
    (shrunk,) = call("GrowMask", mask=1 - blob(11, 11, 5, 5, 1), expand=-3, tapered_corners=tapered)
    assert torch.equal(shrunk[0], (distance > 3).float())


def test_growing_further_than_the_picture_ends(call):
    (grown,) = call("GrowMask", mask=blob(9, 7, 0, 0, 1), expand=16384, tapered_corners=True)
    assert torch.equal(grown, torch.ones(1, 9, 7))


def test_pasting_blends_by_the_mask_and_cuts_what_lies_outside(call):
    below, above = torch.zeros(1, 6, 8, 3), torch.ones(1, 4, 4, 3)
    (pasted,) = call(
        "ImageCompositeMasked", destination=below, source=above, x=6, y=1, resize_source=False, mask=torch.full((1, 4, 4), 0.25)
    )
    expected = torch.zeros(1, 6, 8, 3)
    expected[:, 1:5, 6:] = 0.25
    assert torch.equal(pasted, expected)
    (outside,) = call("ImageCompositeMasked", destination=below, source=above, x=8, y=900, resize_source=False)
    assert torch.equal(outside, below)


def test_a_source_without_alpha_is_opaque(call):
    below, above = torch.zeros(1, 2, 2, 4), torch.full((1, 1, 1, 3), 0.5)
    (pasted,) = call("ImageCompositeMasked", destination=below, source=above, x=0, y=0, resize_source=False)
    assert pasted[0, 0, 0].tolist() == [0.5, 0.5, 0.5, 1.0]
    assert not pasted[0, 1].any()


def test_padding_keeps_the_picture_and_masks_the_rest(call):
    picture = image(1, 1, 24, 32)
    padded, hole = call("ImagePadForOutpaint", image=picture, left=8, top=0, right=0, bottom=16, feathering=4)
    assert torch.equal(padded[:, :24, 8:], picture)
    assert (padded[:, 24:] == 0.5).all() and (padded[:, :, :8] == 0.5).all()
    assert (hole[0, 24:] == 1).all() and (hole[0, :, :8] == 1).all()
    # a pixel at distance d from a padded end: ((4 − d) / 4)²
    assert hole[0, 0, 8:13].tolist() == [1.0, 0.5625, 0.25, 0.0625, 0.0]


def test_a_picture_without_alpha_has_no_alpha_channel(call):
    with pytest.raises(NodeInputError, match="Convert Image to Mask: input 'channel' got 'alpha'"):
        call("ImageToMask", image=image(1), channel="alpha")


def test_sizes_as_numbers(call):
    assert call("GetImageSize", image=torch.zeros(2, 5, 7, 3)) == (7, 5, 2)


# Conditioning


def test_averages_are_linear_and_zero_pad(call):
    to, other = conditioning(1, 5), conditioning(2, 3)
    (averaged,) = call("ConditioningAverage", conditioning_to=to, conditioning_from=other, conditioning_to_strength=0.25)
    assert torch.allclose(averaged[0][0][:, :3], 0.25 * to[0][0][:, :3] + 0.75 * other[0][0], atol=1e-6)
    assert torch.allclose(averaged[0][0][:, 3:], 0.25 * to[0][0][:, 3:], atol=1e-6)


def test_reference_latents_collect(call):
    (once,) = call("ReferenceLatent", conditioning=conditioning(1), latent=latent(1))
    (twice,) = call("ReferenceLatent", conditioning=once, latent=latent(2))
    assert len(once[0][1]["reference_latents"]) == 1
    assert [torch.equal(a, b["samples"]) for a, b in zip(twice[0][1]["reference_latents"], (latent(1), latent(2)))] == [True, True]


# Schedules


def test_split_schedules_share_a_sigma_and_join_to_the_whole(call):
    sigmas = torch.linspace(1, 0, 11)
    for step in range(11):
        high, low = call("SplitSigmas", sigmas=sigmas, step=step)
        assert torch.equal(torch.cat([high, low[1:]]), sigmas)
    high, low = call("SplitSigmasDenoise", sigmas=sigmas, denoise=0.3)
    assert (len(high), len(low)) == (8, 4)
    assert high[-1] == low[0]


def test_a_flipped_schedule_never_starts_at_zero(call):
    (flipped,) = call("FlipSigmas", sigmas=torch.tensor([1.0, 0.5, 0.0]))
    assert torch.equal(flipped, torch.tensor([0.0001, 0.5, 1.0]))


def test_an_empty_schedule_has_no_first_sigma(call):
    with pytest.raises(NodeInputError, match="SetFirstSigma: input 'sigmas'"):
        call("SetFirstSigma", sigmas=torch.zeros(0), sigma=1.0)


# Sizes beyond memory


@pytest.mark.parametrize(
    "node, inputs, named",
    [
        (
            "EmptyLatentImage",
            {"width": 16384, "height": 16384, "batch_size": 4096},
            "Empty Latent Image: input 'width, height, batch_size'",
        ),
        ("EmptySD3LatentImage", {"width": 16384, "height": 16384, "batch_size": 4096}, "EmptySD3LatentImage: input"),
        ("EmptyImage", {"width": 16384, "height": 16384, "batch_size": 4096, "color": 0}, "EmptyImage: input"),
        ("SolidMask", {"value": 1.0, "width": 16384, "height": 16384}, "SolidMask: input 'width, height'"),
        ("RepeatImageBatch", {"image": torch.zeros(1, 512, 512, 3), "amount": 4096}, "RepeatImageBatch: input 'amount'"),
        ("RepeatLatentBatch", {"samples": latent(1, 64, 16, 64, 64), "amount": 64}, "Repeat Latent Batch: input 'amount'"),
        ("LatentUpscaleBy", {"samples": latent(1, 4, 16, 512, 512), "upscale_method": "area", "scale_by": 8.0}, "Upscale Latent By: input"),
        (
            "ImageScale",
            {"image": image(1, 8), "upscale_method": "area", "width": 16384, "height": 16384, "crop": "disabled"},
            "Upscale Image: input",
        ),
        (
            "ImagePadForOutpaint",
            {"image": image(1, 8), "left": 16384, "top": 16384, "right": 0, "bottom": 0, "feathering": 0},
            "Pad Image for Outpainting: input",
        ),
    ],
)
def test_sizes_beyond_memory_are_refused_before_they_are_taken(call, monkeypatch, node, inputs, named):
    monkeypatch.setattr("rectiflow.host.embedded.model_management.system_memory", lambda: (limits.GIB, limits.GIB // 4))
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: pytest.fail("memory was taken"))
    monkeypatch.setattr(torch, "full", lambda *_, **__: pytest.fail("memory was taken"))
    with pytest.raises(NodeInputError, match=rf"{named}.*0\.2 GiB of free memory; this takes \d+\.\d GiB"):
        call(node, **inputs)


def test_sizes_that_fit_are_made(call):
    assert call("EmptyLatentImage", width=64, height=48, batch_size=2)[0]["samples"].shape == (2, 4, 6, 8)
    assert call("EmptySD3LatentImage", width=64, height=48)[0]["samples"].shape == (1, 16, 6, 8)
    assert call("EmptyImage", width=2, height=1, color=0xFF0080)[0][0, 0, 0].tolist() == pytest.approx([1.0, 0.0, 128 / 255])


@pytest.mark.parametrize("node, name", [("ImageScaleBy", "width, height"), ("LatentUpscaleBy", "scale_by")])
def test_scaling_to_nothing_is_refused(call, node, name):
    given = {"image": image(1)} if node == "ImageScaleBy" else {"samples": latent(1)}
    with pytest.raises(NodeInputError, match=f"input '{name}'"):
        call(node, **given, upscale_method="area", scale_by=0.01)


# Values


def test_anything_can_be_shown(call):
    class Silent:
        def __str__(self):
            raise RuntimeError("no")

    shown = {None: "None", "a": "a", 3: "3", 2.5: "2.5", True: "True"}
    for value, text in shown.items():
        assert call("PreviewAny", source=value) == {"ui": {"text": (text,)}}
    assert call("PreviewAny", source=[1, {"k": 2}])["ui"]["text"] == ('[1, {"k": 2}]',)
    assert call("PreviewAny", source=torch.ones(1))["ui"]["text"] == ("tensor([1.])",)
    assert call("PreviewAny", source=Silent())["ui"]["text"] == ("source exists, but could not be serialized.",)
