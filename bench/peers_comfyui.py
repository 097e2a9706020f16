"""ComfyUI's side of bench/peers.py: answers each order, one line of JSON, with the latent and the seconds of its sampling.

An order has the prompt, the noise, the sigmas and `make`: null for the plain model, or a node's name and its inputs. EasyCache and
LazyCache are ComfyUI's own nodes; a Rectiflow node comes from this pack, imported as ComfyUI imports it.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time

from tiny_steps import Sampling, comfyui_pack


class Cached(Sampling):
    def __init__(self):
        self.name = comfyui_pack()
        super().__init__(self.name)
        self.pack = sys.modules[self.name]
        self.calls = 0

    def with_cache(self, make: dict | None):
        """(MODEL, report or None)."""
        if make is None:
            return self.model, None
        inputs = {name: value for name, value in make.items() if name != "node"}
        if make["node"].startswith("Rectiflow"):
            node = self.pack.NODE_CLASS_MAPPINGS[make["node"]]
            return node().execute(model=self.model, **_with_defaults(node, inputs))
        from comfy_extras import nodes_easycache

        node = {"EasyCache": nodes_easycache.EasyCacheNode, "LazyCache": nodes_easycache.LazyCacheNode}[make["node"]]
        return node.execute(self.model, verbose=False, **inputs).result[0], None

    def answer(self, order: dict) -> dict:
        torch = self.torch
        model, _ = self.with_cache(order["make"])
        noise = torch.tensor(order["noise"])
        guider = self.port.CFGGuider(model)
        guider.set_conds(self.clip.encode_from_tokens_scheduled(self.clip.tokenize(order["prompt"])), self.conds[1])
        guider.set_cfg(3.0)
        counted = self.model.get_model_object("diffusion_model").double_blocks[1].register_forward_hook(self._count)
        self.calls, start = 0, time.process_time()
        try:
            with torch.inference_mode():
                euler, sigmas = self.port.sampler_object("euler"), torch.tensor(order["sigmas"])
                latent = guider.sample(noise, torch.zeros_like(noise), euler, sigmas, disable_pbar=True, seed=0)
        finally:
            counted.remove()
        seconds = time.process_time() - start
        return {"latent": latent.tolist(), "seconds": seconds, "calls": self.calls, "asked": 2 * (len(order["sigmas"]) - 1)}

    def _count(self, _module, _inputs, outputs) -> None:
        self.calls += outputs[0].shape[0]


def _with_defaults(node, inputs: dict) -> dict:
    """A node's own defaults under what the order sets; a combo's default is its first choice."""
    found = {}
    for name, (kind, *options) in node.INPUT_TYPES()["required"].items():
        if name != "model":
            found[name] = kind[0] if isinstance(kind, (list, tuple)) else (options[0] if options else {}).get("default")
    return found | inputs


def main() -> None:
    with contextlib.redirect_stdout(sys.stderr):
        sampling = Cached()
    print(json.dumps({"version": sampling.port.HOST_VERSION}), flush=True)
    for line in sys.stdin:
        with contextlib.redirect_stdout(sys.stderr):
            answer = sampling.answer(json.loads(line))
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
