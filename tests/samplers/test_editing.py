"""FlowEdit, Uni-Edit and RF-Inversion: the identities each must keep, their cost, and what they refuse."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from rectiflow import NODE_CLASS_MAPPINGS as NODES
from rectiflow.errors import NodeInputError
from rectiflow.host import CFGGuider, calc_cond_batch, cfg_function, sample_custom
from rectiflow.nodes import editing
from rectiflow.samplers.flow_edit import FlowEditSampler
from rectiflow.samplers.inversion import InvertSampler, inversion_sigmas, sample_uni_inv
from rectiflow.samplers.rf_inversion import sample_rf_inversion_forward, sample_rf_inversion_reverse, window_strengths
from rectiflow.samplers.solvers import sample_euler
from rectiflow.samplers.source_target import SourceTarget, seeded_noise, source_target_guider
from rectiflow.samplers.uni_edit import UniEditSampler, difference_mask
from rectiflow.tests.samplers.flows import GaussianFlow, rmse

STEPS = 6
SIGMAS = torch.linspace(1, 0, STEPS + 1)
PICTURE = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))


class Counted:
    """The small trained model with its calls counted, and prompts for it."""

    def __init__(self):
        model, self.clip, _ = NODES["RectiflowLoadTiny"]().execute()
        self.calls: list[int] = []  # rows of each model call
        self.model = model.clone()
        self.counted = model.clone()
        self.counted.set_model_unet_function_wrapper(self._count)
        self.cat, self.dog, self.empty = (self._prompt(text) for text in ("noto cat on white", "noto dog on white", ""))

    def _prompt(self, text):
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))

    def _count(self, apply_model, args):
        self.calls.append(len(args["input"]))
        return apply_model(args["input"], args["timestep"], **args["c"])

    def guider(self, source=None, target=None, cfg_source=1.5, cfg_target=3.0, model=None):
        inputs = {"model": model or self.model, "source": source or self.cat, "target": target or self.dog, "negative": self.empty}
        return editing.RectiflowSourceTargetGuider().execute(**inputs, cfg_source=cfg_source, cfg_target=cfg_target)[0]

    def run(self, sampler, latent=PICTURE, sigmas=SIGMAS, mask=None, **sides):
        guider = self.guider(**sides)
        return guider.sample(torch.zeros_like(latent), latent, sampler, sigmas, denoise_mask=mask, disable_pbar=True, seed=0)


@pytest.fixture(scope="module")
def tiny():
    return Counted()


class AnalyticSides(SourceTarget):
    """A guider between two Gaussian flows, for latents of any rank."""

    flows = GaussianFlow(0.7, 0.5), GaussianFlow(-0.2, 0.3)

    def source(self, x, sigma, model_options=None, seed=None):
        return self.flows[0](x, sigma)

    def both(self, x_source, x_target, sigma, model_options=None, seed=None, joined=False):
        return self.flows[0](x_source, sigma), self.flows[1](x_target, sigma)


VIDEO = torch.randn(2, 3, 4, 6, 5, generator=torch.Generator().manual_seed(1))  # (b, c, t, h, w)


@pytest.mark.parametrize("sampler", [FlowEditSampler(skip=1), UniEditSampler(0.8, 1.0), UniEditSampler(0.8, 1.0, torch.ones(2, 24, 20))])
def test_video_latents_and_their_rows(sampler):
    """Five dimensions as four, and a batch as its videos alone (FlowEdit's row r draws from seed + r, so row 0 is the one to compare)."""
    edited = sampler.sample(AnalyticSides(), SIGMAS, {}, None, None, VIDEO)
    assert edited.shape == VIDEO.shape and torch.isfinite(edited).all() and not torch.equal(edited, VIDEO)
    if getattr(sampler, "mask", None) is None:
        assert rmse(sampler.sample(AnalyticSides(), SIGMAS, {}, None, None, VIDEO[:1]), edited[:1]) < 1e-6


# FlowEdit


def test_flowedit_with_equal_sides_returns_the_picture_to_the_last_bit(tiny):
    for options in ({"skip": 1}, {"skip": 0, "n_avg": 2}):
        assert torch.equal(tiny.run(FlowEditSampler(**options), target=tiny.cat, cfg_source=2.0, cfg_target=2.0), PICTURE)


def test_flowedit_step_by_step():
    """Against the formula written out, on two Gaussian flows whose velocities are known."""
    source, target = AnalyticSides.flows
    got = FlowEditSampler(skip=2, seed=5, n_avg=2).sample(AnalyticSides(), SIGMAS, {}, None, None, PICTURE)
    z, noise = PICTURE.clone(), seeded_noise(PICTURE, 5)
    for s, s_next in zip(SIGMAS[2:-1], SIGMAS[3:]):
        moves = []
        for _ in range(2):
            zs = (1 - s) * PICTURE + s * next(noise)
            moves.append(target.velocity(z + zs - PICTURE, s) - source.velocity(zs, s))
        z = z + (s_next - s) * (moves[0] + moves[1]) / 2
    assert rmse(got, z) < 1e-5


def test_flowedit_counts_and_joins_its_calls(tiny):
    for n_avg, refine, calls in ((1, 0, 2 * 4), (2, 0, 4 * 4), (1, 1, 2 * 3 + 1)):
        tiny.calls.clear()
        tiny.run(FlowEditSampler(skip=2, n_avg=n_avg, refine=refine), model=tiny.counted)
        assert tiny.calls == [2] * calls  # each with its negative prompt
    apart = tiny.run(FlowEditSampler(skip=2))
    # Joined, sums run over four rows in place of two; guidance 3 enlarges the rounding.
    assert rmse(tiny.run(FlowEditSampler(skip=2, batch_pairs=True)), apart) < 1e-4


def test_joined_pairs_are_one_call_of_four_rows(tiny):
    rows = []
    model = tiny.model.clone()

    def count(args, extra):
        rows.append(len(args["img"]))
        return extra["original_block"](args)

    model.set_model_patch_replace(count, "dit", "double_block", 0)
    tiny.run(FlowEditSampler(skip=2, batch_pairs=True), model=model)
    assert rows == [4] * 4
    rows.clear()
    tiny.run(FlowEditSampler(skip=2, batch_pairs=True), model=model, cfg_source=1.0, cfg_target=1.0)
    assert rows == [2] * 4


def test_flowedit_keeps_what_a_mask_covers_and_rows_apart(tiny):
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    edited = tiny.run(FlowEditSampler(skip=1, refine=1), mask=mask)
    assert torch.equal(edited[..., :4], PICTURE[..., :4]) and not torch.equal(edited[..., 4:], PICTURE[..., 4:])
    pair = torch.cat([PICTURE, PICTURE.flip(-1)])
    both = tiny.run(FlowEditSampler(skip=1, seed=3), latent=pair)
    assert rmse(both[:1], tiny.run(FlowEditSampler(skip=1, seed=3), latent=pair[:1])) < 1e-4
    assert rmse(both[1:], tiny.run(FlowEditSampler(skip=1, seed=4), latent=pair[1:])) < 1e-4


def test_more_skipped_steps_keep_more(tiny):
    far = [rmse(tiny.run(FlowEditSampler(skip=skip)), PICTURE) for skip in (0, 2, 4)]
    assert far[0] > far[1] > far[2] > 0


# Uni-Edit


def test_uni_edit_with_equal_sides_is_uni_invs_reconstruction(tiny):
    guider = tiny.guider(target=tiny.cat, cfg_source=1.0, cfg_target=1.0)
    edited = guider.sample(torch.zeros_like(PICTURE), PICTURE, UniEditSampler(0.5, 5.0), SIGMAS, disable_pbar=True, seed=0)
    rising = inversion_sigmas(SIGMAS[3:])

    class Back:
        """Invert and come back with Euler, over the same three steps."""

        def max_denoise(self, *args):
            return False

        def sample(self, guider, sigmas, extra_args, callback, noise, latent_image=None, *rest, **named):
            ask = lambda x, sigma, **extra: guider(x, sigma, model_options=extra_args["model_options"])  # noqa: E731
            x = sample_uni_inv(ask, (1 - rising[0]) * latent_image, rising, disable=True)
            return sample_euler(ask, x, SIGMAS[3:], disable=True)

    reconstruction = guider.sample(torch.zeros_like(PICTURE), PICTURE, Back(), SIGMAS, disable_pbar=True, seed=0)
    assert rmse(edited, reconstruction) < 1e-6


def test_uni_edit_counts_its_calls(tiny):
    tiny.calls.clear()
    tiny.run(UniEditSampler(0.5, 5.0), model=tiny.counted, cfg_source=1.0, cfg_target=1.0)
    assert len(tiny.calls) == 3 * 3 + 1
    assert torch.equal(tiny.run(UniEditSampler(0.0, 5.0)), PICTURE)


def test_uni_edits_mask(tiny):
    d = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(1))
    d[1] *= 100
    m = difference_mask(d)
    assert m.shape == (2, 1, 5, 5) and m.flatten(1).amin(1).tolist() == [0, 0] and m.flatten(1).amax(1).tolist() == [1, 1]
    assert torch.equal(m[:1], difference_mask(d[:1]))
    assert difference_mask(torch.zeros(1, 4, 5, 5)).count_nonzero() == 0
    # A mask of zeros leaves v_source + omega·d; with omega 0 that is the reconstruction.
    still = tiny.run(UniEditSampler(0.5, 0.0, torch.zeros(1, 64, 64)), cfg_source=1.0, cfg_target=1.0)
    same = tiny.run(UniEditSampler(0.5, 0.0), target=tiny.cat, cfg_source=1.0, cfg_target=1.0)
    assert rmse(still, same) < 1e-6
    with pytest.raises(NodeInputError, match="mask"):
        tiny.run(UniEditSampler(0.5, 1.0, torch.zeros(3, 8, 8)))


# RF-Inversion


class Ask:
    """The Gaussian flow as what a sampler function is handed by a host."""

    def __init__(self):
        self.flow = GaussianFlow()
        self.inner_model = SimpleNamespace(inner_model=SimpleNamespace(process_latent_in=lambda latent: latent))

    def __call__(self, x, sigma, **extra):
        return self.flow(x, sigma)


@pytest.mark.parametrize("rising", [SIGMAS.flip(0), inversion_sigmas(SIGMAS)])
def test_gamma_goes_from_eulers_inversion_to_the_drawn_noise(rising):
    euler = sample_euler(Ask(), PICTURE, rising)
    y1 = next(seeded_noise(PICTURE, 7))
    assert torch.equal(sample_rf_inversion_forward(Ask(), PICTURE, rising, gamma=0.0, seed=7), euler)
    ends = {gamma: sample_rf_inversion_forward(Ask(), PICTURE, rising, gamma=gamma, seed=7) for gamma in (0.25, 0.5, 1.0)}
    assert rmse(ends[1.0], y1) < 1e-6
    assert rmse(euler, y1) > rmse(ends[0.25], y1) > rmse(ends[0.5], y1) > 0.01


def test_eta_goes_from_euler_to_the_picture():
    z = next(seeded_noise(PICTURE, 1))
    plain = sample_rf_inversion_reverse(Ask(), z, SIGMAS, source=PICTURE, eta=0.0, end=1.0)
    assert torch.equal(plain, sample_euler(Ask(), z, SIGMAS))
    assert rmse(sample_rf_inversion_reverse(Ask(), z, SIGMAS, source=PICTURE, eta=1.0, end=1.0), PICTURE) < 1e-6
    near = [rmse(sample_rf_inversion_reverse(Ask(), z, SIGMAS, source=PICTURE, eta=0.8, end=end), PICTURE) for end in (0.2, 0.6, 1.0)]
    assert near[0] > near[1] > near[2]


def test_windows():
    assert window_strengths(4, 0.8, 0.0, 0.5, "constant") == [0.8, 0.8, 0.0, 0.0]
    assert window_strengths(4, 0.8, 0.25, 0.75, "linear_up") == [0.0, 0.4, 0.8, 0.0]
    assert window_strengths(4, 0.8, 0.0, 0.5, "linear_down") == [0.8, 0.4, 0.0, 0.0]
    assert window_strengths(4, 0.8, 0.5, 0.5, "linear_up") == [0.0] * 4
    for start, end in ((0.5, 0.4), (-0.1, 0.5), (0.0, 1.1), (float("nan"), 1.0)):
        with pytest.raises(NodeInputError, match="start_percent"):
            window_strengths(4, 0.8, start, end, "constant")
    with pytest.raises(NodeInputError, match="trend"):
        window_strengths(4, 0.8, 0.0, 1.0, "cubic")


def test_rf_inversion_through_its_nodes(tiny):
    """Up and down on the trained model: the picture comes back with the pull over all steps."""
    rising = inversion_sigmas(SIGMAS)
    (up,) = editing.RectiflowRFInversionForwardSampler().execute(gamma=0.5, seed=0)
    assert isinstance(up, InvertSampler)
    none = torch.zeros_like(PICTURE)
    z = sample_custom(tiny.model, none, 1.0, up, rising, tiny.empty, tiny.empty, PICTURE, disable_pbar=True, seed=0)
    options = {"source": {"samples": PICTURE}, "start_percent": 0.0, "end_percent": 1.0, "trend": "constant"}
    (down,) = editing.RectiflowRFInversionReverseSampler().execute(**options, eta=1.0)
    back = sample_custom(tiny.model, none, 1.0, down, SIGMAS, tiny.dog, tiny.empty, z, disable_pbar=True, seed=0)
    assert rmse(back, PICTURE) < 1e-5
    with pytest.raises(NodeInputError, match="source"):
        wide = torch.cat([z, z], dim=-1)
        sample_custom(tiny.model, torch.zeros_like(wide), 1.0, down, SIGMAS, tiny.dog, tiny.empty, wide, disable_pbar=True, seed=0)


# What is refused, and what is left behind


@pytest.mark.parametrize("sampler", [FlowEditSampler(skip=1), UniEditSampler()])
def test_other_guiders_are_refused(tiny, sampler):
    with pytest.raises(NodeInputError, match="guider.*Source Target Guider"):
        sample_custom(tiny.model, torch.zeros_like(PICTURE), 2.0, sampler, SIGMAS, tiny.dog, tiny.empty, PICTURE, disable_pbar=True, seed=0)


def test_schedules_that_do_not_fit_are_refused(tiny):
    (up,) = editing.RectiflowRFInversionForwardSampler().execute(gamma=0.5, seed=0)
    with pytest.raises(NodeInputError, match="RF-Inversion Forward Sampler: input 'sigmas'"):
        sample_custom(tiny.model, torch.zeros_like(PICTURE), 1.0, up, SIGMAS, tiny.empty, tiny.empty, PICTURE, disable_pbar=True, seed=0)
    with pytest.raises(NodeInputError, match="sigmas"):
        tiny.run(FlowEditSampler(skip=1), sigmas=SIGMAS.flip(0))
    with pytest.raises(NodeInputError, match="skip 4, refine 2"):
        tiny.run(FlowEditSampler(skip=4, refine=2))


def test_the_guider_is_the_hosts_own_for_other_samplers(tiny):
    from rectiflow.host import sampler_object

    noise = next(seeded_noise(PICTURE, 2))
    guider = tiny.guider(cfg_target=2.5)
    got = guider.sample(noise, torch.zeros_like(PICTURE), sampler_object("euler"), SIGMAS, disable_pbar=True, seed=0)
    none = torch.zeros_like(PICTURE)
    stock = sample_custom(
        tiny.model, noise, 2.5, sampler_object("euler"), SIGMAS, tiny.dog, tiny.empty, none, disable_pbar=True, seed=0
    )
    assert torch.equal(got, stock)


def test_an_error_on_the_source_side_leaves_the_target_in_place(tiny):
    guider = source_target_guider(CFGGuider, tiny.model, (calc_cond_batch, cfg_function), 1.5, 3.0)
    guider.conds = {"positive": "target", "negative": "n", "source": "source", "source_negative": "n"}

    def fail(*args, **kwargs):
        assert guider.conds["positive"] == "source" and guider.cfg == 1.5
        raise KeyboardInterrupt

    guider.outer_predict_noise = fail
    with pytest.raises(KeyboardInterrupt):
        guider.source(PICTURE, SIGMAS[:1])
    assert guider.conds["positive"] == "target" and guider.cfg == 3.0
