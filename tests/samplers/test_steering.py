"""Steering on flows with known answers: Euler when off, exact where it must be, blind to batch and size, no way back through the model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from rectiflow.errors import NodeInputError
from rectiflow.samplers.costs import CostPart, LatentMeasurement, LatentSpace, PixelDecoder, PixelMeasurement, Score
from rectiflow.samplers.operators import Blur, Downsample, Grayscale, Identity, Mask, gaussian_kernel
from rectiflow.samplers.scores import ClassScore, ClipVisionScore, ColourScore
from rectiflow.samplers.solvers import sample_euler
from rectiflow.samplers.steering import sample_flowchef
from rectiflow.tests.samplers.flows import GaussianFlow, MixtureFlow

GENERATOR = torch.Generator().manual_seed(21)
NOISE = torch.randn(2, 4, 8, 8, generator=GENERATOR)
PICTURE = torch.randn(1, 4, 8, 8, generator=GENERATOR)
DOWN = torch.linspace(1, 0, 11)
HALF = torch.zeros(1, 8, 8)
HALF[..., :4] = 1


def part(cost, beta=1.0, beta_end=None, sigma_hi=1.0, sigma_lo=0.0):
    return CostPart(cost, beta, beta if beta_end is None else beta_end, sigma_hi, sigma_lo)


class Codec(torch.nn.Module):
    """A linear decoder: 4 channels → 3 × (2h, 2w), for pictures and, frame by frame, for videos."""

    def __init__(self):
        super().__init__()
        weights = torch.randn(12, 4, generator=torch.Generator().manual_seed(2)) * 0.3
        self.mix = torch.nn.Parameter(weights)
        self.passes = 0

    def decode(self, z):
        self.passes += 1
        frames = z.movedim(2, 1).flatten(0, 1) if z.ndim == 5 else z
        rgb = torch.nn.functional.pixel_shuffle(torch.einsum("oc,bchw->bohw", self.mix, frames), 2)
        return rgb.unflatten(0, (z.shape[0], -1)).movedim(1, 2) if z.ndim == 5 else rgb


def decoder(codec=None):
    codec = codec or Codec()
    vae = SimpleNamespace(
        first_stage_model=codec, patcher=None, device=torch.device("cpu"), vae_dtype=torch.float32,
        process_output=lambda rgb: ((rgb + 1) / 2).clamp(0, 1), memory_used_decode=lambda shape, dtype: 100 * shape[0],
    )
    return PixelDecoder(vae, lambda patchers, memory: None)


def pixels(codec, latent):
    return ((codec.decode(latent) + 1) / 2).movedim(1, -1).detach()


# Off, schedules, sums.

@pytest.mark.parametrize("costs", [
    (),
    (part(LatentMeasurement(Identity(), PICTURE), beta=0.0),),
    (part(LatentMeasurement(Identity(), PICTURE), sigma_hi=0.05, sigma_lo=0.01),),
])
def test_without_an_active_cost_it_is_euler_bit_for_bit(costs):
    assert torch.equal(sample_flowchef(GaussianFlow(), NOISE, DOWN, costs=costs), sample_euler(GaussianFlow(), NOISE, DOWN))


def test_the_schedule_of_a_part():
    ramp = part(None, beta=0.8, beta_end=0.2, sigma_hi=0.9, sigma_lo=0.3)
    assert [ramp.weight(sigma) for sigma in (1.0, 0.9, 0.6, 0.3, 0.1)] == pytest.approx([0, 0.8, 0.5, 0, 0])
    early = part(None, sigma_lo=0.9)
    assert early.weight(float(torch.tensor(0.9)) + 5e-8) == 0 and early.weight(0.92) == 1  # rounding does not move a window's end
    for lo, hi in ((0.5, 0.5), (-0.1, 1.0), (0.0, 1.1), (0.0, float("nan"))):
        with pytest.raises(NodeInputError, match="sigma_lo"):
            part(None, sigma_lo=lo, sigma_hi=hi)


def test_costs_add_up():
    halves = [part(LatentMeasurement(Mask(known), PICTURE), beta=0.4) for known in (HALF, 1 - HALF)]
    whole = (part(LatentMeasurement(Identity(), PICTURE), beta=0.4),)
    expected = sample_flowchef(GaussianFlow(), NOISE, DOWN, costs=whole)
    for costs in (tuple(halves), tuple(halves[::-1])):
        torch.testing.assert_close(sample_flowchef(GaussianFlow(), NOISE, DOWN, costs=costs), expected, rtol=0, atol=1e-6)


# The closed form.

def test_known_values_are_met():
    """beta 1 to the end; float32 rounding of one step."""
    out = sample_flowchef(GaussianFlow(), NOISE, DOWN, costs=(part(LatentMeasurement(Mask(HALF), PICTURE)),))
    assert (out - PICTURE)[..., :4].abs().max() < 1e-5
    assert (out - PICTURE)[..., 4:].abs().max() > 0.1


def test_one_step_by_hand():
    """From sigma 1 to 0.5 on the Gaussian: v = noise − mean at sigma 1, so D = mean."""
    out = sample_flowchef(GaussianFlow(), NOISE, torch.tensor([1.0, 0.5]), costs=(part(LatentMeasurement(Identity(), PICTURE), 0.3),))
    expected = NOISE + 0.3 * (PICTURE - 0.7) - 0.5 * (NOISE - 0.7)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


def test_inner_steps_compound():
    one, three = (
        sample_flowchef(GaussianFlow(), NOISE, DOWN, costs=(part(LatentMeasurement(Identity(), PICTURE), beta),), inner=inner)
        for beta, inner in ((1 - 0.7**3, 1), (0.3, 3))
    )
    torch.testing.assert_close(three, one, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("beta", "steps", "low", "high"), [(0.0, 30, 0.15, 0.45), (0.02, 100, 0.55, 0.9), (0.3, 30, 0.95, 1.0)])
def test_the_hidden_half_lands_in_the_right_component(beta, steps, low, high):
    """Published for beta 0 / 0.02 / 0.08 / 0.3 at 100 steps: 0.29, 0.73, 0.99, 1.00; asked for: 0.95 at beta 0.3 and 30 steps."""
    flow = MixtureFlow()
    truth = flow.data(400)  # (n, 16)
    state = flow.noise(400)
    known = torch.tensor([1.0, 0.0]).repeat_interleave(8).reshape(1, 4, 4)

    def model(x, sigma):
        return flow(x.flatten(1), sigma).reshape(x.shape)

    cost = LatentMeasurement(Mask(known), truth.reshape(-1, 1, 4, 4))
    grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    out = sample_flowchef(model, state.reshape(-1, 1, 4, 4), grid, costs=(part(cost, beta),)).flatten(1)

    def nearest(x):
        return torch.cdist(x[:, 8:], flow.means[:, 8:]).argmin(1)

    right = float((nearest(out) == torch.cdist(truth, flow.means).argmin(1)).double().mean())
    assert low <= right <= high


# Independence.

def run(cost, noise=NOISE, beta=0.4, inner=2):
    return sample_flowchef(GaussianFlow(), noise, DOWN, costs=(part(cost, beta),), inner=inner)


def test_batch_and_resolution_change_nothing():
    codec = Codec()
    image = pixels(codec, PICTURE)
    smooth = Blur(gaussian_kernel(1, 1.0))  # a kernel of one pixel has no edges, so that tiles may meet
    for cost in (LatentMeasurement(Downsample(2), PICTURE), PixelMeasurement(smooth, image, decoder(codec))):
        both = run(cost)
        alone = torch.cat([run(cost, NOISE[row : row + 1]) for row in range(2)])
        torch.testing.assert_close(alone, both, rtol=0, atol=1e-5)
    for small, large in (
        (LatentMeasurement(Downsample(2), PICTURE), LatentMeasurement(Downsample(2), PICTURE.repeat(1, 1, 2, 2))),
        (PixelMeasurement(smooth, image, decoder(codec)), PixelMeasurement(smooth, image.repeat(1, 2, 2, 1), decoder(codec))),
        (Score(ColourScore((1.0, 0.0, 0.0)), decoder(codec)), Score(ColourScore((1.0, 0.0, 0.0)), decoder(codec))),
    ):
        expected = run(small, NOISE[:1], beta=0.1)
        tiled = run(large, NOISE[:1].repeat(1, 1, 2, 2), beta=0.1)
        torch.testing.assert_close(tiled, expected.repeat(1, 1, 2, 2), rtol=0, atol=1e-4)  # sums of 4 times as many float32


def test_a_mask_a_picture():
    masks = torch.cat([HALF, 1 - HALF])
    codec = Codec()
    image = pixels(codec, PICTURE)
    for cost in (lambda known: LatentMeasurement(Mask(known), PICTURE), lambda known: PixelMeasurement(Mask(known), image, decoder(codec))):
        both = run(cost(masks))
        for row in range(2):
            alone = run(cost(masks[row : row + 1]), NOISE[row : row + 1])
            torch.testing.assert_close(both[row : row + 1], alone, rtol=0, atol=1e-5)


# Through the decoder.

@pytest.mark.parametrize("operator", [Identity(), Downsample(4), Blur(gaussian_kernel(5, 1.0)), Grayscale()])
def test_the_step_through_a_linear_decoder_is_the_best_along_its_gradient(operator):
    codec = Codec()
    with torch.no_grad():
        y = operator.fitted((16, 16), PICTURE).forward(pixels(codec, PICTURE).movedim(-1, 1)).movedim(1, -1)
    step = PixelMeasurement(operator, y, decoder(codec)).bind(LatentSpace(), NOISE[:1])

    def cost(latent):
        seen = operator.fitted((16, 16), latent).forward((codec.decode(latent) + 1) / 2)
        return 0.5 * ((seen - y.movedim(-1, 1)) ** 2).sum()

    move = step(NOISE[:1])
    moved = (NOISE[:1] - move).requires_grad_()
    (slope,) = torch.autograd.grad(cost(moved), moved)
    latent = NOISE[:1].clone().requires_grad_()
    (g,) = torch.autograd.grad(cost(latent), latent)
    cosine = float((move * g).sum() / (move.norm() * g.norm()))
    assert cosine == pytest.approx(1.0, abs=1e-4)
    assert abs(float((slope * g).sum())) < 1e-2 * float((g * g).sum())  # nothing left along g; the trial step of 1 % rounds
    assert cost(moved).item() < cost(latent).item()


def test_pixels_are_measured_in_videos_too():
    codec = Codec()
    film = torch.randn(1, 4, 3, 8, 8, generator=GENERATOR)
    frames = pixels(codec, film)[0].clone()  # (3, 16, 16, 3)
    noise = torch.randn(film.shape, generator=GENERATOR)
    before = sample_euler(GaussianFlow(), noise, DOWN)
    for cost in (PixelMeasurement(Identity(), frames, decoder(codec)), LatentMeasurement(Identity(), film)):
        out = run(cost, noise, beta=1.0, inner=4)
        assert (out - film).square().mean() < 0.3 * (before - film).square().mean()
    redder = run(Score(ColourScore((1.0, 0.0, 0.0)), decoder(codec)), noise, beta=0.05)
    assert pixels(codec, redder)[..., 0].mean() > pixels(codec, before)[..., 0].mean() + 0.05


def test_scores_rise_and_see_their_region():
    codec = Codec()
    left = torch.zeros(1, 16, 16)
    left[..., :8] = 1
    score = ColourScore((0.9, 0.1, 0.1), left)
    plain = sample_euler(GaussianFlow(), NOISE, DOWN)
    out = run(Score(score, decoder(codec)), beta=0.1)
    assert (score(pixels(codec, out)) > score(pixels(codec, plain)) + 0.01).all()
    # Where no gradient points, this flow's pixels go their own way.
    torch.testing.assert_close(out[..., 4:], plain[..., 4:], rtol=0, atol=1e-6)


def test_a_score_without_a_decoder_sees_latents():
    """The gradient of a sum is 1 everywhere, so the clean picture rises by beta: compare test_one_step_by_hand."""
    cost = Score(lambda latent: latent.sum(dim=(1, 2, 3)))
    out = sample_flowchef(GaussianFlow(), NOISE, torch.tensor([1.0, 0.5]), costs=(part(cost, 0.1),))
    torch.testing.assert_close(out, NOISE + 0.1 - 0.5 * (NOISE - 0.7), rtol=0, atol=1e-6)


# No way back through the model.

class CountedBackward(torch.autograd.Function):
    """Identity that counts how often a gradient passes."""

    @staticmethod
    def forward(ctx, x, counter):
        ctx.counter = counter
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.counter[0] += 1
        return gradient, None


@pytest.mark.parametrize("in_graph", [False, True])
def test_no_backward_pass_through_the_model(in_graph):
    """Counted on both sides: the decoder's gradients pass inner times a step and picture, the model's never."""
    through_model, through_decoder = [0], [0]

    class Model(GaussianFlow):
        def __call__(self, x, sigma, **extra):
            assert not torch.is_grad_enabled() and not x.requires_grad
            out = CountedBackward.apply(super().__call__(x, sigma), through_model)
            assert not out.requires_grad
            return out

    class CountedCodec(Codec):
        def decode(self, z):
            return CountedBackward.apply(super().decode(z), through_decoder)

    with torch.inference_mode(in_graph):  # graphs load and sample in inference mode
        codec, model = CountedCodec(), Model()
        image = torch.rand(1, 4, 4, 3)
        noise = NOISE.clone()
        assert codec.mix.is_inference() is in_graph and noise.is_inference() is in_graph
        out = sample_flowchef(model, noise, DOWN, costs=(part(PixelMeasurement(Downsample(4), image, decoder(codec)), 0.5),), inner=3)
    assert model.calls == 10
    assert through_model == [0] and through_decoder == [10 * 3 * 2]
    assert torch.isfinite(out).all() and not out.requires_grad and codec.mix.grad is None


def test_latent_costs_need_no_gradient_at_all(monkeypatch):
    monkeypatch.setattr(torch.autograd, "grad", None)
    assert torch.isfinite(run(LatentMeasurement(Mask(HALF), PICTURE))).all()


def test_fresh_asks_again_where_it_steered():
    flow = GaussianFlow()
    cost = part(LatentMeasurement(Mask(HALF), PICTURE), 0.3, sigma_hi=0.55)
    sample_flowchef(flow, NOISE, DOWN, costs=(cost,), velocity="fresh")
    assert flow.calls == 10 + 5


class Encoder(torch.nn.Module):
    """Adds in place to a tensor that its own norm has saved, as ComfyUI's CLIP layers do."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3 * 8 * 8, 6)
        self.norm = torch.nn.LayerNorm(6)

    def forward(self, pixel_values, intermediate_output=None):
        x = self.layer(pixel_values.flatten(1)) * 1.0
        x += self.norm(x)
        return None, None, x


def test_clip_vision_scores_have_gradients_and_their_models_loaded():
    """On the CLIP_VISION protocol of ComfyUI 0.3.64: model, patcher, load_device, image_size, image_mean, image_std."""
    torch.manual_seed(0)
    codec, loaded = Codec(), []
    with torch.inference_mode():
        clip = SimpleNamespace(
            model=Encoder(), patcher="clip", load_device=torch.device("cpu"), image_size=8, image_mean=[0.5] * 3, image_std=[0.3] * 3
        )
        reference = torch.rand(1, 20, 12, 3)
    through = decoder(codec)
    through.load = lambda patchers, memory: loaded.append((patchers, memory))
    plain = sample_euler(GaussianFlow(), NOISE, DOWN)
    score = ClipVisionScore(clip, reference)
    with torch.inference_mode():
        out = run(Score(score, through), beta=0.1)
    assert (["clip", None], 300) in loaded  # encoder and decoder together, with the memory of one picture of the two
    measured = score.prepared(lambda patchers: None)
    assert (measured(pixels(codec, out)) > measured(pixels(codec, plain)) + 0.05).all()


@pytest.mark.parametrize("index", [0, 2])
def test_a_class_score_is_the_log_probability_of_the_nearest_example(index):
    """Closed form: examples of one grey each, so that every distance is a difference of greys squared."""
    greys, seen = torch.tensor([0.2, 0.5, 0.9]), torch.tensor([0.25, 0.6])
    examples = greys.reshape(3, 1, 1, 1).expand(3, 32, 48, 3)
    score = ClassScore(examples, index, 0.05, 0.03).prepared(lambda patchers: pytest.fail("nothing to load"))
    found = score(seen.reshape(2, 1, 1, 1).expand(2, 40, 40, 3))
    distances = torch.cat([(seen[:, None] - greys) ** 2, torch.full((2, 1), 0.03)], 1)
    torch.testing.assert_close(found, (-distances / 0.05).log_softmax(1)[:, index])


def test_class_scores_by_an_encoder_rise_and_need_a_class_that_is_there():
    torch.manual_seed(0)
    with torch.inference_mode():
        clip = SimpleNamespace(
            model=Encoder(), patcher="clip", load_device=torch.device("cpu"), image_size=8, image_mean=[0.5] * 3, image_std=[0.3] * 3
        )
        examples = torch.rand(2, 12, 12, 3)
    codec = Codec()
    plain = sample_euler(GaussianFlow(), NOISE, DOWN)
    for index in (0, 1):
        score = ClassScore(examples, index, 0.5, 0.3, clip)
        measured = score.prepared(lambda patchers: None)
        with torch.inference_mode():
            out = run(Score(score, decoder(codec)), beta=0.1)
        assert (measured(pixels(codec, out)) > measured(pixels(codec, plain))).all()
    with pytest.raises(NodeInputError, match="Class Score: input 'wanted'.*1 to 2"):
        ClassScore(examples, 2)


# Refusals.

def refused(match, cost=None, sigmas=DOWN, **options):
    with pytest.raises(NodeInputError, match=match):
        sample_flowchef(GaussianFlow(), NOISE, sigmas, costs=() if cost is None else (part(cost),), **options)


def test_refusals():
    refused("sigmas", sigmas=DOWN.flip(0))
    refused("velocity", velocity="old")
    refused("Flow Latent Cost: input 'latent'", LatentMeasurement(Identity(), torch.zeros(1, 4, 8, 9)))
    refused("Flow Latent Cost: input 'latent'", LatentMeasurement(Identity(), torch.zeros(3, 4, 8, 8)))
    refused("Flow Latent Cost: input 'operator'", LatentMeasurement(Mask(torch.ones(3, 8, 8)), PICTURE))
    refused("Flow Pixel Cost: input 'image'", PixelMeasurement(Downsample(2), torch.zeros(1, 16, 16, 3), decoder()))
    refused("Flow Score Cost: input 'score'", Score(lambda image: 1.0, decoder()))
    refused("Flow Score Cost: input 'score'", Score(lambda image: image.detach().mean((1, 2, 3)), decoder()))
    with pytest.raises(NodeInputError, match="decoder"):
        PixelDecoder(SimpleNamespace(first_stage_model=None), None)
    audio = SimpleNamespace(first_stage_model=Codec(), process_output=lambda wave: wave)
    with pytest.raises(NodeInputError, match="Flow Score Cost: input 'vae'"):
        PixelDecoder(audio, None, "Flow Score Cost")


def test_an_interrupt_passes_through():
    class Stopped(Exception):
        pass

    def callback(state):
        if state["i"] == 3:
            raise Stopped

    with pytest.raises(Stopped):
        sample_flowchef(GaussianFlow(), NOISE, DOWN, callback=callback, costs=(part(LatentMeasurement(Identity(), PICTURE)),))
