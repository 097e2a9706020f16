"""What every transformer must keep, whatever its weights: shapes, batches, untouched inputs, gates, hooks and residuals."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from rectiflow.host.embedded.ldm.flux import DoubleStreamBlock, Flux, FluxParams, SingleStreamBlock  # noqa: E402
from rectiflow.host.embedded.ldm.lumina2 import NextDiTParams  # noqa: E402
from rectiflow.host.embedded.ldm.mmdit import MMDiTParams  # noqa: E402
from rectiflow.host.embedded.patcher_extension import WrappersMP  # noqa: E402
from small_models import FLUX, LUMINA, MODELS, SD3, filled, flux, inputs, lumina2, random, sd3  # noqa: E402

FAMILIES = list(MODELS)
SUMS = {"rtol": 2e-5, "atol": 2e-5}  # fp32 products whose order depends on the batch


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def first(given: dict, count: int = 1) -> dict:
    return {key: value[:count] if isinstance(value, torch.Tensor) else value for key, value in given.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(6, 8), (5, 8), (6, 7), (3, 5), (1, 1), (2, 2)])
def test_output_has_the_inputs_size(family, size):
    out = MODELS[family]()(**inputs(family, height=size[0], width=size[1]))
    assert out.shape == (2, 16, *size) and torch.isfinite(out).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_odd_sizes_see_the_wrapped_picture(family):
    given = inputs(family, height=5, width=7)
    padded = {**given, "x": torch.nn.functional.pad(given["x"], (0, 1, 0, 1), mode="circular")}
    model = MODELS[family]()
    assert torch.equal(model(**given), model(**padded)[..., :5, :7])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_equals_its_pictures(family):
    model, given = MODELS[family](), inputs(family, batch=3)
    whole = model(**given)
    for i in range(3):
        single = {key: value[i : i + 1] for key, value in given.items()}
        torch.testing.assert_close(model(**single), whole[i : i + 1], **SUMS)


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_stay_as_they_are(family):
    given = inputs(family)
    before = {key: value.clone() for key, value in given.items()}
    options = {"patches_replace": {"dit": {}}, "mine": 1}
    MODELS[family]()(**given, transformer_options=options)
    assert all(torch.equal(given[key], before[key]) for key in before)
    assert options == {"patches_replace": {"dit": {}}, "mine": 1}


@pytest.mark.parametrize("family", FAMILIES)
def test_text_and_time_matter(family):
    model, given = MODELS[family](), inputs(family)
    base = model(**given)
    time = "timestep" if family == "flux" else "timesteps"
    for key in ("context", time, "x"):
        changed = model(**{**given, key: given[key] * (-0.5 if key == "context" else 0.5)})
        assert (changed - base).abs().max() > 1e-3, key  # (the sign: Lumina normalises the length of text states away)


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_follows_single(family):
    make, sizes = {"flux": (flux, FLUX), "sd3": (sd3, SD3), "lumina2": (lumina2, LUMINA)}[family]
    single = make()
    half = type(single)(sizes, dtype=torch.bfloat16)
    half.load_state_dict({key: tensor.bfloat16() for key, tensor in single.state_dict().items()})
    given = inputs(family)
    time = "timestep" if family == "flux" else "timesteps"
    narrow = half(**{key: value if key == time else value.bfloat16() for key, value in given.items()})
    assert narrow.dtype == torch.bfloat16
    wide = single(**given)
    assert (narrow.float() - wide).abs().max() < 0.1 * wide.abs().max()  # 8 bits through four blocks


def test_gates_of_zero_make_a_block_the_identity():
    made = {"dtype": torch.float32}
    double = filled(DoubleStreamBlock(64, 2, 2.0, True, **made))
    single = filled(SingleStreamBlock(64, 2, 2.0, **made))
    img, txt, vec = random(2, 6, 64), random(2, 3, 64, seed=1), random(2, 64, seed=2)
    for modulation in (double.img_mod.lin, double.txt_mod.lin, single.modulation.lin):
        for part in (2, 5)[: modulation.weight.shape[0] // (3 * 64)]:
            modulation.weight[part * 64 : (part + 1) * 64] = 0
            modulation.bias[part * 64 : (part + 1) * 64] = 0
    out = double(img, txt, vec, None)
    assert torch.equal(out[0], img) and torch.equal(out[1], txt)
    assert torch.equal(single(img, vec, None), img)


def test_gates_of_zero_in_sd3_and_lumina():
    block = sd3().joint_blocks[0]
    for half in (block.context_block, block.x_block):
        half.adaLN_modulation[1].weight.zero_()
        half.adaLN_modulation[1].bias.zero_()
    context, x, c = random(1, 3, 64), random(1, 6, 64, seed=1), random(1, 64, seed=2)
    out = block(context, x, c)
    assert torch.equal(out[0], context) and torch.equal(out[1], x)
    layer = lumina2().layers[0]
    layer.adaLN_modulation[1].weight.zero_()
    layer.adaLN_modulation[1].bias.zero_()
    tokens = random(1, 6, 48)
    freqs = lumina2().rope_embedder(torch.zeros(1, 6, 3)).movedim(1, 2)
    assert torch.equal(layer(tokens, None, freqs, random(1, 48, seed=1)), tokens)


def test_flux_is_blind_to_the_order_of_text_but_not_of_pictures():
    """Text tokens all stand at position 0, image tokens at their place."""
    model, given = flux(), inputs("flux")
    base = model(**given)
    torch.testing.assert_close(model(**{**given, "context": given["context"].flip(1)}), base, **SUMS)
    assert (model(**{**given, "x": given["x"].flip(-1)}).flip(-1) - base).abs().max() > 1e-2


# Hooks


def recorder(calls: list, change=None):
    def patch(args, extra):
        options = args["transformer_options"]
        calls.append((options["block_type"], options["block_index"], options["total_blocks"], sorted(args)))
        return extra["original_block"](args) if change is None else change(args, extra)

    return patch


HOOKED = {
    "flux": [("double_block", 0), ("double_block", 1), ("single_block", 0), ("single_block", 1)],
    "sd3": [("double_block", 0), ("double_block", 1), ("double_block", 2)],
}
ARGS = {
    "flux": {"double": ["attn_mask", "img", "pe", "transformer_options", "txt", "vec"],
             "single": ["attn_mask", "img", "pe", "transformer_options", "vec"]},
    "sd3": {"double": ["img", "transformer_options", "txt", "vec"]},
}  # fmt: skip


@pytest.mark.parametrize("family", HOOKED)
def test_block_hooks_are_called_in_order_and_change_nothing_by_themselves(family):
    calls: list = []
    options = {"patches_replace": {"dit": {key: recorder(calls) for key in HOOKED[family]}}}
    model, given = MODELS[family](), inputs(family)
    assert torch.equal(model(**given, transformer_options=options), model(**given))
    totals = {kind: sum(key[0].startswith(kind) for key in HOOKED[family]) for kind in ("double", "single")}
    expected = [(kind.partition("_")[0], i) for kind, i in HOOKED[family]]
    assert calls == [(kind, i, totals[kind], ARGS[family][kind]) for kind, i in expected]


@pytest.mark.parametrize("family", HOOKED)
def test_a_block_can_be_left_out_or_changed(family):
    model, given = MODELS[family](), inputs(family)
    skip = {("double_block", 0): lambda args, extra: {"img": args["img"], "txt": args["txt"]}}
    skipped = model(**given, transformer_options={"patches_replace": {"dit": skip}})
    blocks = model.double_blocks if family == "flux" else model.joint_blocks
    kept = blocks.pop(0)
    expected = model(**given)
    blocks.insert(0, kept)
    assert torch.equal(skipped, expected)
    changed = {("double_block", 1): lambda args, extra: extra["original_block"]({**args, "vec": args["vec"] * 0})}
    assert (model(**given, transformer_options={"patches_replace": {"dit": changed}}) - model(**given)).abs().max() > 1e-3


def test_sd3s_last_block_returns_no_text():
    seen = {}

    def patch(args, extra):
        seen.update(extra["original_block"](args))
        return seen

    sd3()(**inputs("sd3"), transformer_options={"patches_replace": {"dit": {("double_block", 2): patch}}})
    assert seen["txt"] is None and seen["img"].shape == (2, 12, 64)


def test_lumina_has_no_block_hooks():
    def patch(args, extra):
        raise AssertionError("ComfyUI 0.3.64 does not call block hooks here")

    replace = {(kind, i): patch for kind in ("double_block", "single_block") for i in range(2)}
    given = inputs("lumina2")
    assert torch.equal(lumina2()(**given, transformer_options={"patches_replace": {"dit": replace}}), lumina2()(**given))


def test_what_a_hook_keeps_is_not_written_to():
    """A cache stores what the block returned; a residual added afterwards must not reach it."""
    kept = []

    def patch(args, extra):
        out = extra["original_block"](args)
        kept.append((out["img"], out["img"].clone()))
        return out

    replace = {key: patch for key in HOOKED["flux"]}
    control = {"input": [torch.ones(2, 12, 64)] * 2, "output": [torch.ones(2, 12, 64)] * 2}
    flux()(**inputs("flux"), control=control, transformer_options={"patches_replace": {"dit": replace}})
    assert len(kept) == 4 and all(torch.equal(*pair) for pair in kept)


def test_post_input_sees_tokens_with_their_ids_and_may_drop_some():
    model, given = flux(), inputs("flux")
    shapes = {}

    def look(tokens):
        shapes.update({key: tuple(value.shape) for key, value in tokens.items()})
        tokens["img_ids"] += 0.0  # ids are each image's own: writing in place must work
        return tokens

    assert torch.equal(model(**given, transformer_options={"patches": {"post_input": [look]}}), model(**given))
    assert shapes == {"img": (2, 12, 64), "txt": (2, 5, 64), "img_ids": (2, 12, 3), "txt_ids": (2, 5, 3)}

    def drop(tokens):
        return {**tokens, "txt": tokens["txt"][:, :3], "txt_ids": tokens["txt_ids"][:, :3]}

    dropped = model(**given, transformer_options={"patches": {"post_input": [drop]}})
    torch.testing.assert_close(dropped, model(**{**given, "context": given["context"][:, :3]}), **SUMS)


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusion_model_wrappers(family):
    seen = []

    def wrapper(executor, *args, **kwargs):
        seen.append(executor.class_obj)
        return executor(*args, **kwargs) * 2

    model, given = MODELS[family](), inputs(family)
    options = {"wrappers": {WrappersMP.DIFFUSION_MODEL: {"a": [wrapper], "b": [wrapper]}}}
    factor = 1 if family == "sd3" else 4  # SD3's class has no such hook in ComfyUI 0.3.64
    assert torch.equal(model(**given, transformer_options=options), model(**given) * factor)
    assert seen == ([] if family == "sd3" else [model, model])


@pytest.mark.parametrize("family, calls", [("flux", 4), ("sd3", 4), ("lumina2", 4)])
def test_attention_override_reaches_every_attention(family, calls):
    seen = []

    def override(func, q, k, v, *args, **kwargs):
        seen.append((tuple(q.shape), q.shape == k.shape == v.shape, kwargs["transformer_options"] is not None))
        return func(q, k, v, *args, **kwargs)

    model, given = MODELS[family](), inputs(family)
    assert torch.equal(model(**given, transformer_options={"optimized_attention_override": override}), model(**given))
    assert len(seen) == calls and all(equal and has_options for _, equal, has_options in seen)
    heads_first = (2, 2, 17, 32) if family == "flux" else (2, 17, 64)
    assert family == "lumina2" or seen[-1][0] == heads_first


# Residuals and references


def test_flux_residuals_come_after_their_block_on_image_tokens():
    model, given = flux(), inputs("flux")
    add = random(2, 12, 64, seed=5)

    def shifted(number, kind, amount):
        def patch(args, extra):
            out = dict(extra["original_block"](args))
            start = 0 if kind == "double_block" else 5
            out["img"] = torch.cat((out["img"][:, :start], out["img"][:, start : start + 12] + amount), dim=1)
            return out

        return {"patches_replace": {"dit": {(kind, number): patch}}}

    for kind, side in (("double_block", "input"), ("single_block", "output")):
        control = {"input": [], "output": [], side: [None, add]}
        expected = model(**given, transformer_options=shifted(1, kind, add))
        assert torch.equal(model(**given, control=control), expected), side
    short = {"input": [add[:, :4]], "output": []}
    padded = {"input": [torch.cat((add[:, :4], torch.zeros(2, 8, 64)), dim=1)], "output": []}
    assert torch.equal(model(**given, control=short), model(**given, control=padded))


def test_reference_latents_change_the_picture_not_its_size():
    model, given = flux(), inputs("flux")
    refs = [random(2, 16, 4, 4, seed=6), random(2, 16, 3, 5, seed=7)]
    outs = [model(**given, ref_latents=refs, ref_latents_method=method) for method in ("offset", "index", "uxo")]
    assert all(out.shape == given["x"].shape for out in outs)
    assert len({float(out.sum()) for out in [*outs, model(**given)]}) == 4
    assert torch.equal(model(**given, ref_latents=[]), model(**given))
    assert torch.equal(model(**given, ref_latents=refs), outs[0])


def test_ids_count_rows_and_columns_from_the_offset():
    tokens, ids = flux().process_img(random(2, 16, 3, 6), index=2, h_offset=8, w_offset=3)
    assert tokens.shape == (2, 6, 64) and ids.shape == (2, 6, 3) and ids.dtype == torch.float32
    assert ids[0].tolist() == ids[1].tolist() == [[2, 4 + r, 2 + c] for r in range(2) for c in range(3)]


def test_flux_without_guidance_weights_ignores_guidance():
    model, given = flux(guidance_embed=False), inputs("flux")
    assert torch.equal(model(**given), model(**{**given, "guidance": None}))
    guided = flux()
    assert not torch.equal(guided(**given), guided(**{**given, "guidance": None}))


def test_missing_pooled_text_counts_as_zeros():
    model, given = flux(), inputs("flux")
    assert torch.equal(model(**{**given, "y": None}), model(**{**given, "y": torch.zeros(2, 12)}))


# SD3's table and Lumina's captions


def test_sd3_cuts_the_middle_of_its_positions():
    model = sd3()
    side = SD3.max_positions
    model.pos_embed.copy_(torch.arange(side * side, dtype=torch.float32).reshape(1, -1, 1).expand_as(model.pos_embed))
    cut = model.cropped_pos_embed(2, 3)[0, :, 0]
    assert cut.tolist() == [(4 + r) * side + 3 + c for r in range(2) for c in range(3)]
    with pytest.raises(ValueError, match="allowed: up to 20×20"):
        model(**inputs("sd3", height=22, width=4))
    with pytest.raises(ValueError, match="without text"):
        model(**{**inputs("sd3"), "context": None})


def test_lumina_captions_of_several_lengths_equal_themselves_alone():
    model, given = lumina2(), inputs("lumina2", batch=2, tokens=6)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
    both = model(**given, num_tokens=8, attention_mask=mask)
    for i, length in enumerate((3, 5)):
        alone = {key: value[i : i + 1] for key, value in given.items()}
        alone["context"] = alone["context"][:, :length]
        torch.testing.assert_close(model(**alone, num_tokens=length), both[i : i + 1], **SUMS)


def test_lumina_uses_the_first_num_tokens():
    model, given = lumina2(), inputs("lumina2", tokens=6)
    assert torch.equal(model(**given), model(**given, num_tokens=6))
    assert not torch.equal(model(**given), model(**given, num_tokens=4))


@pytest.mark.parametrize("make, sizes, wrong", [
    (FluxParams, FLUX, {"num_heads": 3}), (FluxParams, FLUX, {"axes_dim": (4, 14, 12)}), (FluxParams, FLUX, {"axes_dim": (5, 13, 14)}),
    (MMDiTParams, SD3, {"num_heads": 5}), (NextDiTParams, LUMINA, {"n_kv_heads": 4}), (NextDiTParams, LUMINA, {"axes_dims": (8, 8)}),
])  # fmt: skip
def test_sizes_that_contradict_each_other_are_refused(make, sizes, wrong):
    with pytest.raises(ValueError):
        make(**{**sizes.__dict__, **wrong})


def test_flux_has_the_published_names():
    names = set(Flux(FLUX, device="meta").state_dict())
    for name in (
        "img_in.weight", "time_in.in_layer.weight", "guidance_in.out_layer.bias", "vector_in.in_layer.weight", "txt_in.bias",
        "double_blocks.1.img_mod.lin.weight", "double_blocks.0.txt_attn.norm.query_norm.scale", "double_blocks.0.img_mlp.2.bias",
        "single_blocks.1.linear1.weight", "single_blocks.0.norm.key_norm.scale", "single_blocks.0.modulation.lin.bias",
        "final_layer.adaLN_modulation.1.weight", "final_layer.linear.bias",
    ):  # fmt: skip
        assert name in names
    assert len(names) == 12 + 4 + 2 * 24 + 2 * 8 + 4
