"""RF-Edit on the small trained model: what is kept, what is put back where, what is refused, and that nothing stays behind."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from rectiflow import NODE_CLASS_MAPPINGS as NODES
from rectiflow.errors import NodeInputError
from rectiflow.families.blocks import BlockLayout, block_layout, parse_blocks
from rectiflow.host import KSAMPLER, calc_cond_batch, sample_custom
from rectiflow.nodes.editing import RectiflowRFEditSampler
from rectiflow.samplers.attention_values import ValueHook
from rectiflow.samplers.feature_sharing import FeatureBank, RecordPlan, ReplayPlan, sample_rf_edit
from rectiflow.samplers.sampler_object import FlowSampler
from rectiflow.tests.models import small_models

STEPS = 4
SIGMAS = torch.linspace(1, 0, STEPS + 1)
PICTURE = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))


class Tiny:
    def __init__(self):
        self.model, self.clip, _ = NODES["RectiflowLoadTiny"]().execute()
        self.source, self.target, self.empty = (self.prompt(text) for text in ("noto cat on white", "noto dog on white", ""))

    def prompt(self, text):
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))

    def invert(self, latent=PICTURE, model=None, source=None, sigmas=SIGMAS, **options):
        options = {"solver": "rf_solver", "save_steps": 2, "blocks": "single:3-5", **options}
        inputs = {"model": model or self.model, "source": source or self.source, "latent": {"samples": latent}, "sigmas": sigmas}
        inverted, bank, consistency = NODES["RectiflowFlowInvert"]().execute(**inputs, **options)
        return inverted["samples"], bank, consistency

    def edit(self, latent, bank, target=None, cfg=2.0, model=None, sigmas=SIGMAS, **plan):
        options = {"bank": bank, "plan": ReplayPlan(**{"inject_steps": 2, **plan}), "calc_cond_batch": calc_cond_batch}
        return self.draw(latent, FlowSampler(KSAMPLER(sample_rf_edit, options), "latent"), target, cfg, model, sigmas)

    def draw(self, latent, sampler, target=None, cfg=2.0, model=None, sigmas=SIGMAS, callback=None):
        model, target = model or self.model, target or self.target
        none = torch.zeros_like(latent)
        return sample_custom(model, none, cfg, sampler, sigmas, target, self.empty, latent, callback=callback, disable_pbar=True, seed=0)


@pytest.fixture(scope="module")
def tiny():
    return Tiny()


@pytest.fixture(scope="module")
def inverted(tiny):
    return tiny.invert()[0]


def recorded(tiny, **options) -> FeatureBank:
    return tiny.invert(**options)[1]


class Spy:
    """An attention override and a block replacement that were there before ours, and what they saw."""

    def __init__(self, model):
        self.values, self.calls = [], 0
        self.model = model.clone()
        self.model.model_options["transformer_options"]["optimized_attention_override"] = self.attention
        self.model.set_model_patch_replace(self.block, "dit", "single_block", 4)

    def attention(self, func, *args, **kwargs):
        options = kwargs["transformer_options"]
        self.values.append((options["block_type"], options["block_index"], args[2].clone(), tuple(options["cond_or_uncond"])))
        return func(*args, **kwargs)

    def block(self, args, extra):
        self.calls += 1
        return extra["original_block"](args)


def test_no_steps_is_rf_solver_bit_for_bit(tiny, inverted):
    (plain,) = NODES["RectiflowRFSolverSampler"]().execute(derivative="midpoint", probe=0.01, start_from="latent")
    assert torch.equal(tiny.edit(inverted, recorded(tiny), inject_steps=0), tiny.draw(inverted, plain))
    assert torch.equal(tiny.edit(inverted, recorded(tiny), strength=0.0), tiny.draw(inverted, plain))


def test_recording_does_not_change_the_inversion_and_counts_no_more_calls(tiny, inverted):
    calls = []
    model = tiny.model.clone()
    model.set_model_unet_function_wrapper(lambda apply, args: (calls.append(1), apply(args["input"], args["timestep"], **args["c"]))[1])
    assert torch.equal(tiny.invert(save_steps=0)[0], inverted)
    assert torch.equal(tiny.invert(model=model)[0], inverted) and len(calls) == 2 * STEPS
    bank = recorded(tiny)
    calls.clear()
    tiny.edit(inverted, bank, model=model)
    assert len(calls) == 2 * STEPS and bank.remade == 0


def test_from_noise_over_an_empty_latent_is_the_same_edit(tiny, inverted):
    """The other way into the sampler: the inverted latent as NOISE through the host's own scaling, which at sigma 1 is exact."""
    (noise,) = NODES["RectiflowNoiseFromLatent"]().execute(model=tiny.model, latent={"samples": inverted}, sigma_start=1.0)
    empty = torch.zeros_like(inverted)
    inputs = {"inject_steps": 2, "match": "interval", "tokens": "all", "rows": "cond_and_uncond", "strength": 1.0, "start_from": "noise"}
    (sampler,) = RectiflowRFEditSampler().execute(features=recorded(tiny), **inputs)
    start = noise.generate_noise({"samples": empty})
    drawn = sample_custom(tiny.model, start, 2.0, sampler, SIGMAS, tiny.target, tiny.empty, empty, disable_pbar=True, seed=0)
    assert torch.equal(drawn, tiny.edit(inverted, recorded(tiny)))


def test_features_keep_more_of_the_picture(tiny, inverted):
    """More injected steps, all blocks: the edit comes ever nearer to what was inverted."""
    bank = recorded(tiny, save_steps=STEPS, blocks="double,single")
    far = [float((tiny.edit(inverted, bank, inject_steps=n) - PICTURE).square().mean()) for n in (0, 2, 4)]
    assert far[0] > far[1] > far[2]


@pytest.mark.parametrize("solver", ["rf_solver", "euler", "fireflow", "uni_inv", "heun", "fixed_point"])
def test_every_solver_records_and_replays(tiny, solver):
    z, bank, _ = tiny.invert(solver=solver)
    assert bank.values and all(len(values) == 3 for values in bank.values.values())
    plain, edited = (tiny.edit(z, bank, inject_steps=n) for n in (0, 2))
    assert torch.isfinite(edited).all() and not torch.equal(plain, edited)


def test_earlier_patches_are_kept_and_other_blocks_are_left_alone(tiny, inverted):
    bank, spy = recorded(tiny), Spy(tiny.model)
    kept = {place: dict(values) for place, values in bank.values.items()}
    tiny.edit(inverted, bank, model=spy.model, inject_steps=1)
    seen, count = spy.values, 9  # attentions an evaluation: 3 double and 6 single blocks
    assert len(seen) == 2 * STEPS * count and spy.calls == 2 * STEPS
    plain = Spy(tiny.model)
    tiny.edit(inverted, bank, model=plain.model, inject_steps=0)
    for (kind, number, v, kinds), (_, _, fresh, _) in zip(seen[:count], plain.values[:count]):
        if kind == "single" and number >= 3:
            assert kinds == (1, 0) and v.shape[0] == 2
            assert all(torch.equal(row, kept[STEPS - 1, "first"]["single_block", number][0]) for row in v)
            assert not torch.equal(v, fresh)
        else:
            assert torch.equal(v, fresh), (kind, number)


def test_rows_and_strength(tiny, inverted):
    plain, spy = Spy(tiny.model), Spy(tiny.model)
    tiny.edit(inverted, recorded(tiny), model=plain.model, inject_steps=0)
    bank = recorded(tiny, blocks="single:3")
    kept = bank.values[STEPS - 1, "first"]["single_block", 3].clone()
    tiny.edit(inverted, bank, model=spy.model, inject_steps=1, rows="cond", strength=0.25)
    fresh, mixed = plain.values[6][2], spy.values[6][2]
    assert mixed.shape[0] == 2 and torch.equal(mixed[0], fresh[0])  # the negative prompt comes first in the batch
    assert torch.allclose(mixed[1], fresh[1] + 0.25 * (kept[0] - fresh[1]), atol=1e-6)


def test_conditions_joined_or_split_give_the_same_edit(tiny, inverted, monkeypatch):
    joined = tiny.edit(inverted, recorded(tiny))
    monkeypatch.setattr(tiny.model.model, "memory_required", lambda *args, **kwargs: 1e30)
    split = tiny.edit(inverted, recorded(tiny))
    assert torch.allclose(joined, split, atol=1e-4)  # sums of another batch size; the guidance of 2 and 4 steps enlarge them


def test_one_picture_serves_a_batch_and_batches_keep_their_rows(tiny):
    pair = torch.cat([PICTURE, PICTURE.flip(-1)])
    z, bank, _ = tiny.invert(pair)
    edited = tiny.edit(z, bank)
    for row in range(2):
        one_z, one, _ = tiny.invert(pair[row : row + 1])
        assert torch.allclose(edited[row : row + 1], tiny.edit(one_z, one), atol=1e-4)
    twice = tiny.edit(z[:1].repeat(2, 1, 1, 1), recorded(tiny))
    assert torch.allclose(twice[0], twice[1], atol=1e-5)
    with pytest.raises(NodeInputError, match="latent"):
        tiny.edit(z[:1], bank)


@pytest.mark.parametrize("store", ["cpu", "device"])
def test_memory_is_stated_capped_and_what_is_missing_made_again(tiny, inverted, store, caplog):
    caplog.set_level("INFO")
    whole = recorded(tiny, store=store)
    tokens, width = 8 + 16, 256
    assert whole.nbytes == tokens * width * 4 * 3 * 4  # float32, 3 blocks, 2 steps of 2 evaluations
    size = whole.nbytes
    assert f"{size / 2**20:.1f} MiB on {store}" in caplog.text
    held = tiny.edit(inverted, whole)
    capped = recorded(tiny, store=store, max_gib=size / 3 / 2**30)
    assert 0 < capped.nbytes <= size / 3
    assert torch.equal(tiny.edit(inverted, capped), held) and capped.remade == 3


def test_a_run_frees_the_bank_and_a_cached_inversion_still_edits(tiny, inverted):
    bank = recorded(tiny)
    alive = [weakref.ref(v) for values in bank.values.values() for v in values.values()]
    first = tiny.edit(inverted, bank)
    gc.collect()
    assert bank.nbytes == 0 and not any(ref() is not None for ref in alive)
    assert torch.equal(tiny.edit(inverted, bank), first) and bank.remade == 4


@pytest.mark.parametrize("step", range(STEPS))
def test_interrupts_leave_no_bank(tiny, inverted, step, monkeypatch):
    banks = []
    release = FeatureBank.release
    monkeypatch.setattr(FeatureBank, "release", lambda self: (banks.append(self), release(self)))

    def interrupt(at, *rest):
        if at == step:
            raise KeyboardInterrupt

    monkeypatch.setattr("rectiflow.host.embedded.port.prepare_callback", lambda *args: interrupt)
    with pytest.raises(KeyboardInterrupt):
        tiny.invert()
    monkeypatch.undo()
    assert banks[0].nbytes == 0
    bank = recorded(tiny)
    (sampler,) = RectiflowRFEditSampler().execute(
        features=bank, inject_steps=2, match="interval", tokens="all", rows="cond", strength=1.0
    )
    with pytest.raises(KeyboardInterrupt):
        tiny.draw(inverted, sampler, callback=interrupt)
    assert bank.nbytes == 0


@pytest.mark.parametrize("call", range(2 * STEPS))
def test_a_fault_in_any_model_call_leaves_no_bank(tiny, inverted, call, monkeypatch):
    """Out of memory, or a request to stop between two blocks, at the first and the second evaluation of every step."""
    banks, calls = [], []
    release = FeatureBank.release
    monkeypatch.setattr(FeatureBank, "release", lambda self: (banks.append(self), release(self)))
    model = tiny.model.clone()

    def fail(executor, *args, **kwargs):
        calls.append(1)
        if len(calls) == call + 1:
            raise MemoryError
        return executor(*args, **kwargs)

    model.add_wrapper_with_key("apply_model", "fail", fail)
    with pytest.raises(MemoryError):
        tiny.invert(model=model)
    assert banks[0].nbytes == 0
    bank = recorded(tiny)
    calls.clear()
    with pytest.raises(MemoryError):
        tiny.edit(inverted, bank, model=model)
    assert bank.nbytes == 0


def longer(conditioning):
    return [[torch.cat([tokens, tokens[:, -2:]], dim=1), options] for tokens, options in conditioning]


def test_prompts_of_unequal_length(tiny, inverted):
    with pytest.raises(NodeInputError, match="tokens.*24 tokens kept, 26"):
        tiny.edit(inverted, recorded(tiny), target=longer(tiny.target), cfg=1.0)
    edited = tiny.edit(inverted, recorded(tiny), target=longer(tiny.target), cfg=1.0, tokens="image_only")
    assert torch.isfinite(edited).all()


def test_what_does_not_fit_is_refused(tiny, inverted):
    bank = recorded(tiny)
    with pytest.raises(NodeInputError, match="inject_steps.*3; allowed: 0 to 2"):
        tiny.edit(inverted, bank, inject_steps=3)
    for sigmas in (torch.linspace(1, 0, STEPS + 2), torch.linspace(0.9, 0, STEPS + 1)):
        with pytest.raises(NodeInputError, match="sigmas.*the inversion's own schedule"):
            tiny.edit(inverted, bank, sigmas=sigmas)
    with pytest.raises(NodeInputError, match="features of another model"):
        tiny.edit(inverted, bank, model=Tiny().model)
    with pytest.raises(NodeInputError, match="latent"):
        tiny.edit(torch.cat([inverted, inverted], dim=-1), bank)
    with pytest.raises(NodeInputError, match="source.*more than one condition"):
        tiny.invert(source=tiny.source + tiny.target)
    with pytest.raises(NodeInputError, match="single:20-37.*single:0-5"):
        tiny.invert(blocks="single:20-37")
    with pytest.raises(NodeInputError, match="save_steps"):
        tiny.invert(save_steps=STEPS + 1)


def test_a_block_that_another_node_skips_is_named(tiny):
    model = tiny.model.clone()
    model.set_model_patch_replace(lambda args, extra: {"img": args["img"]}, "dit", "single_block", 4)
    with pytest.raises(NodeInputError, match="blocks.*single:4, which no attention"):
        tiny.invert(model=model)


def test_places_that_match():
    """4 steps; the edit's step 0 is interval 3. Released rule: same place of the same interval, one step older at the first place."""
    bank = FeatureBank(RecordPlan(save_steps=2), "rf_solver")
    bank.sigmas = SIGMAS.flip(0)
    bank.states = dict.fromkeys([(2, "first"), (2, "mid"), (3, "first"), (3, "mid")])
    assert [bank.find(step, stage, "interval") for step in (0, 1) for stage in ("first", "mid")] == [
        (3, "first"), (3, "mid"), (2, "first"), (2, "mid"),
    ]  # fmt: skip
    assert [bank.find(step, stage, "exact_sigma") for step in (0, 1) for stage in ("first", "mid")] == [
        None, (3, "mid"), (3, "first"), (2, "mid"),
    ]  # fmt: skip
    bank.states = dict.fromkeys([(2, "last"), (3, "last")])  # uni_inv: its upper ends are Euler's starting points on the way back
    assert [bank.find(step, "first", match) for step in (0, 1) for match in ("interval", "exact_sigma")] == [
        (3, "last"), (3, "last"), (2, "last"), (2, "last"),
    ]  # fmt: skip


LAYOUT = BlockLayout("Flux", {"double": 3, "single": 6}, "first")


@pytest.mark.parametrize(("text", "blocks"), [
    ("single:4-5", [("single_block", 4), ("single_block", 5)]),
    ("single:4-, double:0", [("double_block", 0), ("single_block", 4), ("single_block", 5)]),
    ("double,double:1", [("double_block", n) for n in range(3)]),
])
def test_block_ranges(text, blocks):
    assert list(parse_blocks(text, LAYOUT, "node")) == blocks


@pytest.mark.parametrize(
    "text", ["", "single:6", "single:5-4", "single:0-6", "joint:1", "single:-1", "single:1 2", "single:²", "double:9999999999"]
)
def test_block_ranges_that_are_refused(text):
    with pytest.raises(NodeInputError, match="double:0-2, single:0-5"):
        parse_blocks(text, LAYOUT, "node")


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_the_hook_meets_joint_attention_of_each_family(family):
    """Values, axis and text tokens are what the network has; the second attention of SD 3.5's first block is left alone."""
    network, given = small_models.MODELS[family](), small_models.inputs(family)
    assert family != "sd3" or network.joint_blocks[0].x_block.x_block_self_attn
    layout = block_layout(network, "test")
    blocks = parse_blocks("double", layout, "test")
    seen = []

    def read(visit):
        seen.append((visit.key, visit.v.shape[visit.axis], visit.text, visit.parts()))

    def run(on_values):
        hook = ValueHook(blocks, on_values)
        options = {**hook.options(None)["transformer_options"], "cond_or_uncond": [1, 0]}
        out = network(**given, transformer_options=options)
        hook.check("test")
        return out

    plain = network(**given)
    assert torch.equal(run(read), plain) and not torch.equal(run(lambda visit: torch.zeros_like(visit.v)), plain)
    tokens = 5 + 3 * 4
    assert seen == [(key, tokens, 5, [(1, slice(0, 1)), (0, slice(1, 2))]) for key in blocks]


def test_a_model_without_known_blocks_is_refused():
    with pytest.raises(NodeInputError, match="Linear.*Flux"):
        block_layout(torch.nn.Linear(1, 1), "node")
