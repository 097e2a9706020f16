"""Networks of two layers for tests that change weights."""

from __future__ import annotations

import torch
from rectiflow.host.embedded.ldm import ops
from rectiflow.host.embedded.model_patcher import ModelPatcher

CPU = torch.device("cpu")


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = ops.Linear(3, 2)
        self.other = ops.Linear(3, 2)
        for parameter in self.parameters():
            parameter.data.fill_(1.0)
        self.model_sampling = "original"
        self.manual_cast_dtype = None
        self.current_patcher = None

    def get_dtype(self):
        return torch.float32


def patcher(**kwargs) -> ModelPatcher:
    return ModelPatcher(Net(), CPU, CPU, **kwargs)


def load(model: ModelPatcher) -> ModelPatcher:
    model.partially_load(CPU, 1e32)
    return model
