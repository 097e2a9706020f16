"""KV-Edit: the picture outside the mask to the bit, the foreground blind to the target's own background, cost and refusals."""

from __future__ import annotations

import logging

import pytest
import torch
from rectiflow.errors import NodeInputError
from rectiflow.families.blocks import block_layout
from rectiflow.host import CFGGuider, calc_cond_batch, cfg_function, sample_custom
from rectiflow.host.embedded import sd
from rectiflow.nodes import editing
from rectiflow.samplers.inversion import InvertSampler, inversion_sigmas
from rectiflow.samplers.kv_edit import KVEditSampler, _Background, token_mask
from rectiflow.samplers.solvers import sample_euler
from rectiflow.samplers.source_target import seeded_noise, source_target_guider
from rectiflow.tests.models import small_models
from rectiflow.tests.samplers.test_editing import PICTURE, SIGMAS, STEPS, Counted

MASK = torch.zeros(1, 8, 8)
MASK[:, 2:6, 3:7] = 1
STARTS = ["inverted", "noise", "inversion_free"]


@pytest.fixture(scope="module")
def tiny():
    return Counted()


def run(tiny, sampler, latent=PICTURE, mask=None, **sides):
    return tiny.run(sampler, latent=latent, mask=mask, **{"cfg_source": 1.0, "cfg_target": 2.0, **sides})


@pytest.mark.parametrize("start", STARTS)
def test_an_empty_mask_returns_the_picture_to_the_last_bit(tiny, start):
    assert torch.equal(run(tiny, KVEditSampler(torch.zeros(1, 8, 8), start=start)), PICTURE)


@pytest.mark.parametrize("start", STARTS)
def test_the_background_is_the_picture_to_the_last_bit_and_the_rest_is_not(tiny, start):
    edited = run(tiny, KVEditSampler(MASK, start=start, seed=4))
    outside = (MASK == 0).expand_as(PICTURE)
    assert torch.equal(edited[outside], PICTURE[outside])
    assert torch.isfinite(edited).all() and (edited - PICTURE)[~outside].abs().min() > 0


def test_a_full_mask_is_an_edit_by_euler(tiny):
    """No background is left to show: inversion under the source, sampling under the target."""
    none, rising = torch.zeros_like(PICTURE), inversion_sigmas(SIGMAS)
    z = sample_custom(tiny.model, none, 1.0, InvertSampler("euler"), rising, tiny.cat, tiny.empty, PICTURE, disable_pbar=True, seed=0)
    guider = tiny.guider(cfg_target=2.0)

    class Plain:
        inpaint_options = {}  # noqa: RUF012 what the host reads of a sampler

        def max_denoise(self, *args):
            return False

        def sample(self, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):
            return sample_euler(guider, z, sigmas, {key: extra_args.get(key) for key in ("model_options", "seed")}, disable=True)

    plain = guider.sample(none, PICTURE, Plain(), SIGMAS, disable_pbar=True, seed=0)
    assert (run(tiny, KVEditSampler(torch.ones(1, 8, 8))) - plain).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_the_foreground_sees_the_source_and_nothing_of_the_targets_own_background(family):
    """So sending only the foreground's tokens through the blocks, as published, gives the same numbers."""
    whole = torch.zeros(1, 8, 8)
    whole[:, 2:6, 4:8] = 1  # whole tokens of 2 × 2 cells: one that holds both parts is drawn, and would see its own clean cells
    network = small_models.filled(small_models.MODELS[family](), 0.3)
    model = sd.load_diffusion_model_state_dict(network.state_dict())

    def prompt(seed, tokens):
        pooled = small_models.random(1, 12, seed=seed + 1)
        return [[small_models.random(1, tokens, 20, seed=seed), {"pooled_output": pooled, "guidance": 1.0}]]

    class Probe(KVEditSampler):
        """Asks for the target's velocity twice at one sigma, the second time with another background under the target."""

        def sample(self, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):
            layout = block_layout(guider.inner_model.diffusion_model, "test")
            mask = whole[:, None]
            background = _Background(layout, mask, latent_image.shape, "cpu")
            options = {key: extra_args.get(key) for key in ("model_options", "seed")}
            source, s = next(seeded_noise(latent_image, 1)), sigmas[1]
            other = torch.where(mask > 0, source, next(seeded_noise(latent_image, 2)))
            self.seen = [self._target(guider, background, source, x, s, options) for x in (source, other)]
            rows = s * source.new_ones([1])
            self.plain = [guider(x, rows, **options) for x in (source, other)]
            assert not background.kept
            return latent_image

    probe = Probe(whole)
    guider = source_target_guider(CFGGuider, model, (calc_cond_batch, cfg_function), 1.0, 2.0)
    source, target = prompt(5, 5), prompt(9, 7)  # of other lengths: text is never taken over
    guider.inner_set_conds({"positive": target, "negative": prompt(2, 5), "source": source, "source_negative": source})
    guider.sample(torch.zeros_like(PICTURE), PICTURE, probe, SIGMAS, disable_pbar=True, seed=0)
    inside = (whole > 0).expand_as(PICTURE)
    near, far = (float((pair[0] - pair[1])[inside].abs().max()) for pair in (probe.seen, probe.plain))
    assert near < 1e-6 and far > 1e-3


@pytest.mark.parametrize(("start", "calls"), [("inverted", 3 * STEPS), ("noise", 3 * STEPS), ("inversion_free", 2 * STEPS)])
def test_it_counts_its_calls(tiny, start, calls):
    tiny.calls.clear()
    run(tiny, KVEditSampler(MASK, start=start), model=tiny.counted, cfg_target=1.0)
    assert len(tiny.calls) == calls
    tiny.calls.clear()
    run(tiny, KVEditSampler(MASK, start=start, skip=2), model=tiny.counted, cfg_target=1.0)
    assert len(tiny.calls) == calls * (STEPS - 2) // STEPS


def test_rows_of_a_batch_are_runs_of_their_own(tiny):
    both = torch.cat([PICTURE, PICTURE.flip(-1)])
    masks = torch.cat([MASK, MASK.flip(-1).roll(1, 1)])
    edited = run(tiny, KVEditSampler(masks, seed=3, start="noise"), latent=both)
    for row in range(2):
        alone = run(tiny, KVEditSampler(masks[row : row + 1], seed=3 + row, start="noise"), latent=both[row : row + 1])
        assert (edited[row : row + 1] - alone).abs().max() < 1e-4


def test_the_latents_noise_mask_serves_as_the_mask(tiny):
    edited = run(tiny, KVEditSampler(start="inversion_free"), mask=MASK)
    assert torch.equal(edited, run(tiny, KVEditSampler(MASK, start="inversion_free")))


def test_soft_edges_blend_with_the_pictures_path(tiny):
    soft = MASK * 0.5
    edited = run(tiny, KVEditSampler(soft))
    half, hard = ((x - PICTURE).square().mean() for x in (edited, run(tiny, KVEditSampler(MASK))))
    assert 0 < half < hard and torch.equal(edited[(MASK == 0).expand_as(PICTURE)], PICTURE[(MASK == 0).expand_as(PICTURE)])


def test_masks_over_tokens():
    one = torch.zeros(1, 1, 5, 7)
    one[..., 4, 6] = 1  # the corner of an odd latent: alone in its token
    assert token_mask(one, 35, torch.Size((1, 4, 5, 7))).nonzero().tolist() == [[0, 34]]
    assert token_mask(one, 12, torch.Size((1, 4, 5, 7))).nonzero().tolist() == [[0, 11]]
    video = torch.zeros(1, 1, 3, 4, 4)
    video[:, :, 1, 0, 3] = 0.2
    assert token_mask(video, 12, torch.Size((1, 4, 3, 4, 4))).nonzero().tolist() == [[0, 5]]
    still = torch.ones(2, 1, 1, 4, 4)  # one picture for all frames
    assert token_mask(still, 12, torch.Size((2, 4, 3, 4, 4))).shape == (2, 12)
    with pytest.raises(NodeInputError, match="13 image tokens"):
        token_mask(one, 13, torch.Size((1, 4, 5, 7)))


def test_what_it_refuses(tiny):
    with pytest.raises(NodeInputError, match="KV-Edit Sampler: input 'mask'"):
        run(tiny, KVEditSampler())
    with pytest.raises(NodeInputError, match="2 masks"):
        run(tiny, KVEditSampler(torch.ones(2, 8, 8)))
    with pytest.raises(NodeInputError, match="skip"):
        run(tiny, KVEditSampler(MASK, skip=STEPS))
    for sigmas in (SIGMAS.flip(0), SIGMAS[:-1]):
        with pytest.raises(NodeInputError, match="falls? to 0"):
            tiny.run(KVEditSampler(MASK), sigmas=sigmas)
    with pytest.raises(NodeInputError, match="Source Target Guider"):
        none = torch.zeros_like(PICTURE)
        sample_custom(tiny.model, none, 2.0, KVEditSampler(MASK), SIGMAS, tiny.dog, tiny.empty, PICTURE, disable_pbar=True, seed=0)
    with pytest.raises(NodeInputError, match="start"):
        KVEditSampler(MASK, start="clean")


@pytest.mark.parametrize("store", ["device", "cpu"])
def test_memory_is_stated_and_an_interrupt_leaves_nothing(tiny, store, monkeypatch, caplog):
    seen = []
    original = _Background.__init__
    monkeypatch.setattr(_Background, "__init__", lambda self, *args: (seen.append(self), original(self, *args))[1])
    (sampler,) = editing.RectiflowKVEditSampler().execute(skip=0, start="inversion_free", seed=0, mask=MASK, store=store)
    with caplog.at_level(logging.INFO):
        run(tiny, sampler)
    assert "KV-Edit holds keys and values of one step" in caplog.text
    for call in range(1, 2 * STEPS):
        tiny.calls.clear()
        broken = tiny.model.clone()

        def stop(apply_model, args, last=call):
            tiny.calls.append(1)
            if len(tiny.calls) == last:
                raise KeyboardInterrupt
            return apply_model(args["input"], args["timestep"], **args["c"])

        broken.set_model_unet_function_wrapper(stop)
        with pytest.raises(KeyboardInterrupt):
            run(tiny, sampler, model=broken, cfg_target=1.0)
        assert not seen[-1].kept
