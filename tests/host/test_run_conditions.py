"""Conditions in a run: joined or split, areas, masks, strengths, ranges, control objects."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from rectiflow.host.embedded.latent_formats import Flux
from rectiflow.host.embedded.ldm.flux import FluxParams
from rectiflow.host.embedded.model_detection import build_network, flux_config
from rectiflow.host.embedded.patcher_extension import WrappersMP
from rectiflow.host.embedded.sd import build_flux_model
from rectiflow.tests.host.toy import NOISE, cond, euler, net, run, toy_model

pytestmark = pytest.mark.usefixtures("host")


# Batches


@pytest.mark.parametrize("cfg", [1.0, 2.5])
@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m"])
def test_joined_and_split_are_the_same(host, cfg, name):
    joined, split = toy_model(), toy_model()
    positive = cond(0.5) + cond(1.5)
    expected = run(joined, positive, cfg=cfg, name=name)
    with host.memory.reporting_free(0):
        result = run(split, positive, cfg=cfg, name=name)
    assert torch.equal(result, expected)  # pixel by pixel arithmetic: joining may not change a bit
    kinds = [call["options"]["cond_or_uncond"] for call in net(split).calls]
    evaluations = len(net(joined).calls)
    assert net(joined).calls[0]["options"]["cond_or_uncond"] == ([1, 0, 0] if cfg != 1 else [0, 0])
    assert kinds == ([[1], [0], [0]] if cfg != 1 else [[0], [0]]) * evaluations


def test_memory_for_half_of_the_conditions_runs_halves(host):
    model = toy_model()
    single = model.model.memory_required([2, 2, 4, 6])
    with host.memory.reporting_free(int(single * 1.5 * 2) + 2):
        run(model, cond(0.1) + cond(0.2) + cond(0.3), sigmas=torch.tensor([1.0, 0.0]))
    assert [call["options"]["cond_or_uncond"] for call in net(model).calls] == [[1, 0], [0, 0]]


def test_contexts_of_other_lengths_join_and_too_different_ones_do_not():
    model = toy_model()
    run(model, cond(0.5, tokens=6), cond(0, tokens=3), sigmas=torch.tensor([1.0, 0.0]))
    run(model, cond(0.5, tokens=7), cond(0, tokens=2), sigmas=torch.tensor([1.0, 0.0]))
    assert [call["options"]["cond_or_uncond"] for call in net(model).calls] == [[1, 0], [0], [1]]


# Conditions


def denoised_at(model, positive, sigma=1.0, x=NOISE):
    """The positive prediction at the first step of a run, as a velocity minus its x part: the context each pixel saw."""
    seen = []
    model.set_model_sampler_post_cfg_function(lambda args: seen.append(args) or args["denoised"])
    run(model, positive, cfg=1.0, sigmas=torch.tensor([sigma, 0.0]), noise=x, latent=torch.zeros_like(x))
    args = seen[0]
    return (args["input"] - args["cond_denoised"]) / sigma - sigma * args["input"]


def test_overlapping_conditions_are_averaged_by_strength():
    context = denoised_at(toy_model(), cond(1.0, strength=3.0) + cond(5.0, strength=1.0))
    torch.testing.assert_close(context, torch.full_like(context, 2.0))


def test_masks_divide_the_picture_and_are_resized():
    left = torch.zeros(8, 12)
    left[:, :6] = 1
    context = denoised_at(toy_model(), cond(1.0, mask=left) + cond(5.0, mask=(1 - left).unsqueeze(0), mask_strength=0.5))
    torch.testing.assert_close(context[..., :3], torch.full((2, 2, 4, 3), 1.0))
    torch.testing.assert_close(context[..., 3:], torch.full((2, 2, 4, 3), 5.0))


def test_a_place_that_no_condition_covers_predicts_zero():
    mask = torch.ones(1, 4, 6)
    mask[:, 0] = 0
    seen = []
    model = toy_model()
    model.set_model_sampler_post_cfg_function(lambda args: seen.append(args["cond_denoised"]) or args["denoised"])
    run(model, cond(1.0, mask=mask), cfg=1.0, sigmas=torch.tensor([1.0, 0.0]))
    assert torch.all(seen[0][:, :, 0] == 0) and torch.all(seen[0][:, :, 1:] != 0)


@pytest.mark.parametrize("area", [(2, 3, 1, 2), ("percentage", 0.5, 0.5, 0.25, 1 / 3)])
def test_an_area_is_cut_out_and_the_other_side_sees_the_same_cut(area):
    model = toy_model()
    context = denoised_at(model, cond(1.0) + cond(5.0, area=area))
    inside = torch.zeros(4, 6, dtype=torch.bool)
    inside[1:3, 2:5] = True
    torch.testing.assert_close(context[:, :, ~inside], torch.ones(2, 2, 18))
    assert torch.all(context[:, :, inside] > 1.5)
    net(model).calls.clear()
    run(model, cond(5.0, area=area), cond(0.0), sigmas=torch.tensor([1.0, 0.0]))
    shapes = sorted((tuple(call["x"].shape[2:]), call["options"]["cond_or_uncond"]) for call in net(model).calls)
    assert shapes == [((2, 3), [1, 0]), ((4, 6), [1])]


def test_an_areas_edges_fade_inside_the_picture_only():
    x = torch.zeros(1, 2, 32, 32)
    context = denoised_at(toy_model(), cond(0.0) + cond(1.0, area=(16, 32, 0, 0)), x=x)[0, 0]
    ramp = torch.arange(4, 0, -1) / 4.0  # a quarter of 16 rows, at most 8
    weight = torch.cat([torch.ones(12), ramp, torch.zeros(16)])
    torch.testing.assert_close(context, (weight / (1 + weight))[:, None].expand(32, 32), atol=1e-5, rtol=0)


def test_set_area_to_bounds_runs_the_masks_box_only():
    model, mask = toy_model(), torch.zeros(1, 16, 16)
    mask[:, 2:12, 3:13] = 1
    denoised_at(model, cond(1.0) + cond(5.0, mask=mask, set_area_to_bounds=True), x=torch.zeros(1, 2, 16, 16))
    assert sorted(tuple(call["x"].shape[2:]) for call in net(model).calls) == [(10, 10), (16, 16)]
    net(model).calls.clear()
    denoised_at(model, cond(1.0) + cond(5.0, mask=0 * mask, set_area_to_bounds=True), x=torch.zeros(1, 2, 16, 16))
    assert sorted(tuple(call["x"].shape[2:]) for call in net(model).calls) == [(8, 8), (16, 16)]


def test_default_conditions_fill_what_is_left():
    mask = torch.zeros(1, 4, 6)
    mask[..., :3] = 1
    context = denoised_at(toy_model(), cond(1.0, mask=mask) + cond(7.0, default=True))
    torch.testing.assert_close(context[..., :3], torch.full((2, 2, 4, 3), 1.0))
    torch.testing.assert_close(context[..., 3:], torch.full((2, 2, 4, 3), 7.0))
    model = toy_model()
    denoised_at(model, cond(1.0) + cond(7.0, default=True))
    assert all(call["options"]["cond_or_uncond"] == [0] for call in net(model).calls)  # nothing left: not run


def test_conditions_hold_between_their_percents():
    model = toy_model()
    positive = cond(1.0, start_percent=0.0, end_percent=0.5) + cond(5.0, start_percent=0.5, end_percent=1.0)
    sigmas = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
    result = run(model, positive, cfg=1.0, sigmas=sigmas)
    means = {1.0: 1.0, 0.75: 1.0, 0.5: 3.0, 0.25: 5.0}  # both hold at the seam
    torch.testing.assert_close(result, euler(lambda x, s: s * x + means[round(float(s), 2)], sigmas))


class Control:
    """The protocol of a control object, with a residual of its own."""

    extra_hooks = None

    def __init__(self, trace):
        self.trace = trace

    def get_models(self):
        return []

    def inference_memory_requirements(self, dtype):
        self.trace.append(("memory", dtype))
        return 0

    def pre_run(self, model, percent_to_sigma):
        self.trace.append(("pre_run", percent_to_sigma(0.5)))

    def get_control(self, x, t, conds, batched_number, transformer_options):
        kinds = transformer_options["cond_or_uncond"]
        self.trace.append(("get", tuple(x.shape), t.tolist(), batched_number, kinds, "c_crossattn" in conds))
        return {"output": [torch.full_like(x, 10.0)]}

    def cleanup(self):
        self.trace.append(("cleanup",))


@pytest.mark.parametrize("to_uncond", [True, False])
def test_control_objects(to_uncond):
    model, trace = toy_model(), []
    result = run(model, cond(0.5, control=Control(trace), control_apply_to_uncond=to_uncond), sigmas=torch.tensor([1.0, 0.0]))
    uncond_velocity = -0.25 + 10 * to_uncond
    torch.testing.assert_close(result, euler(lambda x, s: s * x + uncond_velocity + 2 * (10.5 - uncond_velocity), torch.tensor([1.0, 0.0])))
    assert trace[0] == ("memory", torch.float32) and trace[1][0] == "pre_run" and trace[-1] == ("cleanup",)
    batch, kinds = (4, [1, 0]) if to_uncond else (2, [0])
    calls = [entry for entry in trace if entry[0] == "get"]
    assert calls == [("get", (batch, 2, 4, 6), [1.0] * batch, len(kinds), kinds, True)]


@pytest.mark.parametrize("key", ["hooks", "gligen"])
def test_what_this_host_cannot_do_is_refused_before_anything_is_loaded(key):
    model = toy_model()
    with pytest.raises(ValueError, match=f"'{key}'"):
        run(model, cond(1.0, **{key: object()}))
    assert model.loaded_size() == 0


def test_models_of_conditions_and_patchers_are_loaded_and_cleaned():
    further, attached, cleaned = toy_model(), toy_model(), []
    for model in (further, attached):
        model.cleanup = lambda model=model: cleaned.append(model)
    model = toy_model()
    model.additional_models["k"] = [attached]
    run(model, cond(1.0, additional_models=[further]))
    assert further.loaded_size() > 0 and attached.loaded_size() > 0 and cleaned == [further, attached]


# A real transformer


def small_flux(guidance_embed=True):
    """A Flux of two blocks with random weights: text and image attend to each other, so conditions could leak into one another."""
    params = FluxParams(
        in_channels=16, out_channels=16, vec_in_dim=8, context_in_dim=12, hidden_size=64, mlp_ratio=2.0, num_heads=2, depth=1,
        depth_single_blocks=1, axes_dim=(8, 12, 12), theta=10000, patch_size=2, qkv_bias=True, guidance_embed=guidance_embed,
    )  # fmt: skip
    random = torch.Generator().manual_seed(0)
    network = build_network(flux_config(params), torch.float32, "cpu")
    weights = {key: torch.randn(tensor.shape, generator=random) * 0.2 for key, tensor in network.state_dict().items()}
    return build_flux_model(weights, asdict(params), Flux())


def flux_cond(seed, tokens=4, **options):
    random = torch.Generator().manual_seed(seed)
    states = torch.randn(1, tokens, 12, generator=random)
    return [[states, {"pooled_output": torch.randn(1, 8, generator=random), **options}]]


def flux_run(positive, negative):
    noise = torch.randn(2, 16, 6, 4, generator=torch.Generator().manual_seed(1))
    return run(small_flux(), positive, negative, noise=noise, latent=torch.zeros_like(noise))


REFERENCE = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(5))
MASKED = torch.zeros(1, 10, 10)  # 4 text and 6 image tokens; the last text token is hidden
MASKED[:, :, 3] = float("-inf")


@pytest.mark.parametrize(
    ("options", "joinable"),
    [({}, True), ({"guidance": 7.0}, True), ({"guidance": None}, False), ({"reference_latents": [REFERENCE]}, False),
     ({"attention_mask": MASKED, "attention_mask_img_shape": (3, 2)}, False)],
    ids=["plain", "guidance", "no guidance", "reference", "attention mask"],
)  # fmt: skip
def test_a_flux_transformer_sees_each_condition_alone(host, options, joinable):
    """Joined, split by memory and joined with equal options: the same picture; and each option changes it."""
    positive, negative = flux_cond(1, **options), flux_cond(2)
    joined = flux_run(positive, negative)
    with host.memory.reporting_free(0):
        split = flux_run(positive, negative)
    # Products over other batch sizes sum in another order: 1e-6 of the largest value is seen after three steps.
    assert (joined - split).abs().max() < 1e-5 * joined.abs().max()
    if options:
        assert (joined - flux_run(flux_cond(1), negative)).abs().max() > 1e-3
    model, seen = small_flux(), []
    model.add_wrapper(WrappersMP.APPLY_MODEL, lambda executor, *a, **k: seen.append(a[5]["cond_or_uncond"]) or executor(*a, **k))
    run(model, positive, negative, sigmas=torch.tensor([1.0, 0.0]), noise=REFERENCE, latent=0 * REFERENCE)
    assert seen == ([[1, 0]] if joinable else [[0], [1]])
