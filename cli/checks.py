"""What `rectiflow doctor` looks at: each function yields the findings of one section."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .node_table import ROOT, known_nodes

__all__ = ["SECTIONS", "Finding"]

NEEDED = ("torch", "numpy", "pillow", "safetensors")
FOR_THE_EMBEDDED_HOST = ("aiohttp", "comfyui-frontend-package")
FOR_DEVELOPERS = ("pytest", "ruff")
GIGABYTE = 1024**3
LITTLE_DISK = 2 * GIGABYTE
BOOTSTRAP = "Start ./rectiflow, which installs it."


@dataclass(frozen=True)
class Finding:
    """One line: `state` is "ok", "note" (nothing is broken) or "fault"; `remedy` says what to do."""

    name: str
    value: str
    state: str = "ok"
    remedy: str = ""


def pinned_versions() -> dict[str, set[str]]:
    """Package → the versions that constraints.txt allows for one Python or another; empty in an installed package."""
    pins: dict[str, set[str]] = {}
    path = ROOT / "constraints.txt"
    for name, version in re.findall(r"^([\w.-]+)==([\w.]+)", path.read_text(encoding="utf-8") if path.is_file() else "", re.MULTILINE):
        pins.setdefault(name.lower(), set()).add(version)
    return pins


def programs() -> Iterator[Finding]:
    from .. import __version__

    yield Finding("rectiflow", f"{__version__} in {ROOT}")
    young_enough = sys.version_info >= (3, 10)
    yield Finding("python", f"{platform.python_version()} ({sys.executable})", "ok" if young_enough else "fault")
    yield Finding("system", f"{platform.system()} {platform.release()} {platform.machine()}, {os.cpu_count()} CPUs")


def packages() -> Iterator[Finding]:
    pins = pinned_versions()
    for name in NEEDED:
        yield _package(name, pins, "fault", BOOTSTRAP)
    for name in FOR_THE_EMBEDDED_HOST:
        yield _package(name, pins, "note", f"`rectiflow serve` needs it. {BOOTSTRAP}")
    yield _package("triton", pins, "note", "Only GPU kernels need it; it exists for Linux. Without it the torch versions run.")
    for name in FOR_DEVELOPERS:
        yield _package(name, pins, "note", f"`rectiflow test` needs it. {BOOTSTRAP}")


def _package(name: str, pins: dict[str, set[str]], when_absent: str, remedy: str) -> Finding:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "not installed", when_absent, remedy)
    allowed = pins.get(name)
    if allowed and version.partition("+")[0] not in allowed:
        return Finding(name, f"{version}, but tested with {' or '.join(sorted(allowed))}", "note", "Start ./rectiflow to install the pins.")
    return Finding(name, version)


def device() -> Iterator[Finding]:
    import torch

    from ..host.embedded import HostSettings
    from ..host.embedded.model_management import MemoryManager, get_torch_device_name

    memory = MemoryManager(HostSettings())
    free, total = (size / GIGABYTE for size in (memory.free(memory.device), memory.total(memory.device)))
    yield Finding("device", f"{get_torch_device_name(memory.device)}, {free:.1f} of {total:.1f} GB free")
    fast = [str(dtype).removeprefix("torch.") for dtype in _dtypes(torch) if memory.computes_in(dtype, memory.device)]
    yield Finding("dtype", f"{fast[0]} (fast here: {', '.join(fast)})")
    if memory.device.type == "cpu":
        yield _integer_product()
    bound = ", ".join(f"{name}={os.environ[name]}" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ)
    yield Finding("threads", f"{torch.get_num_threads()}" + (f" ({bound})" if bound else ""))
    if sys.platform == "linux" and torch.version.cuda is None and Path("/proc/driver/nvidia").exists():
        yield Finding("cuda", "an NVIDIA driver is there, but this torch is a CPU build", "note", "Install torch with CUDA into .venv.")


def _integer_product() -> Finding:
    from ..kernels.int8_gemm import CPU_MULTIPLIES_BYTES

    if CPU_MULTIPLIES_BYTES:
        return Finding("8-bit layers", "in integers (VNNI): faster than fp32")
    return Finding("8-bit layers", "without VNNI as fast as fp32", "note", "Quantize saves memory here, not time.")


def _dtypes(torch) -> tuple:
    return (torch.bfloat16, torch.float16, torch.float32)


def host() -> Iterator[Finding]:
    comfyui = comfyui_checkout()
    inside = importlib.util.find_spec("comfy") is not None
    yield Finding("host", "ComfyUI, whose modules this Python finds" if inside else "embedded")
    if comfyui is None:
        named = os.environ.get("COMFYUI_PATH")
        value = f"COMFYUI_PATH is {named}, which is no ComfyUI checkout" if named else "none found"
        yield Finding("ComfyUI", value, "note", "Only `rectiflow test --host comfyui` needs it: let COMFYUI_PATH name a checkout.")
    else:
        yield Finding("ComfyUI", f"{_comfyui_version(comfyui)} in {comfyui}")
    yield _front_end()


def comfyui_checkout() -> Path | None:
    """COMFYUI_PATH, or the ComfyUI whose custom_nodes this folder lies in."""
    named = os.environ.get("COMFYUI_PATH")
    for folder in ([Path(named)] if named else []) + [ROOT.parent.parent]:
        if (folder / "comfy" / "model_patcher.py").is_file():
            return folder
    return None


def _comfyui_version(folder: Path) -> str:
    file = folder / "comfyui_version.py"
    found = re.search(r'__version__ = "([^"]+)"', file.read_text(encoding="utf-8")) if file.is_file() else None
    return found.group(1) if found else "of an unknown version"


def _front_end() -> Finding:
    spec = importlib.util.find_spec("comfyui_frontend_package")
    folder = Path(spec.origin).parent / "static" if spec and spec.origin else None
    if folder is None:
        return Finding("interface", "not installed", "note", f"`rectiflow serve` needs it. {BOOTSTRAP}")
    if not (folder / "index.html").is_file():
        return Finding("interface", f"{folder} holds no index.html", "fault", "Reinstall comfyui-frontend-package.")
    return Finding("interface", str(folder))


def nodes() -> Iterator[Finding]:
    from .. import MISSING_PALETTES, NODE_CLASS_MAPPINGS

    yield Finding("our nodes", str(len(NODE_CLASS_MAPPINGS)), "ok" if NODE_CLASS_MAPPINGS else "fault")
    for palette, reason in MISSING_PALETTES.items():
        yield Finding(f"palette {palette}", f"missing: {reason}", "fault", "Install what it names, or mend the module.")
    with known_nodes() as registry:
        yield Finding("all nodes", str(len(registry)))
        for path, reason in registry.failures.items():
            yield Finding(f"pack {Path(path).name}", f"not loaded: {reason}", "note", "Mend the pack or take it out of custom_nodes.")
    weights = ROOT / "tiny" / "tiny-emoji-flux.safetensors"
    if weights.is_file():
        yield Finding("tiny model", f"{weights.stat().st_size / 1e6:.0f} MB")
    else:
        yield Finding("tiny model", f"{weights} is absent", "fault", "Restore it from the project; the examples draw with it.")


def folders() -> Iterator[Finding]:
    with known_nodes() as registry_of_paths:  # the block makes the folders below those of the embedded host
        from ..host.embedded import current_host

        del registry_of_paths
        paths = current_host().paths
        for name in ("input", "output", "temp", "user"):
            yield _folder(name, Path(getattr(paths, f"{name}_directory")))
        for kind in ("checkpoints", "diffusion_models", "text_encoders", "vae", "loras"):
            count = len(paths.get_filename_list(kind))
            if count:
                yield Finding(kind, f"{count} file{'s' * (count > 1)}")
    free = shutil.disk_usage(ROOT).free
    yield Finding("disk", f"{free / GIGABYTE:.1f} GB free", "ok" if free > LITTLE_DISK else "note")


def _folder(name: str, path: Path) -> Finding:
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    if not os.access(existing, os.W_OK) and name != "input":
        return Finding(name, f"{path} cannot be written", "fault", f"Allow writing in {existing}, or name another folder.")
    return Finding(name, str(path) + ("" if path.exists() else " (made when needed)"))


SECTIONS: dict[str, Callable[[], Iterator[Finding]]] = {
    "Program": programs,
    "Packages": packages,
    "Host": host,
    "Device": device,
    "Nodes": nodes,
    "Folders": folders,
}
