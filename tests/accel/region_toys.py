"""Small transformers of each family as MODELs, and a call of them over a chosen set of tokens."""

from __future__ import annotations

import torch
from rectiflow.accel.region.binding import RUN, attach
from rectiflow.accel.region.plan import KVOptions, RegionPlan
from rectiflow.accel.region.report import RegionLog
from rectiflow.accel.region.run import RegionRun, RunShape
from rectiflow.families.tokens import token_spec
from rectiflow.host import CFGGuider, sampler_object
from rectiflow.host.embedded import sd
from rectiflow.tests.models import small_models

FAMILIES = ("flux", "sd3", "lumina2")
SIZE = (6, 8)


def toy(family: str):
    """A MODEL with random weights. Flux: 2 double and 2 single blocks; SD3: 4 blocks, the first with two attentions; NextDiT: 4 layers."""
    sizes = {"flux": {}, "sd3": {"depth": 4}, "lumina2": {"n_layers": 4}}[family]
    return sd.load_diffusion_model_state_dict(small_models.MODELS[family](**sizes).state_dict())


def conditioning(seed: int, tokens: int = 5) -> list:
    return [[small_models.random(1, tokens, 20, seed=seed), {"pooled_output": small_models.random(1, 12, seed=seed + 1)}]]


def with_ras(model, log: RegionLog | None = None, kv: str = "full", **changed):
    """(MODEL, RegionLog); dense for two steps, then half of the tokens."""
    log = RegionLog() if log is None else log
    options = {name: changed.pop(name) for name in ("dtype", "device", "cap") if name in changed}
    plan = RegionPlan(**{"start": 2, "resets": (), **changed}, kv=KVOptions(kv, **options))
    return attach(model, plan, log, "RAS test"), log


def sample(
    model, noise, *, steps=8, cfg=3.0, sampler="euler", sigmas=None, mask=None, callback=None, positive=None, tokens=(5, 5), latent=None
):
    guider = CFGGuider(model)
    guider.set_conds(positive or conditioning(5, tokens[0]), conditioning(9, tokens[1]))
    guider.set_cfg(cfg)
    sigmas = torch.linspace(1.0, 0.0, steps + 1) if sigmas is None else sigmas
    latent = torch.zeros_like(noise) if latent is None else latent
    with torch.inference_mode():
        return guider.sample(
            noise, latent, sampler_object(sampler), sigmas, denoise_mask=mask, callback=callback, disable_pbar=True, seed=0
        )  # fmt: skip


def noise(batch: int = 1, size: tuple[int, int] = SIZE, seed: int = 3) -> torch.Tensor:
    return small_models.random(batch, 16, *size, seed=seed)


class OneVisit:
    """One model call at one sigma with chosen tokens, without a guider: what a test compares token by token."""

    def __init__(self, family: str, batch: int = 1, conditions: int = 1, size: tuple[int, int] = SIZE, kv: str = "full", **options):
        self.model = toy(family)
        self.spec = token_spec(self.model.get_model_object("diffusion_model"), "test")
        self.attached, _ = with_ras(self.model, kv=kv, **options)
        self.attached.patch_model()
        self.conditions, self.batch = conditions, batch
        self.x = noise(batch, size, seed=21).repeat(conditions, 1, 1, 1)
        rows = batch * conditions
        self.given = {"c_crossattn": small_models.random(rows, 5, 20, seed=31)}
        if family != "lumina2":
            self.given["y"] = small_models.random(rows, 12, seed=32)
        else:
            self.given["num_tokens"] = 5
        if family == "flux":
            self.given["guidance"] = torch.full((rows,), 4.0)
        plan = RegionPlan(start=1, resets=(), kv=KVOptions(kv, **options))
        self.run = RegionRun(plan, self.spec, RunShape(torch.Size((batch, *self.x.shape[1:])), (1.0, 0.6, 0.3, 0.0), 0), "test")
        self.grid = self.run.grid

    def close(self):
        self.attached.unpatch_model()

    def call(self, sigma: float = 0.6, index: torch.Tensor | None = None, **more) -> torch.Tensor:
        """Denoised of the whole batch: dense and filling for None, else over the tokens `index` (b, a)."""
        run = self.run
        run.visiting, run.step, run.phase = True, 1, "dense" if index is None else "active"
        if index is not None:
            run.index = index
            run.active = torch.zeros(self.batch, self.grid.count, dtype=torch.bool).scatter_(1, index, True)
        options = dict(self.attached.model_options["transformer_options"])
        wrappers = {kind: {key: list(found) for key, found in keyed.items()} for kind, keyed in self.attached.wrappers.items()}
        conditions = list(range(self.conditions))
        options.update({RUN: run, "uuids": conditions, "cond_or_uncond": conditions, "wrappers": wrappers})
        options.update(more.pop("options", {}))
        with torch.inference_mode():
            return self.model.model.apply_model(
                self.x, torch.full((self.x.shape[0],), sigma), transformer_options=options, **self.given, **more
            )  # fmt: skip

    def cells(self, index: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(self.batch, self.grid.count, dtype=torch.bool).scatter_(1, index, True)
        return self.grid.spread(mask).expand(self.batch, *self.x.shape[1:]).repeat(self.conditions, 1, 1, 1)
