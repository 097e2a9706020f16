"""A browser with the interface open, once for each interface version that is there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from rectiflow.tests.browser.devtools import Browser, find_chromium
from rectiflow.tests.server.process import ServerProcess

HERE = Path(__file__).parent
SCREENSHOTS = HERE.parent / "screenshots"
OLD = "1.27.10"
INSTALL_CHROMIUM = "Chromium is not installed: apt-get install chromium, or name an executable in CHROMIUM"
INSTALL_OLD = f"pip install --no-deps --target tests/browser/front_ends/{OLD} comfyui-frontend-package=={OLD}"
READY = "window.app?.graph && window.app.extensionManager && Object.keys(window.LiteGraph.registered_node_types).length > 50"


def _front_end(version: str) -> list[str]:
    """Server flags for an interface version, or a skip that says how to get it."""
    if version == "installed":
        pytest.importorskip("comfyui_frontend_package", reason="pip install comfyui-frontend-package")
        return []
    named = os.environ.get("OLD_FRONT_END")
    root = Path(named) if named else HERE / "front_ends" / version / "comfyui_frontend_package" / "static"
    if not (root / "index.html").is_file():
        pytest.skip(f"interface {version} is not there: {INSTALL_OLD}, or name its static folder in OLD_FRONT_END")
    return ["--front-end-root", str(root)]


class Interface:
    """The open page and the server behind it."""

    def __init__(self, browser: Browser, server: ServerProcess, version: str):
        self.browser = browser
        self.server = server
        self.version = version
        self.run, self.wait = browser.run, browser.wait

    def screenshot(self, name: str) -> None:
        self.browser.screenshot(SCREENSHOTS / f"{self.version}_{name}.png")

    def empty(self) -> None:
        """Close what is open and start from an empty graph, as a person does."""
        for _ in range(2):
            for kind in ("keyDown", "keyUp"):
                self.browser.call("Input.dispatchKeyEvent", type=kind, key="Escape", code="Escape", windowsVirtualKeyCode=27)
        self.run("app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
        self.wait("app.graph._nodes.length === 0")
        self.browser.errors.clear()

    def queue(self) -> None:
        self.run("app.queuePrompt(0)")

    def types(self) -> list[str]:
        return self.run("app.graph._nodes.map(node => node.type)")

    def picture_of(self, node_type: str, seconds: float = 60) -> str:
        """Address of the picture on a node, once it is one that the server has stored."""
        node = f"app.graph._nodes.find(node => node.type === '{node_type}')"
        return self.wait(f"{node}.imgs?.[0]?.naturalWidth > 0 && {node}.imgs[0].src.includes('/view?') && {node}.imgs[0].src", seconds)


@pytest.fixture(scope="module", params=["installed", OLD])
def interface(request, tmp_path_factory):
    """The interface of one version, booted; the tests of a module share it."""
    executable = find_chromium()
    if executable is None:
        pytest.skip(INSTALL_CHROMIUM)
    flags = _front_end(request.param)
    with ServerProcess(tmp_path_factory.mktemp("browser"), *flags) as server, Browser(executable) as browser:
        server.post("/settings", {"Comfy.TutorialCompleted": True})  # else a new user is shown the templates at some point
        browser.open(f"http://127.0.0.1:{server.port}/")
        browser.wait(READY, 60)
        yield Interface(browser, server, request.param)
