"""Heads and neurons removed from the tiny model by six rules, at equal size and without any training after it; writes
bench/results/prune_width.csv (quality) and prune_width_speed.csv (time of the narrow model). And MLPs as linear maps:
prune_width_maps.csv; the text of runs of blocks: prune_width_text.csv.

    python bench/prune_width.py [--part quality speed maps text] [--iterations N] [--seeds N] [--betas 1.0,0.1]

Quality: 20 % of the weights of heads and 20 % of those of neurons go, to the nearest unit, by one ranking over all layers and by the same
share of each. Measured: ‖ẑ_0 − z_0‖²/‖z_0‖² of final latents with prompts and noises that no rule has seen, against the whole model from
the same noise. Learned masks get one β each, that with the least error on their own prompts at the first seed. Seconds are process time of
one thread.

Speed: process time of a sampling run of whole and narrow models in turn, median of the rounds, beside the share of FLOPs that torch's
counter finds removed.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from table import write_table

STEPS, REMOVE = 6, 0.2
PARTS = ("quality", "speed", "maps", "text")
LEARN = (
    "twemoji rocket on black", "noto cat on white", "twemoji pizza on white", "noto dog on black", "twemoji car on white",
    "noto apple on white", "twemoji fish on black", "noto house on white", "twemoji sun on white", "noto star on black",
    "twemoji frog on white", "noto bus on white",
)  # fmt: skip
HELD = (
    "twemoji heart on white", "noto banana on white", "twemoji ghost on black", "noto tree on white", "twemoji dog on white",
    "noto rocket on black", "twemoji cat on black", "noto pizza on white",
)  # fmt: skip
HEADER = ("method", "beta", "seed", "scope", "heads removed", "neurons removed", "all weights removed", "error", "error cfg 3", "seconds")
SPEED = ("model", "align", "FLOPs removed", "seconds a run", "time removed", "time removed / FLOPs removed")


class Bench:
    def __init__(self, tiny, services, iterations: int):
        from rectiflow.accel.prune.width import groups_of

        self.tiny, self.services, self.iterations = tiny, services, iterations
        self.groups = groups_of(tiny.model, "bench")
        self.prompts = [entry for text in LEARN for entry in tiny.conditioning(text)]
        self.held = [text for text in HELD for _ in range(2)]
        self.noise = tiny.noise(range(1000, 1000 + len(self.held)))
        self.whole = {cfg: self.final(tiny.model, cfg) for cfg in (1.0, 3.0)}
        self.rows: list[tuple] = []

    def final(self, model, cfg: float) -> torch.Tensor:
        sigmas = torch.linspace(1.0, 0.0, STEPS + 1)
        return self.tiny.sample(self.held, self.noise, model=model, cfg=cfg, sigmas=sigmas)

    def shown(self, seed: int):
        from rectiflow.train.pool import Calibration

        return Calibration(self.prompts, self.tiny.conditioning(""), (16, 16, 16), count=36, steps=STEPS, cfg=1.0, seed=seed)

    def narrow(self, scores, scope: str = "global", align: int = 1, remove: float = REMOVE):
        from rectiflow.accel.prune.compact import compact_model
        from rectiflow.accel.prune.width import WidthCut, kept_units, removed_share, width_plan

        kept = kept_units(self.groups, scores, WidthCut(remove, scope, align, 1), self.tiny.model)
        plan = width_plan(self.tiny.model, kept, self.groups, "bench")
        return compact_model(self.tiny.model, plan, "bench"), removed_share(kept, self.groups, self.tiny.model)

    def measured(self, scores, beta, seed: int, seconds: float) -> None:
        for scope in ("global", "local"):
            model, shares = self.narrow(scores, scope)
            errors = [relative(self.final(model, cfg), whole) for cfg, whole in self.whole.items()]
            removed = [f"{shares[name]:.3f}" for name in ("heads", "neurons", "all")]
            self.rows.append((scores.method, beta, seed, scope, *removed, *(f"{error:.4f}" for error in errors), f"{seconds:.0f}"))
        write_table("prune_width", HEADER, self.rows)

    def scored(self, method: str, seed: int):
        from rectiflow.train.width_masks import score_width

        start = time.process_time()
        scores = score_width(self.tiny.model, method, self.shown(seed), 48, self.services, "bench")
        self.measured(scores, "", seed, time.process_time() - start)
        return scores

    def learned(self, objective: str, beta: float, seed: int) -> float:
        """Error at 20 % on the rule's own prompts."""
        from rectiflow.train.width_masks import MaskSettings, learn_masks

        start, sigmas = time.process_time(), torch.linspace(1.0, 0.0, STEPS + 1)
        settings = MaskSettings(objective=objective, iterations=self.iterations, beta=beta, lr_heads=0.3, seed=seed)
        done = learn_masks(self.tiny.model, settings, self.shown(seed), sigmas, None, self.services, "bench")
        self.measured(done.scores, beta, seed, time.process_time() - start)
        return done.report["final_latent_error_at"]["0.2"]


def relative(given: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((given - wanted).square().sum() / wanted.square().sum())


def flops(bench: Bench, model) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        bench.tiny.sample(HELD[:1], bench.noise[:1], model=model, cfg=1.0, sigmas=torch.tensor([1.0, 0.0]))
    return counter.get_total_flops()


def speed(bench: Bench, scores, rounds: int) -> None:
    models = {"whole": ("", bench.tiny.model)}
    for remove, align in ((0.2, 1), (0.2, 64), (0.5, 64)):
        models[f"{remove:.0%} of the width out, align {align}"] = (align, bench.narrow(scores, align=align, remove=remove)[0])
    counted = {name: flops(bench, model) for name, (_, model) in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, (_, model) in models.items():
            flops(bench, model)  # layers are exchanged off the clock
            start = time.process_time()
            bench.tiny.sample(list(HELD), bench.noise[: len(HELD)], model=model, cfg=1.0, sigmas=torch.linspace(1.0, 0.0, STEPS + 1))
            seconds[name].append(time.process_time() - start)
    whole, rows = statistics.median(seconds["whole"]), []
    for name, (align, _) in models.items():
        took, gone = statistics.median(seconds[name]), 1.0 - counted[name] / counted["whole"]
        saved = 1.0 - took / whole
        rows.append((name, align, f"{gone:.3f}", f"{took:.3f}", f"{saved:.3f}", f"{saved / gone:.2f}" if gone else ""))
    write_table("prune_width_speed", SPEED, rows)


class Taught:
    """A LoRA of rank 16 on every layer, towards the whole model, `steps` steps of 4 on its own samples."""

    def __init__(self, bench: Bench, steps: int):
        tiny, self.steps, self.tiny = bench.tiny, steps, bench.tiny
        clean = tiny.sample(list(LEARN), tiny.noise(range(500, 500 + len(LEARN))), steps=STEPS * 2)
        self.data = self.run("RectiflowLatentDataset", latents={"samples": clean}, positive=bench.prompts)[0]
        self.target = self.run(
            "RectiflowTrainTarget", kind="teacher_velocity", teacher=tiny.model, teacher_cfg=1.0, anneal_steps=1, annealing="linear"
        )[0]
        self.params = self.run("RectiflowTrainParams", kind="lora", rank=16, alpha=0.0, include="", exclude="", blocks="")[0]

    def run(self, node: str, **inputs):
        from rectiflow import NODE_CLASS_MAPPINGS

        return NODE_CLASS_MAPPINGS[node]().execute(**inputs)

    def model(self, model, name: str):
        return self.run(
            "RectiflowTrain", model=model, data=self.data, params=self.params, target=self.target, steps=self.steps, batch=4, name=name,
            negative=self.tiny.conditioning(""), dtype="fp32", checkpointing=False, cond_dropout=0.2, ema=0.9, save_every=0,
            validate_every=0,
        )[0]  # fmt: skip


def maps(bench: Bench, steps: int) -> None:
    """MLPs as linear maps, those with the least residual first, and what training takes back."""
    from rectiflow.train.linear_mlps import MapRequest, linearise

    tiny, rows, whole, taught = bench.tiny, [], bench.tiny.model.model_size(), Taught(bench, steps)

    def measured(streams: str, count: int, done, model, steps: int) -> None:
        errors = [f"{relative(bench.final(model, cfg), wanted):.4f}" for cfg, wanted in bench.whole.items()]
        last = done.exchanged[-1]
        rows.append((streams, count, last, f"{done.residuals[last]:.3f}", f"{model.model_size() / whole:.3f}", steps, *errors))

    for streams, counts in (("image", (1, 2, 3)), ("both", (4, 5, 6))):
        for count in counts:
            done = linearise(tiny.model, MapRequest(count, streams, 32, 8192), bench.shown(0), bench.services.guider, "bench")
            measured(streams, count, done, done.model, 0)
            if count in (3, 6):
                measured(streams, count, done, taught.model(done.model, f"maps {count}"), steps)
    header = ("streams", "maps", "last", "its residual", "share of bytes", "steps of training", "error", "error cfg 3")
    write_table("prune_width_maps", header, rows)


def every_thing(tiny, seed: int):
    """A calibration that shows each thing of the vocabulary twice, in styles and colours drawn by `seed`, none of HELD."""
    from rectiflow.tiny.text import COLOURS, STYLES, Vocabulary
    from rectiflow.train.pool import Calibration

    draw = random.Random(seed)
    told = [f"{draw.choice(STYLES)} {thing} on {draw.choice(list(COLOURS))}" for thing in 2 * list(Vocabulary.load().things)]
    prompts = [entry for text in told if text not in HELD for entry in tiny.conditioning(text)]
    return Calibration(prompts, tiny.conditioning(""), (16, 16, 16), count=len(prompts), steps=STEPS, cfg=1.0, seed=seed)


def text(bench: Bench, steps: int, seeds: int) -> None:
    """The text of every run of double blocks as linear maps, and what training takes back; of the best one also with many prompts shown."""
    from rectiflow.train.text_runs import TextRequest, linearise_text

    tiny, rows, whole, taught, guider = bench.tiny, [], bench.tiny.model.model_size(), Taught(bench, steps), bench.services.guider

    def add(name: str, prompts: int, seed: int, judged, model, count: int) -> None:
        errors = [f"{relative(bench.final(model, cfg), wanted):.4f}" for cfg, wanted in bench.whole.items()]
        losses = [f"{of.losses[name]:.4f}" for of in judged]
        rows.append((name, prompts, seed, *losses, f"{model.model_size() / whole:.3f}", count, *errors))

    for seed in range(seeds):
        shown = bench.shown(seed)
        judged = [linearise_text(tiny.model, TextRequest(judge=judge), shown, guider, "bench") for judge in ("maps", "velocity")]
        losses = judged[1].losses
        for name in losses:
            model = linearise_text(tiny.model, TextRequest(name), shown, guider, "bench").model
            add(name, len(LEARN), seed, judged, model, 0)
            add(name, len(LEARN), seed, judged, taught.model(model, f"text {name} {seed}"), steps)
        best, shown = min(losses, key=losses.get), every_thing(tiny, seed)
        count = len(shown.positive)
        judged = [
            linearise_text(tiny.model, TextRequest(best, judge=judge, at=count, tokens=16 * count), shown, guider, "bench")
            for judge in ("maps", "velocity")
        ]  # fmt: skip
        add(best, count, seed, judged, judged[1].model, 0)
    header = ("run", "prompts", "seed", "unsaid by maps", "velocity error", "share of bytes", "steps of training", "error", "error cfg 3")
    write_table("prune_width_text", header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--betas", default="1.0")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=60, help="of training on linear maps")
    given = parser.parse_args()
    from rectiflow.host.embedded import HostSettings, make_host, use_host
    from rectiflow.tests.contract.tiny_runs import TinyRuns

    torch.set_num_threads(1)
    host = make_host(Path(tempfile.mkdtemp()), settings=HostSettings(device="cpu", dtype="fp32"))
    with use_host(host):
        from rectiflow.nodes.pruning import host_services

        bench = Bench(TinyRuns(host), host_services(), given.iterations)
        if "maps" in given.part:
            maps(bench, given.steps)
        if "text" in given.part:
            text(bench, given.steps, given.seeds)
        if not {"quality", "speed"} & set(given.part):
            return
        magnitude = bench.scored("magnitude", 0)
        if "speed" in given.part:
            speed(bench, magnitude, given.rounds)
        if "quality" not in given.part:
            return
        for seed in range(given.seeds):
            for method in ("taylor", "activation", "random"):
                bench.scored(method, seed)
        betas = [float(part) for part in given.betas.split(",")]
        best = {}
        for objective in ("end_to_end", "per_step"):
            found = {beta: bench.learned(objective, beta, 0) for beta in betas}
            best[objective] = min(found, key=found.get)
        for seed in range(1, given.seeds):
            for objective, beta in best.items():
                bench.learned(objective, beta, seed)


if __name__ == "__main__":
    main()
