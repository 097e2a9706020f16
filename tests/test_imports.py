"""The laws of docs/architecture.md that a parser can hold: who may enter which room, what is imported when, what is never used."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE_THE_PACK = {"tests", "bench", "setup.py"}
LONGEST_FILE = 450

# Room → the other rooms it may import. A room is a folder of the root or, for the embedded host, host/embedded.
DOORS = {
    "kernels": set(),
    "families": {"kernels"},
    "metrics": set(),
    "samplers": {"families", "kernels"},
    "accel": {"families", "kernels", "metrics"},
    "train": {"accel", "families", "kernels", "metrics", "samplers", "tiny"},
    "tiny": {"families"},
    "host": {"host/embedded"},
    "host/embedded": {"host", "tiny", "families"},
    "nodes": {"accel", "families", "host", "kernels", "metrics", "samplers", "tiny", "train"},
    "cli": {"host", "host/embedded", "kernels", "client.py", "tiny", "train"},
    "client.py": set(),
    "errors.py": set(),
    "workflows": {"host/embedded"},
    "__init__.py": {"nodes"},
    "__main__.py": {"cli"},
}
OPEN_TO_ALL = {"errors.py", "__init__.py"}

# The algorithms know torch and nothing else that has to be installed; the host's names are ComfyUI's modules.
ALGORITHMS = {"kernels", "families", "samplers", "accel", "train"}
HOST_MODULES = {
    "comfy", "comfy_api", "comfy_execution", "comfyui_version", "folder_paths", "latent_preview", "node_helpers", "nodes",
    "execution", "server",
}  # fmt: skip
HARD_IMPORTS_OF_ALGORITHMS = {"torch"}
NEVER_IMPORTED = {"pickle", "cPickle", "dill", "marshal", "shelve", "cloudpickle", "pip", "ensurepip", "requests"}
NEVER_CALLED = {"eval", "exec", "compile", "__import__"}
MUTATORS = {"append", "extend", "insert", "remove", "pop", "popitem", "clear", "update", "setdefault", "add", "discard", "sort"}


@dataclass(frozen=True)
class Source:
    """One Python file of the pack."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @property
    def room(self) -> str:
        return room_of(self.path.relative_to(ROOT).parts)

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text(encoding="utf-8"), self.name)

    def imports(self, tree: ast.AST | None = None) -> Iterator[tuple[int, int, str]]:
        """(line, level, dotted name) of every import; `from . import a, b` yields one per name."""
        for node in ast.walk(tree or self.tree):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, 0, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    yield node.lineno, node.level, ".".join(part for part in (node.module, alias.name) if part)

    def rooms_entered(self) -> Iterator[tuple[int, str]]:
        for line, level, name in self.imports():
            if level:
                package = self.path.relative_to(ROOT).parts[:-1]
                base = package[: len(package) - (level - 1)]
                yield line, room_of((*base, *name.split(".")))


def room_of(parts: tuple[str, ...]) -> str:
    """The room of a path, or of an import target that ends in a module or in a name of one."""
    if parts[:2] == ("host", "embedded"):
        return "host/embedded"
    first = parts[0] if parts else "__init__.py"
    if (ROOT / first).is_dir() or first.endswith(".py"):
        return first
    return f"{first}.py" if (ROOT / f"{first}.py").is_file() else "__init__.py"


def tracked(pattern: str) -> list[Path]:
    """Files of the pack: what is in a hidden or an ignored folder is not ours."""
    ignored = {"build", "dist", "output", "temp", "user", "input", "models", "__pycache__"}
    found = sorted(ROOT.rglob(pattern))
    return [path for path in found if not any(part.startswith(".") or part in ignored for part in path.relative_to(ROOT).parts)]


EVERY_FILE = [Source(path) for path in tracked("*.py")]
PACK = [source for source in EVERY_FILE if source.room not in OUTSIDE_THE_PACK]


def report(findings: list[str], law: str) -> None:
    assert not findings, law + "\n" + "\n".join(findings)


def test_the_parser_sees_the_pack():
    """Every other test here would pass on an empty list."""
    rooms = {source.room for source in PACK}
    assert {"nodes", "samplers", "host", "host/embedded", "tiny", "cli", "errors.py"} <= rooms
    assert not rooms - set(DOORS), "a new room: say in DOORS and in docs/architecture.md what it may import"


def test_who_may_enter_which_room():
    findings = [
        f"{source.name}:{line} enters {room}"
        for source in PACK
        for line, room in source.rooms_entered()
        if room != source.room and room not in OPEN_TO_ALL | DOORS[source.room]
    ]
    report(findings, "docs/architecture.md, 'Who may enter which room', does not allow:")


def test_imports_inside_the_pack_are_relative():
    """ComfyUI loads the folder under a name of its own, so neither `rectiflow` nor a folder of it is importable by name there."""
    own = {path.name for path in ROOT.iterdir() if path.is_dir() and (path / "__init__.py").exists()} | {"rectiflow", "client", "errors"}
    allowed_as_host = {("host", name) for name in HOST_MODULES} | {("host/embedded", name) for name in HOST_MODULES}
    findings = [
        f"{source.name}:{line} imports {name}"
        for source in PACK
        for line, level, name in source.imports()
        if level == 0 and name.split(".")[0] in own and (source.room, name.split(".")[0]) not in allowed_as_host
    ]
    report(findings, "imports inside the pack are relative:")


def test_only_the_port_imports_comfyui():
    findings = [
        f"{source.name}:{line} imports {name}"
        for source in PACK
        for line, level, name in source.imports()
        if level == 0 and name.split(".")[0] in HOST_MODULES and source.name != "host/comfyui.py" and "server/alias" not in source.name
    ]
    report(findings, "ComfyUI is imported by host/comfyui.py alone:")


def test_torch_is_the_only_hard_import_of_the_algorithms():
    findings = []
    for source in PACK:
        if source.room not in ALGORITHMS:
            continue
        top = [node for node in source.tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        for node in top:
            for line, level, name in source.imports(node):
                package = name.split(".")[0]
                if level == 0 and package not in sys.stdlib_module_names | HARD_IMPORTS_OF_ALGORITHMS:
                    findings.append(f"{source.name}:{line} needs {package}")
    report(findings, "a package other than torch is imported inside the function that needs it:")


def test_nothing_is_evaluated_or_unpickled():
    findings = []
    for source in EVERY_FILE:
        if source.room == "tests":  # what a test may do there, lint says
            continue
        findings += [f"{source.name}:{line} imports {name}" for line, _, name in source.imports() if name.split(".")[0] in NEVER_IMPORTED]
        for node in ast.walk(source.tree):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            if called in NEVER_CALLED or called in ("os.system", "os.popen"):
                findings.append(f"{source.name}:{node.lineno} calls {called}")
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            if called == "torch.load" and ast.unparse(keywords.get("weights_only", ast.Constant(None))) != "True":
                findings.append(f"{source.name}:{node.lineno} calls torch.load without weights_only=True")
            if "shell" in keywords and ast.unparse(keywords["shell"]) != "False":
                findings.append(f"{source.name}:{node.lineno} starts a shell")
    report(findings, "no eval, no exec, no pickle, no shell:")


def module_names(tree: ast.Module) -> set[str]:
    names = set()
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def local_names(function: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(function):
        if isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def changed_names(function: ast.AST) -> Iterator[tuple[int, str]]:
    """Names whose object is changed in place: item assignment, deletion, a mutating method."""
    for node in ast.walk(function):
        if isinstance(node, ast.Global):
            yield from ((node.lineno, name) for name in node.names)
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, (ast.Store, ast.Del)) and isinstance(node.value, ast.Name):
            yield node.lineno, node.value.id
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            if node.func.attr in MUTATORS:
                yield node.lineno, node.func.value.id


def changes_of_module_state(tree: ast.Module) -> set[tuple[int, str]]:
    """(line, name) of every place inside a function that changes or rebinds a name of the module."""
    at_module_level = module_names(tree)
    found = set()
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            hidden = local_names(function)
            rebound = {name for node in ast.walk(function) if isinstance(node, ast.Global) for name in node.names}
            for line, name in changed_names(function):
                if name in at_module_level and (name in rebound or name not in hidden):
                    found.add((line, name))
    return found


def test_no_module_keeps_mutable_state():
    """Tables at module level are fine; functions that change them, or rebind a global, are not."""
    findings = [f"{source.name}:{line} changes {name}" for source in PACK for line, name in changes_of_module_state(source.tree)]
    report(sorted(findings), "state belongs to an object, not to a module:")


@pytest.mark.parametrize(
    "body, caught",
    [
        ("TABLE['a'] = 1", True),
        ("del TABLE['a']", True),
        ("TABLE.update(a=1)", True),
        ("global TABLE; TABLE = {}", True),
        ("return TABLE['a']", False),
        ("TABLE = {}; TABLE['a'] = 1", False),
        ("other = dict(TABLE); other['a'] = 1", False),
    ],
)
def test_changes_of_module_state_are_seen(body, caught):
    assert bool(changes_of_module_state(ast.parse(f"TABLE = {{}}\ndef f():\n    {body}"))) is caught


def test_files_stay_readable():
    findings = [
        f"{source.name} has {count} lines"
        for source in EVERY_FILE
        if (count := len(source.path.read_text(encoding="utf-8").splitlines())) > LONGEST_FILE
    ]
    report(findings, f"a file of more than {LONGEST_FILE} lines is split by meaning:")


def run_with_blocked(packages: tuple[str, ...], code: str) -> str:
    """Run code in a fresh interpreter in which importing one of the packages fails; returns what it prints."""
    block = f"import sys\nfor name in {packages!r}: sys.modules[name] = None\n"
    done = subprocess.run([sys.executable, "-c", block + code], capture_output=True, text=True, cwd=ROOT.parent, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


HEAVY = ("torch", "numpy", "PIL", "aiohttp", "safetensors", "comfyui_frontend_package")


def test_the_root_imports_with_the_standard_library_alone():
    code = "import rectiflow, rectiflow.nodes as n\nprint(len(rectiflow.NODE_CLASS_MAPPINGS), n.MISSING_PALETTES)"
    count, missing = run_with_blocked(HEAVY, code).strip().split(" ", 1)
    assert int(count) > 0
    assert missing == "{}"


def test_inputs_are_described_with_the_standard_library_alone():
    code = "import rectiflow\nfor c in rectiflow.NODE_CLASS_MAPPINGS.values(): assert c.INPUT_TYPES()['required'] is not None\nprint('ok')"
    assert run_with_blocked(HEAVY, code).strip() == "ok"


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["nodes", "--help"], ["nodes"], ["nodes", "KSampler"]])
def test_help_and_nodes_do_not_load_torch(arguments):
    code = f"from rectiflow.cli import main\ntry: main({arguments!r})\nexcept SystemExit as done: assert not done.code"
    assert "rectiflow" in run_with_blocked(("torch",), code) or arguments[-1] == "KSampler"


def test_lint_is_clean():
    if importlib.util.find_spec("ruff") is None:
        pytest.skip("ruff is not installed (it is among the pins of ./rectiflow)")
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
