"""Small prompts for the server tests, made of the testing pack's nodes and core nodes."""

from __future__ import annotations

from typing import Any

__all__ = ["fail", "node", "picture", "show", "steps"]


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def show(value: int = 1) -> dict[str, dict]:
    """One node, one text."""
    return {"1": node("TestingShow", value=value)}


def steps(count: int = 3, seconds: float = 0.01, preview: bool = True) -> dict[str, dict]:
    """Progress, previews, then a temporary picture."""
    return {"1": node("TestingSteps", steps=count, seconds=seconds, preview=preview), "2": node("PreviewImage", images=["1", 0])}


def picture(seed: int, prefix: str = "picture", size: int = 64, seconds: float = 0.0) -> dict[str, dict]:
    """A saved picture that depends on the seed alone."""
    return {
        "1": node("TestingPicture", seed=seed, size=size, seconds=seconds),
        "2": node("SaveImage", images=["1", 0], filename_prefix=prefix),
    }


def fail(kind: str) -> dict[str, dict]:
    return {"1": node("TestingFail", kind=kind), "2": node("TestingShow", value=["1", 0])}
