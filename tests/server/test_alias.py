"""ComfyUI's module names: what they forward to, that they can be patched, and that they are gone outside of the server."""

from __future__ import annotations

import importlib
import sys

import pytest
from rectiflow.host.embedded import context, model_management, samplers, utils
from rectiflow.host.embedded.server.alias import installed
from rectiflow.host.embedded.server.alias.table import FORWARDS, PACKAGES


@pytest.fixture
def alias(embedded_host):
    with installed(), context.use_host(embedded_host):
        yield


@pytest.fixture
def embedded_host(tmp_path):
    from rectiflow.host.embedded.execution.registry import NodeRegistry
    from rectiflow.host.embedded.folder_paths import FolderPaths
    from rectiflow.host.embedded.model_management import MemoryManager

    settings = context.HostSettings(device="cpu")
    return context.Host(FolderPaths(tmp_path), NodeRegistry(), MemoryManager(settings), settings)


@pytest.mark.parametrize("name", sorted(FORWARDS))
def test_every_name_of_the_table_can_be_imported(alias, name):
    module = importlib.import_module(name)
    assert module.__name__ == name and len(dir(module)) > 5


def test_every_package_can_be_imported(alias):
    assert all(importlib.import_module(name).__path__ == [] for name in PACKAGES)


def test_the_objects_are_the_hosts_own(alias, embedded_host):
    import comfy.model_management
    import comfy.samplers
    import comfy.utils
    import folder_paths
    from comfy.patcher_extension import WrappersMP
    from comfy.utils import ProgressBar

    import nodes

    assert ProgressBar is utils.ProgressBar and comfy.utils.ProgressBar is utils.ProgressBar
    assert comfy.samplers.KSampler is samplers.KSampler and WrappersMP.OUTER_SAMPLE == "outer_sample"
    assert comfy.model_management.get_torch_device() == embedded_host.memory.device
    assert folder_paths.get_output_directory() == embedded_host.paths.output_directory
    folder_paths.folder_names_and_paths["mine"] = ([folder_paths.models_dir], set())
    assert embedded_host.paths.get_folder_paths("mine") and nodes.NODE_CLASS_MAPPINGS is embedded_host.registry.classes


def test_assigning_to_an_alias_reaches_the_host(alias, monkeypatch):
    import comfy.model_management as name

    original = model_management.soft_empty_cache
    replacement = lambda force=False: None  # noqa: E731
    try:
        name.soft_empty_cache = replacement
        assert model_management.soft_empty_cache is replacement and name.soft_empty_cache is replacement
    finally:
        model_management.soft_empty_cache = original


def test_a_star_import_brings_the_public_names(alias):
    names: dict = {}
    exec("from comfy.samplers import *", names)  # noqa: S102 - the statement under test
    assert names["KSampler"] is samplers.KSampler


def test_what_is_not_offered_says_so(alias):
    with pytest.raises(ModuleNotFoundError, match="comfy.controlnet is part of ComfyUI that this host does not offer"):
        importlib.import_module("comfy.controlnet")
    with pytest.raises(ImportError):
        from comfy.utils import no_such_name  # noqa: F401
    import comfy.utils

    with pytest.raises(AttributeError, match="comfy.utils.no_such_name is part of ComfyUI"):
        comfy.utils.no_such_name  # noqa: B018


def test_nothing_is_left_behind():
    before = {name: sys.modules.get(name) for name in ("server", "nodes", "execution")}
    with installed():
        importlib.import_module("comfy.utils")
        importlib.import_module("server")
    assert "comfy" not in sys.modules and {name: sys.modules.get(name) for name in before} == before
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("comfy.utils")


def test_io_types_compare_as_comfyui_does(alias):
    from comfy.comfy_types import IO

    assert not IO.ANY != "MODEL" and not IO.NUMBER != "INT" and not IO.INT != "FLOAT,INT"
    assert IO.INT != "FLOAT" and IO.INT != 3 and IO.INT == "INT" and str(IO.INT) == "INT" and {IO.INT: 1}["INT"] == 1
