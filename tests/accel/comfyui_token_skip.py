"""Runs inside ComfyUI's Python: skipped MLPs on ComfyUI's own classes, at toy sizes with random weights; prints one JSON object.

Started by test_token_skip_in_comfyui.py with the pack's folder as its only argument.
"""

from __future__ import annotations

import importlib
import json
import sys

import torch
from comfyui_families import FALLING, TOYS, Bench, load_pack

GIVEN = {"router": "velocity_change", "blocks": "all", "start_percent": 0.0, "end_percent": 1.0, "max_mib": 64}
CHOSEN = (0, 3, 4, 9)  # of a picture's 12 tokens, in clips of each frame


def hooked(bench: Bench, call) -> torch.Tensor:
    """A whole run in which every model call has these tokens' MLPs alone."""
    model = bench.model.clone()

    def around(executor, *args, **kwargs):
        with call.on(bench.model.model.diffusion_model):
            return executor(*args, **kwargs)

    model.add_wrapper_with_key("apply_model", "test", around)
    return bench.draw(FALLING, model)


def masked(bench: Bench, sites, chosen: torch.Tensor) -> torch.Tensor:
    """The same by the dense network with outputs of the other tokens set to zero."""
    network, handles, tokens = bench.model.model.diffusion_model, [], chosen.shape[1]

    def keep(out, text):
        mask = torch.ones(out.shape[1], dtype=torch.bool)
        mask[text : text + tokens] = chosen[0]
        return out * mask[None, :, None]

    for site in sites:
        module = network.get_submodule(site.path)
        if site.kind != "fused":
            text = 0 if site.kind == "image" else bench.toy.length
            handles.append(module.register_forward_hook(lambda layer, args, out, text=text: keep(out, text)))
            continue

        def read(layer, args, out, hidden=module.mlp_hidden_dim):
            x, split = args[0], layer.in_features - hidden
            attention = torch.nn.functional.linear(x[..., :split], layer.weight[:, :split], layer.bias)
            return attention + keep(torch.nn.functional.linear(x[..., split:], layer.weight[:, split:]), bench.toy.length)

        handles.append(module.linear2.register_forward_hook(read))
    try:
        return bench.draw(FALLING)
    finally:
        for handle in handles:
            handle.remove()


def answers(name: str, node: type) -> dict:
    bench = Bench(name)
    try:
        off, _ = node().execute(model=bench.model, ratio=1.0, reuse="cached_mlp_output", **GIVEN)
    except ValueError as refusal:
        return {"refused": str(refusal), "class": type(bench.model.model.diffusion_model).__name__}
    plain = bench.draw(FALLING)
    found = {"same_off": torch.equal(bench.draw(FALLING, off), plain), "steps": len(FALLING) - 1}
    for reuse in ("residual_only", "cached_mlp_output"):
        model, report = node().execute(model=bench.model, ratio=0.5, reuse=reuse, **GIVEN)
        drawn = bench.draw(FALLING, model)
        moved = float((drawn - plain).abs().max())
        found[reuse] = {"finite": bool(drawn.isfinite().all()), "moved": moved, "calls": report.calls, "notes": report.notes,
                        "tokens": report.tokens, "mlps": report.mlps, "said": "GFLOP" in report.text()}  # fmt: skip
    parts = {part: importlib.import_module(f"pack_under_test.{part}") for part in ("families.mlps", "accel.region.token_skip")}
    sites = parts["families.mlps"].mlp_sites(bench.model.model.diffusion_model, "test")
    tokens = found["residual_only"]["tokens"][0]
    chosen = torch.zeros(1, tokens, dtype=torch.bool)
    chosen.view(1, -1, 12)[..., list(CHOSEN)] = True
    call = parts["accel.region.token_skip"].SkipCall(sites, chosen, int(chosen.sum()), tokens, bench.toy.length, ("one",), None)
    drawn, expected = hooked(bench, call), masked(bench, sites, chosen)
    found["error"] = float((drawn - expected).abs().max() / expected.abs().max())
    found["ran"] = len(call.ran) == len(sites) and not call.whole
    return found


if __name__ == "__main__":
    skip = load_pack()["RectiflowTokenSkipMLP"]
    print(json.dumps({name: answers(name, skip) for name in sys.argv[2:] or TOYS}))
