"""A real ComfyUI in a process and a folder of its own, with the pack linked into custom_nodes under a name that is not ours."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

PACK = Path(__file__).resolve().parents[2]
LINK_NAME = "linked-under-another-name"  # no Python identifier either: the pack must import by path alone
START_SECONDS = 120
RUN_SECONDS = 240


class ComfyUIServer:
    """`with ComfyUIServer(checkout, python, folder) as server: server.run(graph)`."""

    def __init__(self, checkout: Path, python: str, folder: Path):
        self.folder = folder
        for name in ("custom_nodes", "input", "output", "temp", "user", "models", "front_end"):
            (folder / name).mkdir()
        (folder / "custom_nodes" / LINK_NAME).symlink_to(PACK, target_is_directory=True)
        (folder / "front_end" / "index.html").write_text("<!doctype html>", encoding="utf-8")
        self.port = _free_port()
        self.log = folder / "log.txt"
        self.command = [
            python, str(checkout / "main.py"), "--cpu", "--listen", "127.0.0.1", "--port", str(self.port), "--disable-api-nodes",
            "--base-directory", str(folder), "--database-url", "sqlite:///:memory:", "--front-end-root", str(folder / "front_end"),
        ]  # fmt: skip
        self.checkout = checkout
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> ComfyUIServer:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(self.command, cwd=self.checkout, env=environment, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                self.get("/system_stats")
                return self
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.3)
        self.__exit__()
        raise RuntimeError(f"ComfyUI did not start; its log ends with:\n{self.last_words()}")

    def __exit__(self, *exc) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def last_words(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")[-4000:]

    def raw(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=20) as answer:
            return answer.read()

    def text(self, path: str) -> str:
        return self.raw(path).decode()

    def get(self, path: str) -> Any:
        return json.loads(self.raw(path))

    def run(self, graph: dict[str, dict]) -> dict[str, Any]:
        """Queue a graph in API form and wait; the history entry, or AssertionError with what went wrong."""
        entry = self.wait(self.queue(graph))
        assert entry["status"]["status_str"] == "success", (entry["status"], self.last_words())
        return entry

    def post(self, path: str, content: dict[str, Any]) -> Any:
        body = json.dumps(content).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return json.loads(answer.read() or "null")
        except urllib.error.HTTPError as error:
            raise AssertionError(f"ComfyUI refused {path}: {error.read().decode()}") from None

    def queue(self, graph: dict[str, dict]) -> str:
        """Queue a graph in API form; its prompt id."""
        queued = self.post("/prompt", {"prompt": graph})
        assert not queued["node_errors"], queued["node_errors"]
        return queued["prompt_id"]

    def wait(self, prompt_id: str) -> dict[str, Any]:
        """The history entry of a prompt once it has ended, whatever ended it."""
        deadline = time.monotonic() + RUN_SECONDS
        while time.monotonic() < deadline:
            history = self.get(f"/history/{prompt_id}")
            if history:
                return history[prompt_id]
            time.sleep(0.1)
        raise AssertionError(f"ComfyUI did not finish within {RUN_SECONDS} s:\n{self.last_words()}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
