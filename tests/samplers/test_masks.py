"""Masks over space and time: the family of VDT, the way to latent cells, and masked runs of a video model whose truth is known."""

from __future__ import annotations

import pytest
import torch
from rectiflow import NODE_CLASS_MAPPINGS as NODES
from rectiflow.errors import NodeInputError
from rectiflow.host import KSAMPLER, sample_custom, sampler_object
from rectiflow.nodes import masks as palette
from rectiflow.samplers.known_part import KNOWN_MODES
from rectiflow.samplers.masks import (
    COMBINATIONS,
    TASKS,
    Strides,
    VideoMask,
    block_mask,
    build_mask,
    combine_masks,
    feathered,
    latent_mask,
    masked_velocity_loss,
    parse_frames,
    training_mask,
)
from rectiflow.samplers.repaint import sample_repaint
from rectiflow.samplers.solvers import sample_heun, sample_rf_solver
from rectiflow.tests.samplers.flows import GaussianFlow, rmse
from rectiflow.tests.samplers.video_flow import FrameTimes, Interpolation, OneTime, calls, draw, video_model

FRAME = Strides(1, 8, 8)
SIGMAS = torch.linspace(1, 0, 9)


def frames_of(task: str, frames: int = 16, **options) -> list[int]:
    """Numbers of the generated frames; every frame of these tasks is whole."""
    mask = build_mask(VideoMask(task, **options), frames, 3, 2, FRAME)
    assert mask.shape == (frames, 3, 2) and set(mask.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(mask, mask[:, :1, :1].expand_as(mask))
    return mask[:, 0, 0].nonzero().flatten().tolist()


def defaults(node) -> dict:
    return {declared.name: declared.options.get("default") for declared in node.INPUTS if not declared.optional}


def masked(latent: torch.Tensor, known=None, **options):
    """(pixel mask, LATENT, report) of the node with its defaults."""
    inputs = {**defaults(palette.RectiflowVideoMaskBuilder), "latent": {"samples": latent}, "vae_stride": "1x8x8", **options}
    return palette.RectiflowVideoMaskBuilder().execute(**inputs, **({} if known is None else {"known": {"samples": known}}))


def condition(model, latent, mask, known):
    return palette.RectiflowMaskedVideoCondition().execute(model=model, latent=latent, mask=mask, known=known)


def video(frames: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 2, frames, 4, 6, generator=torch.Generator().manual_seed(seed))


# The family


def test_frame_tasks_are_the_hand_written_ones():
    assert frames_of("predict", given=8) == [8, 9, 10, 11, 12, 13, 14, 15]
    assert frames_of("backward", given=8) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert frames_of("interpolate", step=4) == [1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15]
    assert frames_of("unconditional") == list(range(16))
    assert frames_of("single_frame", frame_index=3) == [0, 1, 2, *range(4, 16)]
    assert frames_of("custom", frame_list="0, 4-6,-1") == [1, 2, 3, *range(7, 15)]
    assert frames_of("backward", given=0) == list(range(16))


def test_drawn_tasks_follow_the_seed_and_their_probability():
    assert frames_of("single_frame", seed=5) == frames_of("single_frame", seed=5)
    assert len({tuple(frames_of("single_frame", seed=seed)) for seed in range(40)}) > 8  # of 16
    assert all(len(frames_of("single_frame", seed=seed)) == 15 for seed in range(5))
    # 4000 frames at 0.8: a standard error of 0.0063; five of them.
    assert abs(len(frames_of("arbitrary", frames=4000, seed=1)) / 4000 - 0.8) < 0.032
    assert frames_of("arbitrary", p_generate=0.0) == [] and frames_of("arbitrary", p_generate=1.0) == list(range(16))


@pytest.mark.parametrize("task", TASKS)
def test_a_mask_and_its_inverse_share_every_position(task):
    mask = build_mask(VideoMask(task, frame_list="2", seed=1), 16, 8, 8, FRAME)
    assert torch.equal(mask + combine_masks("invert", mask, None), torch.ones_like(mask))


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("size", [(8, 8), (30, 52), (5, 17)])
def test_blocks_cover_the_ratio_within_one_block(ratio, size):
    for seed in range(5):
        mask = block_mask(*size, ratio, 4, torch.Generator().manual_seed(seed))
        missing = round(ratio * size[0] * size[1]) - int(mask.sum())
        assert 0 <= missing < 4
        assert torch.equal(mask, block_mask(*size, ratio, 4, torch.Generator().manual_seed(seed)))


def test_blocks_are_blocks():
    """Half of a 32×32 grid in rectangles has far fewer borders than half of it in scattered cells (about 1000 of 1984)."""
    mask = block_mask(32, 32, 0.5, 16, torch.Generator().manual_seed(0))
    borders = int((mask[1:] != mask[:-1]).sum() + (mask[:, 1:] != mask[:, :-1]).sum())
    assert borders < 500


@pytest.mark.parametrize("gaps", [(0, 0), (2, 3), (0, 3)])
def test_completion_keeps_to_its_frames(gaps):
    mask = build_mask(VideoMask("spatial", start_gap=gaps[0], end_gap=gaps[1]), 8, 6, 6, FRAME)
    inside = mask[gaps[0] : 8 - gaps[1]]
    assert not mask[: gaps[0]].any() and not mask[8 - gaps[1] :].any()
    assert torch.equal(inside, inside[:1].expand_as(inside)) and inside.any()


def test_outpaint_keeps_the_middle():
    mask = build_mask(VideoMask("outpaint", spatial_ratio=0.75), 2, 8, 12, FRAME)
    assert not mask[:, 2:6, 3:9].any() and mask.sum() == 2 * (96 - 24)


def test_training_masks_have_the_published_mixture():
    generator = torch.Generator().manual_seed(0)
    drawn = [training_mask(16, 8, 8, generator) for _ in range(2000)]
    spatial = sum(bool((mask != mask[:, :1, :1]).any()) for mask in drawn)
    everything = sum(bool(mask.all()) for mask in drawn)
    # Standard errors of the shares: 0.009 at 0.2 and 0.0076 at 0.8/6 (an arbitrary mask is all ones with 0.8^16 = 0.028 of 0.133).
    assert abs(spatial / 2000 - 0.2) < 0.036
    assert abs(everything / 2000 - 0.8 / 6 * (1 + 0.8**16)) < 0.03


def test_the_loss_counts_generated_positions_only():
    predicted, target = torch.zeros(2, 3, 4, 2, 2), torch.ones(2, 3, 4, 2, 2)
    mask = torch.zeros(1, 1, 4, 1, 1)
    assert masked_velocity_loss(predicted, target, mask) == 0
    mask[:, :, 2] = 1
    predicted[:, :, :2] = 100.0
    assert masked_velocity_loss(predicted, target, mask) == 1.0


# Pixels and cells


def test_a_latent_frame_is_given_only_if_all_its_pixel_frames_are():
    pixels = build_mask(VideoMask("predict", given=8), 13, 2, 2, Strides(4, 8, 8))
    assert len(pixels) == 49
    cells = latent_mask(pixels, 13, 2, 2)
    assert cells[:, 0, 0].tolist() == [0, 0] + [1] * 11  # pixel frames 0 | 1-4 are given, 5-8 not whole


def test_a_cell_is_given_only_if_all_its_pixels_are():
    pixels = torch.zeros(1, 16, 24)
    pixels[0, 7, 8] = 1
    assert latent_mask(pixels, 3, 2, 3).nonzero().tolist() == [[frame, 0, 1] for frame in range(3)]


@pytest.mark.parametrize(("shape", "named"), [((6, 16, 16), "6 frames"), ((5, 15, 16), "15"), ((4, 16, 16), "4 frames")])
def test_masks_of_another_size_are_refused(shape, named):
    with pytest.raises(NodeInputError, match=named):
        latent_mask(torch.ones(shape), 3, 2, 2)


def test_feather_softens_inside_and_leaves_the_given_part():
    mask = torch.zeros(1, 9, 9)
    mask[:, :, 4:] = 1
    assert torch.equal(feathered(mask, 0), mask)
    soft = feathered(mask, 2)
    assert torch.equal(soft == 0, mask == 0)
    assert soft[0, 4].tolist() == pytest.approx([0, 0, 0, 0, 1 / 3, 2 / 3, 1, 1, 1])


def test_combinations():
    first, second = torch.tensor([[[1.0, 1.0, 0.0, 0.0]]]), torch.tensor([[[1.0, 0.0, 1.0, 0.0]]]).expand(3, 1, 4)
    expected = {"union": [1, 1, 1, 0], "intersection": [1, 0, 0, 0], "difference": [0, 1, 0, 0]}
    assert set(expected) | {"invert"} == set(COMBINATIONS)
    for kind, row in expected.items():
        assert combine_masks(kind, first, second).tolist() == [[row]] * 3
    with pytest.raises(NodeInputError, match="second"):
        combine_masks("union", first, None)
    with pytest.raises(NodeInputError, match="second"):
        combine_masks("union", first, torch.ones(1, 2, 4))


def test_frame_lists():
    assert parse_frames("3,0-1, -2 ,", 10) == [0, 1, 3, 8] and parse_frames("", 10) == []
    for bad in ("10", "-11", "a", "3-", "5-2", "1.5", "0x1", "--2"):
        with pytest.raises(NodeInputError, match="frame_list"):
            parse_frames(bad, 10)


@pytest.mark.parametrize(("options", "named"), [
    ({"task": "spatial", "start_gap": 4, "end_gap": 2}, "start_gap"),
    ({"task": "spatial", "min_block": 256}, "min_block"),
    ({"task": "single_frame", "frame_index": 6}, "frame_index"),
    ({"task": "custom", "frame_list": "9"}, "frame_list"),
    ({"task": "predict", "known": torch.zeros(1, 2, 3, 4, 6)}, "known"),
    ({"task": "predict", "given": 2, "known": torch.zeros(1, 2, 2, 4, 5)}, "known"),
])
def test_the_node_refuses_and_names_the_input(options, named):
    with pytest.raises(NodeInputError, match=f"Video Mask: input '.*{named}"):
        masked(video(), **options)


# Masked runs


def test_known_frames_go_to_their_places():
    frames = video(3, seed=1)
    for task, places in (("predict", [0, 1, 2]), ("backward", [3, 4, 5]), ("interpolate", [0, 2, 4])):
        pixels, latent, report = masked(torch.zeros(1, 2, 6, 4, 6), task=task, given=3, step=2, known=frames)
        assert pixels.shape == (6, 32, 48) and latent["noise_mask"].shape == (1, 1, 6, 4, 6)
        assert torch.equal(latent["samples"][:, :, places], frames)
        others = [number for number in range(6) if number not in places]
        assert not latent["samples"][:, :, others].any() and latent["noise_mask"][0, 0, others].all()
        assert report.startswith("pixel frames: 6") and "generated: 50.0 %" in report
    # An empty latent may have other channels, which the host would mend before the run.
    _, latent, _ = masked(torch.zeros(1, 4, 6, 4, 6), task="predict", given=3, known=frames)
    assert latent["samples"].shape == (1, 2, 6, 4, 6)


@pytest.mark.parametrize(("kind", "known"), [
    (kind, known) for kind in (OneTime, FrameTimes) for known in KNOWN_MODES if (kind, known) != (OneTime, "clean_t0")
])
def test_given_positions_come_out_bit_for_bit(kind, known):
    pixels, latent, _ = masked(video(), task="spatial", seed=2)
    latent, model = condition(video_model(kind), latent, pixels, known)
    out = draw(model, latent, sampler_object("heun"), SIGMAS)
    (pasted,) = palette.RectiflowPasteKnown().execute(generated={"samples": out}, known=latent)
    given = (latent["noise_mask"] == 0).expand_as(out)
    assert torch.equal(pasted["samples"][given], latent["samples"][given]) and "noise_mask" not in pasted
    assert torch.equal(pasted["samples"][~given], out[~given]) and given.any() and not given.all()
    assert (out - latent["samples"])[given].abs().max() < 1e-5  # the host alone is a rounding away


@pytest.mark.parametrize("kind", [OneTime, FrameTimes])
def test_a_mask_of_ones_is_no_mask(kind):
    _, latent, _ = masked(video(), task="unconditional")
    free = draw(video_model(kind), {"samples": latent["samples"]}, sampler_object("euler"), SIGMAS)
    assert torch.equal(draw(video_model(kind), latent, sampler_object("euler"), SIGMAS), free)


def test_a_mask_of_zeros_returns_the_input():
    _, latent, _ = masked(video(), task="custom", frame_list="0-5")
    assert not latent["noise_mask"].any()
    out = draw(video_model(), latent, sampler_object("euler"), SIGMAS)
    assert (out - latent["samples"]).abs().max() < 1e-5
    (pasted,) = palette.RectiflowPasteKnown().execute(generated={"samples": out}, known=latent)
    assert torch.equal(pasted["samples"], latent["samples"])


def test_noised_is_noise_at_the_top_and_the_latent_at_the_bottom():
    pixels, latent, _ = masked(video(), task="predict", given=2)
    for kind in (OneTime, FrameTimes):
        latent, model = condition(video_model(kind), latent, pixels, "noised")
        draw(model, latent, sampler_object("euler"), torch.tensor([1.0, 0.5, 1e-6, 0.0]), seed=3)
        noise = torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(3))
        seen = [x[:, :, :2] for x, _ in calls(model)]
        assert [time.shape for _, time in calls(model)] == [(1,)] * 3
        for x, s in zip(seen, (1.0, 0.5, 1e-6)):
            assert torch.allclose(x, s * noise[:, :, :2] + (1 - s) * latent["samples"][:, :, :2], atol=1e-6)
        assert torch.allclose(seen[0], noise[:, :, :2], atol=1e-6) and torch.allclose(seen[2], latent["samples"][:, :, :2], atol=1e-5)


@pytest.mark.parametrize("solver", [sample_heun, sample_rf_solver])
def test_clean_frames_have_time_zero_at_every_stage(solver):
    pixels, latent, _ = masked(video(), task="custom", frame_list="0,3")
    latent, model = condition(video_model(FrameTimes), latent, pixels, "clean_t0")
    draw(model, latent, KSAMPLER(solver, {}), SIGMAS)
    assert len(calls(model)) == (15 if solver is sample_heun else 16)
    for x, time in calls(model):
        assert time.shape == (1, 6) and (time[0, [0, 3]] == 0).all()
        assert len(time[0, [1, 2, 4, 5]].unique()) == 1 and time[0, 1] > 0
        assert torch.equal(x[:, :, [0, 3]], latent["samples"][:, :, [0, 3]])


def test_clean_shared_shows_clean_frames_under_the_common_time():
    for kind in (OneTime, FrameTimes):
        pixels, latent, _ = masked(video(), task="predict", given=2)
        latent, model = condition(video_model(kind), latent, pixels, "clean_shared")
        draw(model, latent, sampler_object("euler"), SIGMAS)
        for (x, time), s in zip(calls(model), SIGMAS):
            assert time.tolist() == [pytest.approx(float(s))]
            assert torch.equal(x[:, :, :2], latent["samples"][:, :, :2])


def test_the_patch_leaves_the_given_model_alone():
    model = video_model(FrameTimes)
    pixels, latent, _ = masked(video(), task="predict", given=2)
    before = draw(model, latent, sampler_object("euler"), SIGMAS)
    _, patched = condition(model, latent, pixels, "clean_shared")
    assert not torch.equal(draw(patched, latent, sampler_object("euler"), SIGMAS), before)
    assert torch.equal(draw(model, latent, sampler_object("euler"), SIGMAS), before)
    _, auto = condition(model, latent, pixels, "auto")
    assert torch.equal(draw(auto, latent, sampler_object("euler"), SIGMAS), before)


def errors_of(kind, mode: str, sampler=None) -> tuple[float, float]:
    truth = Interpolation(kind)
    pixels, latent, _ = masked(truth.video, task="custom", frame_list="0,4")
    latent, patched = condition(truth.model, latent, pixels, mode)
    return truth.errors(draw(patched, latent, sampler or sampler_object("heun"), torch.linspace(1, 0, 41)))


def test_interpolation_draws_the_exact_conditional_where_frames_have_times():
    """Two given frames of a correlated video: mean and spread of the frames between them are those of the conditional Gaussian.

    4800 cells of spread about 0.4: standard error of a slope about 0.01, of a spread 0.01; Heun at 40 steps adds less.
    """
    slope, spread = errors_of(FrameTimes, "clean_t0")
    assert slope < 0.04 and abs(spread - 1) < 0.04


def test_noised_frames_are_an_approximation_that_resampling_mends():
    """The figures of docs/vdt.md: noise hides the given frames while the picture forms; taking steps again lets both parts settle."""
    slope, spread = errors_of(OneTime, "noised")
    assert slope > 0.3 and spread > 1.8
    (sampler,) = palette.RectiflowRepaintSampler().execute(resample=10, seed_offset=0)
    slope, spread = errors_of(OneTime, "noised", sampler)
    assert slope < 0.08 and abs(spread - 1) < 0.05


def test_repaint_without_resampling_is_euler_and_counts_its_calls():
    pixels, latent, _ = masked(video(), task="predict", given=2)
    results = {}
    for resample, expected in ((0, 8), (3, 7 * 4 + 1)):
        model = video_model()
        (sampler,) = palette.RectiflowRepaintSampler().execute(resample=resample, seed_offset=0)
        results[resample] = draw(model, latent, sampler, SIGMAS)
        assert len(calls(model)) == expected
        assert (results[resample] - latent["samples"])[:, :, :2].abs().max() < 1e-5
    (sampler,) = NODES["RectiflowFlowODESampler"]().execute(solver="euler", start_from="noise", last_step="euler")
    assert torch.equal(results[0], draw(video_model(), latent, sampler, SIGMAS))
    assert not torch.equal(results[0], results[3])


def test_repaint_keeps_the_spread_of_a_free_run_and_its_rows_apart():
    """Up and down along the flow's own path changes no distribution: 200 000 Gaussians, standard error 0.0016 of the spread 0.5."""
    x = torch.randn(2, 100_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grid = torch.linspace(1, 0, 41, dtype=torch.float64)
    out = sample_repaint(GaussianFlow(), x, grid, {"seed": 4}, resample=2)
    euler = sample_repaint(GaussianFlow(), x, grid, resample=0)
    # Euler's own spread is 3.6 % low at 40 steps, and each step is taken three times.
    assert abs(float(out.mean()) - 0.7) < 0.01 and abs(float(out.std()) - 0.5) < 0.04 and abs(float(euler.std()) - 0.5) < 0.02
    assert torch.equal(out[1:], sample_repaint(GaussianFlow(), x[1:], grid, {"seed": 5}, resample=2))
    for bad, named in (({"resample": -1}, "resample"), ({}, "sigmas")):
        with pytest.raises(NodeInputError, match=named):
            sample_repaint(GaussianFlow(), x, grid if bad else grid.flip(0), **bad)


def test_pictures_of_a_batch_count_as_frames():
    latent = torch.randn(4, 16, 8, 8)
    pixels, made, _ = masked(latent, task="predict", given=1, vae_stride="4x8x8")
    assert pixels.shape == (4, 64, 64) and made["noise_mask"].shape == (4, 1, 8, 8)
    assert made["noise_mask"].flatten(1).amax(1).tolist() == [0, 1, 1, 1] and torch.equal(made["samples"], latent)
    model, clip, _ = NODES["RectiflowLoadTiny"]().execute()
    prompt = clip.encode_from_tokens_scheduled(clip.tokenize("noto cat on blue"))
    out = sample_custom(
        model, torch.randn(4, 16, 8, 8), 1.0, sampler_object("euler"), torch.linspace(1, 0, 4), prompt, prompt, latent,
        noise_mask=made["noise_mask"], disable_pbar=True, seed=0,
    )
    assert (out[0] - latent[0]).abs().max() < 1e-5 and (out[1:] - latent[1:]).abs().amax((1, 2, 3)).min() > 0.1
    assert rmse(palette.RectiflowPasteKnown().execute(generated={"samples": out}, known=made)[0]["samples"][0], latent[0]) == 0


def test_refusals():
    pixels, latent, _ = masked(video(), task="predict", given=2)
    with pytest.raises(NodeInputError, match="Masked Video Condition: input 'known' got 'clean_t0 on OneTime"):
        condition(video_model(), latent, pixels, "clean_t0")
    with pytest.raises(NodeInputError, match="Paste Known: input 'known'"):
        palette.RectiflowPasteKnown().execute(generated=latent, known={"samples": latent["samples"]})
    with pytest.raises(NodeInputError, match="Paste Known: input 'known'"):
        palette.RectiflowPasteKnown().execute(generated={"samples": video(5)}, known=latent)
