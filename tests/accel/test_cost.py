"""Predicted FLOPs against torch's own counter on every family, and predicted seconds against a run."""

from __future__ import annotations

import statistics

import pytest
import torch
from rectiflow.accel.cost import Predictor, TimedCalls, smaller_sizes
from rectiflow.errors import NodeInputError
from rectiflow.families.cost import forward_cost
from rectiflow.families.tokens import token_spec
from rectiflow.tests.accel.region_toys import FAMILIES, conditioning, noise, sample, toy
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

SIZE = (12, 16)  # 6 × 8 tokens


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [1, 2])
def test_flops_are_those_that_torch_counts(family, batch):
    """Bound: SD3's last block does not attend for the text's sake, and its positions and time frequencies are not multiplied here."""
    model, z = toy(family), noise(batch, SIZE)
    transformer = model.get_model_object("diffusion_model")
    cost = forward_cost(transformer, token_spec(transformer, "test"))
    assert not cost.unknown
    predictor = Predictor.of(model, tuple(z.shape), (5, 5), "test")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # the CPU's fused attention is not counted
        sample(model, z, steps=1)
    assert predictor.flops(48, 48) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_cost_of_a_part():
    """Layers fall with the tokens computed, attention by queries alone."""
    transformer = toy("flux").get_model_object("diffusion_model")
    cost = forward_cost(transformer, token_spec(transformer, "test"))
    assert cost.attention(24, 0, 48) == cost.attention(48, 0) / 2
    fixed = cost.linear(0, 5)
    assert cost.linear(24, 5) - fixed == pytest.approx((cost.linear(48, 5) - fixed) / 2)


def test_run_adds_dense_and_partial_evaluations():
    model = toy("flux")
    predictor = Predictor.of(model, (1, 16, *SIZE), (5, 8), "test")
    sizes = smaller_sizes((1, 16, *SIZE), predictor.spec.patch)
    assert sizes == [(1, 16, 6, 8), (1, 16, 4, 4)]
    found = predictor.run([(sizes[0], 0.02), (sizes[1], 0.01)], 10, 0.25, 4)
    assert found.evaluations == (4, 6) and found.flops == 4 * found.dense[0] + 6 * found.partial[0]
    assert found.partial[0] == predictor.flops(12, 48) < found.dense[0] and found.partial[1] < found.dense[1]
    assert "48 image tokens, 5 and 8 of text; 10 evaluations, 4 with all tokens" in found.text()
    whole = predictor.run([(sizes[0], 0.02), (sizes[1], 0.01)], 10, 1.0, 4)
    assert whole.partial == whole.dense and whole.flops == 10 * found.dense[0]


def test_seconds_of_a_run_are_near_the_measured_ones(tiny):
    """128×128 from calls at 64×64 and 32×32: within a factor of 1.6 of the median call, on a machine that others use too."""
    shape = (1, 16, 32, 32)
    predictor = Predictor.of(tiny.model, shape, (16, 16), "test")

    def call_seconds(size) -> float:
        from rectiflow.host import CFGGuider

        guider = CFGGuider(tiny.model)
        guider.set_conds(tiny.conditioning("noto cat"), tiny.conditioning(""))
        guider.set_cfg(3.0)
        calls = TimedCalls(rounds=5)
        with torch.inference_mode():
            guider.sample(torch.zeros(size), torch.zeros(size), calls, torch.tensor([1.0, 0.0]), disable_pbar=True, seed=0)
        return calls.seconds

    ratios = []
    for _ in range(3):
        measured = [(size, call_seconds(size)) for size in smaller_sizes(shape, predictor.spec.patch)]
        ratios.append(predictor.run(measured, 1, 1.0, 1).seconds / call_seconds(shape))
    assert 1 / 1.6 < statistics.median(ratios) < 1.6, ratios


def test_the_node_says_what_a_run_costs():
    from rectiflow.nodes.token_tools import RectiflowCostPredictor

    given = {"positive": conditioning(5), "negative": conditioning(9), "latent": {"samples": torch.zeros(1, 16, *SIZE)}}
    text, tflops, seconds = RectiflowCostPredictor().execute(model=toy("flux"), **given, steps=8, cfg=3.0, sample_ratio=0.5, dense_steps=3)
    assert "8 evaluations, 3 with all tokens" in text and tflops > 0 and seconds > 0
    single = RectiflowCostPredictor().execute(model=toy("flux"), **given, steps=8, cfg=1.0, sample_ratio=0.5, dense_steps=3)
    assert single[1] == pytest.approx(tflops / 2)


def test_families_without_known_sizes_are_refused():
    class Other(torch.nn.Module):
        pass

    class Model:
        load_device = "cpu"

        def get_model_object(self, name):
            return Other()

    with pytest.raises(NodeInputError, match="Other"):
        Predictor.of(Model(), (1, 16, 8, 8), (5,), "test")
