"""One host's side of the step-time measurement: `python tiny_steps.py embedded|comfyui`.

Answers each line "SIDE STEPS" on standard input with one JSON line: seconds a step of Euler sampling with the tiny model at SIDE×SIDE
pixels, prompt and empty prompt both computed (CFG 3), fp32. Both hosts build the same MODEL from the same node.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import time
from pathlib import Path

PACK = Path(__file__).resolve().parent.parent


def embedded_pack() -> str:
    from rectiflow.host.embedded import announce

    announce()
    return "rectiflow"


def comfyui_pack() -> str:
    """Import the pack as ComfyUI does: from its folder, under a name of the host's choosing."""
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    sys.argv = ["main.py", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    name = "pack_in_comfyui"
    spec = importlib.util.spec_from_file_location(name, PACK / "__init__.py", submodule_search_locations=[str(PACK)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return name


class Sampling:
    def __init__(self, pack: str):
        import torch

        self.port = importlib.import_module(f"{pack}.host")
        node = importlib.import_module(f"{pack}.nodes.tiny").RectiflowLoadTiny()
        with torch.inference_mode():
            self.model, self.clip, _ = node.execute()
            self.conds = [self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text)) for text in ("noto cat on blue", "")]
        self.torch = torch

    def seconds_per_step(self, side: int, steps: int) -> float:
        latent = self.torch.zeros(1, 16, side // 4, side // 4)
        noise = self.port.prepare_noise(latent, 0)
        guider = self.port.CFGGuider(self.model)
        guider.set_conds(*self.conds)
        guider.set_cfg(3.0)
        sigmas = self.torch.linspace(1.0, 0.0, steps + 1)
        marks: list[float] = []
        euler = self.port.sampler_object("euler")
        with self.torch.inference_mode():
            guider.sample(noise, latent, euler, sigmas, callback=lambda *_: marks.append(time.perf_counter()), disable_pbar=True)
        return (marks[-1] - marks[0]) / (len(marks) - 1)  # between callbacks, so that loading and preparing are left out


def main() -> None:
    with contextlib.redirect_stdout(sys.stderr):  # imports may print
        sampling = Sampling({"embedded": embedded_pack, "comfyui": comfyui_pack}[sys.argv[1]]())
    port = sampling.port
    print(json.dumps({"version": port.HOST_VERSION, "torch": sampling.torch.__version__, "python": sys.version.split()[0]}), flush=True)
    for line in sys.stdin:
        side, steps = (int(word) for word in line.split())
        print(json.dumps({"seconds": sampling.seconds_per_step(side, steps)}), flush=True)


if __name__ == "__main__":
    main()
