"""Measure the gated caches at equal computed steps: `python bench/cache_policies.py [--steps N] [--shares 0.5 0.33]`.

Four prompts in one batch under guidance 3 on the tiny model, as in bench/cache.py. For every share of computed steps each gate gets the
lowest threshold that computes no more (found by halving), beside plain reuse and TaylorSeer at that very number of evenly spread steps.
Prints a table, writes bench/results/cache_policies.csv: distance of the latents and PSNR of the pictures, mean and worst, to those
without a cache.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from cache import Bench
from rectiflow.accel.cache.binding import attach
from rectiflow.accel.cache.calibration import ReuseCalibration, fit_polynomial
from rectiflow.accel.cache.confidence import ConfidenceGatedTaylor
from rectiflow.accel.cache.first_block import FirstBlockGate
from rectiflow.accel.cache.input_change import InputChangeGate
from rectiflow.accel.cache.magnitude import MagnitudeRule
from rectiflow.accel.cache.modulated import ModulatedInputGate
from rectiflow.accel.cache.policy import Action, Choice, Limits, Policy, Visit
from rectiflow.accel.cache.report import CacheLog
from rectiflow.accel.cache.visits import CachePlan
from rectiflow.metrics.fidelity import psnr
from table import write_csv

HEADER = ["steps", "policy", "target", "threshold", "calls", "of", "distance", "psnr_mean", "psnr_worst", "peak_kib"]
WARMUP, TAIL, HALVINGS, WIDEST = 3, 1, 6, 2.0


@dataclass(frozen=True)
class Even(Policy):
    """So many computed visits, warm-up and tail among them, the others spread evenly between."""

    computed: int = 8

    def decide(self, visit: Visit) -> Choice:
        inner, between = self.computed - WARMUP - TAIL, visit.steps - WARMUP - TAIL
        place = visit.index - WARMUP + 1
        due = int(place * inner / between) > int((place - 1) * inner / between)
        return Choice(Action.FULL if due else Action.SKIP, "even")

    def line(self) -> str:
        return f"{self.computed} even steps, order {self.order}"


def gates(findings: dict) -> dict[str, tuple[Callable[[float], Policy], str]]:
    """Name → (policy of a threshold, target). findings: of a calibration."""
    ratios = tuple(findings["ratios"])
    curve = fit_polynomial(findings["changes"], 2, "bench")
    return {
        "confidence gate": (lambda t: ConfidenceGatedTaylor(threshold=t), "last_block"),
        "confidence gate, residual": (lambda t: ConfidenceGatedTaylor(threshold=t, gate="residual"), "last_block"),
        "first block": (lambda t: FirstBlockGate(threshold=t), "block_delta"),
        "first block, order 1": (lambda t: FirstBlockGate(order=1, threshold=t), "block_delta"),
        "modulated input": (lambda t: ModulatedInputGate(threshold=t), "block_delta"),
        "modulated input, fitted": (lambda t: ModulatedInputGate(threshold=t, coefficients=curve), "block_delta"),
        "input change": (lambda t: InputChangeGate(threshold=t), "output"),
        "input change, x + offset": (lambda t: InputChangeGate(threshold=t), "output_delta"),
        "input change, order 1": (lambda t: InputChangeGate(order=1, threshold=t), "output"),
        "magnitude": (lambda t: MagnitudeRule(threshold=t, ratios=ratios), "block_delta"),
    }


class Table:
    def __init__(self, steps: int):
        self.bench, self.steps = Bench(), steps
        self.plain, _ = self.bench.sample(self.bench.model, steps)
        self.pictures = self.bench.vae.decode(self.plain)
        self.findings = self.run(ReuseCalibration(), "block_delta", Limits())[1].findings

    def run(self, policy: Policy, target: str, limits: Limits | None = None):
        log = CacheLog()
        plan = CachePlan(policy, target, limits or Limits(WARMUP, TAIL))
        latent, _ = self.bench.sample(attach(self.bench.model, plan, log, "bench"), self.steps)
        return latent, log.last

    def row(self, name: str, target: str, threshold: str, latent, record) -> list:
        decibels = psnr(self.bench.vae.decode(latent), self.pictures, where="bench")
        distance = float((latent - self.plain).norm() / self.plain.norm())
        return [
            self.steps, name, target, threshold, record.calls_made, record.calls, f"{distance:.4f}", f"{float(decibels.mean()):.1f}",
            f"{float(decibels.min()):.1f}", record.peak_bytes >> 10,
        ]  # fmt: skip

    def gated(self, name: str, make: Callable[[float], Policy], target: str, budget: int) -> list | None:
        """The lowest threshold within the budget; None where the gate never gets there."""
        low, high, best = 0.0, WIDEST, None
        for _ in range(HALVINGS + 1):
            tried = high if best is None else (low + high) / 2
            latent, record = self.run(make(tried), target)
            if record.calls_made > budget:
                if best is None:
                    return None
                low = tried
            else:
                high, best = tried, self.row(name, target, f"{tried:.3f}", latent, record)
        return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.33, 0.25, 0.2], help="of computed steps")
    arguments = parser.parse_args()
    table = Table(arguments.steps)
    rows = []
    for share in arguments.shares:
        budget = max(round(share * arguments.steps), WARMUP + TAIL + 1)
        for name, order, target in (("plain reuse", 0, "last_block"), ("plain reuse", 0, "output"), ("TaylorSeer", 1, "last_block")):
            rows.append(table.row(name, target, "", *table.run(Even(order=order, computed=budget), target)))
            print(*rows[-1], sep="\t", flush=True)
        for name, (make, target) in gates(table.findings).items():
            row = table.gated(name, make, target, budget)
            if row is not None:
                rows.append(row)
                print(*row, sep="\t", flush=True)
    write_csv("cache_policies", HEADER, rows)


if __name__ == "__main__":
    main()
