"""First order or straight: known answers on pairs with constant noise, on the Gaussian of either path, and through the node."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from rectiflow import NODE_CLASS_MAPPINGS as NODES
from rectiflow.errors import NodeInputError
from rectiflow.host import CFGGuider
from rectiflow.host.embedded.model_base import ModelType
from rectiflow.samplers.path_order import PathOrder, sample_path_order
from rectiflow.tests.samplers.flows import GaussianFlow, StraightFlow
from rectiflow.tests.samplers.prediction_models import MEAN, SD, KnownPair, gaussian_noise_estimate, made_model

DATA, NOISE = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def measured(model, x, sigmas, flow=True) -> PathOrder:
    record = PathOrder()
    sample_path_order(model, x, sigmas, record=record, flow=flow)
    return record


def gaussian_truth(low: float = 0.0, high: float = 1.0, count: int = 200_000) -> tuple[float, float]:
    """Both figures of N(0, SD²) by quadrature: x = spread·z, so eps = s/spread·z and v = spread'·z."""
    s = low + (high - low) * (torch.arange(count, dtype=torch.float64) + 0.5) / count
    spread = torch.sqrt(((1 - s) * SD) ** 2 + s**2)
    eps, v = s / spread, (s - (1 - s) * SD**2) / spread
    return tuple(float(q.var(correction=0) / q.square().mean()) for q in (eps, v))


def test_a_straight_flow_is_both():
    record = measured(StraightFlow(DATA, NOISE), NOISE, torch.linspace(1, 0, 8, dtype=torch.float64))
    assert record.first_order_error < 1e-10 and record.straightness_error < 1e-10
    assert "first order (constant noise) and straight" in record.table()


def test_constant_noise_on_the_exploding_path_is_first_order_and_nothing_else_is_asked():
    def model(x, sigma):
        return x - sigma.reshape(-1, 1) * NOISE

    record = measured(model, DATA + 14.6 * NOISE, torch.linspace(14.6, 0, 30, dtype=torch.float64), flow=False)
    assert record.first_order_error < 1e-10


def test_the_gaussian_of_the_flow_path_agrees_with_quadrature():
    record = measured(GaussianFlow(0.0, SD), NOISE, torch.linspace(1, 0, 81, dtype=torch.float64))
    assert (record.first_order_error, record.straightness_error) == pytest.approx(gaussian_truth(), rel=0.01)


def test_the_gaussian_of_an_epsilon_model_agrees_with_quadrature():
    def model(x, ve):
        rows = ve.reshape(-1, 1)
        return x - rows * gaussian_noise_estimate(x / torch.sqrt(rows**2 + 1), rows)

    s = torch.linspace(0.99, 0.01, 99, dtype=torch.float64)
    ve = s / (1 - s)
    start = MEAN + torch.sqrt(SD**2 + ve[0] ** 2) * NOISE
    record = measured(model, start, ve, flow=False)
    assert record.first_order_error == pytest.approx(gaussian_truth(0.01, 0.99)[0], rel=0.01)


def test_steps_of_other_lengths_give_the_same_figure():
    uniform = measured(GaussianFlow(0.0, SD), NOISE, torch.linspace(1, 0, 81, dtype=torch.float64))
    line = torch.linspace(1, 0, 121, dtype=torch.float64)
    shifted = measured(GaussianFlow(0.0, SD), NOISE, 3 * line / (1 + 2 * line))
    assert shifted.first_order_error == pytest.approx(uniform.first_order_error, rel=0.01)


@pytest.mark.parametrize("kind", [ModelType.FLOW, ModelType.EPS])
def test_the_node_knows_the_path_of_its_model(kind):
    """A network that always says the same: constant velocity as a flow, constant noise as an epsilon model."""
    network = KnownPair(torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)))
    guider = CFGGuider(made_model(network, kind))
    guider.set_conds([[torch.zeros(1, 1, 2), {}]], [[torch.zeros(1, 1, 2), {}]])
    noise = SimpleNamespace(seed=1, generate_noise=lambda latent: torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)))
    top = 1.0 if kind == ModelType.FLOW else 14.6
    inputs = {"noise": noise, "guider": guider, "latent_image": {"samples": torch.zeros(2, 4, 8, 8)}}
    first, straight, table = NODES["RectiflowPathOrderProbe"]().execute(sigmas=torch.linspace(top, 0, 11), **inputs)
    assert (straight if kind == ModelType.FLOW else first) < 1e-6 and len(network.calls) == 20
    assert ("straight" if kind == ModelType.FLOW else "first order") in table.splitlines()[0] and len(table.splitlines()) == 13
    for bad in (torch.linspace(0, top, 5), torch.zeros(0)):
        with pytest.raises(NodeInputError, match="Path Order Probe: input 'sigmas'"):
            NODES["RectiflowPathOrderProbe"]().execute(sigmas=bad, **inputs)
