"""BaseModel between sampler and network: what it passes on, casts, scales and estimates."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from rectiflow.host.embedded import make_host, sd, use_host  # noqa: E402
from rectiflow.host.embedded.conds import CONDConstant, CONDRegular  # noqa: E402
from rectiflow.host.embedded.context import HostSettings  # noqa: E402
from rectiflow.host.embedded.patcher_extension import WrappersMP  # noqa: E402
from small_models import MODELS, flux, inputs, random  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def host(tmp_path_factory):
    with use_host(make_host(tmp_path_factory.mktemp("host"), settings=HostSettings(device="cpu"))) as active:
        yield active


def model(family: str = "flux", **sizes):
    return sd.load_diffusion_model_state_dict(MODELS[family](**sizes).state_dict()).model


def called(base, **given):
    """apply_model at the times of `inputs`, taken as sigmas."""
    sigma = torch.tensor([0.9, 0.3])
    return base.apply_model(given["x"], sigma, c_crossattn=given["context"], transformer_options=given.get("options", {}),
                            **{key: given[key] for key in ("y", "guidance", "c_concat") if key in given})  # fmt: skip


@pytest.mark.parametrize("family", MODELS)
def test_denoised_is_x_minus_sigma_times_velocity(family):
    base, given = model(family), inputs(family)
    sigma = torch.tensor([0.9, 0.3])
    time = "timestep" if family == "flux" else "timesteps"
    velocity = base.diffusion_model(**{**given, time: sigma * (1000 if family == "sd3" else 1)})
    expected = given["x"] - sigma.reshape(2, 1, 1, 1) * velocity
    torch.testing.assert_close(called(base, **given), expected, rtol=1e-5, atol=1e-5)


def test_apply_model_wrappers_get_the_arguments_in_place():
    seen = []

    def wrapper(executor, *args, **kwargs):
        seen.append((executor.class_obj, len(args), args[5]["mine"], sorted(kwargs)))
        return executor(*args, **kwargs) + 1

    base, given = model(), inputs("flux")
    options = {"mine": 7, "wrappers": {WrappersMP.APPLY_MODEL: {"a": [wrapper]}}}
    assert torch.equal(called(base, **given, options=options), called(base, **given) + 1)
    assert seen == [(base, 6, 7, ["guidance", "y"])]


def test_inputs_reach_the_network_in_its_dtype_and_times_in_fp32():
    base, given = model(), inputs("flux")
    seen = {}

    def wrapper(executor, x, timestep, context, y, guidance, *rest, **kwargs):
        seen.update(x=x.dtype, t=timestep.dtype, context=context.dtype, y=y.dtype, guidance=guidance.dtype, ids=kwargs["ids"].dtype)
        seen["refs"] = rest[0][0].dtype
        return x.to(torch.bfloat16)

    base.manual_cast_dtype = torch.bfloat16
    options = {"wrappers": {WrappersMP.DIFFUSION_MODEL: {None: [wrapper]}}}
    out = base.apply_model(
        given["x"], torch.tensor([0.9, 0.3]), c_crossattn=given["context"], transformer_options=options, y=given["y"],
        guidance=given["guidance"], ref_latents=[given["x"]], ids=torch.tensor([1, 2]),
    )  # fmt: skip
    narrow = torch.bfloat16
    assert seen == {"x": narrow, "t": torch.float32, "context": narrow, "y": narrow, "guidance": narrow, "refs": narrow, "ids": torch.int64}
    assert out.dtype == torch.float32


def entry(**more) -> dict:
    return {"cross_attn": random(1, 5, 20), "pooled_output": random(1, 12), "noise": random(2, 16, 6, 8), "device": "cpu", **more}


def test_conditions_of_flux():
    base = model()
    conds = base.extra_conds(**entry(guidance=2.0, reference_latents=[random(1, 16, 4, 4)], reference_latents_method="index"))
    assert sorted(conds) == ["c_crossattn", "guidance", "ref_latents", "ref_latents_method", "y"]
    assert type(conds["c_crossattn"]) is CONDRegular and float(conds["guidance"].cond) == 2.0
    expected = base.latent_format.process_in(random(1, 16, 4, 4))
    assert torch.equal(conds["ref_latents"].cond[0], expected)
    assert float(base.extra_conds(**entry())["guidance"].cond) == 3.5
    assert "guidance" not in base.extra_conds(**entry(guidance=None))
    assert base.extra_conds_shapes(**entry(reference_latents=[random(1, 16, 4, 6)])) == {"ref_latents": [1, 16, 24]}
    assert base.extra_conds_shapes(**entry()) == {}


def test_attention_mask_follows_the_picture():
    mask = torch.ones(1, 5 + 4, 5 + 4)
    conds = model().extra_conds(**entry(attention_mask=mask, attention_mask_img_shape=(2, 2)))
    assert conds["attention_mask"].cond.shape == (1, 5 + 12, 5 + 12)


def test_conditions_of_lumina():
    base = model("lumina2")
    whole = base.extra_conds(**entry(attention_mask=torch.ones(1, 5, dtype=torch.long)))
    assert "attention_mask" not in whole and whole["num_tokens"].cond == 5 and type(whole["num_tokens"]) is CONDConstant
    part = base.extra_conds(**entry(attention_mask=torch.tensor([[1, 1, 0, 0, 0]])))
    assert part["num_tokens"].cond == 2 and part["attention_mask"].cond.shape == (1, 5)
    assert "y" not in part


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_a_conditioning_without_pooled_text_is_refused(family):
    given = entry()
    del given["pooled_output"]
    with pytest.raises(ValueError, match="pooled_output"):
        model(family).extra_conds(**given)


def test_fill_models_see_picture_and_mask_cells():
    base = model(in_channels=16 + 16 + 64)
    mask = torch.zeros(1, 1, 48, 64)
    mask[..., 8:16, 16:24] = 1.0  # exactly latent cell (1, 2)
    concat = base.extra_conds(**entry(concat_latent_image=random(1, 16, 6, 8), concat_mask=mask))["c_concat"].cond
    assert concat.shape == (2, 80, 6, 8)
    assert torch.equal(concat[0, :16], base.process_latent_in(random(1, 16, 6, 8))[0])
    cells = concat[0, 16:].sum(dim=0)
    assert cells[1, 2] == 64 and cells.sum() == 64
    assert base.extra_conds(**entry())["c_concat"].cond[:, 16:].eq(1).all()
    assert model(in_channels=32).extra_conds(**entry())["c_concat"].cond.shape == (2, 16, 6, 8)
    assert "c_concat" not in model().extra_conds(**entry())


def test_latents_are_scaled_there_and_back():
    for family in MODELS:
        base, latent = model(family), random(1, 16, 4, 4)
        torch.testing.assert_close(base.process_latent_out(base.process_latent_in(latent)), latent)


def test_the_kept_part_of_an_inpainting_lies_on_the_line_to_noise():
    base, noise, latent = model(), random(2, 16, 4, 4), random(2, 16, 4, 4, seed=1)
    out = base.scale_latent_inpaint(x=noise, sigma=torch.tensor([1.0, 0.25]), noise=noise, latent_image=latent)
    assert torch.equal(out[0], noise[0])
    torch.testing.assert_close(out[1], 0.25 * noise[1] + 0.75 * latent[1])


def test_memory_grows_with_area_batch_and_references():
    base = model()
    one = base.memory_required([1, 16, 64, 64])
    assert base.memory_required([2, 16, 64, 64]) == 2 * one == base.memory_required([1, 16, 128, 64])
    assert base.memory_required([1, 16, 64, 64], cond_shapes={"ref_latents": [[1, 16, 64 * 64]], "y": [[1, 9]]}) == 2 * one


def test_a_saved_checkpoint_loads_again(tmp_path):
    from safetensors.torch import save_file

    network = flux()
    base = sd.load_diffusion_model_state_dict(network.state_dict()).model
    path = str(tmp_path / "saved.safetensors")
    save_file(base.state_dict_for_saving(vae_state_dict={"pixel_space_vae": torch.tensor(1.0)}), path)
    loaded, _, vae = sd.load_checkpoint(path)
    for key, tensor in network.state_dict().items():
        assert torch.equal(loaded.model.diffusion_model.state_dict()[key], tensor)
    assert vae.latent_channels == 3
