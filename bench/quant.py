"""How near few bits come: `python bench/quant.py [--part weights codes rotation model rows directions seeds lora flips
train]`.

    quant_weights    SQNR in dB of weights by quantiser, at equal bits with every scale counted: a normal law, one with long tails, one with
                     one weight in a thousand ten times as large, and layers of the tiny model
    quant_core_codes codes of our int8 export beside comfy-kitchen's
    quant_rotation   what rotations leave of an unquantised layer's output, and what they gain at 8 bits with four outlier channels
    quant_model      the tiny model in few bits, to the nearest codes and compensated: velocity SQNR over a schedule, bytes, and the final
                     latent's distance
    quant_rows       the same at W4A8 by how many rows of the calibration the rounding knows
    quant_directions the same by how many principal directions of each layer's input are beside the codes
    quant_layers     its layers at W8A8: errors of weight and output, share of the velocity's error, what is kept
    quant_seeds      twin-log against uniform at equal bytes, seed by seed, for several draws of the rotations' signs
    quant_flips      how far the final latent moves when the noise moves by its last bits
    quant_lora       how a LoRA changes a layer in few bits, by policy and by its size
    quant_train      what a LoRA of rank 8 takes back that learned beside compensated codes, on samples of other prompts

Peers are used where they are installed: `pip install comfy-kitchen==0.2.40 torchao==0.18.0 gguf==0.19.0 bitsandbytes==0.50.2`.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from pathlib import Path

import torch
from quant_formats import others, peers_installed
from rectiflow import NODE_CLASS_MAPPINGS as NODES
from rectiflow.accel.quant.attach import quantised_parts
from rectiflow.accel.quant.compare import recording_sampler, replaying_sampler
from rectiflow.accel.quant.error import sqnr
from rectiflow.accel.quant.recipe import QuantScheme, quantised_layer
from rectiflow.accel.quant.rotation import block_hadamard, convrot, dual_rotation, hadamard, no_rotation
from rectiflow.accel.quant.stored import store
from rectiflow.accel.quant.twin_log import reference_quantised
from rectiflow.accel.quant.uniform import clipped_grid, int8_rows, int_tokens, min_max_grid
from rectiflow.host import KSAMPLER, sample_custom
from rectiflow.host.embedded import HostSettings, make_host, use_host
from rectiflow.metrics.fidelity import relative_errors
from rectiflow.tests.contract.tiny_runs import TinyRuns
from rectiflow.tiny.weights import load_weights
from table import write_table

LAYERS = (
    "double_blocks.0.img_attn.qkv", "double_blocks.1.img_mlp.0", "double_blocks.1.img_mlp.2", "double_blocks.2.txt_attn.proj",
    "single_blocks.0.linear1", "single_blocks.3.linear2", "single_blocks.5.linear1",
)  # fmt: skip
SIGMA = 0.02
PROMPTS = ("noto cat on white", "twemoji rocket on black")
STEPS, CFG = 10, 3.0
TAUGHT = ("twemoji apple on green", "noto koala on red", "twemoji house on yellow", "noto dog on white", "twemoji pizza on blue",
          "noto guitar on white", "noto ghost on black", "twemoji bus on yellow")  # fmt: skip
TRAINED = (("4", "8"), ("3", "8"), ("2", "8"), ("3", "4"))
PARTS = ("weights", "codes", "rotation", "model", "rows", "directions", "seeds", "lora", "flips", "train")
PROBED = range(20, 24)  # seeds of the velocity's error
TARGETS = (35.0, 36.0)  # dB of Keep Sensitive Layers
LAST_BITS = 3e-7  # of a float32, as two hosts differ: a few last places
LORA_SIZES, LORA_RANK = (0.05, 0.1, 0.2, 0.4), 4
SETTINGS = (  # bits of weights and activations, method, group
    ("8", "8", "tlq", "32"), ("6", "8", "tlq", "32"), ("4", "8", "tlq", "16"), ("4", "8", "tlq", "32"), ("4", "8", "uniform", "32"),
    ("3", "8", "tlq", "32"), ("3", "8", "uniform", "32"), ("2", "8", "tlq", "16"), ("4", "4", "tlq", "32"), ("3", "4", "tlq", "32"),
)  # fmt: skip
ROUNDINGS = ("nearest", "compensated")
ROWS = (0, 64, 256, 512, 1024, 2048)
BESIDE = (  # bits of weights and activations, rounding, counts of directions
    ("8", "8", "nearest", (0, 4, 8, 16, 32)), ("8", "8", "compensated", (0, 16)), ("4", "8", "nearest", (0, 16)),
    ("4", "8", "compensated", (0, 16, 32)), ("3", "8", "compensated", (0, 16)), ("4", "4", "compensated", (0, 16, 32)),
    ("3", "4", "compensated", (0, 16)),
)  # fmt: skip
QUANTIZE = {
    "group_size": "32", "method": "tlq", "rotation": "auto", "j_threshold": 1.0, "smooth_alpha": 0.5, "protect_down": False,
    "keep_below_db": 0.0, "include": "", "exclude": "", "lora": "before", "seed": 0, "rounding": "nearest",
}  # fmt: skip


def laws() -> dict[str, list[torch.Tensor]]:
    """Weights by name, each a list of matrices (n, k) float32."""
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(128, 1024, generator=generator) * SIGMA
    uniform = torch.rand(128, 1024, generator=generator).clamp(1e-6, 1 - 1e-6)
    laplace = torch.distributions.Laplace(0.0, 1.0).icdf(uniform) * SIGMA / 2**0.5
    outliers = normal.clone()
    outliers[torch.rand(normal.shape, generator=generator) < 0.001] *= 10
    trained = load_weights().transformer
    real = [trained[f"{name}.weight"].float() for name in LAYERS]
    return {"normal": [normal], "laplace": [laplace], "0.1 % ten times": [outliers], "tiny model": real}


def ours(weight: torch.Tensor):
    """(name, class of bits, bits a weight, ŵ) of our quantisers and of the plain grids that they are held against."""
    per_row = 32 / weight.shape[1]
    for bits in (3, 4):
        yield f"uniform min-max, rows, {bits} bits", bits, bits + 2 * per_row, min_max_grid(weight, bits)
        yield f"uniform with clip search, rows, {bits} bits", bits, bits + 2 * per_row, clipped_grid(weight, bits)
        yield f"published twin-log code, rows, {bits} bits", bits, bits + 4 * per_row, reference_quantised(weight, bits)
        for method in ("tlq", "uniform"):
            for group in (0, 64, 32, 16):
                stored = store(weight, bits, group, method)
                what = f"ours {method}, {f'groups of {group}' if group else 'rows'}, {bits} bits"
                yield what, bits, 8 * stored.nbytes / weight.numel(), stored.numbers()
    stored = store(weight, 8, 0, "tlq")
    yield "ours int8 rows", 8, 8 * stored.nbytes / weight.numel(), stored.numbers()
    turned = convrot(weight.shape[1])
    stored = store(turned.apply(weight), 8, 0, "tlq")
    yield "ours int8 rows, convrot", 8, 8 * stored.nbytes / weight.numel(), turned.undo(stored.numbers())
    turned = hadamard(weight.shape[1])
    for bits in (3, 4):
        stored = store(turned.apply(weight), bits, 16, "tlq")
        size = 8 * (stored.nbytes + weight.shape[1]) / weight.numel()
        yield f"ours tlq, groups of 16, hadamard, {bits} bits", bits, size, turned.undo(stored.numbers())


def weights_part() -> None:
    rows, peers = [], peers_installed()
    for law, matrices in laws().items():
        collected: dict[str, tuple[int, list[float], list[float]]] = {}
        for weight in matrices:
            for name, bits, size, numbers in (*ours(weight), *others(weight)):
                kept = collected.setdefault(name, (bits, [], []))
                if numbers is not None:
                    kept[1].append(size)
                    kept[2].append(sqnr(weight, numbers))
        for name, (bits, sizes, decibels) in sorted(collected.items(), key=lambda item: (item[1][0], -sum(item[1][2]))):
            mean = [f"{sum(values) / len(values):.2f}" if values else "" for values in (sizes, decibels)]
            rows.append([law, bits, name, *mean, peers])
    write_table("quant_weights", ["weights", "bits", "quantiser", "bits_per_weight", "sqnr_db", "peers"], rows)


def codes_part() -> None:
    """Our int8 export against what comfy-kitchen makes of the same weights, code by code."""
    try:
        from comfy_kitchen.tensor.int8 import TensorWiseINT8Layout as Layout
    except ImportError:
        print("comfy-kitchen is not installed: its codes are not compared")
        return
    rows = []
    for name, weight in zip(LAYERS, laws()["tiny model"]):
        for form, turned in (("rowwise", weight), ("convrot", convrot(weight.shape[1]).apply(weight))):
            stored = store(turned, 8, 0, "tlq")
            theirs, params = Layout.quantize(weight, per_channel=True, convrot=form == "convrot")
            equal = float((stored.codes == theirs).float().mean())
            scale = float((stored.scale.flatten() / params.scale.flatten().float() - 1).abs().max())
            apart = int((stored.codes.int() - theirs.int()).abs().max())
            rows.append([name, form, f"{equal:.6f}", apart, f"{scale:.1e}", peers_installed()])
    write_table("quant_core_codes", ["layer", "form", "equal_codes", "largest_difference", "scale_difference", "peers"], rows)


def rotation_part() -> None:
    rows = []
    for width in (384, 768, 1024, 1152, 3072):
        generator = torch.Generator().manual_seed(width)
        x, w = torch.randn(128, width, generator=generator) * 0.5, torch.randn(128, width, generator=generator) * SIGMA
        for channel, level in ((5, 60.0), (130, -45.0), (300, 40.0), (371, 120.0)):
            x[:, channel] += level
        exact = x @ w.t()
        made = {"none": no_rotation(), "hadamard": hadamard(width), "hadamard_block": block_hadamard(width)}
        if width % 256 == 0:
            made["convrot"] = convrot(width)
        if width <= 1152:
            made["dual"] = dual_rotation(x.abs().amax(0))
        for kind, rotation in made.items():
            turned_x, turned_w = rotation.apply(x), rotation.apply(w)
            codes, scale = int8_rows(turned_w)
            tokens, token_scale = int_tokens(turned_x, 8)
            product = tokens.float() @ codes.float().t() * token_scale * scale
            left = float((turned_x @ turned_w.t() - exact).norm() / exact.norm())
            rows.append([width, kind, f"{left:.1e}", f"{sqnr(exact, product):.1f}"])
    write_table("quant_rotation", ["channels", "rotation", "unquantised_difference", "w8a8_output_sqnr_db"], rows)


class Tiny:
    """The tiny model on a host of its own: quantised, measured in velocity over whole runs, and sampled."""

    def __init__(self, host):
        self.runs = TinyRuns(host)
        sigmas = torch.linspace(1, 0, STEPS + 1)
        self.shown = {
            "positive": self.runs.conditioning(PROMPTS[0]), "negative": self.runs.conditioning(""), "sigmas": sigmas, "cfg": CFG,
            "latent_image": {"samples": torch.zeros(1, 16, 16, 16)},
        }  # fmt: skip
        self.stats = self.calibrated()
        self.visited = {(cfg, prompt): self._run(cfg, prompt) for cfg in (CFG, 1.0) for prompt in PROMPTS}

    def calibrated(self, rows: int = 1024):
        return NODES["RectiflowQuantCalibrate"]().execute(model=self.runs.model, seed=99, num_runs=1, layers="", rows=rows, **self.shown)[0]

    def quantised(self, weight_bits: str, act_bits: str, method: str, group: str, **changed):
        """(MODEL, report)."""
        given = {**QUANTIZE, "weight_bits": weight_bits, "act_bits": act_bits, "method": method, "group_size": group, "stats": self.stats}
        return NODES["RectiflowQuantize"]().execute(model=self.runs.model, **{**given, **changed})

    def _sampled(self, model, sampler, cfg: float, prompt: str) -> None:
        noise = self.runs.noise(PROBED)
        positive, negative = (self.runs.conditioning([text] * len(noise)) for text in (prompt, ""))
        empty, sigmas = torch.zeros_like(noise), self.shown["sigmas"]
        sample_custom(model, noise, cfg, KSAMPLER(sampler), sigmas, positive, negative, empty, disable_pbar=True, seed=0)

    def _run(self, cfg: float, prompt: str) -> list:
        visited: list = []
        self._sampled(self.runs.model, recording_sampler(visited), cfg, prompt)
        return visited

    def velocity(self, model, cfg: float) -> float:
        """Mean SQNR in dB over the steps of PROBED seeds of each prompt, none of which calibrated anything."""
        found: list = []
        for prompt in PROMPTS:
            self._sampled(model, replaying_sampler(self.visited[cfg, prompt], found), cfg, prompt)
        return sum(value for _, value in found) / len(found)

    def latent(self, model, seeds: int) -> torch.Tensor:
        prompts = [PROMPTS[i % 2] for i in range(seeds)]
        return self.runs.sample(prompts, self.runs.noise(range(seeds)), model=model, steps=STEPS, cfg=CFG)

    def distances(self, model, exact: torch.Tensor) -> list[float]:
        """Of each seed's final latent, relative to the fp32 model's."""
        found = self.latent(model, len(exact))
        return relative_errors(found, exact).tolist()

    def figures(self, model, exact: torch.Tensor) -> list[str]:
        """Velocity SQNR at both guidances and the mean of `distances`, the columns of `figure_names`."""
        decibels = [f"{self.velocity(model, cfg):.1f}" for cfg in (CFG, 1.0)]
        return [*decibels, f"{sum(self.distances(model, exact)) / len(exact):.4f}"]


def figure_names(seeds: int) -> list[str]:
    return [f"velocity_sqnr_db_cfg_{CFG:g}", "velocity_sqnr_db_cfg_1", f"latent_error_mean_of_{seeds}"]


def model_part(tiny: Tiny, seeds: int) -> None:
    exact, rows = tiny.latent(tiny.runs.model, seeds), [["fp32", "", "", "", "32.00", tiny.runs.model.model_size(), "", "", "0"]]

    def measured(name: str, model, method: str, group: str, rounding: str) -> None:
        rows.append([name, method, group, rounding, _bits(model), model.model_size(), *tiny.figures(model, exact)])

    for (weight_bits, act_bits, method, group), rounding in itertools.product(SETTINGS, ROUNDINGS):
        model, report = tiny.quantised(weight_bits, act_bits, method, group, rounding=rounding)
        name = f"W{weight_bits}A{act_bits}"
        measured(name, model, method, group, rounding)
        if name == "W8A8" and rounding == "nearest":
            for target in TARGETS:
                kept, shares, _ = NODES["RectiflowKeepSensitiveLayers"]().execute(
                    reference=tiny.runs.model, model=model, seed=98, target_db=target, **tiny.shown
                )
                count = sum(part.act_bits == 16 for part in quantised_parts(kept).values())
                measured(f"W8A8, {count} of {len(quantised_parts(kept))} layers kept", kept, method, group, rounding)
            measured("W8A16", tiny.quantised("8", "16", method, group)[0], method, group, rounding)
            _layers(report, shares)
    header = ["model", "method", "group", "rounding", "bits_per_weight", "bytes"]
    write_table("quant_model", [*header, *figure_names(seeds)], rows)


def rows_part(tiny: Tiny, seeds: int) -> None:
    """W4A8, the rest as in quant_model; no rows are the nearest codes."""
    exact, rows = tiny.latent(tiny.runs.model, seeds), []
    for count in ROWS:
        model, _ = tiny.quantised("4", "8", "tlq", "32", stats=tiny.calibrated(count), rounding="compensated")
        rows.append([count, *tiny.figures(model, exact)])
    write_table("quant_rows", ["rows", *figure_names(seeds)], rows)


def directions_part(tiny: Tiny, seeds: int) -> None:
    exact, rows = tiny.latent(tiny.runs.model, seeds), []
    for weight_bits, act_bits, rounding, counts in BESIDE:
        for count in counts:
            model, _ = tiny.quantised(weight_bits, act_bits, "tlq", "32", rounding=rounding, directions=count)
            name = f"W{weight_bits}A{act_bits}"
            rows.append([name, rounding, count, _bits(model), model.model_size(), *tiny.figures(model, exact)])
    header = ["model", "rounding", "directions", "bits_per_weight", "bytes"]
    write_table("quant_directions", [*header, *figure_names(seeds)], rows)


def _bits(model) -> str:
    """A weight, scales and all that is beside the codes counted."""
    parts = quantised_parts(model).values()
    return f"{8 * sum(part.nbytes for part in parts) / sum(part.in_features * part.out_features for part in parts):.2f}"


def _layers(report: str, shares: str) -> None:
    """W8A8 layer by layer: the errors of weight and output that Quantize tells, and the share of the velocity's error."""

    def cells(text: str) -> dict[str, list[str]]:
        lines = [line.strip("|").split("|") for line in text.splitlines() if line.count("|") > 3]
        return {name.strip(): [cell.strip() for cell in rest] for name, *rest in lines[2:]}

    told = cells(report)
    rows = [[name, told[name][0], *told[name][4:6], *found] for name, found in cells(shares).items()]
    write_table("quant_layers", ["layer", "rotation", "weight_db", "output_db", "share_of_velocity_error_db", "activations"], rows)


def seeds_part(tiny: Tiny, seeds: int, draws: int) -> None:
    """Twin-log and uniform with everything else alike, seed by seed, for several draws of the rotations' signs."""
    exact, rows = tiny.latent(tiny.runs.model, seeds), []
    for bits in ("4", "3"):
        found = {method: [] for method in ("tlq", "uniform")}
        size = {}
        for draw in range(draws):
            for method, errors in found.items():
                model, _ = tiny.quantised(bits, "8", method, "32", rotation="hadamard", seed=draw)
                errors.append(tiny.distances(model, exact))
                size[method] = model.model_size()
        pairs = {method: torch.tensor(errors) for method, errors in found.items()}  # (draws, seeds)
        for seed in range(seeds):
            ours, theirs = (pairs[method][:, seed] for method in ("tlq", "uniform"))
            mean = [f"{float(errors.mean()):.4f}" for errors in (ours, theirs)]
            first = [f"{float(errors[0]):.4f}" for errors in (ours, theirs)]
            nearer = f"{int((ours < theirs).sum())}/{draws}"
            rows.append([f"W{bits}A8", seed, *first, *mean, nearer, int(ours.mean() < theirs.mean()), size["tlq"], size["uniform"]])
    header = ["model", "seed", "tlq_first_draw", "uniform_first_draw", f"tlq_mean_of_{draws}", f"uniform_mean_of_{draws}"]
    write_table("quant_seeds", [*header, "draws_where_tlq_is_nearer", "tlq_mean_is_nearer", "tlq_bytes", "uniform_bytes"], rows)


def lora_part(tiny: Tiny) -> None:
    """Cosine of a LoRA's change of a layer's output in few bits to that of the layer in fp32, on rows of the calibration, by its size."""
    rows, trained = [], load_weights().transformer
    for bits in (8, 4, 3):
        for size in LORA_SIZES:
            cosines: dict[str, list[float]] = {"before": [], "bypass": [], "requant": []}
            for place, name in enumerate(LAYERS):
                weight, inputs = trained[f"{name}.weight"].float(), tiny.stats.layers[name]
                drawn = (torch.randn(*shape, generator=torch.Generator().manual_seed(place)) for shape in _factors(weight))
                added = next(drawn) @ next(drawn)
                added *= size * weight.norm() / added.norm()
                for policy, found in cosines.items():
                    moved = _moved(weight, added, bits, policy, inputs)
                    found.append(float(torch.nn.functional.cosine_similarity(moved, (inputs.sample @ added.t()).flatten(), dim=0)))
            for policy, found in cosines.items():
                rows.append([f"W{bits}A8", size, policy, f"{sum(found) / len(found):.3f}", f"{min(found):.3f}"])
    write_table("quant_lora", ["model", "lora_over_weight", "policy", "cosine_mean", "cosine_lowest"], rows)


def flips_part(tiny: Tiny) -> None:
    """How far the final latent moves when the noise moves by its last bits: a rounding that falls the other way is a whole step."""
    noise, rows = tiny.runs.noise([5]), []
    for bits in (None, ("8", "8"), ("4", "8"), ("3", "8"), ("4", "4"), ("3", "4")):
        model = tiny.runs.model if bits is None else tiny.quantised(*bits, "tlq", "32", rotation="hadamard")[0]
        found = [tiny.runs.sample(PROMPTS[0], start, model=model, steps=16, cfg=CFG) for start in (noise, noise * (1 + LAST_BITS))]
        moved = float((found[1] - found[0]).norm() / found[0].norm())
        rows.append(["fp32" if bits is None else f"W{bits[0]}A{bits[1]}", f"{LAST_BITS:.1e}", f"{moved:.1e}"])
    write_table("quant_flips", ["model", "noise_moved_by", "latent_moved_by"], rows)


def train_part(tiny: Tiny, seeds: int, steps: int) -> None:
    """Before and after `steps` of 4 points towards the whole model, whose samples of TAUGHT, four each, are the examples."""
    exact, rows, runs = tiny.latent(tiny.runs.model, seeds), [], tiny.runs
    prompts = list(TAUGHT) * 4
    clean = runs.sample(prompts, runs.noise(range(500, 500 + len(prompts))), steps=STEPS, cfg=CFG)
    positive = [entry for prompt in prompts for entry in runs.conditioning(prompt)]
    data = NODES["RectiflowLatentDataset"]().execute(latents={"samples": clean}, positive=positive)[0]
    target = NODES["RectiflowTrainTarget"]().execute(
        kind="teacher_velocity", teacher=runs.model, teacher_cfg=1.0, anneal_steps=1, annealing="linear"
    )[0]

    def measured(name: str, taught: int, model, seconds: float) -> None:
        rows.append([name, taught, *tiny.figures(model, exact), f"{seconds:.0f}"])

    for bits in TRAINED:
        name = "W{}A{}".format(*bits)
        model = tiny.quantised(*bits, "tlq", "32", lora="bypass", rounding="compensated")[0]
        measured(name, 0, model, 0.0)
        start = time.process_time()
        learnt, *_ = NODES["RectiflowTrain"]().execute(
            model=model, data=data, target=target, steps=steps, batch=4, name=name, negative=runs.conditioning(""), dtype="fp32",
            checkpointing=False, cond_dropout=0.2, ema=0.9, save_every=0, validate_every=0,
        )  # fmt: skip
        measured(name, steps, learnt, time.process_time() - start)
    write_table("quant_train", ["model", "steps", *figure_names(seeds), "seconds"], rows)


def _factors(weight: torch.Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
    return (weight.shape[0], LORA_RANK), (LORA_RANK, weight.shape[1])


def _moved(weight: torch.Tensor, added: torch.Tensor, bits: int, policy: str, inputs) -> torch.Tensor:
    """How the output of the layer in few bits changes when the LoRA is put on it."""
    scheme = QuantScheme(bits, 8, 32, rotation="hadamard", lora="requant" if policy == "requant" else "bypass", rounding="nearest")
    layer = quantised_layer(weight, None, scheme, inputs)
    plain = layer(inputs.sample)
    if policy == "before":
        layer = quantised_layer(weight + added, None, scheme, inputs)
    else:
        layer.set_weight(layer.numbers() + added, seed=11)
    return (layer(inputs.sample) - plain).flatten()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--steps", type=int, default=120, help="of training, for quant_train")
    given = parser.parse_args()
    if "weights" in given.part:
        weights_part()
    if "codes" in given.part:
        codes_part()
    if "rotation" in given.part:
        rotation_part()
    if not {"model", "rows", "directions", "seeds", "lora", "flips", "train"} & set(given.part):
        return
    host = make_host(Path(tempfile.mkdtemp()), settings=HostSettings(device="cpu", dtype="fp32"))
    with use_host(host), torch.inference_mode():
        tiny = Tiny(host)
        if "model" in given.part:
            model_part(tiny, given.seeds)
        if "rows" in given.part:
            rows_part(tiny, given.seeds)
        if "directions" in given.part:
            directions_part(tiny, given.seeds)
        if "seeds" in given.part:
            seeds_part(tiny, given.seeds, given.draws)
        if "flips" in given.part:
            flips_part(tiny)
        if "train" in given.part:
            train_part(tiny, given.seeds, given.steps)
        if "lora" in given.part:
            with torch.inference_mode(False), torch.no_grad():
                lora_part(tiny)


if __name__ == "__main__":
    main()
