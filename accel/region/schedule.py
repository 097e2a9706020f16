"""How many tokens each step leaves out.

"Region-Adaptive Sampling for Diffusion Transformers", arXiv 2502.10389, and its published settings. With n tokens, T steps, start s₀,
period L and slope s,

    left out at step t:  floor64( (1 − ratio)·n + s·(floor(t/L) − floor(floor((T + s₀)/L)/2)) )     0 before s₀ and at reset steps

L = 0 keeps (1 − ratio)·n without rounding to 64. What we do differently: below 1024 tokens the rounding is to 1, since a multiple of 64
would be all or nothing; the count stays between 0 and n − 1; the last step that may leave tokens out is end − 1.
"""

from __future__ import annotations

import math
import re

from ...errors import input_error

__all__ = ["drop_counts", "parse_steps", "steps_from_percent"]

ROUNDING = 64  # rows a matrix kernel likes; the published code rounds to it
ROUNDED_FROM = 1024


def drop_counts(
    tokens: int, steps: int, ratio: float, start: int, end: int, resets: tuple[int, ...], slope: int = 0, period: int = 0
) -> list[int]:
    """Tokens left out at each step, `steps` values from 0 to tokens − 1."""
    average = (1.0 - ratio) * tokens
    last = min(end, steps)
    middle = (last + start) // period // 2 if period else 0
    unit = ROUNDING if period and tokens >= ROUNDED_FROM else 1
    counts = []
    for step in range(steps):
        wanted = average + slope * (step // period - middle) if period else average
        counted = 0 if not start <= step < last or step in resets or ratio >= 1.0 else math.floor(wanted / unit) * unit
        counts.append(min(max(counted, 0), tokens - 1))
    return counts


def parse_steps(text: str, where: str, name: str = "reset_steps") -> tuple[int, ...]:
    """"12, 22" → (12, 22), sorted, each once.

    Raises: NodeInputError for anything but whole numbers from 0 on.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(re.fullmatch(r"[0-9]{1,6}", part) for part in parts):
        raise input_error(where, name, text, "step numbers separated by commas, such as 12, 22, or nothing", "Write whole numbers.")
    return tuple(sorted({int(part) for part in parts}))


def steps_from_percent(steps: int, start: float, resets: str, where: str) -> tuple[int, tuple[int, ...]]:
    """(start step, reset steps) of shares of a run, each rounded to the nearest step.

    Raises: NodeInputError for shares that are no numbers from 0 to 1.
    """
    shares = []
    for part in (part.strip() for part in resets.split(",")):
        if not part:
            continue
        if re.fullmatch(r"[0-9]*\.?[0-9]+", part) is None or float(part) > 1.0:
            remedy = "Write shares such as 0.43, 0.73."
            raise input_error(where, "reset_percents", resets, "numbers from 0 to 1 separated by commas", remedy)
        shares.append(float(part))
    return round(steps * start), tuple(sorted({min(round(steps * share), steps - 1) for share in shares}))
