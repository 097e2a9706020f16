"""Which device a host uses, which models lie on it, how much is free: what ComfyUI keeps in the globals of model_management.

A model is either fully on its load device or on its offload device: this host does not split weights between the two.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import threading
import weakref
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ...errors import input_error
from .context import HostSettings

__all__ = [
    "CPU", "DTYPES", "INFERENCE_MEMORY", "RESERVED_MEMORY", "LoadedModel", "MemoryManager", "pick_device", "soft_empty_cache",
    "system_memory",
]  # fmt: skip

GIB = 1024**3
RESERVED_MEMORY = 400 * 1024**2  # what the desktop and other programs may take of a GPU between two looks
INFERENCE_MEMORY = int(0.8 * GIB)  # activations of the smallest pictures
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU = torch.device("cpu")


def pick_device(name: str) -> torch.device:
    """A torch device that is present here; "auto" is CUDA, then MPS, then the CPU."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps") if torch.backends.mps.is_available() else CPU
    present = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())] + ["mps"] * torch.backends.mps.is_available()
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is not None and device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    if device is None or str(device) not in present:
        raise input_error("device", "--device", name, f"auto, {', '.join(present)}", "Name a device that this machine has.")
    return device


def _windows_memory() -> tuple[int, int]:
    class Status(ctypes.Structure):  # MEMORYSTATUSEX
        _fields_ = [("length", ctypes.c_ulong), ("load", ctypes.c_ulong)] + [
            (name, ctypes.c_ulonglong) for name in ("total", "available", "page_total", "page_free", "virtual", "virtual_free", "extended")
        ]

    status = Status(length=ctypes.sizeof(Status))
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
    return int(status.total), int(status.available)


def system_memory() -> tuple[int, int]:
    """(all, available without swapping) bytes of main memory; half of it counts as available where the system does not tell."""
    if sys.platform == "win32":
        return _windows_memory()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return total, int(line.split()[1]) * 1024
    return total, total // 2


def soft_empty_cache(force: bool = False) -> None:
    """Give the allocator's unused blocks back to the device."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


class LoadedModel:
    """A model on its load device and the patcher that put it there.

    The patcher is held weakly: when a node's clone is gone, the nearest living ancestor stands for the model.
    """

    def __init__(self, patcher: Any):
        self.device = patcher.load_device
        lineage = []
        while patcher is not None:
            lineage.append(weakref.ref(patcher))
            patcher = patcher.parent
        self._lineage = lineage

    @property
    def patcher(self) -> Any | None:
        return next((patcher for patcher in (ref() for ref in self._lineage) if patcher is not None), None)


class MemoryManager:
    """Which device this host uses, which models lie on it, how much is free.

    Attributes:
        device: where models run.
        reported_free: bytes that `free` answers instead of asking the device, or None. It is how a test (or a user with a budget)
            decides whether conditions are run in one batch or one after the other.
    """

    def __init__(self, settings: HostSettings | None = None):
        self.settings = settings or HostSettings()
        self.device = pick_device(self.settings.device)
        if self.settings.dtype != "auto" and self.settings.dtype not in DTYPES:
            raise input_error("dtype", "--dtype", self.settings.dtype, f"auto, {', '.join(DTYPES)}", "Choose one of these.")
        self.reported_free: int | None = None
        self.loaded: list[LoadedModel] = []  # most recently used first
        self.lock = threading.RLock()

    @contextmanager
    def reporting_free(self, free_bytes: int):
        """`with memory.reporting_free(0):` makes every decision that depends on free memory deterministic."""
        previous, self.reported_free = self.reported_free, free_bytes
        try:
            yield
        finally:
            self.reported_free = previous

    def free(self, device: torch.device) -> int:
        if self.reported_free is not None:
            return self.reported_free
        if device.type == "cuda":
            stats = torch.cuda.memory_stats(device)
            cached = stats.get("reserved_bytes.all.current", 0) - stats.get("active_bytes.all.current", 0)
            return torch.cuda.mem_get_info(device)[0] + cached
        if device.type == "mps":
            return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
        return system_memory()[1]

    def total(self, device: torch.device) -> int:
        if device.type == "cuda":
            return torch.cuda.get_device_properties(device).total_memory
        return torch.mps.recommended_max_memory() if device.type == "mps" else system_memory()[0]

    def load(self, patchers: Iterable[Any], memory_required: float = 0, force_patch_weights: bool = False) -> None:
        """Put models on their devices, unloading others where the room is short.

        A model that another clone of the same weights has loaded is handed over: the old clone is detached, the weights stay.
        Raises: torch.OutOfMemoryError where even an empty device has too little room.
        """
        with self.lock:
            wanted = list(dict.fromkeys(model for patcher in patchers for model in (patcher, *patcher.model_patches_models())))
            for patcher in wanted:
                self._hand_over(patcher)
            self._make_room(wanted, memory_required)
            for patcher in wanted:
                patcher.model_patches_to(patcher.load_device)
                if patcher.model_dtype() is not None:
                    patcher.model_patches_to(patcher.model_dtype())
                patcher.partially_load(patcher.load_device, 1e32, force_patch_weights=force_patch_weights)
                self.loaded.insert(0, LoadedModel(patcher))

    def _hand_over(self, patcher: Any) -> None:
        for entry in list(self.loaded):
            other = entry.patcher
            if other is None or patcher.is_clone(other):
                self.loaded.remove(entry)
            if other is not None and patcher.is_clone(other):
                other.detach(unpatch_all=False)

    def _make_room(self, wanted: list[Any], memory_required: float) -> None:
        for device in {patcher.load_device for patcher in wanted} - {CPU}:
            missing = sum(
                patcher.model_size() - (patcher.loaded_size() if patcher.current_loaded_device() == device else 0)
                for patcher in wanted
                if patcher.load_device == device
            )
            self.free_memory(missing * 1.1 + max(INFERENCE_MEMORY, memory_required) + RESERVED_MEMORY, device)
            room = self.free(device)
            if missing > room:
                names = ", ".join(type(patcher.model).__name__ for patcher in wanted)
                raise torch.OutOfMemoryError(
                    f"{names}: {missing / GIB:.2f} GiB of weights do not fit into the {room / GIB:.2f} GiB free on {device}. "
                    "Choose a smaller weight dtype, close other programs, or run with --device cpu."
                )

    def free_memory(self, memory_required: float, device: torch.device, keep_loaded: Iterable[Any] = ()) -> list[Any]:
        """Unload the longest unused models from `device` until `memory_required` bytes are free; returns their patchers."""
        unloaded = []
        keep = set(keep_loaded)
        with self.lock:
            for entry in reversed(list(self.loaded)):
                patcher = entry.patcher
                if entry.device != device or patcher in keep:
                    continue
                if self.free(device) > memory_required:
                    break
                self.loaded.remove(entry)
                if patcher is not None:
                    logging.debug("unloading %s", type(patcher.model).__name__)
                    patcher.detach()
                    unloaded.append(patcher)
            if unloaded:
                soft_empty_cache()
        return unloaded

    # Dtypes

    def computes_in(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether the device is fast at `dtype`; a dtype that the user chose is taken at its word."""
        if dtype == torch.float32 or DTYPES.get(self.settings.dtype) == dtype:
            return True
        if device.type == "cuda":
            major = torch.cuda.get_device_properties(device).major
            return (dtype == torch.float16 and major >= 7) or (dtype == torch.bfloat16 and (major >= 8 or torch.version.hip is not None))
        return device.type == "mps" and dtype in (torch.float16, torch.bfloat16)

    def weights_dtype(self, supported: Iterable[torch.dtype], stored: torch.dtype | None, device: torch.device) -> torch.dtype:
        """The dtype a diffusion model is kept in: the user's, else fp16 files stay fp16, else the first that the device is fast at."""
        if self.settings.dtype != "auto":
            return DTYPES[self.settings.dtype]
        supported = [dtype for dtype in supported if self.computes_in(dtype, device)]
        if stored == torch.float16 and torch.float16 in supported:
            return torch.float16
        return supported[0] if supported else torch.float32

    def compute_dtype(self, weights: torch.dtype, device: torch.device, supported: Iterable[torch.dtype]) -> torch.dtype | None:
        """The dtype layers cast their weights to at each call, or None where they compute in the dtype they are kept in."""
        if weights in (torch.float32, torch.float64) or self.computes_in(weights, device):
            return None
        return next((dtype for dtype in supported if self.computes_in(dtype, device)), torch.float32)
