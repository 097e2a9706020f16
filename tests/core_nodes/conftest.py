"""A host whose folders lie in the test's own folder, with the core nodes registered."""

from __future__ import annotations

import pytest
from rectiflow.host.embedded.context import Host, HostSettings, use_host
from rectiflow.host.embedded.core_nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from rectiflow.host.embedded.execution.registry import NodeRegistry
from rectiflow.host.embedded.folder_paths import FolderPaths
from rectiflow.host.embedded.model_management import MemoryManager


@pytest.fixture
def host(tmp_path):
    registry = NodeRegistry()
    registry.add(NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS)
    settings = HostSettings(device="cpu", dtype="fp32")
    made = Host(paths=FolderPaths(tmp_path), registry=registry, memory=MemoryManager(settings), settings=settings)
    for folder in (made.paths.input_directory, made.paths.output_directory, made.paths.temp_directory):
        (tmp_path / folder).mkdir()
    with use_host(made):
        yield made


@pytest.fixture
def call(host):
    """call("ImageScale", image=…, …): what the node returns."""

    def run(class_id: str, **inputs):
        cls = host.registry[class_id]
        return getattr(cls(), cls.FUNCTION)(**inputs)

    return run
