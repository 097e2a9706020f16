"""RF-Edit with the source's own prompt: what it changes is the round trip's error and nothing else, on toy Flux and SD3 transformers.

Values put back from the states at which they are used change nothing, to the last bit and for any weights. Values of the inversion come
from its own states, which miss those of the way back by the solver's error; the change is that error times the network's slope, so it
shrinks with it. Hence a bound such as 1e-5 is a statement about weights and steps, not about sharing.
"""

from __future__ import annotations

import pytest
import torch
from rectiflow.host import KSAMPLER, calc_cond_batch, sample_custom
from rectiflow.host.embedded import sd
from rectiflow.samplers.feature_sharing import FeatureBank, RecordPlan, ReplayPlan, sample_rf_edit
from rectiflow.samplers.inversion import InvertSampler, inversion_sigmas
from rectiflow.samplers.sampler_object import FlowSampler
from rectiflow.samplers.solvers import sample_rf_solver
from rectiflow.tests.models import small_models

PICTURE = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPT = [[small_models.random(1, 5, 20, seed=5), {"pooled_output": small_models.random(1, 12, seed=6), "guidance": 1.0}]]


class RoundTrip:
    """A picture inverted in `steps` steps with every double block kept, and ways back under the same prompt."""

    def __init__(self, family: str, scale: float, steps: int):
        network = small_models.filled(small_models.MODELS[family](), scale)
        self.model = sd.load_diffusion_model_state_dict(network.state_dict())
        self.sigmas, self.steps = torch.linspace(1, 0, steps + 1), steps
        self.bank = FeatureBank(RecordPlan(steps, "double"), "rf_solver")
        rising = inversion_sigmas(self.sigmas, sigma_floor=0.0)  # from the picture itself: a floor adds an error that no step shrinks
        self.z = self.run(InvertSampler("rf_solver", watch=self.bank.watch), rising, PICTURE)

    def run(self, sampler, sigmas, latent):
        none = torch.zeros_like(latent)
        return sample_custom(self.model, none, 1.0, sampler, sigmas, PROMPT, PROMPT, latent, disable_pbar=True, seed=0)

    def back(self, function, **options):
        return self.run(FlowSampler(KSAMPLER(function, options), "latent"), self.sigmas, self.z)

    def edited(self):
        plan = ReplayPlan(self.steps, "exact_sigma")
        return self.back(sample_rf_edit, bank=self.bank, plan=plan, calc_cond_batch=calc_cond_batch)

    def own_states(self) -> dict:
        """Where the way back stands at each evaluation that the bank has values for."""
        found, bank = {}, self.bank

        class Watching:
            def __init__(self, model):
                self.model, self.inner_model = model, model.inner_model

            def before_evaluation(self, step, stage):
                self.place = bank.find(step, stage, "exact_sigma")

            def __call__(self, x, sigma, **extra):
                if self.place is not None:
                    found[self.place] = (x.clone(), float(sigma[0]))
                return self.model(x, sigma, **extra)

        self.back(lambda model, *rest, **extra: sample_rf_solver(Watching(model), *rest, **extra))
        return found


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_values_of_the_same_states_change_nothing_whatever_the_weights(family):
    trip = RoundTrip(family, 0.15, 4)
    plain, edited = trip.back(sample_rf_solver), trip.edited()
    assert float((edited - plain).abs().max()) > 1e-2  # rough weights: four steps do not bring the picture back
    trip.bank.states.update(trip.own_states())
    trip.bank.release()
    assert torch.equal(trip.edited(), plain) and trip.bank.remade == 2 * 4 - 1  # all but the first at sigma 1, where inversion never asks


@pytest.mark.parametrize(("family", "scale", "bound"), [("sd3", 0.05, 1e-5), ("flux", 0.03, 1e-5)])
def test_values_of_the_inversion_change_as_little_as_its_round_trip_errs(family, scale, bound):
    changes = []
    for steps in (5, 10, 20):
        trip = RoundTrip(family, scale, steps)
        plain = trip.back(sample_rf_solver)
        changes.append(float((trip.edited() - plain).abs().max()))
        assert changes[-1] < float((plain - PICTURE).abs().max())
    assert changes[0] > 1.5 * changes[1] and changes[-1] < bound
