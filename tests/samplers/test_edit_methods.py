"""Every method behind one call, the node that compares them, and RF-Edit on SD3's joint blocks through a whole host run."""

from __future__ import annotations

import pytest
import torch
from rectiflow import NODE_CLASS_MAPPINGS as NODES
from rectiflow.errors import NodeInputError
from rectiflow.host import KSAMPLER, CFGGuider, calc_cond_batch, cfg_function, sample_custom
from rectiflow.host.embedded import sd
from rectiflow.samplers.edit_methods import METHODS, EditTask, HostCalls, parse_methods, resampled, run_method
from rectiflow.samplers.feature_sharing import FeatureBank, RecordPlan, ReplayPlan, sample_rf_edit
from rectiflow.samplers.inversion import InvertSampler, inversion_sigmas
from rectiflow.samplers.sampler_object import FlowSampler
from rectiflow.tests.models import small_models

HOST = HostCalls(sample_custom, calc_cond_batch, cfg_function, CFGGuider, KSAMPLER)
PICTURE = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def task():
    model, clip, _ = NODES["RectiflowLoadTiny"]().execute()
    cat, dog, empty = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("noto cat on white", "noto dog on white", ""))
    region = torch.zeros(1, 8, 8)
    region[:, 2:, 2:] = 1
    return EditTask(model, cat, dog, empty, PICTURE, torch.linspace(1, 0, 6), 3, region)


@pytest.mark.parametrize(("line", "calls", "rows"), [  # 5 steps; way back or edit with its negative prompt: twice the rows
    ("euler cfg=2", 10, 15),
    ("rf_edit cfg=2 blocks=single:4 inject_steps=2", 20, 30),
    ("fireflow cfg=2 blocks=single:4 inject_steps=2 steps=4", 10, 15),
    ("rf_inversion cfg=2", 10, 15),
    ("flow_edit skip=2 cfg=2", 6, 12),
    ("flow_edit skip=2 cfg=1 cfg_source=1 n_avg=2 refine=1", 9, 9),
    ("uni_edit alpha=0.6", 10, 10),
    ("kv_edit cfg=2", 15, 20),
    ("kv_edit cfg=1 start=inversion_free skip=1", 8, 8),
])
def test_every_method_edits_at_the_cost_it_states(task, line, calls, rows):
    (method,) = parse_methods(line, "node")
    edited, counted, counted_rows = run_method(method, task, HOST)
    assert (counted, counted_rows) == (calls, rows)
    assert edited.shape == PICTURE.shape and torch.isfinite(edited).all() and not torch.equal(edited, PICTURE)
    assert not task.model.get_all_wrappers("apply_model")
    again = run_method(method, task, HOST)[0]
    assert torch.equal(again, edited)


def test_lines_are_read_with_their_defaults():
    first, second = parse_methods("\n rf_edit  cfg=3.5 match=exact_sigma \n\nflow_edit\n", "node")
    assert (first.name, first.options["cfg"], first.options["match"], first.options["steps"]) == ("rf_edit", 3.5, "exact_sigma", 0)
    assert dict(second.options) == {"steps": 0, **METHODS["flow_edit"][1]}


@pytest.mark.parametrize("text", [
    "", "sdedit", "rf_edit strenth=1", "rf_edit cfg", "rf_edit cfg=nan", "rf_edit steps=2.5", "flow_edit skip=-1", "uni_edit alpha=1e9",
])  # fmt: skip
def test_lines_that_are_refused(text):
    with pytest.raises(NodeInputError, match="node: input 'methods'"):
        parse_methods(text, "node")


def test_schedules_are_read_at_another_number_of_steps():
    sigmas = torch.tensor([1.0, 0.8, 0.5, 0.0])
    assert resampled(sigmas, 0) is sigmas and resampled(sigmas, 3) is sigmas
    assert resampled(sigmas, 6).tolist() == pytest.approx([1, 0.9, 0.8, 0.65, 0.5, 0.25, 0])
    assert resampled(sigmas, 1).tolist() == [1.0, 0.0]


def test_edit_compare_hands_out_pictures_captions_and_a_table(task):
    _, _, vae = NODES["RectiflowLoadTiny"]().execute()
    picture, region = NODES["RectiflowExamplePicture"]().execute(picture="smiling cat")
    inputs = {"model": task.model, "vae": vae, "source": task.source, "target": task.target, "negative": task.negative, "seed": 0}
    latents, pictures, labels, table = NODES["RectiflowEditCompare"]().execute(
        **inputs, latent={"samples": vae.encode(picture)}, sigmas=torch.linspace(1, 0, 4), mask=region,
        methods="euler cfg=2\nflow_edit skip=1",
    )  # fmt: skip
    assert latents["samples"].shape[0] == pictures.shape[0] == len(labels.splitlines()) == 2
    assert [line.split()[:2] for line in table.splitlines()[1:]] == [["euler", "6"], ["flow_edit", "4"]]


class Encoder:
    """What a CLIP_VISION of the host offers: embeddings of pictures, here their mean colours."""

    def encode_image(self, pixels):
        return {"image_embeds": pixels.mean((1, 2))}


def test_edit_compare_adds_the_columns_that_are_asked_for(task):
    _, _, vae = NODES["RectiflowLoadTiny"]().execute()
    picture, region = NODES["RectiflowExamplePicture"]().execute(picture="smiling cat")
    inputs = {"model": task.model, "vae": vae, "source": task.source, "target": task.target, "negative": task.negative, "seed": 0}
    inputs |= {"latent": {"samples": vae.encode(picture)}, "sigmas": torch.linspace(1, 0, 3), "mask": region}
    *_, table = NODES["RectiflowEditCompare"]().execute(**inputs, methods="kv_edit cfg=2", features=True, clip_vision=Encoder())
    head, line = table.splitlines()
    assert head.split() == ["method", "calls", "rows", "seconds", "MiB", "PSNR", "SSIM", "MSE", "features", "CLIP", "line"]
    calls, rows, _, memory, psnr, ssim, mse, features, clip = line.split()[1:10]
    assert (calls, rows, memory) == ("6", "8", "-")
    # Outside the mask the latent is the picture's; the codec, and SSIM's window more so, let a little of the inside through.
    assert float(psnr) > 30 and float(ssim) > 0.85 and float(mse) < 1e-3 and 0 < float(features) < 0.05 and 0.9 < float(clip) <= 1
    *_, plain = NODES["RectiflowEditCompare"]().execute(**inputs, methods="kv_edit cfg=2")
    assert plain.splitlines()[1].split()[8:10] == ["-", "-"]


@pytest.fixture(scope="module")
def sd3():
    """A gentle SD3: with weights this small 20 RF-Solver steps invert to 3e-3, so that both runs stand at nearly the same states."""
    return sd.load_diffusion_model_state_dict(small_models.filled(small_models.sd3(), 0.05).state_dict())


def prompt(seed):
    return [[small_models.random(1, 5, 20, seed=seed), {"pooled_output": small_models.random(1, 12, seed=seed + 1)}]]


def test_rf_edit_on_joint_blocks(sd3):
    """Same prompt, same sigma: values come back where they were taken, and nothing changes; another prompt is changed by them."""
    sigmas, none = torch.linspace(1, 0, 21), torch.zeros_like(PICTURE)
    bank = FeatureBank(RecordPlan(20, "double"), "rf_solver")
    inverter = InvertSampler("rf_solver", watch=bank.watch)
    rising = inversion_sigmas(sigmas)
    z = sample_custom(sd3, none, 1.0, inverter, rising, prompt(5), prompt(5), PICTURE, disable_pbar=True, seed=0)
    assert bank.text == 5 and bank.axis == 1 and len(bank.values) == 40

    def edit(steps, seed):
        options = {"bank": bank, "plan": ReplayPlan(steps, "exact_sigma"), "calc_cond_batch": calc_cond_batch}
        sampler = FlowSampler(KSAMPLER(sample_rf_edit, options), "latent")
        return sample_custom(sd3, none, 1.0, sampler, sigmas, prompt(seed), prompt(seed), z, disable_pbar=True, seed=0)

    assert (edit(20, 5) - edit(0, 5)).abs().max() < 1e-5
    assert (edit(20, 9) - edit(0, 9)).abs().max() > 1e-3
