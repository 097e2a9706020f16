"""µP on a Flux and an SD3 of a few thousand to a few million parameters: which rule each tensor gets, and that layers keep their scale."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from rectiflow.errors import NodeInputError
from rectiflow.host.embedded.ldm.flux import Flux, FluxParams
from rectiflow.host.embedded.ldm.mmdit import MMDiT, MMDiTParams
from rectiflow.tests.train.widths import initialise, shapes
from rectiflow.train.mup import measured, mup_of, slopes
from rectiflow.train.optim import Optim, Optimizers

HEAD = 16
FLUX = FluxParams(
    in_channels=4, out_channels=4, vec_in_dim=8, context_in_dim=8, hidden_size=32, mlp_ratio=4.0, num_heads=2, depth=1,
    depth_single_blocks=1, axes_dim=(4, 6, 6), theta=10000, patch_size=2, qkv_bias=True, guidance_embed=False,
)  # fmt: skip
MMDIT = MMDiTParams(
    in_channels=4, out_channels=4, patch_size=2, hidden_size=32, num_heads=2, depth=2, mlp_hidden=128, context_in_dim=8, vec_in_dim=8,
    max_positions=8,
)  # fmt: skip


def flux(width: int, device: str = "cpu") -> Flux:
    return Flux(dataclasses.replace(FLUX, hidden_size=width, num_heads=width // HEAD), dtype=torch.float32, device=device)


def mmdit(width: int, device: str = "cpu") -> MMDiT:
    sizes = dataclasses.replace(MMDIT, hidden_size=width, num_heads=width // HEAD, mlp_hidden=4 * width)
    return MMDiT(sizes, dtype=torch.float32, device=device)


def rules(build, width: int, base: int = 32):
    return mup_of(dict(build(width, "meta").named_parameters()), shapes(build(base, "meta")), shapes(build(base + HEAD, "meta")))


INPUT_WEIGHTS = {
    flux: ("img_in.weight", "txt_in.weight", "time_in.in_layer.weight", "vector_in.in_layer.weight"),
    mmdit: ("x_embedder.proj.weight", "context_embedder.weight", "t_embedder.mlp.0.weight", "y_embedder.mlp.0.weight"),
}  # fmt: skip


@pytest.mark.parametrize("build", [flux, mmdit])
def test_every_tensor_has_the_rule_that_a_hand_gives_it(build):
    """Weights of input layers by name, the last layer's weight is the output, every other matrix is hidden, vectors go with the width."""
    kinds = rules(build, 64).kinds
    for name, shape in shapes(build(64, "meta")).items():
        if name == "final_layer.linear.weight":
            expected = "output"
        elif name == "final_layer.linear.bias" or name.endswith("norm.scale") or name == "pos_embed" and 64 not in shape:
            expected = "fixed"
        elif name in INPUT_WEIGHTS[build] or len(shape) == 1:
            expected = "input"
        else:
            expected = "hidden"
        assert kinds[name] == expected, name
    assert set(kinds) == set(shapes(build(64, "meta")))


def trained(build, width: int, seed: int, mup: bool, steps: int, lr: float) -> list[dict[str, float]]:
    """Mean |x| of every block and of the answer, after each step on the same batches."""
    model = build(width)
    initialise(model, seed)
    rule = rules(build, width)
    rule = rule if mup else dataclasses.replace(rule, width=1.0)
    params = dict(model.named_parameters())
    optimizers = Optimizers(rule.optim(Optim(lr=lr, eps=1e-10, weight_decay=0.0)), params)
    draw = torch.Generator().manual_seed(99)
    found = []
    with rule.scaled(model), measured(model, lambda name: name.count(".") == 1 and "blocks." in name or name == "final_layer") as sizes:
        for _ in range(steps):
            x, target = (torch.randn((8, 4, 8, 8), generator=draw) for _ in range(2))
            sigma, context = torch.rand(8, generator=draw), torch.randn((8, 4, 8), generator=draw)
            pooled = torch.randn((8, 8), generator=draw)
            (model(x, sigma, context, pooled) - target).square().mean().backward()
            optimizers.step(1.0)
            with torch.no_grad():
                model(x, sigma, context, pooled)
            found.append(dict(sizes))
    return found


def coordinate_slopes(build, mup: bool, lr: float = 2.0**-7, steps: int = 4, seeds: int = 2) -> list[dict[str, float]]:
    """Step → layer → slope; mean |x| is a mean over seeds."""
    runs = {width: [trained(build, width, seed, mup, steps, lr) for seed in range(seeds)] for width in (32, 64, 128, 256)}
    return [
        slopes({
            width: {name: sum(run[step][name] for run in given) / seeds for name in given[0][step]} for width, given in runs.items()
        })
        for step in range(steps)
    ]  # fmt: skip


@pytest.mark.parametrize("build", [flux, mmdit])
def test_layers_keep_their_scale_at_every_width(build):
    """|slope| < .1 with µP at every step; without it the answer after one step grows with the width.

    Measured: at most .081, and .91."""
    for step, found in enumerate(coordinate_slopes(build, True)):
        assert max(abs(slope) for slope in found.values()) < 0.1, (step, found)
    assert coordinate_slopes(build, False, steps=1)[0]["final_layer"] > 0.5


def test_at_the_base_width_nothing_changes():
    rule, optim = rules(flux, 32), Optim(lr=1e-3)
    assert rule.optim(optim) == optim
    model, x = flux(32), torch.randn(1, 4, 8, 8)
    initialise(model, 0)
    torch.nn.init.normal_(model.final_layer.linear.weight)
    given = (torch.tensor([0.5]), torch.zeros(1, 2, 8), torch.zeros(1, 8))
    plain = model(x, *given)
    with rule.scaled(model):
        assert torch.equal(model(x, *given), plain)


def test_folded_weights_answer_alike_and_scaling_leaves_no_trace():
    model, x = flux(64), torch.randn(1, 4, 8, 8)
    rule = rules(flux, 64)
    assert rule.width == 2.0
    initialise(model, 0)
    torch.nn.init.normal_(model.final_layer.linear.weight)
    given = (torch.tensor([0.5]), torch.zeros(1, 2, 8), torch.zeros(1, 8))
    before = model(x, *given)
    with rule.scaled(model):
        scaled = model(x, *given)
    assert torch.equal(model(x, *given), before) and not torch.allclose(scaled, before)
    model.load_state_dict(rule.folded(model.state_dict()))
    assert torch.allclose(model(x, *given), scaled, rtol=1e-6, atol=1e-6)  # a power of two alone: the same products


def test_decay_is_that_of_the_base():
    """rate · decay of every group is lr · weight_decay; the rate of hidden matrices is lr/m."""
    model = flux(64)
    initialise(model, 0)
    rule = rules(flux, 64)
    optimizers = Optimizers(rule.optim(Optim(lr=1e-3, weight_decay=0.1)), dict(model.named_parameters()))
    optimizer = optimizers.parts[0][0]
    for group in optimizer.param_groups:
        assert group["factor"] * group["weight_decay"] == pytest.approx(0.1)
    slow = {id(value) for group in optimizer.param_groups if group["factor"] == 0.5 for value in group["params"]}
    assert slow == {id(value) for name, value in model.named_parameters() if rule.kinds[name] == "hidden"}


def test_other_models_and_optimisers_are_refused():
    with pytest.raises(NodeInputError, match="muon"):
        rules(flux, 64).optim(Optim(kind="muon"))
    with pytest.raises(NodeInputError, match="one width alone"):
        mup_of(dict(flux(64, "meta").named_parameters()), shapes(mmdit(32, "meta")), shapes(flux(48, "meta")))
    wide = shapes(flux(64, "meta")) | {"txt_in.bias": torch.Size((96,))}
    with pytest.raises(NodeInputError, match="widths of"):
        mup_of(
            {name: torch.empty(shape, device="meta") for name, shape in wide.items()}, shapes(flux(32, "meta")), shapes(flux(48, "meta"))
        )
