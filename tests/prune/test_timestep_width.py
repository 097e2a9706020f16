"""Width by timestep: slices are what masks are, tables keep what they say, and whole runs follow sigma."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rectiflow.accel.prune.compact import compact_model
from rectiflow.accel.prune.timestep_width import Contributions, WidthTable, bucket_of, solved, time_groups, unit_flops
from rectiflow.accel.prune.width import groups_of, width_plan
from rectiflow.accel.prune.width_run import apply_width_table, made_table, with_units
from rectiflow.errors import NodeInputError
from rectiflow.families.tokens import token_spec
from rectiflow.host import CFGGuider, sampler_object
from rectiflow.host.embedded import sd
from rectiflow.metrics.fidelity import relative_errors
from rectiflow.tests.accel import region_toys
from rectiflow.tests.accel.region_toys import FAMILIES, conditioning, noise, sample, with_ras
from rectiflow.tests.models.small_models import lumina2, random
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

WHERE = "Timestep Width"
SIZE = (12, 16)


def toy(family: str):
    """NextDiT with two key heads, so that one can go."""
    if family != "lumina2":
        return region_toys.toy(family)
    return sd.load_diffusion_model_state_dict(lumina2(n_layers=4, dim=96, n_heads=4, n_kv_heads=2, ffn_hidden=192).state_dict())


def drawn(groups, what: str, seed: int = 0) -> dict:
    """Kept units, at least one and not all of each group, of heads, channel groups or both."""
    generator, kept = torch.Generator().manual_seed(seed), {}
    for group in groups:
        if what == "both" or group.is_heads == (what == "heads"):
            count = int(torch.randint(1, max(2, group.count), (), generator=generator))
            kept[group.key] = tuple(torch.randperm(group.count, generator=generator)[:count].sort().values.tolist())
    return kept


def table_of(model, target: float = 0.7, buckets: int = 4) -> WidthTable:
    def run(watched, sigmas):
        sample(watched, noise(1, SIZE), sigmas=sigmas)

    return made_table(model, run, (1, 16, *SIZE), 5, buckets, target, WHERE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("what", ["heads", "groups", "both"])
@pytest.mark.parametrize("seed", [1, 2])
def test_slice_equals_mask(family, what, seed):
    """Done 2: 1e-5 of the largest number, of one step and of a run; the mask moves the answer."""
    model, x = toy(family), noise(2, SIZE)
    groups = time_groups(model, WHERE)
    kept = drawn(groups, what, seed)
    found = [sample(with_units(model, groups, lambda sigma: ("all", kept), how, WHERE), x, steps=3) for how in ("slice", "mask")]
    assert (found[0] - found[1]).abs().max() <= 1e-5 * found[1].abs().max()
    assert (found[1] - sample(model, x, steps=3)).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_one_of_each_is_enough(family):
    model, x = toy(family), noise(1, SIZE)
    groups = time_groups(model, WHERE)
    assert {group.kind for group in groups} >= {"heads", "ffn"}
    kept = {group.key: (group.count - 1,) for group in groups}
    found = [sample(with_units(model, groups, lambda sigma: (0, kept), how, WHERE), x, steps=2) for how in ("slice", "mask")]
    assert (found[0] - found[1]).abs().max() <= 1e-5 * found[1].abs().max()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ["slice", "mask"])
def test_a_table_of_ones_is_bit_identical(family, how):
    """Done 1; the table of target 1, and one that names every unit nowhere."""
    model, x = toy(family), noise(2, SIZE)
    plain = sample(model, x)
    whole = table_of(model, 1.0)
    assert whole.flops == (1.0,) * 4 and torch.equal(sample(apply_width_table(model, whole, how, WHERE), x), plain)
    groups = time_groups(model, WHERE)
    assert torch.equal(sample(with_units(model, groups, lambda sigma: (0, {}), how, WHERE), x), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_are_those_of_the_table(family):
    """Counted by torch at the middle of each bucket; the mean is the target to within two units."""
    model, x = toy(family), noise(1, SIZE)
    target = 0.85 if family == "lumina2" else 0.7  # its refiners stay whole
    table = table_of(model, target)
    assert target - 1e-6 <= sum(table.flops) / 4 <= target + 0.02 and len(set(table.flops)) > 1
    narrow = apply_width_table(model, table, "slice", WHERE)

    def counted(of, sigma: float) -> int:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            sample(of, x, sigmas=torch.tensor([sigma, 0.0]))
        return counter.get_total_flops()

    for place, share in enumerate(table.flops):
        sigma = (place + 0.5) / 4
        assert counted(narrow, sigma) / counted(model, sigma) == pytest.approx(share, abs=0.015)
    assert f"{table.flops[0]:.1%} of the FLOPs" in table.text()


def test_the_least_per_flop_go_first_and_the_strongest_stay():
    model = toy("flux")
    groups = time_groups(model, WHERE)
    scores = [{group.key: torch.rand(group.count, generator=torch.Generator().manual_seed(place + 7 * number))
               for number, group in enumerate(groups)} for place in range(3)]  # fmt: skip
    network = model.model.diffusion_model
    family = token_spec(network, WHERE).family
    cost = {group.key: unit_flops(group, network, family, 48, 5) for group in groups}
    whole = 1.6 * sum(cost[group.key] * group.count for group in groups)
    kept, flops = solved(scores, groups, cost, whole, 0.8, WHERE)
    gone, stays, counts = [], [], {group.key: group.count for group in groups}
    for place, found in enumerate(scores):
        for group in groups:
            left = kept[place].get(group.key, tuple(range(group.count)))
            assert int(found[group.key].argmax()) in left
            values = (found[group.key].square() / cost[group.key]).tolist()
            for unit, value in enumerate(values):
                if unit not in left:
                    gone.append((value, cost[group.key]))
                elif unit != int(found[group.key].argmax()):
                    stays.append((value, cost[group.key]))
        share = 1 - sum(cost[key] * (counts[key] - len(units)) for key, units in kept[place].items()) / whole
        assert share == pytest.approx(flops[place])
    assert 0.8 <= sum(flops) / 3 < 0.82
    dearest = max(cost.values())
    assert all(least >= max(value for value, _ in gone) or price >= dearest / 2 for least, price in stays)
    with pytest.raises(NodeInputError, match="target_flops"):
        solved(scores, groups, cost, 10 * whole, 0.3, WHERE)


def test_what_a_unit_adds_in_closed_form():
    """The share of each head and channel group in its layer's output, and the change of the block."""
    model, x = toy("flux"), noise(1, SIZE)
    groups = time_groups(model, WHERE)
    seen = Contributions(groups, 2)
    network = model.model.diffusion_model
    inputs = {}

    def keep(layer, args):
        inputs["x"] = args[0].clone()

    layer = network.double_blocks[0].img_mlp[2]
    handle = layer.register_forward_pre_hook(keep)
    seen.sigma = 0.9
    with seen.on(network), torch.inference_mode():
        sample(model, x, sigmas=torch.tensor([0.9, 0.0]), cfg=1.0)
    handle.remove()
    group = next(group for group in groups if group.key == ("double_blocks.0", "ffn"))
    each = layer.in_features // group.count
    parts = torch.stack([
        F.linear(inputs["x"][..., u * each : (u + 1) * each], layer.weight[:, u * each : (u + 1) * each]).norm() for u in range(group.count)
    ])  # fmt: skip
    seen.changes = {(1, one.path): [0.5] for one in groups}
    expected = 0.5 * parts / parts.square().sum().sqrt()
    torch.testing.assert_close(seen.scores(1)[group.key].float(), expected, atol=1e-5, rtol=0)
    assert not seen.scores(0)


def test_the_same_sigma_has_the_same_network():
    """Done 6: batch entries, conditions, runs; nothing is drawn. Buckets are even shares of sigma, both ends among them."""
    assert [bucket_of(sigma, 4) for sigma in (0.0, 0.2499, 0.25, 0.9, 1.0, 1.3)] == [0, 0, 1, 3, 3, 3]
    model, x = toy("flux"), noise(2, SIZE)
    table = table_of(model)
    assert table_of(model) == table
    narrow = apply_width_table(model, table, "slice", WHERE)
    together = sample(narrow, x)
    assert torch.equal(sample(narrow, x), together)
    apart = torch.cat([sample(narrow, x[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(together, apart, atol=5e-5, rtol=1e-5)


def test_error_falls_with_target_flops(tiny):
    """Done 7: mean over eight seeds. Nothing is trained to go, so distances are large."""
    from rectiflow.nodes.timestep_width import RectiflowApplyTimestepWidth, RectiflowTimestepWidthTable

    x = tiny.noise(range(8))
    plain = tiny.sample("noto cat", x, steps=3)
    given = {"model": tiny.model, "positive": tiny.conditioning("noto cat"), "negative": tiny.conditioning(""), "buckets": 4, "cfg": 3.0,
             "latent": {"samples": torch.zeros(1, 16, 16, 16)}, "seed": 0}  # fmt: skip
    errors = []
    for target in (0.5, 0.8, 1.0):
        table, text = RectiflowTimestepWidthTable().execute(**given, target_flops=target)
        assert sum(table.flops) / 4 == pytest.approx(target, abs=0.02) and "4 buckets" in text
        (model,) = RectiflowApplyTimestepWidth().execute(model=tiny.model, table=table, exec="slice")
        z = tiny.sample("noto cat", x, model=model, steps=3)
        errors.append(float(relative_errors(z, plain).mean()))
        if target == 0.8:
            (masked,) = RectiflowApplyTimestepWidth().execute(model=tiny.model, table=table, exec="mask")
            torch.testing.assert_close(tiny.sample("noto cat", x[:1], model=masked, steps=3), z[:1], atol=2e-4, rtol=0)
    assert errors == sorted(errors, reverse=True) and errors[-1] == 0.0 < errors[-2], errors


# A run's life, and other nodes


def lora_on(model, scale: float):
    """A clone with a difference on every matrix of the blocks."""
    patched = model.clone()
    weights = {name: value for name, value in model.model.named_parameters() if "_blocks." in name and value.ndim == 2}
    patches = {name: ("diff", (scale * random(*value.shape, seed=place),)) for place, (name, value) in enumerate(weights.items())}
    assert len(patched.add_patches(patches)) == len(patches)
    return patched


def test_a_lora_is_in_the_slices_before_and_behind():
    model, x = toy("flux"), noise(1, SIZE)
    table = table_of(model)
    plain = sample(apply_width_table(model, table, "slice", WHERE), x)
    before = sample(apply_width_table(lora_on(model, 0.05), table, "slice", WHERE), x)
    behind = sample(lora_on(apply_width_table(model, table, "slice", WHERE), 0.05), x)
    masked = sample(apply_width_table(lora_on(model, 0.05), table, "mask", WHERE), x)
    torch.testing.assert_close(before, behind, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(before, masked, atol=5e-5, rtol=1e-5)
    assert (before - plain).abs().max() > 1e-2
    assert torch.equal(sample(apply_width_table(model, table, "slice", WHERE), x), plain)  # the LoRA is gone with its model


def test_a_run_keeps_no_copies_and_an_interrupt_neither():
    model, x = toy("flux"), noise(1, SIZE)
    plain = sample(model, x)
    groups = time_groups(model, WHERE)
    kept = drawn(groups, "both", 1)
    narrow = with_units(model, groups, lambda sigma: (sigma > 0.5, kept), "slice", WHERE)
    states = [cell.cell_contents for wrapper in narrow.wrappers["apply_model"].values() for one in wrapper
              for cell in one.__closure__ if hasattr(cell.cell_contents, "blocks")]  # fmt: skip
    held = []

    def stop(step, *rest):
        held.append(len(states[0].blocks))
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(narrow, x, callback=stop)
    assert held == [4, 4, 4] and not states[0].blocks and not states[0].kept
    assert torch.equal(sample(model, x), plain)
    assert not any(module._forward_pre_hooks for module in model.model.diffusion_model.modules())


def test_slices_take_what_the_table_says():
    """The largest of what is held in any bucket of a run."""
    model, x = toy("flux"), noise(1, SIZE)
    table = table_of(model)
    narrow = apply_width_table(model, table, "slice", WHERE)
    states = [cell.cell_contents for wrapper in narrow.wrappers["apply_model"].values() for one in wrapper
              for cell in one.__closure__ if hasattr(cell.cell_contents, "blocks")]  # fmt: skip
    held = []

    def look(*_):
        own = {id(weight): weight for block in model.model.diffusion_model.modules() for weight in block.parameters(recurse=False)}
        made = {id(weight): weight for block in states[0].blocks.values() for weight in block.parameters() if id(weight) not in own}
        held.append(sum(weight.nbytes for weight in made.values()))

    sample(narrow, x, callback=look)
    assert max(held) == table.slice_bytes > 0 and f"{table.slice_bytes / 2**20:.1f} MiB" in table.text()


def test_two_conditions_alternate_with_training_free_calls():
    """A guider's own call outside of a run passes by sigma as well."""
    model, x = toy("sd3"), noise(1, SIZE)
    narrow = apply_width_table(model, table_of(model), "mask", WHERE)
    guider = CFGGuider(narrow)
    guider.set_conds(conditioning(5), conditioning(9, 7))
    guider.set_cfg(2.0)
    with torch.inference_mode():
        z = guider.sample(x, torch.zeros_like(x), sampler_object("heun"), torch.linspace(1, 0, 5), disable_pbar=True, seed=0)
    assert z.isfinite().all()


def test_beside_region_adaptive_sampling_slices_are_refused_and_masks_run():
    model, x = toy("flux"), noise(1, SIZE)
    table = table_of(model)
    regions = with_ras(model)[0]
    with pytest.raises(NodeInputError, match="exec"):
        sample(apply_width_table(regions, table, "slice", WHERE), x)
    assert sample(apply_width_table(regions, table, "mask", WHERE), x).isfinite().all()


def test_what_does_not_fit_is_refused():
    model, other = toy("flux"), toy("sd3")
    table = table_of(model)
    with pytest.raises(NodeInputError, match="another model"):
        apply_width_table(other, table, "slice", WHERE)
    with pytest.raises(NodeInputError, match="exec"):
        apply_width_table(model, table, "views", WHERE)
    with pytest.raises(NodeInputError, match="a table of widths"):
        apply_width_table(apply_width_table(model, table, "mask", WHERE), table, "mask", WHERE)
    with pytest.raises(NodeInputError, match="target_flops"):
        table_of(model, 0.2)
    full = groups_of(model, WHERE)
    plan = width_plan(model, {group.key: tuple(range(1, group.count)) for group in full}, full, WHERE)
    with pytest.raises(NodeInputError, match="narrower layers"):
        apply_width_table(compact_model(model, plan, WHERE), table, "mask", WHERE)
    exchanged = model.clone()
    layer = model.model.diffusion_model.double_blocks[0].img_mlp[2]
    exchanged.add_object_patch("diffusion_model.double_blocks.0.img_mlp.2", torch.nn.Linear(layer.in_features, layer.out_features))
    with pytest.raises(NodeInputError, match="another node has exchanged"):
        table_of(exchanged)


def test_functions_on_weights_ask_for_the_mask():
    """A host that is short of memory puts functions on weights when a run begins; a mask does not look at weights."""
    model, x = toy("flux"), noise(1, SIZE)
    groups = time_groups(model, WHERE)
    kept = drawn(groups, "both")
    layer = model.model.diffusion_model.double_blocks[0].img_mlp[2]

    def put(executor, *args, **kwargs):
        layer.weight_function = [lambda weight: weight]
        try:
            return executor(*args, **kwargs)
        finally:
            layer.weight_function = []

    model.add_wrapper_with_key("apply_model", "short of memory", put)  # in front of ours
    with pytest.raises(NodeInputError, match="img_mlp.2"):
        sample(with_units(model, groups, lambda sigma: (0, kept), "slice", WHERE), x)
    assert sample(with_units(model, groups, lambda sigma: (0, kept), "mask", WHERE), x).isfinite().all()
