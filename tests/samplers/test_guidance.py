"""The guider: the host's own CFG when nothing is asked, closed forms of each rule, both ends of the flow, batches and split conditions."""

from __future__ import annotations

import pytest
import torch
from rectiflow import NODE_CLASS_MAPPINGS as NODES
from rectiflow.errors import NodeInputError
from rectiflow.host import CFGGuider, WrappersMP, sampler_object
from rectiflow.samplers.guidance import AdaptiveProjection, Guidance, mixed, optimal_scale

GENERATOR = torch.Generator().manual_seed(5)
SIZE = (2, 16, 8, 8)
NOISE = torch.randn(SIZE, generator=GENERATOR)
X, COND, UNCOND = (torch.randn(SIZE, generator=GENERATOR) for _ in range(3))  # x, x − D_c, x − D_u
SIGMAS = torch.linspace(1, 0, 5)
PLAIN = {"rule": "cfg", "sigma_lo": 0.0, "sigma_hi": 1.0, "zero_init": 0, "eta": 0.0, "limit": 0.0, "momentum": 0.0}


class Tiny:
    """The small model with two prompts; counts the rows that reach the transformer at each sigma."""

    def __init__(self):
        self.model, clip, _ = NODES["RectiflowLoadTiny"]().execute()
        self.positive, self.negative = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("noto cat on blue", ""))
        self.rows: list[tuple[float, int]] = []
        self.calls = 0
        self.model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "count", self._count)

    def _count(self, executor, x, t, *args, **kwargs):
        self.rows.append((round(float(t[0]), 4), x.shape[0]))
        self.calls += 1
        return executor(x, t, *args, **kwargs)

    def guider(self, cfg=3.0, model=None, **options):
        inputs = {**PLAIN, **options}
        made = NODES["RectiflowFlowGuider"]().execute(
            model=model or self.model, positive=self.positive, negative=self.negative, cfg=cfg, **inputs
        )
        return made[0]

    def stock(self, cfg=3.0):
        guider = CFGGuider(self.model)
        guider.set_conds(self.positive, self.negative)
        guider.set_cfg(cfg)
        return guider

    def run(self, guider, noise=NOISE, latent=None, sigmas=SIGMAS, sampler="euler"):
        self.rows.clear()
        latent = torch.zeros_like(noise) if latent is None else latent
        return guider.sample(noise, latent, sampler_object(sampler), sigmas, disable_pbar=True, seed=1)


@pytest.fixture(scope="module")
def tiny():
    return Tiny()


def rows_of(batch: torch.Tensor, row: int) -> torch.Tensor:
    return batch[row : row + 1]


# Off is off.

@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_with_the_defaults_it_is_the_hosts_guider_bit_for_bit(tiny, cfg, sampler):
    expected = tiny.run(tiny.stock(cfg), sampler=sampler)
    asked = list(tiny.rows)
    assert torch.equal(tiny.run(tiny.guider(cfg), sampler=sampler), expected)
    assert tiny.rows == asked


@pytest.mark.parametrize("rule", ["cfg_zero", "apg"])
def test_at_scale_one_every_rule_is_the_conditional_prediction(tiny, rule):
    expected = tiny.run(tiny.stock(1.0))
    assert torch.equal(tiny.run(tiny.guider(1.0, rule=rule)), expected)
    assert {rows for _, rows in tiny.rows} == {2}


# The interval.

def test_outside_the_interval_the_unconditional_half_is_not_computed(tiny):
    tiny.run(tiny.guider(sigma_lo=0.5, sigma_hi=0.75))
    assert tiny.rows == [(1.0, 2), (0.75, 4), (0.5, 4), (0.25, 2)]  # both ends included


def test_an_interval_no_sigma_falls_into_is_cfg_one(tiny):
    expected = tiny.run(tiny.stock(1.0))
    guider = tiny.guider(sigma_lo=0.3, sigma_hi=0.4)
    assert torch.equal(tiny.run(guider), expected)
    assert guider.cfg == 3.0


def test_ends_hold_after_rounding():
    assert Guidance(sigma_hi=0.3).acts_at(float(torch.tensor(0.3))) and not Guidance(sigma_hi=0.3).acts_at(0.301)


# Closed forms.

def test_the_optimal_scale_brings_the_unconditional_nearest():
    a = optimal_scale(COND, UNCOND)
    residual = COND - a * UNCOND
    assert (residual * UNCOND).flatten(1).sum(1).abs().max() < 1e-3  # of 1024 products
    torch.testing.assert_close(optimal_scale(0.01 * COND, 0.01 * UNCOND), a, rtol=1e-5, atol=1e-6)
    assert torch.equal(optimal_scale(COND, torch.zeros_like(COND)), torch.ones(2, 1, 1, 1))


def mix(rule="cfg", cfg=3.0, cond=COND, uncond=UNCOND, x=X, mask=None, sigma=0.5, **apg):
    guidance = Guidance(rule, mask=mask, **apg)
    projection = AdaptiveProjection(guidance.eta, guidance.limit, guidance.momentum)
    return mixed(guidance, projection, cond, uncond, x, cfg, sigma)


def test_cfg_zero():
    scaled = optimal_scale(COND, UNCOND) * UNCOND
    torch.testing.assert_close(mix("cfg_zero"), scaled + 3.0 * (COND - scaled))
    torch.testing.assert_close(mix("cfg_zero", uncond=0.5 * COND), COND)  # parallel velocities: nothing to guide along


def test_apg_that_keeps_everything_is_cfg():
    torch.testing.assert_close(mix("apg", eta=1.0), mix("cfg"), rtol=1e-5, atol=1e-5)


def test_apg_takes_off_the_part_along_the_prediction():
    clean = X - COND
    update = (COND - mix("apg")) / 2  # w − 1 = 2
    assert (update * clean).flatten(1).sum(1).abs().max() < 1e-2  # of 1024 products of size 2
    assert not torch.allclose(update, UNCOND - COND, atol=0.01)


def test_apg_limits_the_length_of_each_picture():
    cond = torch.cat([rows_of(COND, 0), 1.01 * rows_of(UNCOND, 1)])  # a long update and a short one
    update = (cond - mix("apg", cond=cond, eta=1.0, limit=0.25)) / 2
    assert rows_of(update, 0).square().mean().sqrt() == pytest.approx(0.25, rel=1e-4)
    assert rows_of(update, 1).square().mean().sqrt() == pytest.approx(0.01, rel=0.1)  # left as it is


def test_momentum_goes_by_sigma_not_by_calls():
    projection = AdaptiveProjection(eta=1.0, limit=0.0, momentum=-0.5)
    first = projection(COND, UNCOND, 1.0)
    torch.testing.assert_close(first, COND - UNCOND)
    second = projection(UNCOND, COND, 0.5)
    torch.testing.assert_close(second, (UNCOND - COND) - 0.5 * (COND - UNCOND), rtol=1e-4, atol=1e-5)
    assert torch.equal(projection(UNCOND, COND, 0.5), second)  # a second stage, or a retry, at the same sigma


def test_momentum_is_forgotten_between_runs(tiny):
    guider = tiny.guider(rule="apg", momentum=-0.5)
    assert torch.equal(tiny.run(guider), tiny.run(guider))
    assert guider._projection is None


@pytest.mark.parametrize("rule", ["cfg", "cfg_zero", "apg"])
def test_a_mask_guides_only_where_it_is_set(rule):
    left = torch.zeros(1, 16, 16)
    left[..., :8] = 1
    out = mix(rule, mask=left)
    torch.testing.assert_close(out[..., :4], mix(rule)[..., :4], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out[..., 4:], COND[..., 4:], rtol=1e-5, atol=1e-5)
    video = [tensor.unsqueeze(2).repeat(1, 1, 3, 1, 1) for tensor in (COND, UNCOND, X)]
    torch.testing.assert_close(mix(rule, mask=left, cond=video[0], uncond=video[1], x=video[2])[:, :, 1], out, rtol=1e-4, atol=1e-4)


# Ends of the flow, batches, splitting.

@pytest.mark.parametrize("rule", ["cfg", "cfg_zero", "apg"])
def test_sigma_zero_is_an_ordinary_point(rule):
    nothing = torch.zeros_like(COND)  # x − D at sigma 0
    assert torch.equal(mix(rule, cond=nothing, uncond=nothing, sigma=0.0), nothing)
    assert torch.equal(mix(rule, cond=nothing, uncond=nothing, x=nothing, sigma=1.0), nothing)


@pytest.mark.parametrize("rule", ["cfg_zero", "apg"])
def test_up_and_down_the_whole_flow_stays_finite(tiny, rule):
    guider = tiny.guider(rule=rule, limit=0.5, momentum=-0.25)
    assert torch.isfinite(tiny.run(guider)).all()
    (invert,) = NODES["RectiflowFlowInvertSampler"]().execute(solver="euler", iterations=1, average=False, floor_noise=False)
    up = guider.sample(NOISE, X, invert, SIGMAS.flip(0), disable_pbar=True, seed=1)  # from sigma 0 to sigma 1
    assert torch.isfinite(up).all()


@pytest.mark.parametrize("rule", ["cfg_zero", "apg"])
def test_a_batch_is_its_pictures_alone_and_split_conditions_change_nothing(tiny, rule, monkeypatch):
    guider = tiny.guider(rule=rule, limit=0.3)
    both = tiny.run(guider)
    joined = tiny.calls
    alone = torch.cat([tiny.run(guider, rows_of(NOISE, row)) for row in range(2)])
    # Matrix products of other sizes round differently; four steps of a network amplify that to a few 1e-5.
    torch.testing.assert_close(alone, both, rtol=1e-3, atol=1e-3)
    monkeypatch.setattr(type(tiny.model.model), "memory_required", lambda self, shape, cond_shapes=None: 1e18)
    tiny.calls = 0
    torch.testing.assert_close(tiny.run(guider), both, rtol=1e-3, atol=1e-3)
    assert tiny.calls == 2 * 4 and joined >= 4


# Zero-init.

def test_zero_init_stands_still_without_a_model_call(tiny):
    held = tiny.run(tiny.guider(zero_init=2))
    assert [sigma for sigma, _ in tiny.rows] == [0.5, 0.25]
    assert torch.equal(held, tiny.run(tiny.stock(), noise=NOISE / 0.5, sigmas=SIGMAS[2:]))  # the noise as the state at sigma 0.5


def test_zero_init_is_for_runs_from_pure_noise(tiny):
    guider = tiny.guider(zero_init=1)
    assert torch.equal(tiny.run(guider, latent=X, sigmas=SIGMAS[1:]), tiny.run(tiny.stock(), latent=X, sigmas=SIGMAS[1:]))
    with pytest.raises(NodeInputError, match="zero_init"):
        tiny.run(tiny.guider(zero_init=4))


# What is refused, and what is passed on.

def test_hooks_of_other_nodes_still_see_the_prediction(tiny):
    model, seen = tiny.model.clone(), []
    model.set_model_sampler_post_cfg_function(lambda args: (seen.append(args["cond_scale"]), args["denoised"])[1])
    assert torch.equal(tiny.run(tiny.guider(model=model, rule="cfg_zero")), tiny.run(tiny.guider(rule="cfg_zero")))
    assert seen == [3.0] * 4


def test_refusals(tiny):
    model = tiny.model.clone()
    model.set_model_sampler_cfg_function(lambda args: args["cond"])
    assert torch.isfinite(tiny.run(tiny.guider(model=model))).all()  # the classical rule leaves the model's own function in its place
    with pytest.raises(NodeInputError, match="Flow Guider: input 'model'"):
        tiny.guider(model=model, rule="apg")
    with pytest.raises(NodeInputError, match="sigma_lo, sigma_hi"):
        tiny.guider(sigma_lo=0.6, sigma_hi=0.5)
    with pytest.raises(NodeInputError, match="'eta'"):
        tiny.guider(eta=float("nan"))
    with pytest.raises(NodeInputError, match="'mask'"):
        tiny.run(tiny.guider(mask=torch.ones(3, 8, 8)))
    with pytest.raises(NodeInputError, match="'rule'"):
        Guidance("rescale")
