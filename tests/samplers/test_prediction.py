"""Views of a model on another path, flow UNets, phases, and samplers of two-time models, on the host's own classes and runs."""

from __future__ import annotations

import pytest
import torch
from rectiflow import NODE_CLASS_MAPPINGS as NODES
from rectiflow.errors import NodeInputError
from rectiflow.host import CONST, EPS, ModelSamplingDiscreteFlow, ModelSamplingFlux, sample_custom, sampler_object
from rectiflow.host.embedded.model_base import ModelType
from rectiflow.host.embedded.model_sampling import V_PREDICTION, ModelSamplingDiscrete
from rectiflow.samplers.flow_maps import FLOW_MAPS, TARGET, sample_flow_map
from rectiflow.samplers.prediction import (
    diffusion_view,
    flow_view,
    is_flow,
    phased_sigmas,
    segment_noise,
    segment_state,
    signed_flow,
)
from rectiflow.tests.samplers.flows import GaussianFlow, rmse
from rectiflow.tests.samplers.prediction_models import (
    MEAN,
    SD,
    ContinuousEps,
    GaussianMap,
    KnownPair,
    RandomUNet,
    gaussian_noise_estimate,
    made_model,
)

NOISE, DATA = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
EMPTY = torch.zeros(1, 4, 8, 8)
CONDITION = [[torch.zeros(1, 1, 2), {}]]


class Flow(ModelSamplingDiscreteFlow, CONST):
    pass


class FluxFlow(ModelSamplingFlux, CONST):
    pass


class Diffusion(ModelSamplingDiscrete, EPS):
    pass


class VDiffusion(ModelSamplingDiscrete, V_PREDICTION):
    pass


def run(model, sigmas, sampler=None, noise=NOISE, latent=EMPTY, cfg=1.0, seed=7):
    sampler = sampler or sampler_object("euler")
    sigmas = torch.as_tensor(sigmas)
    return sample_custom(model, noise, cfg, sampler, sigmas, CONDITION, CONDITION, latent, disable_pbar=True, seed=seed)


def uniform(steps: int) -> torch.Tensor:
    return NODES["RectiflowUniformFlowSigmas"]().execute(steps=steps, start=1.0, end=0.0)[0]


# Epsilon models as flows, and back


def velocity_of(view, x, s, answer):
    """(x − denoised)/s through the calls that a host's BaseModel makes."""
    sigma = s.reshape(-1)
    denoised = view.calculate_denoised(sigma, answer(view.calculate_input(sigma, x), view.timestep(sigma)), x)
    return (x - denoised) / s


def test_the_flow_of_an_epsilon_model_is_exact():
    """Data N(0.7, 0.5²), s from 0.001 to 0.999 in float64: the published bound of 1e-5."""
    s = torch.linspace(0.001, 0.999, 41, dtype=torch.float64)[:, None]
    x = (1 - s) * MEAN + torch.randn(41, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    view = flow_view(ContinuousEps(), CONST)
    v = velocity_of(view, x, s, lambda given, time: gaussian_noise_estimate(given, time.exp()))
    assert (v - GaussianFlow(MEAN, SD).velocity(x, s)).abs().max() < 1e-5


def test_a_table_of_1000_times_costs_what_the_page_says():
    """SD's own schedule rounds the time to an entry of its table: docs/rectified-diffusion.md gives this figure."""
    sampling = Diffusion()
    s = torch.linspace(0.03, 0.93, 41)[:, None]
    x = (1 - s) * MEAN + torch.randn(41, 50, generator=torch.Generator().manual_seed(1))
    view = flow_view(sampling, CONST)
    v = velocity_of(view, x, s, lambda given, time: gaussian_noise_estimate(given, sampling.sigma(time)))
    error = (v - GaussianFlow(MEAN, SD).velocity(x, s)).abs().max()
    assert 1e-4 < error < 0.05


@pytest.mark.parametrize("kind", [Diffusion, VDiffusion])
def test_views_are_finite_from_one_end_to_the_other_and_bounded_by_their_tables(kind):
    view = flow_view(kind(), CONST)
    assert isinstance(view, CONST) and is_flow(view) and not is_flow(kind())
    assert 0 < float(view.sigma_min) < 0.03 and 0.9 < float(view.sigma_max) < 1
    for s in (0.0, 1e-6, 0.5, 0.95, 1.0):
        sigma, x, out = torch.tensor([s]), NOISE, DATA
        assert 0 <= float(view.timestep(sigma)) <= 999
        assert torch.isfinite(view.calculate_denoised(sigma, out, x)).all() and torch.isfinite(view.calculate_input(sigma, x)).all()
    # The input of the network has the spread it was trained on, wherever the flow stands.
    for s in (0.94, 1.0):
        assert torch.allclose(view.calculate_input(torch.tensor([s]), s * NOISE).std(), NOISE.std(), rtol=0.01)
    assert view.percent_to_sigma(0) == 1 and view.percent_to_sigma(1) == 0 and 0 < view.percent_to_sigma(0.5) < 1
    assert torch.equal(view.calculate_denoised(torch.tensor([0.0]), DATA * 0, NOISE), NOISE)


@pytest.mark.parametrize("kind", [Flow, FluxFlow])
def test_there_and_back_is_the_same_model(kind):
    inner = kind()
    through = diffusion_view(inner, EPS)
    back = flow_view(through, CONST)
    assert isinstance(through, EPS) and not is_flow(through) and is_flow(back)
    assert float(through.sigma_max) == pytest.approx(999, rel=1e-3) and bool((through.sigmas[1:] > through.sigmas[:-1]).all())
    for s in (0.002, 0.3, 0.9, 0.99):
        sigma = torch.tensor([s], dtype=torch.float64)
        x, out = NOISE.double(), DATA.double()
        assert torch.allclose(back.calculate_input(sigma, x), inner.calculate_input(sigma, x))
        assert torch.allclose(back.calculate_denoised(sigma, out, x), inner.calculate_denoised(sigma, out, x))
        assert torch.allclose(back.timestep(sigma), inner.timestep(sigma))
    assert through.percent_to_sigma(0.5) == pytest.approx(inner.percent_to_sigma(0.5) / (1 - inner.percent_to_sigma(0.5)))
    assert through.percent_to_sigma(0) > through.sigma_max and through.percent_to_sigma(1) == 0
    assert through.sigma(through.timestep(torch.tensor(2.0))) == pytest.approx(2.0, rel=1e-5) if kind is Flow else True


def test_euler_is_the_same_on_both_paths():
    """x' = (s'/s)·x + (1 − s'/s)·D in either scale; a run of the tiny-sized net through the host in both."""
    model = made_model(RandomUNet(), ModelType.FLOW)
    (eps,) = NODES["RectiflowConvertPrediction"]().execute(model=model, to="eps")
    s = torch.linspace(0.99, 0, 12)
    ours = run(model, s, noise=NOISE, latent=DATA)
    theirs = run(eps, s / (1 - s), noise=NOISE, latent=DATA)
    assert rmse(ours, theirs) < 2e-5  # float32 at levels up to 99
    (same,) = NODES["RectiflowConvertPrediction"]().execute(model=model, to="flow_velocity")
    assert same.get_model_object("model_sampling") is model.get_model_object("model_sampling")


def test_an_epsilon_model_runs_under_flow_samplers():
    """From unit noise at sigma 1 along any flow schedule to the same picture as its own sampling, as both get finer."""
    model = made_model(RandomUNet())
    (flow,) = NODES["RectiflowConvertPrediction"]().execute(model=model, to="flow_velocity")
    sampling = model.get_model_object("model_sampling")
    own = torch.cat([torch.linspace(float(sampling.sigma_max) ** 0.2, float(sampling.sigma_min) ** 0.2, 400) ** 5, torch.zeros(1)])
    ours = run(flow, own / (1 + own), noise=NOISE)
    theirs = run(model, own, noise=NOISE)
    # The flow starts from s·noise with s = 0.936 where the host starts the other from sqrt(1 + 14.6²) = 14.65 times noise: 0.2 %.
    assert rmse(ours, theirs) < 0.01 * float(theirs.std())
    (sampler,) = NODES["RectiflowFlowODESampler"]().execute(solver="heun", start_from="noise", last_step="euler")
    assert torch.isfinite(run(flow, uniform(10), sampler)).all()


# Flow UNets


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_straight_flow_gives_the_data_in_any_number_of_steps(steps):
    network = KnownPair(DATA - NOISE)
    (model,) = NODES["RectiflowFlowUNetSampling"]().execute(
        model=made_model(network), velocity_sign="data_minus_noise", shift=1.0, multiplier=1000.0
    )
    sampler = NODES["RectiflowOneStepSampler"]().execute(start_from="noise")[0] if steps == 1 else None
    assert rmse(run(model, uniform(steps), sampler), DATA) < 1e-6
    assert [float(time) for _, time in network.calls] == pytest.approx([1000 * (1 - i / steps) for i in range(steps)], abs=1e-4)


def test_stock_euler_is_the_reference_loop():
    """x ← x + out/N with time 1000·(1 − i/N), as the released pipeline has it."""
    network, steps = RandomUNet(), 5
    (model,) = NODES["RectiflowFlowUNetSampling"]().execute(
        model=made_model(network), velocity_sign="data_minus_noise", shift=1.0, multiplier=1000.0
    )
    x = NOISE
    for i in range(steps):
        x = x + network.answer(x, torch.tensor([1000 * (1 - i / steps)]), {}) / steps
    assert (run(model, uniform(steps)) - x).abs().max() < 1e-5


@pytest.mark.parametrize(("cfg", "rows"), [(1.0, 1), (1.5, 2)])
def test_guidance_costs_a_row_only_above_one(cfg, rows):
    network = RandomUNet()
    model = made_model(network)
    model.add_object_patch("model_sampling", signed_flow(ModelSamplingDiscreteFlow, CONST, "data_minus_noise"))
    run(model, uniform(3), cfg=cfg)
    assert sum(len(x) for x, _ in network.calls) == 3 * rows


def test_the_sign_is_tried_on_a_picture():
    picture = {"samples": DATA}
    for sign, difference in (("data_minus_noise", -1.0), ("noise_minus_data", 1.0)):
        noise = torch.randn(DATA.shape, generator=torch.manual_seed(0))
        inputs = {"model": made_model(KnownPair(difference * (noise - DATA))), "shift": 1.0, "multiplier": 1000.0}
        check = {"check_latent": picture, "check_positive": CONDITION}
        NODES["RectiflowFlowUNetSampling"]().execute(velocity_sign=sign, **inputs, **check)
        other = "noise_minus_data" if sign == "data_minus_noise" else "data_minus_noise"
        with pytest.raises(NodeInputError, match="Flow UNet Sampling: input 'velocity_sign'"):
            NODES["RectiflowFlowUNetSampling"]().execute(velocity_sign=other, **inputs, **check)
        with pytest.raises(NodeInputError, match="check_latent"):
            NODES["RectiflowFlowUNetSampling"]().execute(velocity_sign=sign, **inputs, check_latent=picture)
    with pytest.raises(NodeInputError, match="velocity_sign"):
        signed_flow(ModelSamplingDiscreteFlow, CONST, "minus")


def test_the_shift_of_a_flow_unet_is_a_shift():
    sampling = signed_flow(ModelSamplingDiscreteFlow, CONST, "data_minus_noise", shift=3.0, multiplier=500.0)
    assert float(sampling.sigma(torch.tensor(250.0))) == pytest.approx(0.75) and float(sampling.timestep(torch.tensor(0.75))) == 375.0


# Phases


def test_phased_steps_of_sd_are_999_749_499_249():
    sampling = Diffusion()
    sigmas = phased_sigmas(sampling, 4, 1)
    assert sampling.timestep(sigmas[:-1]).tolist() == [999, 749, 499, 249] and sigmas[-1] == 0


@pytest.mark.parametrize("kind", [Flow, FluxFlow, Diffusion])
@pytest.mark.parametrize("steps", [1, 3, 16])
def test_borders_of_phases_are_on_the_grid(kind, steps):
    sampling = kind()
    for phases in (1, 4, 7):
        sigmas = phased_sigmas(sampling, phases, steps)
        assert len(sigmas) == phases * steps + 1 and bool((sigmas[1:] < sigmas[:-1]).all()) and sigmas[0] == sampling.sigma_max.float()
        borders = phased_sigmas(sampling, phases, 1)
        assert set(borders.tolist()) <= set(sigmas.tolist())
    (from_node,) = NODES["RectiflowPhasedSigmas"]().execute(
        model=made_model(RandomUNet()), phases=4, steps_per_phase=steps, spacing="trailing"
    )
    assert torch.equal(from_node, phased_sigmas(Diffusion(), 4, steps))


def test_more_steps_than_the_table_has_are_refused():
    with pytest.raises(NodeInputError, match="steps_per_phase"):
        phased_sigmas(Flow(), 16, 63)
    assert len(phased_sigmas(Flow(), 10, 100)) == 1001


@pytest.mark.parametrize("start", [0.97, 0.6])
def test_a_segments_noise_makes_its_end_again(start):
    """Variance-preserving levels and flow levels: x_end from x_start exactly, and from every point between."""
    for level in (lambda s: ((1 - s**2) ** 0.5, s), lambda s: (1 - s, s)):
        a, b = level(start), level(0.25)
        x_start, x_end = NOISE.double(), DATA.double()
        eps = segment_noise(x_start, x_end, a, b)
        assert rmse(segment_state(x_start, eps, a, b), x_end) < 1e-12
        for s in (start - 0.01, 0.5, 0.26):
            between = segment_state(x_start, eps, a, level(s))
            assert rmse(segment_state(between, eps, level(s), b), x_end) < 1e-10
    with pytest.raises(NodeInputError, match="alpha"):
        segment_state(NOISE, NOISE, (0.5, 0.5), (0.0, 1.0))


# Flow maps


def flow_map(kind="meanflow", restart_noise=False):
    return NODES["RectiflowFlowMapSampler"]().execute(kind=kind, restart_noise=restart_noise, seed_offset=0)[0]


def exact(noise):
    return MEAN + SD * noise


@pytest.mark.parametrize("grid", [[1.0, 0.0], [1.0, 0.3, 0.0], [1.0, 0.9, 0.5, 0.1, 0.0]])
@pytest.mark.parametrize("kind", ["ctm", "meanflow"])
def test_an_exact_map_is_exact_on_any_grid(kind, grid):
    """The semigroup law |Psi(.3→0)·Psi(1→.3) − Psi(1→0)| < 1e-5, through the host: one call a jump, each told where it goes."""
    network = GaussianMap()
    out = run(made_model(network, ModelType.FLOW), grid, flow_map(kind))
    assert (out - exact(NOISE)).abs().max() < 1e-5
    assert len(network.calls) == len(grid) - 1


def test_consistency_jumps_aim_at_zero():
    network = GaussianMap()
    model = made_model(network, ModelType.FLOW)
    assert (run(model, [1.0, 0.0], flow_map("cm")) - exact(NOISE)).abs().max() < 1e-5
    # With fresh noise every jump is a new draw of the same distribution: 100 000 values, standard error 0.0016.
    noise = torch.randn(4, 4, 80, 80, generator=torch.Generator().manual_seed(2))
    for kind in FLOW_MAPS:
        out = run(model, [1.0, 0.6, 0.2, 0.0], flow_map(kind, restart_noise=True), noise, torch.zeros_like(noise))
        assert abs(float(out.mean()) - MEAN) < 0.01 and abs(float(out.std()) - SD) < 0.01
        assert rmse(out, exact(noise)) > 0.1


def test_the_second_time_reaches_the_network_and_nothing_else():
    seen = []

    def model(x, sigma, model_options=None, seed=None):
        seen.append(model_options["transformer_options"])
        return x * 0

    options = {"transformer_options": {"other": 1}, "kept": 2}
    sample_flow_map(model, NOISE, torch.tensor([1.0, 0.5, 0.0]), {"model_options": options, "seed": 0}, kind="ctm")
    assert [float(given[TARGET]) for given in seen] == [0.5, 0.0] and all(given["other"] == 1 for given in seen)
    assert options == {"transformer_options": {"other": 1}, "kept": 2}
    seen.clear()
    sample_flow_map(model, NOISE, torch.tensor([1.0, 0.5, 0.0]), {"model_options": options, "seed": 0}, kind="cm")
    assert [float(given[TARGET]) for given in seen] == [0.0, 0.0]


def test_a_model_of_one_time_is_walked_as_by_euler():
    model = made_model(RandomUNet(), ModelType.FLOW)
    for kind in FLOW_MAPS:
        assert rmse(run(model, uniform(6), flow_map(kind)), run(model, uniform(6))) < 1e-6


def test_bad_input_of_flow_maps():
    def model(x, sigma, **extra):
        return x

    for options, grid, named in (({"kind": "lcm"}, [1.0, 0.0], "kind"), ({}, [0.0, 1.0], "sigmas"), ({}, [14.6, 0.0], "sigmas")):
        with pytest.raises(NodeInputError, match=named):
            sample_flow_map(model, NOISE, torch.tensor(grid), **options)
