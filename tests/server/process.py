"""A server in a process and a folder of its own, plain HTTP requests to it, and a websocket client that blocks."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

__all__ = ["Answer", "Listener", "ServerProcess"]

TESTING_PACK = Path(__file__).parent / "testing_pack"
START_SECONDS = 60
ADDRESS = re.compile(rb"To see the GUI go to: http://127\.0\.0\.1:(\d+)")


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class ServerProcess:
    """`with ServerProcess(folder, "--cache-none") as server: server.get("/queue")`. The testing pack is loaded."""

    def __init__(self, folder: Path, *flags: str, pack: Path | None = TESTING_PACK):
        self.folder = folder
        self.port = 0
        self.log = folder / "log.txt"
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "rectiflow", "serve", "--cpu", "--port", "0", "--base-directory", str(folder)]
        if pack is not None:
            packs = folder / "named_by_yaml"
            packs.mkdir(exist_ok=True)
            if not (packs / pack.name).exists():
                (packs / pack.name).symlink_to(pack, target_is_directory=True)
            (folder / "paths.yaml").write_text("testing:\n    custom_nodes: named_by_yaml\n")
            command += ["--extra-model-paths-config", str(folder / "paths.yaml")]
        self._command = [*command, *flags]

    def __enter__(self) -> ServerProcess:
        # Not the checkout: its folders would answer to names such as `nodes`.
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(self._command, cwd=self.folder, stdout=log, stderr=subprocess.STDOUT)
        end = time.monotonic() + START_SECONDS
        while not (found := ADDRESS.search(self.log.read_bytes())):
            if self.process.poll() is not None or time.monotonic() > end:
                self.process.kill()
                raise AssertionError(f"the server did not start:\n{self.log.read_text()}")
            time.sleep(0.02)
        self.port = int(found[1])
        return self

    def __exit__(self, *exc) -> None:
        if self.process.poll() is None:
            self.stop()

    def stop(self, number: int = signal.SIGTERM, seconds: float = 30) -> int:
        """Send a signal and return the exit status."""
        self.process.send_signal(number)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def request(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        """One request on a connection of its own. A body that is not bytes is sent as JSON."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, data, headers or {})
            response = connection.getresponse()
            return Answer(response.status, {key.lower(): value for key, value in response.getheaders()}, response.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        return self.request("GET", path, headers=headers)

    def post(self, path: str, body: Any = None, **headers: str) -> Answer:
        return self.request("POST", path, body, headers)

    def queue(self, prompt: dict, **fields: Any) -> str:
        """POST /prompt and return the id; AssertionError where it is refused."""
        answer = self.post("/prompt", {"prompt": prompt, **fields})
        assert answer.status == 200, answer.body
        return answer.json()["prompt_id"]

    def finished(self, prompt_id: str, seconds: float = 60) -> dict[str, Any]:
        """Wait for the history entry of a prompt."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            entry = self.get(f"/history/{prompt_id}").json()
            if entry:
                return entry[prompt_id]
            time.sleep(0.01)
        raise AssertionError(f"prompt {prompt_id} did not finish within {seconds} s:\n{self.log.read_text()[-2000:]}")

    def wait_until_running(self, prompt_id: str, seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if any(item[1] == prompt_id for item in self.get("/queue").json()["queue_running"]):
                return
            time.sleep(0.005)
        raise AssertionError(f"prompt {prompt_id} did not begin within {seconds} s")

    def upload(self, path: str, content: bytes, filename: str, **fields: str) -> Answer:
        """POST a multipart form with a file under `image`."""
        boundary = uuid.uuid4().hex
        parts = [
            f'--{boundary}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'.encode() for key, value in fields.items()
        ]
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{filename}"\r\nContent-Type: image/png\r\n\r\n'
        body = b"".join([*parts, head.encode(), content, f"\r\n--{boundary}--\r\n".encode()])
        return self.request("POST", path, body, {"Content-Type": f"multipart/form-data; boundary={boundary}"})

    def listen(self, client_id: str = "", features: dict[str, Any] | None = None) -> Listener:
        return Listener(f"ws://127.0.0.1:{self.port}/ws?clientId={client_id}", features)

    def resident_bytes(self) -> int:
        fields = Path(f"/proc/{self.process.pid}/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


class Listener:
    """`with server.listen("me") as socket: socket.receive()`. JSON messages are dicts, binary ones bytes."""

    def __init__(self, url: str, features: dict[str, Any] | None):
        self._url = url
        self._features = features
        self._loop = asyncio.new_event_loop()

    def __enter__(self) -> Listener:
        self._loop.run_until_complete(self._open())
        return self

    async def _open(self) -> None:
        self._session = aiohttp.ClientSession()
        self._socket = await self._session.ws_connect(self._url, max_msg_size=0)
        if self._features is not None:
            await self._socket.send_json({"type": "feature_flags", "data": self._features})

    def __exit__(self, *exc) -> None:
        self._loop.run_until_complete(self._close())
        self._loop.close()

    async def _close(self) -> None:
        await self._socket.close()
        await self._session.close()

    def receive(self, seconds: float = 20) -> dict | bytes | None:
        """The next message; None when the server closed the socket."""
        message = self._loop.run_until_complete(self._socket.receive(seconds))
        if message.type is aiohttp.WSMsgType.TEXT:
            return json.loads(message.data)
        return message.data if message.type is aiohttp.WSMsgType.BINARY else None

    def receive_run(self, prompt_id: str, seconds: float = 20) -> list[dict | bytes]:
        """All messages up to the one that says the prompt is done."""
        messages = []
        while True:
            message = self.receive(seconds)
            assert message is not None, "the server closed the socket"
            messages.append(message)
            if isinstance(message, dict) and message["type"] == "executing" and message["data"]["node"] is None:
                if message["data"]["prompt_id"] == prompt_id:
                    return messages

    def send(self, text: str) -> None:
        self._loop.run_until_complete(self._socket.send_str(text))
