"""The tiny model on an embedded host, once for all tests of this folder."""

from __future__ import annotations

import pytest
import torch
from rectiflow import NODE_CLASS_MAPPINGS
from rectiflow.host import CFGGuider, prepare_noise
from rectiflow.host.embedded import HostSettings, make_host, use_host


class Noise:
    """A NOISE from a seed, as RandomNoise makes it."""

    def __init__(self, seed: int):
        self.seed = seed

    def generate_noise(self, latent):
        return prepare_noise(latent["samples"], self.seed)


class Tiny:
    def __init__(self):
        self.model, self.clip, self.vae = NODE_CLASS_MAPPINGS["RectiflowLoadTiny"]().execute()

    def prompt(self, text: str) -> list:
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))

    def guider(self, model=None, cfg: float = 1.0):
        guider = CFGGuider(model or self.model)
        guider.set_conds(self.prompt("noto cat on white"), self.prompt(""))
        guider.set_cfg(cfg)
        return guider

    def picture(self, name: str = "smiling cat") -> torch.Tensor:
        return NODE_CLASS_MAPPINGS["RectiflowExamplePicture"]().execute(picture=name)[0]

    @staticmethod
    def node(class_id: str, **inputs):
        return NODE_CLASS_MAPPINGS[class_id]().execute(**inputs)

    @staticmethod
    def empty(batch: int = 1, side: int = 8) -> dict:
        return {"samples": torch.zeros(batch, 16, side, side)}

    @staticmethod
    def noise(seed: int = 7) -> Noise:
        return Noise(seed)

    def sigmas(self, steps: int) -> torch.Tensor:
        return self.node("RectiflowUniformFlowSigmas", steps=steps, start=1.0, end=0.0)[0]


@pytest.fixture(scope="session")
def metrics_host(tmp_path_factory):
    return make_host(tmp_path_factory.mktemp("metrics"), settings=HostSettings(device="cpu", dtype="fp32"))


@pytest.fixture(scope="session")
def loaded(metrics_host):
    with use_host(metrics_host), torch.inference_mode():
        return Tiny()


@pytest.fixture
def tiny(metrics_host, loaded):
    """As a graph runs it: inside inference mode, on a host of its own."""
    with use_host(metrics_host), torch.inference_mode():
        yield loaded
