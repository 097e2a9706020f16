"""Caches that people use today, behind one call: what bench/peers.py measures ours against.

Each class samples pictures with the tiny model's weights: Euler on the model's own schedule, guidance v = v⁻ + g·(v⁺ − v⁻). diffusers and
cache-dit call the network once a condition, each under a cache context of its own, as diffusers' pipelines do.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig
from diffusers_flux import DiffusersFlux

__all__ = ["CacheDit", "Diffusers", "Picture", "Run", "Setting"]

GUIDANCE = 3.0


@dataclass(frozen=True)
class Setting:
    """One cache with one strength. family: what is swept; value: how far; make: what the engine needs to build it."""

    family: str
    value: str
    make: Any = None


@dataclass(frozen=True)
class Picture:
    """What is drawn: noise (1, c, h, w) and the two conditions, each text (1, n, d) and pooled (1, e)."""

    prompt: str
    seed: int
    noise: torch.Tensor
    positive: tuple[torch.Tensor, torch.Tensor]
    negative: tuple[torch.Tensor, torch.Tensor]

    @property
    def name(self) -> str:
        return f"{self.prompt}, seed {self.seed}"


class Run(NamedTuple):
    """seconds: of the processor, for the sampling alone; calls: evaluations of the network's middle, of `asked`; kept: bytes held after the
    last step."""

    latent: torch.Tensor
    seconds: float
    calls: int
    asked: int
    kept: int = 0


def euler(velocity: Callable[[torch.Tensor, float], torch.Tensor], noise: torch.Tensor, sigmas: Sequence[float]) -> torch.Tensor:
    x = noise * sigmas[0]
    for sigma, following in zip(sigmas, sigmas[1:]):
        x = x + (following - sigma) * velocity(x, sigma)
    return x


def held_bytes(known: set[int]) -> int:
    """Bytes of living tensors whose memory is not in `known`."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(size for place, size in found.items() if place not in known)


def memory_in_use() -> set[int]:
    gc.collect()
    return {thing.untyped_storage().data_ptr() for thing in gc.get_objects() if isinstance(thing, torch.Tensor)}


class _Counted:
    """Counts forwards of the second block's attention projection: what every cache here leaves out when it skips."""

    def __init__(self, transformer: torch.nn.Module):
        self.count = 0
        transformer.transformer_blocks[1].attn.to_q.register_forward_hook(self._add)

    def _add(self, *_) -> None:
        self.count += 1


class _OnDiffusers:
    """Sampling with the twin. A subclass says how a setting is switched on and off."""

    def __init__(self, twin: torch.nn.Module, contexts: tuple[str | None, str | None]):
        self.twin, self.calls, self.contexts = DiffusersFlux(twin), _Counted(twin), contexts

    @property
    def transformer(self) -> torch.nn.Module:
        return self.twin.transformer

    def on(self, setting: Setting, steps: int) -> None:
        raise NotImplementedError

    def off(self) -> None:
        raise NotImplementedError

    def run(self, setting: Setting | None, picture: Picture, sigmas: Sequence[float], weigh: bool = False) -> Run:
        """setting None is the plain network; weigh: count what the cache keeps, which takes long."""
        if setting is not None:
            self.on(setting, len(sigmas) - 1)
        known = memory_in_use() if weigh else set()

        def velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
            guided, plain = (
                self.twin.velocity(x, sigma, *given, branch=branch)
                for given, branch in zip((picture.positive, picture.negative), self.contexts, strict=True)
            )
            return plain + GUIDANCE * (guided - plain)

        before, start = self.calls.count, time.process_time()
        try:
            with torch.inference_mode():
                latent = euler(velocity, picture.noise, sigmas)
            seconds = time.process_time() - start
            kept = held_bytes(known | {latent.untyped_storage().data_ptr()}) if weigh else 0
        finally:
            if setting is not None:
                self.off()
        return Run(latent, seconds, self.calls.count - before, 2 * (len(sigmas) - 1), kept)


class Diffusers(_OnDiffusers):
    """diffusers' own hooks; a setting's `make` is one of its configurations, or a function of the steps that gives one."""

    def __init__(self, twin: torch.nn.Module):
        super().__init__(twin, ("cond", "uncond"))
        self.ratios: dict[int, list[float]] = {}

    def on(self, setting: Setting, steps: int) -> None:
        self.transformer.enable_cache(setting.make(steps) if callable(setting.make) else setting.make)

    def off(self) -> None:
        self.transformer._reset_stateful_cache()
        self.transformer.disable_cache()

    def calibrate(self, picture: Picture, sigmas: Sequence[float]) -> None:
        """MagCache's ratios for this network and schedule: it prints a list a condition, and takes one list, here their mean."""
        steps = len(sigmas) - 1
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            self.run(Setting("calibration", "", MagCacheConfig(calibrate=True, num_inference_steps=steps)), picture, sigmas)
        lists = [ast.literal_eval(line) for line in printed.getvalue().splitlines() if line.startswith("[") and line.endswith("]")]
        if not lists or any(len(found) != steps for found in lists):
            raise RuntimeError(f"MagCache printed {[len(found) for found in lists]} ratios for {steps} steps")
        self.ratios[steps] = [sum(values) / len(values) for values in zip(*lists)]

    def settings(self) -> list[Setting]:
        def magnitude(threshold: float, longest: int) -> Callable[[int], MagCacheConfig]:
            return lambda steps: MagCacheConfig(
                threshold=threshold, max_skip_steps=longest, num_inference_steps=steps, mag_ratios=self.ratios[steps]
            )

        first = [Setting("FirstBlockCache", f"{t:g}", FirstBlockCacheConfig(t)) for t in (0.08, 0.12, 0.2, 0.4)]
        taylor = [Setting("TaylorSeerCache", f"{n}", TaylorSeerCacheConfig(n, max_order=1)) for n in (2,)]
        lite = [Setting("TaylorSeerCache lite", f"{n}", TaylorSeerCacheConfig(n, max_order=1, use_lite_mode=True)) for n in (2, 3, 5)]
        ratio = [Setting("MagCache", f"{t:g}, {k}", magnitude(t, k)) for t, k in ((0.06, 3), (0.12, 3), (0.24, 5), (0.5, 5), (1.0, 7))]
        return first + taylor + lite + ratio


class CacheDit(_OnDiffusers):
    """cache-dit's DBCache on the whole stack, with its own count of which call is which condition."""

    def __init__(self, twin: torch.nn.Module):
        super().__init__(twin, (None, None))

    def on(self, setting: Setting, steps: int) -> None:
        import cache_dit
        from cache_dit.caching.block_adapters import BlockAdapterRegister

        adapter = BlockAdapterRegister.get_adapter(self.transformer, has_separate_cfg=True)  # what a FluxPipeline of diffusers gets
        options, taylor = setting.make
        config = cache_dit.DBCacheConfig(num_inference_steps=steps, enable_separate_cfg=True, **options)
        calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1) if taylor else None
        self._adapter = cache_dit.enable_cache(adapter, cache_config=config, calibrator_config=calibrator)

    def off(self) -> None:
        import cache_dit

        cache_dit.disable_cache(self._adapter)

    @staticmethod
    def settings() -> list[Setting]:
        found = []
        for taylor in (False, True):
            name = "DBCache F1 W4" + (" Taylor" if taylor else "")
            for threshold in (0.1, 0.15, 0.2, 0.5):
                options = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "residual_diff_threshold": threshold, "max_warmup_steps": 4}
                found.append(Setting(name, f"{threshold:g}", (options, taylor)))
        return found
