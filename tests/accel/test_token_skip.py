"""Skipped MLPs: what a call computes against the masked dense network, its FLOPs, and whole runs on toys of each family."""

from __future__ import annotations

import contextlib

import pytest
import torch
from rectiflow.accel.cache.binding import attach as attach_cache
from rectiflow.accel.cache.interval import IntervalReuse
from rectiflow.accel.cache.policy import Limits
from rectiflow.accel.cache.report import CacheLog
from rectiflow.accel.cache.visits import CachePlan
from rectiflow.accel.region.grid import TokenGrid
from rectiflow.accel.region.mixed_binding import GrainLog, attach_mixed_grain
from rectiflow.accel.region.mixed_grain import MixedGrain
from rectiflow.accel.region.skip_binding import RUN, SkipLog, attach_token_skip, skip_flops
from rectiflow.accel.region.token_skip import REUSES, ROUTERS, MlpStore, SkipCall, TokenSkip, scores_of
from rectiflow.errors import NodeInputError
from rectiflow.families.mlps import block_flops, chosen_sites, mlp_sites
from rectiflow.families.tokens import token_spec
from rectiflow.host.embedded.ldm.flux import Flux, FluxParams
from rectiflow.metrics.fidelity import relative_errors
from rectiflow.tests.accel.region_toys import FAMILIES, conditioning, noise, sample, toy, with_ras
from rectiflow.tests.models.small_models import random
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

WHERE = "Token-Skip MLP"
SIZE = (12, 16)  # 6 × 8 tokens
TEXT = 5


def skipping(model, **changed):
    log = SkipLog()
    return attach_token_skip(model, TokenSkip(**{"ratio": 0.5, "start": 0.0, **changed}), log, WHERE), log


def drawn(batch: int, counts: list[int] | int, seed: int = 0) -> torch.Tensor:
    """Chosen tokens (batch, 48), so many of each picture."""
    scores = torch.rand(batch, 48, generator=torch.Generator().manual_seed(seed))
    counts = [counts] * batch if isinstance(counts, int) else counts
    return torch.stack([row >= row.sort(descending=True).values[count - 1] for row, count in zip(scores, counts)])


class Direct:
    """A network of a family called without a sampler."""

    def __init__(self, family: str, batch: int = 2):
        self.model, self.family, self.batch, self.length = toy(family), family, batch, TEXT
        self.network = self.model.model.diffusion_model
        self.sites = mlp_sites(self.network, "test")
        self.given = {"context": random(batch, TEXT, 20, seed=31)}
        if family == "lumina2":
            self.given["num_tokens"] = TEXT
        else:
            self.given["y"] = random(batch, 12, seed=32)
        if family == "flux":
            self.given["guidance"] = torch.full((batch,), 4.0)
        self.x, self.time = noise(batch, SIZE, seed=3), torch.full((batch,), 0.4)

    def __call__(self, hooks=None, x=None):
        with torch.inference_mode(), hooks or contextlib.nullcontext():
            return self.network((self.x if x is None else x).clone(), self.time, **self.given)

    def skipped(self, chosen, store=None, sites=None, keys=("one",), x=None):
        even = int(chosen[0].sum()) if chosen is not None and len(set(chosen.sum(1).tolist())) == 1 else None
        call = SkipCall(self.sites if sites is None else sites, chosen, even, 48, TEXT, keys, store)
        out = self(call.on(self.network), x)
        assert call.ran == {site.path for site in call.sites} and not call.whole and not call._open
        return out

    @contextlib.contextmanager
    def masked(self, chosen: torch.Tensor, last: dict | None = None, kept: dict | None = None):
        """The dense network with every MLP's output of tokens left out replaced by `last`'s, or zero. Its hidden part is zeroed where the
        layers are shared. kept: is filled with what each MLP gives."""
        handles, chosen = [], chosen.repeat(self.batch // len(chosen), 1)

        def keep(length, text):
            mask = torch.ones(self.batch, length, dtype=torch.bool)
            mask[:, text : text + 48] = chosen
            return mask[..., None]

        for site in self.sites:
            module = self.network.get_submodule(site.path)
            if site.kind != "fused":
                def put(layer, args, out, site=site):
                    text = 0 if site.kind == "image" else self.length
                    old = torch.zeros_like(out) if last is None else last[site.path]
                    out = torch.where(keep(out.shape[1], text), out, old)
                    if kept is not None:
                        kept[site.path] = out.clone()
                    return out

                handles.append(module.register_forward_hook(put))
                continue

            def read(layer, args, out, site=site, hidden=module.mlp_hidden_dim):
                x, split = args[0], layer.in_features - hidden
                attention = torch.nn.functional.linear(x[..., :split], layer.weight[:, :split], layer.bias)
                part = torch.nn.functional.linear(x[..., split:], layer.weight[:, split:])
                old = torch.zeros_like(part) if last is None else last[site.path]
                part = torch.where(keep(x.shape[1], self.length), part, old)
                if kept is not None:
                    kept[site.path] = part.clone()
                return attention + part

            handles.append(module.linear2.register_forward_hook(read))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("counts", [20, 1, [30, 7]])
def test_gather_and_scatter_equal_the_masked_dense_network(family, counts):
    """Done 3, uneven counts in a batch included; 1e-6 of the output's own scale."""
    direct = Direct(family)
    chosen = drawn(2, counts)
    expected = direct(direct.masked(chosen))
    found = direct.skipped(chosen)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert (found - direct()).abs().max() > 1e-3
    everything = direct.skipped(torch.ones(2, 48, dtype=torch.bool))
    assert (everything - direct()).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_outputs_stand_in_for_those_left_out(family):
    """Filled by a whole call, renewed by those that run, conditions by themselves."""
    direct, store = Direct(family), MlpStore(1 << 30, WHERE)
    plain = direct()
    whole = direct.skipped(None, store, keys=("one", "two"))
    assert (whole - plain).abs().max() <= 1e-6 * plain.abs().max()
    last: dict = {}
    direct(direct.masked(torch.ones(2, 48, dtype=torch.bool), kept=last))
    for turn in range(2):
        x = direct.x + 0.2 * random(2, 16, *SIZE, seed=turn)
        chosen = drawn(1, 20, seed=turn)
        kept: dict = {}
        expected = direct(direct.masked(chosen, last, kept), x)
        found = direct.skipped(chosen, store, keys=("one", "two"), x=x)
        assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()
        last = kept
    again = direct.skipped(drawn(1, 20), store, keys=("two", "one"))  # conditions change places
    assert (again - direct.skipped(drawn(1, 20), store, keys=("one", "two"))).abs().max() > 1e-4
    assert store.peak == store.nbytes == sum(rows.nbytes for rows in store.rows.values())
    assert len(store.rows) == 2 * len(direct.sites)


def test_one_layer_in_two_is_exact_with_functions_on_its_weight():
    """What the host does to a weight at each call, such as a LoRA that is not merged, is in both parts."""
    direct = Direct("flux")
    layers = [getattr(block, name) for block in direct.network.single_blocks for name in ("linear1", "linear2")]
    for place, layer in enumerate(layers):
        added = 0.1 * random(*layer.weight.shape, seed=place)
        layer.weight_function.append(lambda weight, added=added: weight + added)
    plain = direct()
    everything = direct.skipped(torch.ones(2, 48, dtype=torch.bool))
    assert (everything - plain).abs().max() <= 2e-6 * plain.abs().max()
    for layer in layers:
        layer.weight_function.clear()
    assert (direct() - plain).abs().max() > 1e-2


@pytest.mark.parametrize("which", ["all", "single"])
def test_text_that_another_node_made_longer_is_read_off_the_blocks(which):
    """Two copies of the text, as pictures packed into one sequence have: the image's rows stand behind both."""
    direct = Direct("flux")

    def twice(given):
        return {**given, "txt": given["txt"].repeat(1, 2, 1), "txt_ids": given["txt_ids"].repeat(1, 2, 1)}

    direct.given["transformer_options"] = {"patches": {"post_input": [twice]}}
    everything = direct.sites
    if which == "single":
        direct.sites = tuple(site for site in everything if site.kind == "fused")
    direct.length = 2 * TEXT
    chosen = drawn(2, 20)
    expected = direct(direct.masked(chosen))
    beside = [site.path for site in everything if site not in direct.sites]
    call = SkipCall(direct.sites, chosen, 20, 48, TEXT, ("one",), None, beside)
    found = direct(call.on(direct.network))
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max() and not call.whole
    assert (found - direct()).abs().max() > 1e-3


def test_layers_that_are_not_plain_compute_whole_and_are_named():
    direct = Direct("flux")
    plain = direct()

    class Other(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer, self.in_features, self.out_features = layer, layer.in_features, layer.out_features

        def forward(self, x):
            return torch.addmm(self.layer.bias, x.flatten(0, 1), self.layer.weight.T).view(*x.shape[:-1], -1)

    for block in direct.network.single_blocks:
        block.linear1, block.linear2 = Other(block.linear1), Other(block.linear2)
    singles = [site for site in direct.sites if site.kind == "fused"]
    call = SkipCall(singles, drawn(2, 9), 9, 48, TEXT, ("one",), None)
    torch.testing.assert_close(direct(call.on(direct.network)), plain, atol=2e-5, rtol=0)
    assert call.whole == {site.path for site in singles} and not call.ran


def test_nothing_stays_on_the_network_after_a_failure():
    direct = Direct("flux")
    plain = direct()

    def fail(*args):
        raise RuntimeError("in the middle of a layer")

    layer = direct.network.single_blocks[0].linear1
    layer.weight_function.append(fail)
    call = SkipCall(direct.sites, drawn(2, 9), 9, 48, TEXT, ("one",), None)
    with pytest.raises(RuntimeError, match="in the middle"):
        direct(call.on(direct.network))
    layer.weight_function.clear()
    assert torch.equal(direct(), plain) and not call._open
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in direct.network.modules())


# Cost


def test_flops_of_a_block_of_dit_xl():
    """Done 4: F_attn and F_mlp in GMACs, exactly; 256 tokens of width 1152, a double block's image half without text."""
    params = FluxParams(
        in_channels=4, out_channels=4, vec_in_dim=8, context_in_dim=8, hidden_size=1152, mlp_ratio=4.0, num_heads=16, depth=1,
        depth_single_blocks=1, axes_dim=(24, 24, 24), theta=10000, patch_size=2, qkv_bias=True, guidance_embed=False,
    )  # fmt: skip
    network = Flux(params, device="meta")
    spec = token_spec(network, "test")
    for key in (("double_block", 0), ("single_block", 0)):
        attention, mlp = block_flops(network, spec, key, 256)
        assert attention / 2e9 == 1.50994944 and mlp / 2e9 == 2.717908992


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_fall_linearly_with_the_ratio_in_the_mlps_part(family):
    """As torch's counter counts them, and as the report says."""
    direct = Direct(family, 1)
    transformer, spec = direct.network, token_spec(direct.network, "test")
    counted, told = [], []
    for count in (12, 24, 36, 48):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            direct.skipped(drawn(1, count))
        counted.append(counter.get_total_flops())
        told.append(skip_flops(transformer, spec, direct.sites, 48, count, TEXT)[0])
    steps = [more - less for less, more in zip(counted, counted[1:])]
    assert len(set(steps)) == 1 and {more - less for less, more in zip(told, told[1:])} == set(map(float, steps))
    assert steps[0] == 12 * 2 * sum(site.weights for site in direct.sites)
    assert told[-1] == pytest.approx(counted[-1], rel=0.01)


# Runs


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reuse", REUSES)
def test_ratio_one_is_bit_identical(family, reuse):
    model, x = toy(family), noise(2, SIZE)
    plain = sample(model, x)
    for changed in ({"ratio": 1.0}, {"ratio": 0.99}, {"start": 0.999, "reuse": "residual_only"}):  # 0.99 of 48 tokens is all of them
        patched, log = skipping(model, **{"reuse": reuse, **changed})
        assert torch.equal(sample(patched, x), plain) and log.calls[0] == 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("reuse", REUSES)
def test_runs_skip_where_they_can(family, router, reuse):
    """Joined and split conditions, pictures of a batch by themselves, text of two lengths."""
    model, x = toy(family), noise(2, SIZE)
    patched, log = skipping(model, router=router, reuse=reuse)
    together = sample(patched, x)
    first = 2 if router == "velocity_change" else 1
    assert together.isfinite().all() and log.calls == (8 - first, first) and log.tokens == (48, 24.0) and not log.notes
    apart = torch.cat([sample(patched, x[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-5)
    assert (together - sample(model, x)).abs().max() > 1e-4
    assert sample(patched, x, tokens=(5, 8)).isfinite().all() and log.calls[0] >= 8 - first and len(log.flops) >= 1
    assert bool(log.kept_bytes) == (reuse == "cached_mlp_output")


def test_always_tokens_are_in_every_visit_and_counts_may_differ():
    model, x = toy("flux"), noise(2, SIZE)
    mask = torch.zeros(2, 6, 8)
    mask[0, :2] = 1.0
    mask[1, :1] = 1.0
    patched, log = skipping(model, always=mask, router="latent_variance")
    sample(patched, x)
    assert 24 < log.tokens[1] <= 24 + 12 and log.calls == (7, 1)
    fixed, other = skipping(model, router="latent_variance")
    sample(fixed, x)
    assert other.tokens[1] == 24


def test_steps_and_blocks_that_are_named():
    model, x = toy("flux"), noise(1, SIZE)
    patched, log = skipping(model, blocks="double:1, single", start=0.25, end=0.75)
    sample(patched, x)
    assert log.calls == (4, 4) and log.mlps == 3
    with pytest.raises(NodeInputError, match="blocks"):
        skipping(model, blocks="double:9")
    assert len(chosen_sites(toy("lumina2").model.diffusion_model, "double:1-2", "test")) == 2


def test_scores_in_closed_form():
    grid = TokenGrid((4, 4), (2, 2))
    v, before, x = (random(2, 3, 4, 4, seed=seed) for seed in range(3))
    assert scores_of("velocity_change", v, None, x, grid) is None
    for router in ROUTERS:
        found = scores_of(router, v, before, x, grid)
        for picture in range(2):
            for token in range(4):
                rows = slice(token // 2 * 2, token // 2 * 2 + 2)
                columns = slice(token % 2 * 2, token % 2 * 2 + 2)
                cells = [part[picture, :, rows, columns] for part in (v, before, x)]
                expected = {
                    "velocity_change": (cells[0] - cells[1]).norm(dim=0).mean(), "latent_variance": cells[2].var(correction=0),
                    "ras_metric": -cells[0].std(dim=0).mean(),
                }[router]  # fmt: skip
                torch.testing.assert_close(found[picture, token], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("reuse", REUSES)
def test_error_falls_with_the_ratio(tiny, reuse):
    """Done 7: mean over eight seeds."""
    x = tiny.noise(range(8))
    plain = tiny.sample("noto cat", x, steps=4)
    errors = []
    for ratio in (0.25, 0.5, 0.75, 1.0):
        model, log = skipping(tiny.model, ratio=ratio, reuse=reuse, start=0.15)
        z = tiny.sample("noto cat", x, model=model, steps=4)
        errors.append(float(relative_errors(z, plain).mean()))
        assert log.calls[0] == (2 if ratio < 1 else 0)
    assert errors == sorted(errors, reverse=True) and errors[-1] == 0.0 < errors[-2], errors


# A run's life, and other nodes


def test_a_run_leaves_nothing_behind_and_an_interrupt_too():
    model, x = toy("flux"), noise(1, SIZE)
    patched, log = skipping(model, reuse="cached_mlp_output")

    def stop(step, *rest):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(patched, x, callback=stop)
    assert RUN not in patched.model_options["transformer_options"] and log.calls == (2, 2)
    assert torch.equal(sample(patched, x), sample(patched, x))  # the same choice every time
    sample(patched, noise(2, (8, 8)))
    assert log.tokens == (16, 8.0) and log.calls == (6, 2)


def test_a_condition_that_comes_late_is_computed_whole_first():
    from rectiflow.host import CFGGuider, sampler_object

    model, x = toy("flux"), noise(1, SIZE)
    patched, log = skipping(model, reuse="cached_mlp_output", router="latent_variance")
    early = [[conditioning(5)[0][0], {**conditioning(5)[0][1], "end_percent": 0.5}]]
    late = [[conditioning(7)[0][0], {**conditioning(7)[0][1], "start_percent": 0.5}]]
    guider = CFGGuider(patched)
    guider.set_conds(early + late, conditioning(9))
    guider.set_cfg(1.0)
    with torch.inference_mode():
        z = guider.sample(x, torch.zeros_like(x), sampler_object("euler"), torch.linspace(1, 0, 9), disable_pbar=True, seed=0)
    assert z.isfinite().all() and any("computed whole" in note for note in log.notes)
    assert log.calls[0] > 0 and log.calls[1] >= 2


def test_the_cap_is_refused_with_the_size():
    model, x = toy("flux"), noise(1, SIZE)
    with pytest.raises(NodeInputError, match="max_mib"):
        sample(skipping(model, reuse="cached_mlp_output", cap=1000)[0], x)


def test_beside_ras_caches_and_mixed_grains():
    model, x = toy("flux"), noise(1, SIZE)
    regions, _ = with_ras(model)
    patched, log = skipping(regions)
    assert sample(patched, x).isfinite().all() and any("part of the tokens" in note for note in log.notes)

    def cached(target):
        return attach_cache(model, CachePlan(IntervalReuse(interval=2), target, Limits()), CacheLog(), "test")

    for target in ("output", "last_block"):
        patched, log = skipping(cached(target))
        assert sample(patched, x).isfinite().all() and 0 < sum(log.calls) <= 8
    with pytest.raises(NodeInputError, match="granularity"):
        sample(skipping(cached("modules"))[0], x)
    with pytest.raises(NodeInputError, match="mixed"):
        skipping(attach_mixed_grain(model, MixedGrain(torch.zeros(1, 6, 8), first=1), GrainLog(), "test"))
    with pytest.raises(NodeInputError, match="skip"):
        attach_mixed_grain(skipping(model)[0], MixedGrain(torch.zeros(1, 6, 8), first=1), GrainLog(), "test")
    with pytest.raises(NodeInputError, match="skip"):
        skipping(skipping(model)[0])


@pytest.mark.parametrize("changed", [{"ratio": 0.01}, {"router": "learned"}, {"reuse": "none"}, {"start": 0.6, "end": 0.5}])
def test_what_does_not_fit_is_refused(changed):
    with pytest.raises(NodeInputError, match=next(iter(changed))):
        skipping(toy("flux"), **changed)
