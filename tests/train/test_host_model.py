"""The trainer on a host's MODEL: what it does to it, what it hands out, and that the host's own loader takes it."""

from __future__ import annotations

import json

import pytest
import torch
from rectiflow.errors import NodeInputError
from rectiflow.host import CFGGuider, InterruptProcessingException, load_lora_for_models
from rectiflow.host.embedded import HostSettings, make_host, use_host
from rectiflow.nodes.training import (
    RectiflowFeatureLoss,
    RectiflowLatentDataset,
    RectiflowTrain,
    RectiflowTrainParams,
    RectiflowTrainTarget,
)
from rectiflow.tests.contract.tiny_runs import TinyRuns
from rectiflow.train.host_model import checkpoint_blocks, train_inside, trainable_weights
from rectiflow.train.params import ParamSubset, attach

FAST = {"dtype": "fp32", "checkpointing": False, "ema": 0.0, "validate_every": 0, "save_every": 0}


def data(tiny, count: int = 2):
    latents = torch.randn((count, 16, 16, 16), generator=torch.Generator().manual_seed(3)) * 0.5
    return RectiflowLatentDataset().execute(latents={"samples": latents}, positive=tiny.conditioning("noto cat on white"))[0]


def params(**changed):
    plain = {"kind": "lora", "rank": 4, "alpha": 0.0, "blocks": "", "include": "", "exclude": ""}
    return RectiflowTrainParams().execute(**{**plain, **changed})[0]


def weights_of(model) -> dict:
    return {name: value.clone() for name, value in model.model.state_dict().items()}


def velocity_of(model, tiny) -> torch.Tensor:
    return tiny.sample("noto cat on white", tiny.noise([1]), model=model, steps=3, cfg=1.0)


def test_with_required_inputs_alone_it_trains_a_lora(tiny):
    """As a graph does it: in inference mode, with nothing but model and data."""
    before = weights_of(tiny.model)
    plain = velocity_of(tiny.model, tiny)
    with torch.inference_mode():
        model, lora, losses, curve, previews, report, step = RectiflowTrain().execute(model=tiny.model, data=data(tiny), steps=3)
    assert step == 3 and len(losses["loss"]) == 3 and all(map(lambda loss: 0.0 < loss < 10.0, losses["loss"]))
    assert json.loads(report)["parameters"] == sum(value.numel() for name, value in lora.items() if "alpha" not in name)
    assert not torch.equal(velocity_of(model, tiny), plain)
    assert torch.equal(velocity_of(tiny.model, tiny), plain), "something of the run hangs on the shared network"
    after = weights_of(tiny.model)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(getattr(layer, "weight_function", []) for layer in tiny.model.model.modules())


def test_a_second_run_trains_nothing_and_more_steps_go_on(tiny):
    first = RectiflowTrain().execute(model=tiny.model, data=data(tiny), steps=2, **FAST)
    assert RectiflowTrain.IS_CHANGED(name="run") == 2
    again = RectiflowTrain().execute(model=tiny.model, data=data(tiny), steps=2, **FAST)
    assert again[2] == first[2] and all(torch.equal(value, again[1][name]) for name, value in first[1].items())
    velocity_of(again[0], tiny)  # leaves the LoRA merged into the network that both share
    more = RectiflowTrain().execute(model=tiny.model, data=data(tiny), steps=3, **FAST)
    assert more[6] == 3 and more[2]["loss"][:2] == first[2]["loss"]


@pytest.mark.parametrize("chosen", [{"alpha": 2.0}, {"kind": "blocks", "blocks": "single:4-"}, {"kind": "biases"}])
def test_the_stock_loader_gives_what_was_trained(chosen, tiny):
    """The file read back, against the adapters in memory in the forward of training itself: 1e-5 in fp32."""
    lora = RectiflowTrain().execute(model=tiny.model, data=data(tiny), steps=2, params=params(**chosen), **FAST)[1]
    from rectiflow.host import get_output_directory
    from safetensors.torch import load_file

    file = load_file(f"{get_output_directory()}/rf_train/run/lora.safetensors")
    loaded = load_lora_for_models(tiny.model, None, file, 1.0, 0.0)[0]
    patcher = tiny.model.clone()
    additions = attach(patcher, params(**chosen), 0, "test")
    with torch.no_grad():
        for key, module in additions.modules.items():
            layer = f"diffusion_model.{key.rsplit('.', 1)[0]}"
            if hasattr(module, "up"):
                module.up.copy_(lora[f"{layer}.lora_up.weight"])
                module.down.copy_(lora[f"{layer}.lora_down.weight"])
            else:
                module.difference.copy_(lora[f"{layer}.{module.name}"])
    with torch.no_grad():
        wrapped = velocity_of(patcher, tiny)
    patcher.detach()
    relative = (velocity_of(loaded, tiny) - wrapped).norm() / wrapped.norm()
    assert relative < 1e-5


def test_in_bf16_the_stock_loader_gives_what_was_trained(tiny, tmp_path):
    """Both add Δ to W in fp32 and round the sum once. bf16 itself takes some thousandths from the network, the LoRA changes far more."""
    host = make_host(tmp_path, settings=HostSettings(device="cpu", dtype="bf16"))
    with use_host(host), torch.inference_mode(False):
        half = TinyRuns(host)
        patcher = half.model.clone()
        additions = attach(patcher, ParamSubset(rank=4), 0, "test")
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for module in additions.modules.values():
                module.up.copy_(0.02 * torch.randn(module.up.shape, generator=draw))
            wrapped, plain = velocity_of(patcher, half), velocity_of(half.model, half)
        patcher.detach()
        loaded = velocity_of(load_lora_for_models(half.model, None, additions.export(additions.params()), 1.0, 0.0)[0], half)
        half.model.detach()
    full = velocity_of(tiny.model, tiny)
    rounding, change = (plain - full).norm() / full.norm(), (wrapped - plain).norm() / plain.norm()
    assert (loaded - wrapped).norm() / wrapped.norm() < 1e-3 < rounding and change > 3 * rounding


def gradients(tiny, checkpointing: bool) -> dict[str, torch.Tensor]:
    found = {}
    with torch.inference_mode(False):
        patcher = tiny.model.clone()
        trainable_weights(patcher)
        additions = attach(patcher, ParamSubset(rank=2), 0, "test")
        with torch.no_grad():
            for module in additions.modules.values():
                module.up.fill_(0.01)
        if checkpointing:
            assert checkpoint_blocks(patcher) == 9
        guider = CFGGuider(patcher)
        guider.set_conds(tiny.conditioning("noto cat on white"), tiny.conditioning(""))
        x = torch.randn((2, 16, 16, 16), generator=torch.Generator().manual_seed(0))

        def body(trainee):
            trainee.velocity(x, torch.tensor([0.3, 0.8]), [0, None]).square().mean().backward()
            found.update({name: value.grad.clone() for name, value in trainee.params().items()})

        train_inside(guider, x[:1], additions, {}, body)
        patcher.detach()
    return found


def test_recomputing_blocks_changes_no_gradient(tiny):
    kept, recomputed = gradients(tiny, False), gradients(tiny, True)
    assert kept.keys() == recomputed.keys() and len(kept) > 100
    for name, value in kept.items():
        assert torch.allclose(value, recomputed[name], rtol=1e-6, atol=1e-9), name


def test_the_default_loss_is_the_cores_up_to_sigma_squared(tiny):
    """σ²·‖v − u‖² = ‖denoised − x0‖² at the same x, z and σ."""
    x0, z = torch.randn((2, 1, 16, 16, 16), generator=torch.Generator().manual_seed(0)).double().float()
    for sigma in (0.1, 0.5, 0.9):
        x = (1.0 - sigma) * x0 + sigma * z
        errors = {}
        guider = CFGGuider(tiny.model)
        guider.set_conds(tiny.conditioning("noto cat on white"), tiny.conditioning(""))

        def body(trainee, x=x, sigma=sigma, errors=errors):
            errors["velocity"] = trainee.velocity(x, torch.tensor([sigma]), [0]) - (z - x0)
            inputs = {name: value.concat([]) for name, value in trainee.positive[0].items()}
            errors["denoised"] = trainee.model.apply_model(x, torch.tensor([sigma]), **inputs, transformer_options={}) - x0

        with torch.no_grad():
            train_inside(guider, x0, None, {}, body)
        ours, core = (float(errors[name].detach().square().mean()) for name in ("velocity", "denoised"))
        assert sigma**2 * ours == pytest.approx(core, rel=1e-5)  # fp32 rounding of a difference of two latents


def test_previews_are_shown_while_it_trains_and_kept_as_files(tiny, monkeypatch):
    from pathlib import Path

    from PIL import Image
    from rectiflow import host as port

    shown = []

    class Bar:
        def __init__(self, total):
            pass

        def update_absolute(self, value, total, preview):
            shown.append((value, preview[1].size))

    monkeypatch.setattr(port, "ProgressBar", Bar, raising=False)
    inputs = {"steps": 1, "vae": tiny.vae, "preview_every": 1, **FAST}
    previews = RectiflowTrain().execute(model=tiny.model, data=data(tiny), **inputs)[4]
    folder = Path(port.get_output_directory()) / "rf_train" / "run"
    files = sorted(folder.glob("preview-*.png"))
    assert [file.name for file in files] == ["preview-000001-0.png", "preview-000001-1.png"] and previews.shape == (2, 64, 64, 3)
    with Image.open(files[1]) as kept:
        pixels = torch.frombuffer(bytearray(kept.tobytes()), dtype=torch.uint8).view(64, 64, 3) / 255.0
    assert (pixels - previews[1].clamp(0, 1)).abs().max() < 1 / 255
    assert shown[-1] == (1, (640, 360 + 160))


def test_an_interrupt_leaves_a_checkpoint_and_no_hooks(tiny, monkeypatch):
    calls = []

    def interrupt():
        calls.append(1)
        if len(calls) == 3:
            raise InterruptProcessingException()

    from rectiflow import host as port

    plain = velocity_of(tiny.model, tiny)
    with monkeypatch.context() as patched:
        patched.setattr(port, "throw_if_interrupted", interrupt, raising=False)
        with pytest.raises(InterruptProcessingException):
            RectiflowTrain().execute(model=tiny.model, data=data(tiny), steps=5, **FAST)
    assert torch.equal(velocity_of(tiny.model, tiny), plain)
    done = RectiflowTrain().execute(model=tiny.model, data=data(tiny), steps=5, **FAST)
    assert done[6] == 5
    whole = RectiflowTrain().execute(model=tiny.model, data=data(tiny), steps=5, name="whole", **FAST)
    assert done[2] == whole[2] and all(torch.equal(value, whole[1][name]) for name, value in done[1].items())


def test_the_own_model_as_teacher_is_answered_without_error(tiny):
    """A LoRA that starts at zero is the model: its distance from itself is rounding."""
    target = following(tiny.model)
    losses = RectiflowTrain().execute(model=tiny.model, data=data(tiny), steps=1, target=target, **FAST)[2]["loss"]
    assert losses[0] < 1e-9


def following(teacher):
    inputs = {"kind": "teacher_velocity", "teacher_cfg": 1.0, "anneal_steps": 0, "annealing": "linear"}
    return RectiflowTrainTarget().execute(**inputs, teacher=teacher)[0]


def test_a_teacher_on_the_same_network_does_not_learn_with_the_student(tiny):
    """After a step on data the student has left its teacher, although both are one network."""
    RectiflowTrain().execute(model=tiny.model, data=data(tiny), steps=2, **FAST)
    RectiflowTrain().execute(model=tiny.model, data=data(tiny), steps=2, **FAST)  # nothing to do
    from pathlib import Path

    from rectiflow.host import get_output_directory

    folder = Path(get_output_directory()) / "rf_train" / "run"
    for file in folder.glob("step-*.json"):  # the same run goes on with another target, as a recipe of two stages would
        file.write_text(file.read_text().replace('"kind": "velocity"', '"kind": "teacher_velocity"'))
    target = following(tiny.model)
    losses = RectiflowTrain().execute(model=tiny.model, data=data(tiny), steps=3, target=target, **FAST)[2]["loss"]
    assert losses[2] > 1e-4


def test_a_teacher_with_other_weights_on_the_same_network_is_refused(tiny):
    learnt = RectiflowTrain().execute(model=tiny.model, data=data(tiny), steps=1, **FAST)[0]
    with pytest.raises(NodeInputError, match="other weight patches"):
        RectiflowTrain().execute(model=tiny.model, data=data(tiny), steps=1, name="b", target=following(learnt), **FAST)


def test_features_of_the_same_model_are_no_distance_and_weight_zero_is_off(tiny):
    inputs = {"teacher": tiny.model, "blocks": "double, single:5", "teacher_blocks": "", "start": 0, "stop": 1000, "every": 1}
    plain = RectiflowTrain().execute(model=tiny.model, data=data(tiny), steps=2, name="plain", **FAST)[2]["loss"]
    runs = {}
    for weight in (0.0, 1.0):
        aux = RectiflowFeatureLoss().execute(weight=weight, **inputs)[0]
        made = RectiflowTrain().execute(model=tiny.model, data=data(tiny), steps=2, name=f"w{weight:g}", features=aux, **FAST)
        runs[weight] = made[2]["loss"]
    assert runs[0.0] == plain
    assert runs[1.0][0] == pytest.approx(plain[0], rel=1e-6) and runs[1.0][1] > plain[1]


@pytest.mark.parametrize("chosen", [{"include": "nothing"}, {"include": "("}, {"blocks": "single:9"}, {"blocks": "triple"}])
def test_choices_that_match_nothing_are_refused(chosen, tiny):
    with pytest.raises(NodeInputError):
        RectiflowTrain().execute(model=tiny.model, data=data(tiny), steps=1, params=params(**chosen), **FAST)


@pytest.mark.parametrize("name", ["../up", "", "a/b", ".hidden", "x" * 81, "nul\0", "trailing "])
def test_names_that_are_no_folder_are_refused(name, tiny):
    with pytest.raises(NodeInputError, match="name"):
        RectiflowTrain().execute(model=tiny.model, data=data(tiny), steps=1, name=name, **FAST)


def test_bad_data_is_refused(tiny):
    broken = torch.zeros(2, 16, 16, 16)
    broken[1, 0, 0, 0] = float("nan")
    prompt = tiny.conditioning("noto cat on white")
    with pytest.raises(NodeInputError, match="example 1"):
        RectiflowLatentDataset().execute(latents={"samples": broken}, positive=prompt)
    with pytest.raises(NodeInputError, match="3 prompts"):
        RectiflowLatentDataset().execute(latents={"samples": torch.zeros(2, 16, 16, 16)}, positive=prompt * 3)
    four = RectiflowLatentDataset().execute(latents={"samples": torch.zeros(1, 4, 16, 16)}, positive=prompt)[0]
    with pytest.raises(NodeInputError, match="4 channels"):
        RectiflowTrain().execute(model=tiny.model, data=four, steps=1, **FAST)
