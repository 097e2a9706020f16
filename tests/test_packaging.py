"""What is installed and shipped: pins, wheel, and the folder as ComfyUI loads it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import rectiflow
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
NOT_SHIPPED = {"tests", "bench"}
LEFT_OUT_OF_COPIES = shutil.ignore_patterns(
    ".*", "__pycache__", "*.egg-info", "build", "dist", "output", "temp", "user", "bench", "tests", "models", "input"
)
# Named by GPU builds of torch with exact versions, so that pinning them here would only break CPU builds.
PINNED_BY_TORCH = ("nvidia-", "cuda-", "triton", "pytorch-triton")


def pyproject() -> dict:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def requirements(path: Path) -> list[Requirement]:
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [Requirement(line) for line in lines if line]


def pins() -> dict[str, str]:
    """Package → version, as far as it applies to this Python and system."""
    found = {}
    for requirement in requirements(ROOT / "constraints.txt"):
        if requirement.marker is None or requirement.marker.evaluate():
            found[canonicalize_name(requirement.name)] = str(requirement.specifier)
    return found


def test_every_pin_is_exact():
    for requirement in requirements(ROOT / "constraints.txt"):
        operators = [clause.operator for clause in requirement.specifier]
        assert operators == ["=="], f"{requirement} is not pinned to one version"


def test_everything_declared_is_pinned():
    project = pyproject()["project"]
    extras = [Requirement(text) for group in project["optional-dependencies"].values() for text in group]
    build = [Requirement(text) for text in pyproject()["build-system"]["requires"]]
    missing = {canonicalize_name(r.name) for r in requirements(ROOT / "requirements.txt") + extras + build} - set(pins())
    assert not missing, f"constraints.txt lacks {', '.join(sorted(missing))}"


def test_everything_that_follows_is_pinned():
    """The requirements of each installed pin, for this Python and system, are pins too."""
    pinned = pins()
    for name in pinned:
        try:
            needed = importlib.metadata.requires(name) or ()
        except importlib.metadata.PackageNotFoundError:
            continue
        for text in needed:
            requirement = Requirement(text)
            other = canonicalize_name(requirement.name)
            if other.startswith(PINNED_BY_TORCH) or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
                continue
            assert other in pinned, f"{name} needs {other}, which constraints.txt does not pin"
            assert requirement.specifier.contains(pinned[other].removeprefix("==")), f"{name} needs {requirement}, not {pinned[other]}"


def test_the_installed_versions_are_the_pins():
    """Numbers in tests and benchmarks are those of the pins; a different torch in .venv would explain a failure elsewhere."""
    compared = 0
    for name, pinned in pins().items():
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        assert installed.partition("+")[0] == pinned.removeprefix("=="), f"{name} {installed} is installed, {pinned} is pinned"
        compared += 1
    assert compared >= 10


def test_comfyui_keeps_its_own_versions():
    """requirements.txt is installed into ComfyUI's environment, where a pin of ours would break other packs or ComfyUI itself."""
    for requirement in requirements(ROOT / "requirements.txt"):
        assert not str(requirement.specifier), f"{requirement} restricts a version"
    assert "comfyui-frontend-package" not in {canonicalize_name(r.name) for r in requirements(ROOT / "requirements.txt")}


def test_one_version():
    assert pyproject()["project"]["version"] == rectiflow.__version__


def test_registry_fields():
    project, comfy = pyproject()["project"], pyproject()["tool"]["comfy"]
    assert "comfyui" not in project["name"].lower() and len(project["name"]) < 100
    assert (ROOT / project["license"]["file"]).is_file()
    assert (ROOT / comfy["Icon"]).is_file()


def test_every_folder_with_modules_is_a_package():
    """Otherwise it would be missing from the wheel: setup.py finds packages by their __init__.py."""
    folders = {path.parent for path in ROOT.rglob("*.py")}
    ours = {folder for folder in folders if not any(part.startswith(".") or part in NOT_SHIPPED for part in folder.relative_to(ROOT).parts)}
    without = sorted(str(f.relative_to(ROOT)) for f in ours if not (f / "__init__.py").exists() and f.name not in ("build", "workflows"))
    assert not without, f"no __init__.py in {without}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a copy of the tree, unpacked; the path of the folder to put on sys.path."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed (it is among the pins of ./rectiflow)")
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=LEFT_OUT_OF_COPIES)
    command = [sys.executable, "-c", "from setuptools.build_meta import build_wheel; print(build_wheel('..'))"]
    done = subprocess.run(command, cwd=folder / "source", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def test_the_wheel_holds_what_runs(wheel):
    pack = wheel / "rectiflow"
    shipped = (
        "nodes/declare.py", "web/docs/RectiflowLoadTiny.md", "workflows/text_to_image.json", "workflows/api/text_to_image.json",
        "tiny/tiny-emoji-flux.safetensors", "tiny/vocabulary.json", "cli/run.py", "client.py", "host/embedded/server/main.py",
    )  # fmt: skip
    missing = [name for name in shipped if not (pack / name).is_file()]
    assert not missing
    assert not any((pack / name).exists() for name in NOT_SHIPPED)
    data = {".json", ".safetensors", ".md", ".png", ".jpg", ".py", ".js", ".svg"}
    rooms = [room for room in ROOT.iterdir() if (pack / room.name).is_dir() and room.name != "docs"]
    wanted = {f for room in rooms for f in room.rglob("*") if f.suffix in data and "__pycache__" not in f.parts}
    left_out = sorted(str(f.relative_to(ROOT)) for f in wanted if not (pack / f.relative_to(ROOT)).is_file())
    assert not left_out, "package-data in pyproject.toml does not cover these"


def test_the_wheel_imports_on_its_own(wheel):
    code = f"import sys; sys.path.insert(0, {str(wheel)!r}); import rectiflow.cli as c; print(c.__file__); c.main(['nodes'])"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd=wheel, timeout=120)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.splitlines()[0]).parents[2] == wheel
    assert "RectiflowLoadTiny" in done.stdout


def test_the_folder_loads_under_any_name():
    """As ComfyUI loads an entry of custom_nodes: from its path, under a name that is no identifier, with no `rectiflow` to import."""
    code = f"""
import importlib.util, sys
sys.modules["rectiflow"] = None
name = "/some/where/custom_nodes/linked-as_x_you like"
spec = importlib.util.spec_from_file_location(name, {str(ROOT / "__init__.py")!r})
module = importlib.util.module_from_spec(spec)
sys.modules[name] = module
spec.loader.exec_module(module)
print(len(module.NODE_CLASS_MAPPINGS), module.MISSING_PALETTES, module.WEB_DIRECTORY)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(len(rectiflow.NODE_CLASS_MAPPINGS)), "{}", "./web"]
