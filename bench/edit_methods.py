"""Editing methods at equal model calls, each at its best setting: the tables `settings` and `methods` of bench/editing.py.

Twelve edits of held-out pictures, no two of one picture. The settings of each method are tried on the four of TUNING; the best of a
method is the one with the largest class margin among those that keep the background to KEEP dB, or the one that keeps it best where none
does. These are then compared on the eight of EDITS, which no setting was chosen on.

Background: where the picture is white. The class margin asks the model itself, inside the rest: its velocity error on the result under the
source prompt less that under the target prompt, mean over four sigmas and some noises, divided by their sum. Above 0 the model finds the
target likelier there.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from held_out import load_held_out
from rectiflow.host import KSAMPLER, CFGGuider, calc_cond_batch, cfg_function, sample_custom
from rectiflow.metrics.fidelity import figures
from rectiflow.samplers.edit_methods import EditTask, HostCalls, Method, parse_methods, run_method
from table import write_table
from torch.nn.functional import adaptive_max_pool2d

HOST = HostCalls(sample_custom, calc_cond_batch, cfg_function, CFGGuider, KSAMPLER)
KEEP = 30.0
SIGMAS = (0.35, 0.5, 0.65, 0.8)

# Held-out picture → what it shall become, in its own style.
TUNING = {"smiley_cat": "dog", "dog2": "fox", "rage": "smile", "cow2": "pig"}
EDITS = {
    "crying_cat_face": "dog", "poodle": "cat", "tiger2": "fox", "pig2": "bear", "grin": "angry", "sob": "smile", "mouse2": "rabbit",
    "racehorse": "cow",
}  # fmt: skip

# One line a method and its steps, then what is tried in the place of each brace; all near 56 evaluations.
CANDIDATES = {
    "euler steps=28 cfg={}": (("1",), ("1.5",), ("2",), ("3",)),
    "rf_edit steps=14 inject_steps=0 cfg={}": (("1",), ("2",), ("3",)),
    "rf_edit steps=14 blocks=single:3-5 inject_steps={} cfg={}": (("4", "2"), ("8", "2"), ("8", "3"), ("12", "2"), ("12", "3")),
    "fireflow steps=27 blocks=single:3-5 inject_steps={} cfg={}": (("8", "2"), ("15", "2"), ("15", "3"), ("24", "2"), ("24", "3")),
    "rf_inversion steps=28 end={} cfg={}": (("0.15", "2.5"), ("0.25", "2.5"), ("0.25", "4"), ("0.4", "2.5"), ("0.4", "4")),
    "flow_edit steps={} skip={} cfg={}": (
        ("30", "2", "3.5"), ("34", "6", "2.5"), ("34", "6", "3.5"), ("34", "6", "5.5"), ("40", "12", "5.5"),
    ),
    "uni_edit steps={} alpha={} omega={} cfg={}": (
        ("30", "0.6", "1", "2"), ("30", "0.6", "5", "1"), ("23", "0.8", "1", "2"), ("23", "0.8", "3", "1"), ("23", "0.8", "0.5", "3"),
    ),
    "kv_edit steps=19 start={} cfg={}": (("inverted", "2"), ("inverted", "3"), ("noise", "2"), ("noise", "3")),
    "kv_edit steps=28 start=inversion_free cfg={}": (("2",), ("3",)),
}  # fmt: skip


@dataclass(frozen=True)
class Edits:
    """Some edits as one batch: task has a row an edit; decoded `(b, h, w, 3)`; paper `(b, h, w)`: 1 where the picture is white."""

    task: EditTask
    decoded: torch.Tensor
    paper: torch.Tensor

    @classmethod
    def load(cls, bench, wanted: dict[str, str]) -> Edits:
        found = {entry.name: (entry, picture) for entry, picture in load_held_out()}
        entries = [found[name][0] for name in wanted]
        latent = bench.vae.encode(torch.stack([torch.from_numpy(found[name][1].copy()) for name in wanted]).float() / 255)
        decoded = bench.vae.decode(latent)
        paper = (decoded.amin(-1) > 0.97).float()
        source = prompt_rows(bench, [entry.caption for entry in entries])
        target = prompt_rows(bench, [f"{entry.style} {thing} on white" for entry, thing in zip(entries, wanted.values())])
        negative = prompt_rows(bench, [""] * len(entries))
        grid = torch.linspace(1, 0, 29)
        return cls(EditTask(bench.model, source, target, negative, latent, grid, mask=1 - paper), decoded, paper)


def prompt_rows(bench, texts: list[str]) -> list:
    """CONDITIONING with a row a text."""
    parts = [bench.prompt(text)[0] for text in texts]
    pooled = torch.cat([extra["pooled_output"] for _, extra in parts])
    return [[torch.cat([context for context, _ in parts]), {**parts[0][1], "pooled_output": pooled}]]


def velocity_errors(bench, latent: torch.Tensor, conditioning: list, inside: torch.Tensor, draws: int) -> torch.Tensor:
    """Mean squared error of the velocity inside the region, `(b,)`; the noises are alike for every prompt and picture."""
    generator, total = torch.Generator().manual_seed(0), torch.zeros(len(latent))
    context, pooled = conditioning[0][0], conditioning[0][1]["pooled_output"]
    share = inside / inside.sum((1, 2, 3), keepdim=True) / latent.shape[1]  # (b, 1, h, w)
    with torch.no_grad():
        for sigma in SIGMAS:
            for _ in range(draws):
                noise = torch.randn(1, *latent.shape[1:], generator=generator).expand_as(latent)
                x = (1 - sigma) * latent + sigma * noise
                denoised = bench.model.model.apply_model(x, torch.full((len(x),), sigma), c_crossattn=context, y=pooled)
                total += (((x - denoised) / sigma - (noise - latent)).square() * share).sum((1, 2, 3))
    return total


def margins(bench, edits: Edits, latent: torch.Tensor, draws: int) -> torch.Tensor:
    """The class margin of each picture, `(b,)`."""
    inside = adaptive_max_pool2d(1 - edits.paper.unsqueeze(1), latent.shape[-2:])
    source, target = (velocity_errors(bench, latent, side, inside, draws) for side in (edits.task.source, edits.task.target))
    return (source - target) / (source + target)


def judged(bench, edits: Edits, method: Method, draws: int) -> dict[str, float]:
    """Figures of one method over all edits; means."""
    start = time.process_time()
    edited, calls, model_rows = run_method(method, edits.task, HOST)
    seconds = (time.process_time() - start) / len(edited)
    result = bench.vae.decode(edited)
    outside, inside = (figures(result, edits.decoded, part, "gaussian", 1.0, "bench") for part in (edits.paper, 1 - edits.paper))
    margin = margins(bench, edits, edited, draws)
    return {
        "calls": calls, "rows": model_rows // len(edited), "cpu_s": seconds, "psnr_background": float(outside.psnr.mean()),
        "ssim_background": float(outside.ssim.mean()), "psnr_inside": float(inside.psnr.mean()), "class_margin": float(margin.mean()),
        "edits_accepted": int((margin > 0).sum()),
    }  # fmt: skip


def best(tried: list[tuple[str, dict[str, float]]]) -> str:
    """The line with the largest margin among those that keep the background, or the one that keeps it best."""
    kept = [entry for entry in tried if entry[1]["psnr_background"] >= KEEP]
    return max(kept, key=lambda entry: entry[1]["class_margin"])[0] if kept else max(tried, key=lambda e: e[1]["psnr_background"])[0]


def shown(found: dict[str, float]) -> list[str]:
    digits = {"cpu_s": 2, "psnr_background": 2, "psnr_inside": 2, "ssim_background": 3, "class_margin": 4}
    return [f"{value:.{digits[name]}f}" if name in digits else str(value) for name, value in found.items()]


def bench_methods(bench, quick: bool) -> None:
    """Both tables: every setting on TUNING, the best ones on EDITS."""
    tuning, edits = Edits.load(bench, TUNING), Edits.load(bench, dict(list(EDITS.items())[:2]) if quick else EDITS)
    rows_tried, chosen, header = [], [], []
    for line, values in CANDIDATES.items():
        tried = []
        for value in values[:1] if quick else values:
            method = parse_methods(line.format(*value), "bench")[0]
            tried.append((method.text, judged(bench, tuning, method, 4)))
            print(method.text, *shown(tried[-1][1]), flush=True)
        chosen.append(best(tried))
        header = list(tried[0][1])
        rows_tried += [[text, *shown(found), "best" if text == chosen[-1] else ""] for text, found in tried]
    write_table("editing_settings", ["method", *header, "chosen"], rows_tried)
    untouched = float(margins(bench, edits, edits.task.latent, 8).mean())
    table = [["the pictures themselves", 0, 0, "", "", "", "", f"{untouched:.4f}", 0]]
    for line in chosen:
        table.append([line, *shown(judged(bench, edits, parse_methods(line, "bench")[0], 8))])
        print(*table[-1], flush=True)
    write_table("editing_methods", ["method", *header], table)
