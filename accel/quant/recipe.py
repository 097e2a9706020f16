"""From a layer to a quantised layer: which layers, which rotation, what it costs in decibels.

A rotation is chosen by the error that the layer's output has on the rows of the calibration ("auto"), or by LRQ-DiT's rule (arXiv
2508.03485, "threshold"): Hadamard where the input's root mean square J is below a threshold, their dual rotation above. J has the model's
own scale, so that the threshold is that of their models; the measured error needs none. Smoothing is taken where it lowers the same error:

    m_k = max_n|W_nk|^α / max|x_k|^(1−α)        as published, without a rotation: the largest magnitudes set the steps
    m_k = ‖W_·k‖^α / rms(x_k)^(1−α)             in front of one, which spreads channels until a token's step follows its norm. The noise is
                                                then c·Σ(x_k·m_k)²·Σ(‖W_·k‖/m_k)², least at α = ½ (Cauchy and Schwarz)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from ...errors import input_error
from .calibration import LayerInputs, QuantStats
from .compensated import compensated
from .directions import DTYPE, MOST, Directions, principal_directions
from .error import sqnr
from .linear import LORA_POLICIES, QuantLinear
from .rotation import CONVROT, Rotation, block_hadamard, convrot, dual_rotation, hadamard, no_rotation
from .stored import store
from .twin_log import ROUNDS

__all__ = ["ROTATIONS", "ROUNDINGS", "LayerReport", "QuantScheme", "layer_report", "quantised_layer", "quantised_layers", "report_table"]

ROTATIONS = ("auto", "none", "hadamard", "hadamard_block", "convrot", "dual", "threshold")
ROUNDINGS = ("auto", "compensated", "nearest")  # auto: compensated below 8 bits
TRIAL_ROWS = 32  # of the weight, to rank rotations
SHORTEST = 32  # channels; below, scales and grids cost more than codes save
TINY = 1e-5

# In a block, what stays in full precision: modulation and embedding are small and multiply everything.
_MULTIPLIERS = r"mod|modulation|adaln|ada_ln|adaLN\w*|\w*_mod|embed\w*|\w*_embed\w*|norm\w*|gate|time\w*"
SENSITIVE = re.compile(rf"(?:^|[._])(?:{_MULTIPLIERS})(?:[._]|$)", re.I)
DOWN = re.compile(r"(?:mlp\.2|ff(?:_context)?\.net\.2|ffn\.2|feed_forward\.w2|mlp\.fc2|mlp\.down_proj|linear2)$")


@dataclass(frozen=True)
class QuantScheme:
    """weight_bits 2, 3, 4, 6 or 8; act_bits 4, 6, 8, or 16 to leave activations; group 0 for a grid a row; simulate: see linear.py;
    directions: of each layer's input that are not rounded, where a calibration has rows to tell them."""

    weight_bits: int = 4
    act_bits: int = 8
    group: int = 32
    method: str = "tlq"
    rotation: str = "auto"
    j_threshold: float = 1.0
    smooth_alpha: float = 0.5
    protect_down: bool = True
    keep_below: float = 0.0
    lora: str = "bypass"
    seed: int = 0
    simulate: bool = False
    rounding: str = "auto"
    directions: int = 0

    @property
    def compensates(self) -> bool:
        return self.rounding == "compensated" or self.rounding == "auto" and self.weight_bits < 8

    def line(self) -> str:
        group = "" if self.weight_bits == 8 else f" group {self.group}" if self.group else " rows"
        how = (f", {self.directions} directions beside" if self.directions else "") + ", simulated" * self.simulate
        return f"W{self.weight_bits}A{self.act_bits} {self.method}{group}, rotation {self.rotation}, LoRA {self.lora}{how}"

    def check(self, where: str) -> None:
        """Raises: NodeInputError for what no layer can have."""
        allowed = {
            "weight_bits": (2, 3, 4, 6, 8), "act_bits": (4, 6, 8, 16), "group_size": (0, 16, 32, 64, 128), "method": ("tlq", "uniform"),
            "rotation": ROTATIONS, "lora": LORA_POLICIES, "rounding": ROUNDINGS,
        }  # fmt: skip
        for name, values in allowed.items():
            value = self.group if name == "group_size" else getattr(self, name)
            if value not in values:
                raise input_error(where, name, value, ", ".join(map(str, values)), "Choose one of these.")
        if not 0 <= self.directions <= MOST:
            raise input_error(where, "directions", self.directions, f"0 to {MOST}", "16 are enough where inputs move along few.")


@dataclass(frozen=True)
class LayerReport:
    """One layer: what was done, and its errors in dB; output is None without calibration. kept: why it stays in full precision.
    compensated: whether its codes make up for each other's errors."""

    name: str
    rotation: str = ""
    smooth: bool = False
    spread: float | None = None
    bits_per_weight: float = 16.0
    weight_db: float | None = None
    output_db: float | None = None
    kept: str = ""
    compensated: bool = False


def reason_to_keep(name: str, layer: nn.Linear, scheme: QuantScheme) -> str:
    """Why a layer stays as it is, or nothing."""
    if SENSITIVE.search(name):
        return "modulation or embedding"
    if scheme.protect_down and scheme.act_bits < 8 and DOWN.search(name):
        return "down-projection below 8-bit activations"
    if min(layer.in_features, layer.out_features) < SHORTEST:
        return f"fewer than {SHORTEST} channels"
    if scheme.weight_bits < 8 and scheme.group and layer.in_features % scheme.group:
        return f"groups of {scheme.group} do not divide {layer.in_features} channels"
    return ""


def _rotation(kind: str, width: int, inputs: LayerInputs | None, seed: int) -> Rotation:
    if kind == "dual":
        return dual_rotation(inputs.peaks, seed)
    made: dict[str, Callable[[], Rotation]] = {
        "none": no_rotation, "hadamard": lambda: hadamard(width, seed), "hadamard_block": lambda: block_hadamard(width, seed=seed),
        "convrot": lambda: convrot(width),
    }  # fmt: skip
    return made[kind]()


def _candidates(scheme: QuantScheme, width: int, inputs: LayerInputs | None) -> tuple[str, ...]:
    block = "convrot" if width % CONVROT == 0 else "hadamard_block"
    if scheme.rotation == "auto":
        return ("hadamard" if scheme.weight_bits < 8 else block,) if inputs is None else ("none", "hadamard", block)
    if scheme.rotation == "threshold":
        return ("hadamard" if inputs is None or inputs.spread < scheme.j_threshold else "dual",)
    if scheme.rotation == "convrot":
        return (block,)
    return ("hadamard",) if scheme.rotation == "dual" and inputs is None else (scheme.rotation,)


def _smoothing(weight: torch.Tensor, inputs: LayerInputs, alpha: float, rotated: bool) -> torch.Tensor:
    """m (k,), 1 for channels that are silent."""
    if rotated:
        entering, columns = inputs.channel_rms.to(weight), weight.norm(dim=0)
    else:
        entering, columns = inputs.peaks.to(weight.device), weight.abs().amax(0)
    m = columns.clamp_min(TINY).pow(alpha) / entering.clamp_min(TINY).pow(1 - alpha)
    return torch.where(entering > 0, m, torch.ones_like(m)).clamp(1e-4, 1e4)


def _output_db(exact: torch.Tensor, layer: QuantLinear, rows: torch.Tensor) -> float:
    return sqnr(exact, layer(rows).float())


def quantised_layer(
    weight: torch.Tensor, bias: torch.Tensor | None, scheme: QuantScheme, inputs: LayerInputs | None = None, where: str = "quantise"
) -> QuantLinear:
    """weight (n, k), bias (n,) → the layer of the scheme whose output errs least on the rows of `inputs`.

    Raises: NodeInputError for a weight that is not finite; ValueError for a group that does not divide the rows.
    """
    weight = weight.detach().float()
    if not bool(torch.isfinite(weight).all()):
        raise input_error(where, "model", "a weight with NaN or infinity", "finite weights", "Load the model again.")
    ways: list[tuple[str, torch.Tensor | None]] = []
    for kind in _candidates(scheme, weight.shape[1], inputs):
        ways.append((kind, None))
        if inputs is not None and scheme.smooth_alpha:
            ways.append((kind, _smoothing(weight, inputs, scheme.smooth_alpha, kind != "none")))

    def made(kind: str, m: torch.Tensor | None, of: torch.Tensor, added: torch.Tensor | None, rounds: int = ROUNDS) -> QuantLinear:
        rotation = _rotation(kind, weight.shape[1], inputs, scheme.seed).to(weight.device)
        turned = rotation.apply(of if m is None else of / m)
        kept = None if added is None else added.detach().clone()
        stored = store(turned, scheme.weight_bits, scheme.group, scheme.method, rounds)
        return QuantLinear(stored, kept, scheme.act_bits, rotation, m, scheme.lora, simulate=scheme.simulate)

    best = ways[0]
    if len(ways) > 1:
        part = weight[:: max(1, len(weight) // TRIAL_ROWS)]
        rows = inputs.sample.to(weight.device)
        exact = rows @ part.t()
        best = max(ways, key=lambda way: _output_db(exact, made(*way, part, None, rounds=1), rows))
    layer = made(*best, weight, bias)
    rows = spread_rows(inputs)
    return layer if rows is None or not (scheme.directions or scheme.compensates) else _fitted(layer, weight, scheme, rows)


def _fitted(layer: QuantLinear, weight: torch.Tensor, scheme: QuantScheme, rows: torch.Tensor) -> QuantLinear:
    """The layer with what the scheme asks for and rows (r, k) of a calibration tell: directions beside the codes, codes that make up for
    each other's errors on what is left."""
    rows, down = layer.turned(rows.to(weight.device).float()), None
    if scheme.directions:
        down = principal_directions(rows, min(scheme.directions, min(weight.shape) // 2), layer.rotation, layer.smooth)
    if down is not None:
        across = layer.turned(down.float())
        rows = rows - rows @ across.T @ across
    if scheme.compensates:
        layer.weight.data.copy_(compensated(layer.stored, layer.into_basis(weight), rows))
    if down is None:
        return layer
    residual = ((layer.into_basis(weight) - layer.stored.numbers()) @ across.T).to(DTYPE)
    return layer.with_directions(Directions(down, residual))


def spread_rows(inputs: LayerInputs | None) -> torch.Tensor | None:
    """Rows (r, k) over all calls of the calibration, where there is one that kept some."""
    return None if inputs is None else inputs.spread_rows


def layer_report(name: str, weight: torch.Tensor, layer: QuantLinear, inputs: LayerInputs | None) -> LayerReport:
    """The errors of `layer`, which stands for weight (n, k)."""
    weight = weight.detach().float()
    output = None
    if inputs is not None:
        rows = inputs.sample.to(weight.device)
        bias = 0 if layer.bias is None else layer.bias.float()
        output = _output_db(rows @ weight.t() + bias, layer, rows)
    found = sqnr(weight, layer.numbers())
    spread = None if inputs is None else inputs.spread
    return LayerReport(name, layer.rotation.kind, layer.smooth is not None, spread, layer.bits_per_weight, found, output)


def quantised_layers(
    layers: Mapping[str, nn.Linear], weight_of: Callable[[str], torch.Tensor], scheme: QuantScheme, stats: QuantStats | None, where: str,
    step: Callable[[], None] = lambda: None,
) -> tuple[dict[str, QuantLinear], list[LayerReport]]:  # fmt: skip
    """The quantised layers by name, and a report of each, kept ones too.

    weight_of: a layer's name → its weight as it is to be quantised. step: called after each layer.
    """
    scheme.check(where)
    if stats is not None:
        stats.check(where)
    made, reports = {}, []
    with torch.inference_mode(False), torch.no_grad():
        for name, layer in layers.items():
            reason = reason_to_keep(name, layer, scheme)
            if not reason:
                inputs = None if stats is None else stats.of(name, layer.in_features, where)
                weight = weight_of(name).clone()
                bias = None if layer.bias is None else layer.bias.data.clone()
                found = quantised_layer(weight, bias, scheme, inputs, where)
                made_up = scheme.compensates and spread_rows(inputs) is not None
                report = replace(layer_report(name, weight, found, inputs), compensated=made_up)
                reason = _too_far(report, scheme.keep_below)
                if not reason:
                    made[name] = found
                    reports.append(report)
            if reason:
                reports.append(LayerReport(name, bits_per_weight=8.0 * layer.weight.element_size(), kept=reason))
            step()
    if not made:
        remedy = "Change include, exclude or keep_below_db."
        raise input_error(where, "include", f"{len(reports)} layers, all kept", "at least one layer to quantise", remedy)
    return made, reports


def _too_far(report: LayerReport, keep_below: float) -> str:
    found = report.weight_db if report.output_db is None else report.output_db
    return f"{found:.1f} dB, below {keep_below:g}" if keep_below and found < keep_below else ""


def _shown(value: float | None, form: str = ".1f") -> str:
    return "" if value is None else format(value, form)


def report_table(scheme: QuantScheme, reports: list[LayerReport], before: int, after: int) -> str:
    """What was done as a table; `before` and `after` are bytes of the model."""
    done = [report for report in reports if not report.kept]
    made_up = sum(report.compensated for report in done)
    rounding = f"rounding compensated in {made_up} of them" if made_up else "to the nearest codes"
    lines = [f"{scheme.line()}: {len(done)} of {len(reports)} layers, {rounding}, {before / 2**20:.1f} → {after / 2**20:.1f} MiB", ""]
    lines += ["| layer | rotation | smooth | J | bits/weight | weight dB | output dB |", "|---|---|---|---|---|---|---|"]
    for r in done:
        smooth = "yes" if r.smooth else ""
        errors = f"{_shown(r.weight_db)} | {_shown(r.output_db)}"
        lines.append(f"| {r.name} | {r.rotation} | {smooth} | {_shown(r.spread, '.2f')} | {r.bits_per_weight:.2f} | {errors} |")
    lines += [f"| {r.name} | kept: {r.kept} | | | {r.bits_per_weight:.0f} | | |" for r in reports if r.kept]
    return "\n".join(lines)
