"""The two faces of the port export the same names."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from rectiflow.host.embedded import port
from rectiflow.host.embedded.context import Host, HostSettings, use_host
from rectiflow.host.embedded.sampler_names import SAMPLER_NAMES, SCHEDULER_NAMES

COMFYUI = Path(port.__file__).parent.parent / "comfyui.py"


def test_both_hosts_export_the_same_names_in_the_same_order():
    """ComfyUI's side is read, not imported: no ComfyUI is needed to see that a name is missing there."""
    tree = ast.parse(COMFYUI.read_text())
    (exported,) = [node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"]
    assert ast.literal_eval(exported) == port.__all__
    defined = {alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    defined |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    defined |= {node.targets[0].id for node in tree.body if isinstance(node, ast.Assign)}
    assert set(port.__all__) <= defined


@pytest.mark.parametrize("name", port.__all__)
def test_every_name_is_there_on_the_embedded_host(name):
    import rectiflow.host

    assert getattr(rectiflow.host, name) is getattr(port, name)


def test_the_embedded_host_says_what_it_is():
    assert port.HOST == "embedded" and port.HOST_VERSION == "0.3.64"
    assert tuple(port.SAMPLER_NAMES) == SAMPLER_NAMES and tuple(port.SCHEDULER_NAMES) == SCHEDULER_NAMES


@pytest.mark.parametrize("disabled", [True, False])
def test_metadata_follows_the_settings(disabled):
    with use_host(Host(paths=None, registry=None, memory=None, settings=HostSettings(disable_metadata=disabled))):
        assert port.metadata_enabled() is not disabled
