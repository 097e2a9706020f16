"""Node classes that both engines run in test_against_comfyui.py; imports nothing of either host."""

from __future__ import annotations

import asyncio


class Number:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"value": ("INT", {"default": 0, "min": -100, "max": 100})}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("INT",), "go", "toy"

    def go(self, value):
        return (value,)


class Add:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"a": ("INT", {}), "b": ("INT", {})}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("INT",), "go", "toy"

    def go(self, a, b):
        return (a + b,)


class Half:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"x": ("FLOAT", {"min": 0.0, "max": 1.0}), "how": (["down", "up"],)}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("FLOAT",), "go", "toy"

    def go(self, x, how):
        return (x / 2,)


class Show:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"value": ("INT,FLOAT,STRING", {})}})
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "go", "toy", True

    def go(self, value):
        return {"ui": {"value": [value]}}


class Numbers:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"first": ("INT", {}), "count": ("INT", {"min": 1})}})
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_IS_LIST = ("INT",), "go", "toy", (True,)

    def go(self, first, count):
        return (list(range(first, first + count)),)


class Total:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"values": ("INT", {})}})
    RETURN_TYPES, FUNCTION, CATEGORY, INPUT_IS_LIST = ("INT",), "go", "toy", True

    def go(self, values):
        return (sum(values),)


class Pick:
    INPUT_TYPES = classmethod(
        lambda cls: {"required": {"first": ("BOOLEAN", {}), "one": ("INT", {"lazy": True}), "two": ("INT", {"lazy": True})}}
    )
    RETURN_TYPES, FUNCTION, CATEGORY = ("INT",), "go", "toy"

    def check_lazy_status(self, first, one, two):
        return ["one"] if first and one is None else ["two"] if not first and two is None else []

    def go(self, first, one=None, two=None):
        return (one if first else two,)


class Repeat:
    """Expands into a chain of additions; its ids are its own, so that no builder is needed."""

    INPUT_TYPES = classmethod(
        lambda cls: {"required": {"value": ("INT", {}), "times": ("INT", {"min": 1})}, "hidden": {"me": "UNIQUE_ID"}}
    )
    RETURN_TYPES, FUNCTION, CATEGORY = ("INT",), "go", "toy"

    def go(self, value, times, me):
        expand, link = {}, value
        for index in range(times):
            expand[f"{me}.{index}"] = {"class_type": "Add", "inputs": {"a": link, "b": 1}}
            link = [f"{me}.{index}", 0]
        return {"result": (link,), "expand": expand}


class Later:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"value": ("INT", {})}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("INT",), "go", "toy"

    async def go(self, value):
        await asyncio.sleep(0.01)
        return (value,)


class Fail:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"value": ("INT", {})}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("INT",), "go", "toy"

    def go(self, value):
        raise RuntimeError("on purpose")


class Changes:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"value": ("INT", {})}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("INT",), "go", "toy"
    IS_CHANGED = classmethod(lambda cls, value: float("nan"))

    def go(self, value):
        return (value,)


class Strict:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"a": ("INT", {"max": 5}), "b": ("INT", {"max": 5})}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("INT",), "go", "toy"

    @classmethod
    def VALIDATE_INPUTS(cls, a):
        return True if a is None or a < 50 else f"{a} is far too much"

    def go(self, a, b):
        return (a + b,)


CLASSES = {
    cls.__name__: cls for cls in (Number, Add, Half, Show, Numbers, Total, Pick, Repeat, Later, Fail, Changes, Strict)
}  # fmt: skip
