"""From a file to MODEL, CLIP and VAE: ordinary layouts load with sizes from their shapes, all others are refused by name."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))
from rectiflow.host.embedded import make_host, sd, use_host  # noqa: E402
from rectiflow.host.embedded.checkpoint_names import describe, network_prefix  # noqa: E402
from rectiflow.host.embedded.context import HostSettings  # noqa: E402
from rectiflow.host.embedded.latent_formats import LatentFormat  # noqa: E402
from rectiflow.host.embedded.model_base import ModelType  # noqa: E402
from rectiflow.host.embedded.model_detection import count_blocks, flux_params, mmdit_params, model_config_from_unet, nextdit_params  # noqa: E402
from rectiflow.host.embedded.weights import load_into, without_fp8_scales  # noqa: E402
from rectiflow.tiny.weights import WEIGHTS_FILE, load_weights  # noqa: E402
from small_models import FLUX, LUMINA, MODELS, SD3, flux, inputs, random, sd3  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def host(tmp_path_factory):
    with use_host(make_host(tmp_path_factory.mktemp("host"), settings=HostSettings(device="cpu"))) as active:
        yield active


@pytest.fixture
def file(tmp_path):
    def write(tensors: dict, name: str = "model.safetensors") -> str:
        path = tmp_path / name
        save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, str(path))
        return str(path)

    return write


def prefixed(tensors: dict, prefix: str) -> dict:
    return {prefix + key: tensor for key, tensor in tensors.items()}


# Transformers


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_saved_model_loads_and_gives_the_same(file, family, prefix):
    network = MODELS[family]()
    model = sd.load_diffusion_model(file(prefixed(network.state_dict(), prefix))).model
    given = inputs(family)
    assert torch.equal(model.diffusion_model(**given), network(**given))
    assert type(model).__name__.lower() == family
    assert not model.diffusion_model.training and not any(p.requires_grad for p in model.parameters())
    expected = {"flux": ModelType.FLUX, "sd3": ModelType.FLOW, "lumina2": ModelType.FLOW}[family]
    assert model.model_type == expected


def test_sizes_come_from_shapes():
    # Flux without guidance, biases, with other widths
    params = flux_params(flux(guidance_embed=False, qkv_bias=False, mlp_ratio=3.0, depth=3, depth_single_blocks=1).state_dict())
    assert (params.guidance_embed, params.qkv_bias, params.mlp_ratio, params.depth, params.depth_single_blocks) == (False, False, 3.0, 3, 1)
    assert flux_params(flux().state_dict()) == FLUX
    assert mmdit_params(sd3().state_dict()) == SD3
    assert nextdit_params(MODELS["lumina2"]().state_dict()) == LUMINA


@pytest.mark.parametrize("head, axes", [(32, (4, 14, 14)), (64, (8, 28, 28)), (128, (16, 56, 56))])
def test_flux_axes_follow_from_the_head(head, axes):
    state = flux(hidden_size=head, num_heads=1, axes_dim=axes).state_dict()
    assert flux_params(state).axes_dim == axes


def test_schedules_of_the_families():
    for network, shift, multiplier, latent in ((flux(), 1.15, None, 0.3611), (flux(guidance_embed=False), 1.0, 1.0, 0.3611),
                                               (sd3(), 3.0, 1000, 1.5305), (MODELS["lumina2"](), 6.0, 1.0, 0.3611)):  # fmt: skip
        model = sd.load_diffusion_model_state_dict(network.state_dict()).model
        assert model.model_sampling.shift == shift
        assert getattr(model.model_sampling, "multiplier", None) == multiplier
        assert model.latent_format.scale_factor == latent
        assert float(model.model_sampling.sigma_max) == 1.0


def test_weights_are_not_copied_where_the_dtype_stays(file):
    model = sd.load_diffusion_model(file(flux().state_dict())).model
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.diffusion_model.parameters()}
    assert len(storages) == 1, "every weight is a view of the mapped file"


def test_dtypes(file):
    half = {key: tensor.half() for key, tensor in flux().state_dict().items()}
    model = sd.load_diffusion_model(file(half)).model
    assert model.get_dtype() == torch.float32 and model.manual_cast_dtype is None, "a CPU computes in fp32"
    stored = sd.load_diffusion_model(file(half), {"dtype": torch.float8_e4m3fn}).model
    assert stored.get_dtype() == torch.float8_e4m3fn and stored.manual_cast_dtype == torch.float32
    given = inputs("flux")
    out = stored.apply_model(
        given["x"], given["timestep"], c_crossattn=given["context"], y=given["y"], guidance=given["guidance"], transformer_options={}
    )  # fmt: skip
    rounded = flux()
    rounded.load_state_dict({key: tensor.half().to(torch.float8_e4m3fn).float() for key, tensor in flux().state_dict().items()})
    velocity = rounded(**given)
    expected = given["x"] - given["timestep"].reshape(-1, 1, 1, 1) * velocity
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_scaled_fp8_is_multiplied_out():
    weight = random(4, 4).to(torch.float8_e4m3fn)
    state = {"a.weight": weight, "a.scale_weight": torch.tensor(2.0), "a.scale_input": torch.tensor(9.0), "scaled_fp8": torch.empty(0)}
    out = without_fp8_scales(state, torch.float32)
    assert set(out) == {"a.weight"} and torch.equal(out["a.weight"], weight.float() * 2)


def test_loading_inside_inference_mode_gives_ordinary_weights(file):
    path = file({key: tensor.half() for key, tensor in flux().state_dict().items()})
    with torch.inference_mode():
        model = sd.load_diffusion_model(path).model
    assert not any(parameter.is_inference() for parameter in model.parameters())
    assert not model.model_sampling.sigmas.is_inference()


# Refusals


def test_missing_and_misshapen_weights_are_named(file):
    state = flux().state_dict()
    del state["double_blocks.1.txt_attn.proj.bias"]
    with pytest.raises(ValueError, match=r"model\.safetensors.*'double_blocks\.1\.txt_attn\.proj\.bias'"):
        sd.load_diffusion_model(file(state))
    state = flux().state_dict()
    state["single_blocks.0.linear2.weight"] = torch.zeros(3, 3)
    with pytest.raises(ValueError, match=r"'single_blocks\.0\.linear2\.weight'.*\[3, 3\] in the file"):
        sd.load_diffusion_model(file(state))


@pytest.mark.parametrize("key, value", [
    ("img_in.weight", torch.zeros(64)), ("final_layer.linear.weight", None), ("vector_in.in_layer.weight", torch.zeros(0, 4)),
])  # fmt: skip
def test_telltale_weights_of_wrong_shape_are_named(key, value):
    state = flux().state_dict()
    state.pop(key)
    if value is not None:
        state[key] = value
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        sd.build_flux_model(state)


def test_unused_tensors_are_logged_or_refused(caplog):
    state = {**flux().state_dict(), "extra.weight": torch.zeros(1)}
    with caplog.at_level(logging.WARNING):
        sd.load_diffusion_model_state_dict(state)
    assert "'extra.weight'" in caplog.text
    with pytest.raises(ValueError, match="'extra.weight'"):
        sd.build_flux_model(state)


def z(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape or (1,))


LIKE_FLUX = {"double_blocks.0.img_attn.norm.key_norm.scale": z(), "img_in.weight": z(4, 4)}
T5_IN_CHECKPOINT = "text_encoders.t5xxl.transformer.encoder.block.23.layer.1.DenseReluDense.wi_1.weight"
FOREIGN = {
    "SD1.5 UNet": {"model.diffusion_model.input_blocks.0.0.weight": z(), **{
        f"model.diffusion_model.input_blocks.{i}.1.transformer_blocks.0.attn2.to_k.weight": z(320, 768) for i in range(1, 8)}},
    "SD2 UNet": {"input_blocks.0.0.weight": z(), "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": z(320, 1024)},
    "SDXL UNet": {"input_blocks.0.0.weight": z(), "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": z(640, 2048)},
    "SDXL refiner": {"input_blocks.0.0.weight": z(), "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": z(640, 1280)},
    "Flux 2": {"double_stream_modulation_img.lin.weight": z(), **LIKE_FLUX},
    "Chroma": {"distilled_guidance_layer.norms.0.scale": z(), **LIKE_FLUX},
    "HunyuanVideo": {"txt_in.individual_token_refiner.blocks.0.norm1.weight": z(), **LIKE_FLUX},
    "Wan": {"head.modulation": z(), "blocks.0.cross_attn.k.weight": z()},
    "Qwen-Image": {"txt_norm.weight": z(), "transformer_blocks.0.img_mod.1.weight": z()},
    "Z-Image": {"cap_pad_token": z(), "noise_refiner.0.attention.qkv.weight": z(), "cap_embedder.1.weight": z(4, 4)},
    "Lumina-Next": {"cap_embedder.1.weight": z(4, 4), "layers.0.attention.wq.weight": z(4, 4)},
    "AuraFlow": {"double_layers.0.attn.w1q.weight": z()},
    "PixArt": {"t_block.1.weight": z(), "y_embedder.y_embedding": z()},
    "Hunyuan-DiT": {"mlp_t5.0.weight": z()},
    "HiDream": {"caption_projection.0.linear.weight": z()},
    "Mochi": {"t5_yproj.weight": z()},
    "LTX-Video": {"adaln_single.emb.timestep_embedder.linear_1.bias": z(), "patchify_proj.weight": z()},
    "Flux transformer in diffusers": {"x_embedder.weight": z(), "single_transformer_blocks.0.proj_out.weight": z()},
    "SD3 transformer in diffusers": {"transformer_blocks.0.attn.add_q_proj.weight": z(), "pos_embed.proj.weight": z()},
    "UNet in diffusers": {"down_blocks.0.resnets.0.conv1.weight": z(), "time_embedding.linear_1.weight": z()},
    "AutoencoderKL in diffusers": {"decoder.up_blocks.0.resnets.0.norm1.weight": z()},
    "LoRA": {f"transformer.transformer_blocks.0.attn.to_q.lora_{half}.weight": z(2, 2) for half in "AB"},
    "LoHa": {"lora_unet_double_blocks_0_img_attn_qkv.hada_w1_a": z()},
    "ControlNet": {"controlnet_blocks.0.weight": z(), "transformer_blocks.0.attn.to_q.weight": z()},
    "CLIP-L": {"text_model.encoder.layers.0.mlp.fc1.weight": z()},
    "CLIP-G": {f"text_encoders.clip_g.transformer.text_model.encoder.layers.{i}.mlp.fc1.weight": z() for i in (0, 30)},
    "T5-XXL": {"encoder.block.23.layer.1.DenseReluDense.wi_1.weight": z(), "encoder.block.0.layer.0.SelfAttention.k.weight": z()},
    "Gemma 2": {"model.layers.0.post_feedforward_layernorm.weight": z()},
    "Llama": {"model.layers.0.post_attention_layernorm.weight": z()},
    "4-bit bitsandbytes": {"double_blocks.0.img_attn.qkv.weight.quant_state.bitsandbytes__nf4": z()},
    "TAESD": {"taesd_decoder.1.weight": z(64, 4, 3, 3)},
    "upscaling": {"conv_first.weight": z()},
    "unknown layout of 2 tensors": {"foo.weight": z(), "bar.bias": z()},
    "without tensors": {},
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_other_layouts_are_named(file, name):
    assert name in describe(FOREIGN[name])
    for load in (sd.load_diffusion_model, sd.load_checkpoint_guess_config):
        with pytest.raises(ValueError) as caught:
            load(file(FOREIGN[name], "their model.safetensors"))
        message = str(caught.value)
        assert "their model.safetensors" in message and name in message
        assert "Flux, SD3/SD3.5 and Lumina-Image-2" in message, "says what is supported"


def test_a_checkpoint_is_described_with_its_parts():
    parts = {
        **prefixed(sd3().state_dict(), "model.diffusion_model."), "first_stage_model.decoder.conv_in.weight": z(1, 16, 3, 3),
        "first_stage_model.decoder.mid.attn_1.q.weight": z(), T5_IN_CHECKPOINT: z(),
    }  # fmt: skip
    assert describe(parts) == "an SD3 transformer with an AutoencoderKL codec with a T5-XXL text encoder"
    assert network_prefix(parts) == "model.diffusion_model."


def test_latent_channels_that_no_codec_has_are_refused():
    state = flux(in_channels=4, out_channels=4).state_dict()
    with pytest.raises(ValueError, match="4 latent channels"):
        sd.load_diffusion_model_state_dict(state)
    custom = LatentFormat()
    custom.latent_channels = 4
    assert sd.build_flux_model(state, latent_format=custom).model.latent_format is custom


def test_explicit_sizes_must_be_complete():
    sizes = dict(FLUX.__dict__)
    assert sd.build_flux_model(flux().state_dict(), sizes).model.diffusion_model.params == FLUX
    for wrong in ({**sizes, "heads": 2}, {key: value for key, value in sizes.items() if key != "theta"}):
        with pytest.raises(ValueError, match="heads|theta"):
            sd.build_flux_model(flux().state_dict(), wrong)


def test_relatives_are_not_taken_for_the_family():
    assert model_config_from_unet({**flux().state_dict(), "distilled_guidance_layer.norms.0.scale": z()}, "") is None
    with pytest.raises(ValueError, match="context_processor"):
        model_config_from_unet({**sd3().state_dict(), "context_processor.layers.0.attn.qkv.weight": z()}, "")


def test_count_blocks_stops_at_a_gap():
    assert count_blocks({"a.0.x": 0, "a.1.x": 0, "a.3.x": 0, "a.b": 0}, "a.") == 2
    assert count_blocks({}, "a.") == 0


def test_load_into_refuses_what_does_not_fit():
    layer = torch.nn.Linear(2, 2, device="meta")
    with pytest.raises(ValueError, match=r"Layer: 1 weights are missing: 'bias'"):
        load_into(layer, {"weight": z(2, 2)}, "Layer")


# Text encoders and the tiny model's one file


def test_the_tiny_file_is_a_whole_checkpoint():
    model, clip, vae = sd.load_checkpoint(WEIGHTS_FILE)
    assert model.model.model_sampling.shift == 1.0 and model.model.latent_format.scale_factor == 1.0
    assert model.model.latent_format.latent_rgb_factors is not None
    assert (vae.latent_channels, vae.downscale_ratio) == (16, 4)
    (context, extra), = clip.encode_from_tokens_scheduled(clip.tokenize("noto cat on blue"))
    assert context.shape == (1, 8, 128) and extra["pooled_output"].shape == (1, 64)
    weights = load_weights()
    assert torch.equal(model.model.diffusion_model.txt_in.weight, weights.transformer["txt_in.weight"].float())


def test_parts_of_the_tiny_model_load_from_files_of_their_own(file):
    state, _ = sd.load_torch_file(WEIGHTS_FILE, return_metadata=True)
    text = file({key: state[key] for key in ("text.embedding", "style.embedding")}, "text.safetensors")
    codec = file({key: state[key] for key in state if key.startswith("codec.")}, "codec.safetensors")
    assert sd.load_clip([text]).tokenize("cat").keys() == {"tiny"}
    pixels = torch.rand(1, 16, 24, 3)
    assert sd.load_vae(codec).encode(pixels).shape == (1, 16, 4, 6)
    with pytest.raises(ValueError, match="144 rows|rows, but"):
        sd.load_clip([file({"text.embedding": z(3, 128), "style.embedding": z(3, 64)}, "other.safetensors")])


@pytest.mark.parametrize("names", [("CLIP-L",), ("T5-XXL",), ("Gemma 2",), ("CLIP-L", "T5-XXL")])
def test_real_text_encoders_are_refused_by_name(file, names):
    paths = [file(FOREIGN[name], f"{i}.safetensors") for i, name in enumerate(names)]
    with pytest.raises(ValueError) as caught:
        sd.load_clip(paths)
    for i, name in enumerate(names):
        assert f"{i}.safetensors is a {name}" in str(caught.value)
    assert "tokenizer" in str(caught.value)


def test_a_checkpoint_without_our_text_encoder_says_so(file, caplog):
    with caplog.at_level(logging.WARNING):
        model, clip, vae = sd.load_checkpoint(file(prefixed(flux().state_dict(), "model.diffusion_model.")))
    assert clip is None and "CLIP output is empty" in caplog.text
    with pytest.raises(ValueError, match="holds no latent codec"):
        vae.decode(torch.zeros(1, 16, 4, 4))


@pytest.mark.parametrize("kind", [member.name for member in sd.CLIPType])
def test_clip_types_are_comfyuis(kind):
    assert sd.CLIPType[kind].value == list(sd.CLIPType).index(sd.CLIPType[kind]) + 1


def test_pickles_are_refused(tmp_path):
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"\x80\x02.")
    for load in (sd.load_diffusion_model, sd.load_vae, sd.load_checkpoint, lambda path: sd.load_clip([path])):
        with pytest.raises(ValueError, match=r"model\.ckpt.*pickle"):
            load(path)


# LoRA


def lora_pair(name: str, out: int, into: int, seed: int, style: str) -> dict:
    up, down = {"kohya": (".lora_up.weight", ".lora_down.weight"), "peft": (".lora_B.weight", ".lora_A.weight")}[style]
    return {name + up: random(out, 2, seed=seed) * 0.1, name + down: random(2, into, seed=seed + 1) * 0.1}


def changed_weights(patcher) -> dict:
    patcher.patch_model()
    try:
        return {key: tensor.clone() for key, tensor in patcher.model.diffusion_model.state_dict().items()}
    finally:
        patcher.unpatch_model()


@pytest.mark.parametrize("name, style", [
    ("diffusion_model.double_blocks.0.img_attn.proj", "peft"), ("lora_unet_double_blocks_0_img_attn_proj", "kohya"),
    ("transformer.transformer_blocks.0.attn.to_out.0", "peft"), ("lora_transformer_transformer_blocks_0_attn_to_out_0", "kohya"),
])  # fmt: skip
def test_lora_names_of_flux(name, style):
    model = sd.build_flux_model(flux().state_dict())
    pair = lora_pair(name, 64, 64, 5, style)
    up, down = pair.values()
    patched, none = sd.load_lora_for_models(model, None, {**pair, f"{name}.alpha": torch.tensor(4.0)}, 0.5, 0.0)
    assert none is None and not model.patches
    before, after = changed_weights(model), changed_weights(patched)
    key = "double_blocks.0.img_attn.proj.weight"
    torch.testing.assert_close(after[key], before[key] + 0.5 * (4.0 / 2) * up @ down, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(after[other], before[other]) for other in before if other != key)


@pytest.mark.parametrize("name, start, rows", [
    ("transformer.transformer_blocks.1.attn.to_k", 64, 64), ("transformer.transformer_blocks.1.attn.to_v", 128, 64),
    ("transformer.single_transformer_blocks.0.attn.to_q", 0, 64), ("transformer.single_transformer_blocks.0.proj_mlp", 192, 128),
])  # fmt: skip
def test_separate_projections_change_their_slice(name, start, rows):
    model = sd.build_flux_model(flux().state_dict())
    pair = lora_pair(name, rows, 64, 7, "peft")
    up, down = pair.values()
    before, after = changed_weights(model), changed_weights(sd.load_lora_for_models(model, None, pair, 1.0, 0.0)[0])
    key = "single_blocks.0.linear1.weight" if "single" in name else "double_blocks.1.img_attn.qkv.weight"
    expected = before[key].clone()
    expected[start : start + rows] += up @ down
    torch.testing.assert_close(after[key], expected, rtol=1e-5, atol=1e-6)


def test_sd3_lora_and_unknown_names(caplog):
    model = sd.load_diffusion_model_state_dict(sd3().state_dict())
    pair = lora_pair("transformer.transformer_blocks.1.attn.add_q_proj", 64, 64, 3, "peft")
    with caplog.at_level(logging.WARNING):
        patched, _ = sd.load_lora_for_models(model, None, {**pair, **lora_pair("nowhere", 4, 4, 1, "kohya")}, 1.0, 1.0)
    assert "2 of 4 tensors fit no weight" in caplog.text
    up, down = pair.values()
    before, after = changed_weights(model), changed_weights(patched)
    key = "joint_blocks.1.context_block.attn.qkv.weight"
    torch.testing.assert_close(after[key][:64], before[key][:64] + up @ down, rtol=1e-5, atol=1e-6)
    assert torch.equal(after[key][64:], before[key][64:])
