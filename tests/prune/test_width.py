"""Masks and narrower layers on three families: the same answer, sizes, LoRAs, nothing left behind; scores, plans and bad input."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from rectiflow.accel.prune.apply import apply_plan, plan_of, stack_under
from rectiflow.accel.prune.compact import NarrowWeights, compact_model, layer_cuts
from rectiflow.accel.prune.identity import NETWORK, model_hash, original_part
from rectiflow.accel.prune.lora import slice_lora
from rectiflow.accel.prune.plan import plan_from_json
from rectiflow.accel.prune.select import plan_without
from rectiflow.accel.prune.width import (
    ColumnMask,
    WidthCut,
    WidthScores,
    check_width,
    groups_of,
    kept_units,
    magnitude,
    mask_model,
    removed_share,
    unit_weights,
    width_plan,
)
from rectiflow.errors import NodeInputError
from rectiflow.host.embedded import sd
from rectiflow.host.embedded.patcher_extension import CallbacksMP
from rectiflow.tests.accel.region_toys import FAMILIES, noise, sample, toy
from rectiflow.tests.models import small_models
from rectiflow.train.recovery import RecoverSettings, recover

BEFORE = CallbacksMP.ON_PRE_RUN


def small(family: str):
    """The toys, NextDiT with three key heads that two query heads share each."""
    if family != "lumina2":
        return toy(family)
    sizes = {"dim": 144, "n_heads": 6, "n_kv_heads": 3, "n_layers": 3}
    return sd.load_diffusion_model_state_dict(small_models.lumina2(**sizes).state_dict())


def planned(model, remove: float, *, align: int = 1, least: int = 0, seed: int = 0):
    """A plan that drops random heads and neurons."""
    groups = groups_of(model, "test")
    generator = torch.Generator().manual_seed(seed)
    values = {group.key: torch.rand(group.count, generator=generator) for group in groups}
    kept = kept_units(groups, WidthScores("", "", "random", values), WidthCut(remove, "global", align, least), model)
    return width_plan(model, kept, groups, "test", method="random")


@pytest.fixture(scope="module", params=FAMILIES)
def case(request):
    """(MODEL, a plan that drops about a third)."""
    model = small(request.param)
    return model, planned(model, 0.34)


def zeroed(model, plan):
    """A second network of the family whose heads and neurons put out zeros, written into its weights by hand."""
    model.detach()
    weights = {name: value.clone() for name, value in model.model.diffusion_model.state_dict().items()}
    for group in groups_of(model, "test"):
        kept = plan.width.get(group.path, {}).get(group.kind)
        for unit in set(range(group.count)) - set(kept if kept is not None else range(group.count)):
            for span in group.columns:
                weights[f"{span.layer}.weight"][:, span.start + unit * span.size : span.start + (unit + 1) * span.size] = 0.0
    return sd.load_diffusion_model_state_dict(weights)


def close(a, b, tolerance: float) -> bool:
    return float((a - b).abs().max()) <= tolerance * float(b.abs().max())


def test_masks_zero_and_narrow_layers_are_the_same_model(case):
    """Masked = zeros in the weights to 1e-6, narrow = masked to 1e-5, of the largest number: float32, sums in another order."""
    model, plan = case
    masked, narrow = mask_model(model, plan, BEFORE, "test"), compact_model(model, plan, "test")
    whole, shown, small_one = (sample(m, noise(), steps=3) for m in (model, masked, narrow))
    assert close(shown, sample(zeroed(model, plan), noise(), steps=3), 1e-6)
    assert close(small_one, shown, 1e-5)
    assert not close(shown, whole, 1e-2), "the plan changes the answer"
    assert close(sample(compact_model(masked, None, "test"), noise(), steps=3), shown, 1e-5), "a masked model carries its plan"


KINDS = {"flux": ("heads", "ffn", "txt_ffn"), "sd3": ("heads", "heads2", "ffn", "txt_ffn"), "lumina2": ("heads", "ffn")}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_kinds_of_units_of_a_family(family):
    assert {group.kind for group in groups_of(small(family), "test")} == set(KINDS[family])


@pytest.mark.parametrize("family, kind", [(family, kind) for family in FAMILIES for kind in KINDS[family]])
def test_a_layer_without_any_unit_adds_its_bias(family, kind):
    model = small(family)
    groups = groups_of(model, "test")
    chosen = [group for group in groups if group.kind == kind]
    plan = width_plan(model, {group.key: () for group in chosen}, groups, "test")
    narrow = compact_model(model, plan, "test")
    assert close(sample(narrow, noise(), steps=2), sample(zeroed(model, plan), noise(), steps=2), 1e-5)
    if not chosen[0].is_heads:
        down = narrow.object_patches[NETWORK + chosen[0].columns[0].layer]
        assert "linear2" in chosen[0].columns[0].layer or down.in_features == 0


def test_a_lora_of_the_whole_model_fits_before_and_behind(case):
    """On the masked model, in front of the narrowing and behind it: one answer, to 1e-5 of the largest number."""
    model, plan = case
    model.detach()
    generator = torch.Generator().manual_seed(4)
    changed = [name for name, value in model.model.named_parameters() if value.ndim == 2 and ".0." in name or "bias" in name]
    shapes = {name: value.shape for name, value in model.model.named_parameters()}
    patches = {name: ("diff", (0.05 * torch.randn(shapes[name], generator=generator),)) for name in changed}

    def with_lora(to):
        patched = to.clone()
        assert len(patched.add_patches(patches)) == len(patches)
        return patched

    narrow = compact_model(model, plan, "test")
    masked = sample(with_lora(mask_model(model, plan, BEFORE, "test")), noise(), steps=2)
    model.detach()
    before = sample(compact_model(with_lora(model), plan, "test"), noise(), steps=2)
    model.detach()
    behind = sample(with_lora(narrow), noise(), steps=2)
    assert torch.equal(before, behind) and close(before, masked, 1e-5)
    assert not close(before, sample(narrow, noise(), steps=2), 1e-3), "the LoRA acts"
    model.detach()
    assert model_hash(model) == plan.model


def test_a_mask_runs_behind_what_a_host_puts_after_it(case):
    """A host that moves weights away appends its LoRA to the functions of the weight: the run begins with the mask last again."""
    model, plan = case
    masked = mask_model(model, plan, BEFORE, "test")
    wanted = sample(masked, noise(), steps=2)
    masked.patch_model()
    layers = [layer for layer in model.model.modules() if any(isinstance(f, ColumnMask) for f in getattr(layer, "weight_function", ()))]
    for layer in layers:
        layer.weight_function.append(lambda weight: weight + 0.0)
    masked.pre_run()
    assert all(isinstance(layer.weight_function[-1], ColumnMask) for layer in layers) and layers
    masked.cleanup()
    masked.unpatch_model()
    assert torch.equal(sample(masked, noise(), steps=2), wanted)


def test_twenty_runs_in_turn_leave_nothing(case):
    model, plan = case
    narrow, masked = compact_model(model, plan, "test"), mask_model(model, plan, BEFORE, "test")
    wanted = [sample(m, noise(), steps=1, cfg=1.0) for m in (model, narrow, masked)]
    for _ in range(7):
        for m, first in zip((model, narrow, masked), wanted):
            assert torch.equal(sample(m, noise(), steps=1, cfg=1.0), first)
    model.detach()
    assert not any(isinstance(module, NarrowWeights) or getattr(module, "weight_function", None) for module in model.model.modules())
    assert model_hash(model) == plan.model


def test_size_identity_and_what_is_removed(case):
    model, plan = case
    groups = groups_of(model, "test")
    narrow = compact_model(model, plan, "test")
    kept = check_width(plan, groups, "test")
    left = {group.key: max(len(kept.get(group.key, range(group.count))), group.is_heads) for group in groups}
    removed = sum(unit_weights(group, model) * (group.count - left[group.key]) for group in groups)
    assert narrow.clone().model_size() == model.model_size() - 4 * removed
    assert narrow.patches_uuid != model.patches_uuid and plan_of(narrow.clone()) is plan
    shares = removed_share(kept, groups, model)
    assert shares["neurons"] == pytest.approx(0.34, abs=0.01) and shares["all"] < shares["neurons"]
    assert plan_from_json(plan.to_json(), "test") == plan
    sample(narrow, noise(), steps=1)  # while narrow layers lie on the network, all of this is still said of the whole one
    assert groups_of(model, "test") == groups and model_hash(model) == plan.model
    assert removed_share(kept, groups, model) == shares


def test_half_precision_stays(case):
    model, plan = case
    half = model.clone()
    half.set_model_compute_dtype(torch.bfloat16)
    assert sample(compact_model(half, plan, "test"), noise(), steps=1).isfinite().all()
    layer = next(patch for patch in compact_model(half, plan, "test").object_patches.values() if isinstance(patch, NarrowWeights))
    assert layer.weight.dtype == torch.float32 and not layer.weight.is_inference()


def test_with_blocks_left_out_too(case):
    """A plan of both is the same in one node, in two, and as masks on the shorter model."""
    model, _ = case
    stack = stack_under(model, "test")
    depth = plan_without((stack.blocks[1],), stack, model_hash(model), "test")
    shorter = apply_plan(model, depth, "test")
    both = planned(shorter, 0.3, seed=2)
    assert both.kept == depth.kept and stack.blocks[1].path not in both.width
    answers = [sample(m, noise(), steps=2) for m in (compact_model(shorter, both, "test"), compact_model(model, both, "test"))]
    assert torch.equal(*answers)
    assert close(sample(mask_model(shorter, both, BEFORE, "test"), noise(), steps=2), answers[0], 1e-5)


def test_a_saved_narrow_model_is_loaded_bit_for_bit_and_takes_a_lora(tiny):
    """Without one block and a third of the width, with a LoRA in the file, and with the LoRA put on what was loaded: one latent."""
    from rectiflow.nodes.compressed_files import RectiflowLoadCompressed, RectiflowSaveCompressed

    stack = stack_under(tiny.model, "test")
    shorter = apply_plan(tiny.model, plan_without((stack.blocks[1],), stack, model_hash(tiny.model), "test"), "test")
    narrow = compact_model(shorter, planned(shorter, 0.3, least=1), "test")

    def drawn(model):
        return tiny.sample("noto cat on white", tiny.noise([3]), model=model, steps=2)

    def saved(model):
        path = RectiflowSaveCompressed().execute(model=model, filename_prefix="width/test", format="rectiflow", dtype="same")[0]
        return RectiflowLoadCompressed().execute(path=path)[0]

    def with_lora(model):
        wide = {name: original_part(tiny.model, name).weight for name in ("double_blocks.0.img_attn.qkv", "single_blocks.5.linear2")}
        patched, generator = model.clone(), torch.Generator().manual_seed(2)
        patches = {f"{NETWORK}{name}.weight": ("diff", (0.02 * torch.randn(w.shape, generator=generator),)) for name, w in wide.items()}
        assert len(patched.add_patches(patches)) == len(patches)
        return patched

    again = saved(narrow)
    assert torch.equal(drawn(again), drawn(narrow))
    tiny.model.detach()
    wanted = drawn(with_lora(narrow))
    assert not close(wanted, drawn(narrow), 1e-3)
    assert torch.equal(drawn(with_lora(again)), wanted)
    tiny.model.detach()
    assert torch.equal(drawn(saved(with_lora(narrow))), wanted)
    with pytest.raises(NodeInputError, match="narrow model from a file"):
        recover(again, tiny.model, RecoverSettings(), None, None, None)


def test_the_nodes_hand_on_what_the_functions_make(tiny):
    from rectiflow.nodes.width import RectiflowApplyWidthMask, RectiflowCompactWidth, RectiflowLoraForPruned, RectiflowWidthMaskScore

    prompt, latent = tiny.conditioning("noto cat on white"), {"samples": torch.zeros(1, 16, 16, 16)}
    scores, said, _ = RectiflowWidthMaskScore().execute(model=tiny.model, positive=prompt, latent=latent, method="magnitude", seed=0)
    assert "36 heads and 12288 neurons" in said
    cut = {"remove": 0.25, "scope": "local", "align": "64", "min_keep_heads": 1}
    masked, plan, report, picture = RectiflowApplyWidthMask().execute(model=tiny.model, scores=scores, **cut)
    assert "25.0% of neurons" in report and picture.ndim == 4
    narrow, said = RectiflowCompactWidth().execute(model=masked, plan="", enabled=True)
    again, _ = RectiflowCompactWidth().execute(model=tiny.model, plan=plan, enabled=True)
    assert plan_of(narrow) == plan_of(again) and narrow.model_size() == again.model_size() and "narrows 9 blocks" in said
    assert RectiflowCompactWidth().execute(model=tiny.model, plan="", enabled=False)[0] is tiny.model
    noise = tiny.noise([1])
    shown, small_one = (tiny.sample("noto cat on white", noise, model=model, steps=2) for model in (masked, narrow))
    assert close(small_one, shown, 1e-5)
    lora = {"diffusion_model.double_blocks.0.img_mlp.0.lora_up.weight": torch.ones(1024, 2)}
    cutted, said = RectiflowLoraForPruned().execute(model=narrow, plan="", lora_name="", numbering="compact", lora=lora)
    assert next(iter(cutted.values())).shape == (768, 2) and said == "1 layers cut, 0 as they were"
    for wrong in ({"lora_name": ""}, {"lora_name": "../x"}, {"lora_name": "none.safetensors"}):
        with pytest.raises(NodeInputError, match="models/loras"):
            RectiflowLoraForPruned().execute(model=narrow, plan="", numbering="compact", **wrong)
    with pytest.raises(NodeInputError, match="a plan"):
        RectiflowLoraForPruned().execute(model=tiny.model, plan="", lora_name="", numbering="compact", lora=lora)
    with pytest.raises(NodeInputError, match="scores of this model"):
        RectiflowApplyWidthMask().execute(model=toy("flux"), scores=scores, **cut)


def test_a_sliced_lora_is_the_slice_of_the_whole(case):
    """up @ down of the sliced LoRA = rows and columns of up @ down; removed blocks are dropped, others renumbered."""
    model, plan = case
    stack, groups = stack_under(model, "test"), groups_of(model, "test")
    cuts = layer_cuts(check_width(plan, groups, "test"), groups, lambda path: original_part(model, path))
    generator = torch.Generator().manual_seed(1)
    lora, layers = {}, list(cuts)
    for layer in layers:
        whole = original_part(model, layer)
        lora[f"diffusion_model.{layer}.lora_up.weight"] = torch.randn(whole.out_features, 2, generator=generator)
        lora[f"diffusion_model.{layer}.lora_down.weight"] = torch.randn(2, whole.in_features, generator=generator)
        lora[f"diffusion_model.{layer}.alpha"] = torch.tensor(2.0)
    made = slice_lora(lora, plan, stack, cuts, renumber=False)
    assert (made.sliced, made.whole, made.dropped) == (len(layers), 0, [])
    narrow = compact_model(model, plan, "test")
    for layer in layers:
        up, down = (f"diffusion_model.{layer}.lora_{part}.weight" for part in ("up", "down"))
        here = narrow.object_patches[NETWORK + layer]
        product = made.tensors[up] @ made.tensors[down]
        assert torch.equal(product, here.set_weight(lora[up] @ lora[down], return_weight=True)), "sums over the rank alone, in one order"
    gone = plan_without((stack.blocks[0],), stack, model_hash(model), "test")
    shorter = slice_lora(lora, gone, stack, {}, renumber=True)
    first = stack.blocks[0].path
    assert shorter.dropped and all(layer.startswith(f"{first}.") for layer in shorter.dropped)
    moved = {key for key in shorter.tensors if f".{first}." in key}
    assert moved == {key.replace(f".{stack.blocks[1].path}.", f".{first}.") for key in lora if f".{stack.blocks[1].path}." in key}
    name = f"lora_unet_{layers[0].replace('.', '_')}"
    kohya = {key.replace(f"diffusion_model.{layers[0]}", name): value for key, value in lora.items() if f".{layers[0]}." in key}
    assert slice_lora(kohya, plan, stack, cuts, renumber=False).sliced == 1
    diff, dora = {f"{layers[0]}.diff": torch.ones(1, 1)}, {f"{layers[0]}.dora_scale": torch.ones(4, 1)}
    for broken in ({"a.hada_w1_a": torch.ones(1)}, diff, dora):
        with pytest.raises(ValueError, match="cut|narrower|merge"):
            slice_lora(broken, plan, stack, cuts, renumber=False)


def test_what_is_kept_by_hand():
    """Two layers of four neurons with known numbers: global and local, alignment, heads that must stay."""
    model = toy("flux")
    groups = tuple(group for group in groups_of(model, "test") if group.path in ("double_blocks.0", "single_blocks.0"))
    values = {group.key: torch.arange(group.count) + (1000.0 if group.kind == "txt_ffn" else 0.0) for group in groups}
    scores = WidthScores("", "", "test", values)

    def counts(cut):
        kept = kept_units(groups, scores, cut, model)
        return {group.name: len(kept[group.key]) for group in groups}

    local = counts(WidthCut(0.25, "local", 1, 1))
    assert local["double_blocks.0.ffn"] == local["single_blocks.0.ffn"] == 96
    everywhere = counts(WidthCut(0.3, "global", 1, 1))
    assert everywhere["double_blocks.0.txt_ffn"] == 128 and everywhere["double_blocks.0.ffn"] < 96
    assert everywhere["double_blocks.0.heads"] >= 1 and everywhere["single_blocks.0.heads"] >= 1
    aligned = counts(WidthCut(0.3, "global", 32, 1))
    assert all(count % 32 == 0 for name, count in aligned.items() if "ffn" in name)
    assert kept_units(groups, scores, WidthCut(0.25, "local", 1, 1), model)[groups[1].key] == tuple(range(32, 128)), "the least go"
    assert counts(WidthCut(0.0, "global", 128, 1)) == {group.name: group.count for group in groups}


def test_magnitude_is_of_rows_and_columns():
    model = toy("flux")
    group = next(group for group in groups_of(model, "test") if group.name == "double_blocks.0.ffn")
    up, down = (original_part(model, f"double_blocks.0.img_mlp.{place}") for place in (0, 2))
    unit = torch.cat((up.weight[5], up.bias[5:6], down.weight[:, 5]))
    assert float(magnitude(model, (group,))[group.key][5]) == pytest.approx(float(unit.square().mean().sqrt()), rel=1e-5)


def test_what_does_not_fit_is_refused(case):
    model, plan = case
    other = small("sd3" if plan.family == "Flux" else "flux")
    for act in (lambda m, p: mask_model(m, p, BEFORE, "test"), lambda m, p: compact_model(m, p, "test")):
        with pytest.raises(NodeInputError, match="for this model"):
            act(other, plan)
        path, kinds = next(iter(plan.width.items()))
        kind = next(iter(kinds))
        with pytest.raises(NodeInputError, match="units that the model has"):
            act(model, dataclasses.replace(plan, width={path: {kind: (0, 1 << 19)}}))
        with pytest.raises(NodeInputError, match="full width|narrow already|without one"):
            act(compact_model(model, plan, "test"), plan)
    with pytest.raises(NodeInputError, match="narrows layers"):
        compact_model(model, None, "test")
    wrapped = model.clone()
    name = NETWORK + next(
        span.layer for group in groups_of(model, "test") if group.kind in plan.width.get(group.path, {}) for span in group.columns
    )
    wrapped.add_weight_wrapper(f"{name}.weight", torch.nn.Identity())
    with pytest.raises(NodeInputError, match="Identity|without functions"):
        compact_model(wrapped, plan, "test")
    replaced = model.clone()
    replaced.add_object_patch(name, torch.nn.Identity())
    with pytest.raises(NodeInputError, match="before quantisation"):
        compact_model(replaced, plan, "test")
