"""Talk to a running server, ours or ComfyUI's: queue a graph, follow its progress, fetch what it made.

    with Client("http://127.0.0.1:8188") as client:
        finished = client.run(json.load(open("graph.json")), on_event=print)
        for file in finished.files:
            Path(file.filename).write_bytes(client.download(file))

The calls block. The websocket is read while `run` waits; a dropped one is opened again under the same client id.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import urllib.parse
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp

__all__ = [
    "Client", "Event", "Preview", "OutputFile", "Finished", "ClientError", "PromptRejected", "ExecutionFailed", "ExecutionInterrupted",
]  # fmt: skip

PREVIEW_IMAGE = 1
PREVIEW_IMAGE_WITH_METADATA = 4
# A preview of 512 pixels is tens of kilobytes; the room is for servers that send larger ones.
LARGEST_MESSAGE_BYTES = 64 * 1024 * 1024
HEARTBEAT_SECONDS = 30
RECONNECT_SECONDS = (0.2, 0.5, 1, 2, 4, 8)


class ClientError(RuntimeError):
    """The server cannot be reached or answered something else than its API says."""


class PromptRejected(ClientError):
    """The server refused the graph. `error` and `node_errors` are ComfyUI's objects."""

    def __init__(self, error: Mapping[str, Any], node_errors: Mapping[str, Any]):
        super().__init__(str(error.get("message", error)))
        self.error = dict(error)
        self.node_errors = dict(node_errors)


class ExecutionFailed(ClientError):
    """A node raised. `details` is the data of the server's execution_error message."""

    def __init__(self, details: Mapping[str, Any]):
        self.details = dict(details)
        super().__init__(f"{self.node_type} (node {self.node_id}): {self.details.get('exception_message', '').strip()}")

    @property
    def node_id(self) -> str:
        return str(self.details.get("node_id", ""))

    @property
    def node_type(self) -> str:
        return str(self.details.get("node_type", ""))


class ExecutionInterrupted(ClientError):
    """Somebody interrupted the run."""


@dataclass(frozen=True)
class Event:
    """One JSON message of the websocket, as ComfyUI names it: "executing", "progress", "executed", …"""

    type: str
    data: dict[str, Any]


@dataclass(frozen=True)
class Preview:
    """A picture of the running node: `format` is "jpeg" or "png", `metadata` is empty where the server sends none."""

    format: str
    image: bytes
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OutputFile:
    """A file that a node made, by the names /view wants."""

    node_id: str
    filename: str
    subfolder: str
    type: str


@dataclass(frozen=True)
class Finished:
    """A run that ended well: `outputs` is node id → ui object, as in the history; `seconds` is wall clock, waiting included."""

    prompt_id: str
    outputs: dict[str, dict]
    seconds: float

    @property
    def files(self) -> list[OutputFile]:
        """Every file named in `outputs`, in order, previews in the temp folder included."""
        found = []
        for node_id, ui in self.outputs.items():
            for entries in ui.values():
                for entry in entries if isinstance(entries, list) else ():
                    if isinstance(entry, dict) and "filename" in entry:
                        found.append(OutputFile(node_id, entry["filename"], entry.get("subfolder", ""), entry.get("type", "output")))
        return found


class Client:
    """A connection to one server; `with` opens and closes it. Not for use from several threads at once.

    Args:
        url: "http://127.0.0.1:8188", with a path where a proxy mounts the server below one; the scheme may be left out.
        timeout: seconds that a single request may take; waiting for a run has no limit.
    """

    def __init__(self, url: str = "http://127.0.0.1:8188", timeout: float = 30.0):
        self.url = _base_url(url)
        self.client_id = uuid.uuid4().hex
        self._timeout = aiohttp.ClientTimeout(total=timeout)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._session: aiohttp.ClientSession | None = None
        self._socket: aiohttp.ClientWebSocketResponse | None = None

    def __enter__(self) -> Client:
        self._loop = asyncio.new_event_loop()
        try:
            self._wait(self._open())
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def close(self) -> None:
        if self._loop is None:
            return
        if self._session is not None:
            self._loop.run_until_complete(self._session.close())
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()
        self._loop = self._session = self._socket = None

    # --- graphs

    def run(
        self,
        prompt: Mapping[str, Any],
        *,
        workflow: Mapping[str, Any] | None = None,
        front: bool = False,
        on_event: Callable[[Event], None] | None = None,
        on_preview: Callable[[Preview], None] | None = None,
    ) -> Finished:
        """Queue a graph and wait for its end.

        Args:
            prompt: the graph in API format.
            workflow: its UI form; servers write it into the pictures.
            on_event: called with every JSON message of this run. on_preview: with every preview picture.

        Raises:
            PromptRejected, ExecutionFailed, ExecutionInterrupted, ClientError.
            KeyboardInterrupt: Ctrl-C; this run is interrupted on the server, or taken from its queue, first.
        """
        start = time.perf_counter()
        prompt_id = self.queue(prompt, workflow=workflow, front=front)
        try:
            outputs = self._wait(self._follow(prompt_id, on_event or _ignore, on_preview or _ignore))
        except KeyboardInterrupt:
            self.cancel(prompt_id)
            raise
        return Finished(prompt_id, outputs, time.perf_counter() - start)

    def queue(self, prompt: Mapping[str, Any], *, workflow: Mapping[str, Any] | None = None, front: bool = False) -> str:
        """Queue a graph in API format without waiting; returns its prompt id."""
        prompt_id = str(uuid.uuid4())  # chosen here, so that messages are recognised before the answer arrives
        body: dict[str, Any] = {"prompt": prompt, "client_id": self.client_id, "prompt_id": prompt_id, "front": front}
        if workflow is not None:
            body["extra_data"] = {"extra_pnginfo": {"workflow": workflow}}
        answer = self._json("POST", "/prompt", body)
        return answer.get("prompt_id", prompt_id)

    def cancel(self, prompt_id: str) -> None:
        """Interrupt a run if it is this one, and take it from the queue if it still waits."""
        self._json("POST", "/queue", {"delete": [prompt_id]})
        self._json("POST", "/interrupt", {"prompt_id": prompt_id})

    # --- what the server has

    def object_info(self, class_id: str | None = None) -> dict[str, Any]:
        """Node classes by id with their inputs and outputs; of one class when it is named."""
        return self._json("GET", "/object_info" + (f"/{urllib.parse.quote(class_id, safe='')}" if class_id else ""))

    def system_stats(self) -> dict[str, Any]:
        return self._json("GET", "/system_stats")

    def history(self, prompt_id: str) -> dict[str, Any] | None:
        """The history entry of a run, None while there is none."""
        return self._json("GET", f"/history/{prompt_id}").get(prompt_id)

    def download(self, file: OutputFile) -> bytes:
        query = urllib.parse.urlencode({"filename": file.filename, "subfolder": file.subfolder, "type": file.type})
        return self._wait(self._request("GET", f"/view?{query}"))

    def upload_image(self, name: str, image: bytes, *, overwrite: bool = False) -> str:
        """Put a picture into the server's input folder; returns the name to give to LoadImage."""
        form = aiohttp.FormData({"overwrite": str(overwrite).lower()})
        form.add_field("image", image, filename=name)
        answer = json.loads(self._wait(self._request("POST", "/upload/image", data=form)))
        return "/".join(part for part in (answer.get("subfolder"), answer["name"]) if part)

    # --- below the surface

    def _wait(self, coroutine):
        """Run to the end; what stops it (Ctrl-C too) cancels it cleanly, so that the next call finds the loop free."""
        if self._loop is None:
            coroutine.close()
            raise ClientError("the client is not connected: use it in a `with` block")
        task = self._loop.create_task(coroutine)
        try:
            return self._loop.run_until_complete(task)
        except BaseException:
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    self._loop.run_until_complete(task)
            raise

    async def _open(self) -> None:
        self._session = aiohttp.ClientSession(timeout=self._timeout)
        await self._connect()

    async def _connect(self) -> None:
        try:
            self._socket = await self._session.ws_connect(
                f"{self.url}/ws?clientId={self.client_id}", heartbeat=HEARTBEAT_SECONDS, max_msg_size=LARGEST_MESSAGE_BYTES
            )
            await self._socket.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError, ValueError) as error:
            raise ClientError(f"no server answers at {self.url} ({_reason(error)})") from error

    def _json(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        text = self._wait(self._request(method, path, json=body))
        try:
            return json.loads(text) if text.strip() else {}
        except ValueError:
            raise ClientError(f"{self.url}{path} answered no JSON: {text[:200]!r}") from None

    async def _request(self, method: str, path: str, **body) -> bytes:
        try:
            async with self._session.request(method, self.url + path, **body) as response:
                content = await response.read()
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
            raise ClientError(f"{self.url}{path}: {_reason(error)}") from error
        if response.status >= 400:
            said = content[:500].decode(errors="replace")
            raise _rejection(content) or ClientError(f"{self.url}{path} answered {response.status} {response.reason}: {said}")
        return content

    async def _follow(self, prompt_id: str, on_event, on_preview) -> dict[str, dict]:
        """Read messages until the run ends; its outputs come from the history, which also knows of nodes taken from the cache."""
        failure: ClientError | None = None
        while True:
            message = await self._socket.receive()
            if message.type is aiohttp.WSMsgType.TEXT:
                event = _event(message.data)
                if event is None or event.data.get("prompt_id", prompt_id) != prompt_id:
                    continue
                on_event(event)
                if event.type == "execution_error" and event.data.get("exception_type") != "ExecutionBlocked":
                    failure = ExecutionFailed(event.data)
                elif event.type == "execution_interrupted":
                    failure = ExecutionInterrupted("the run was interrupted on the server")
                elif event.type == "executing" and event.data.get("node") is None and "prompt_id" in event.data:
                    break
            elif message.type is aiohttp.WSMsgType.BINARY:
                preview = _preview(message.data)
                if preview is not None and preview.metadata.get("prompt_id", prompt_id) == prompt_id:
                    on_preview(preview)
            elif await self._ended_while_away(prompt_id):
                break
        entry = await self._history_entry(prompt_id)
        failure = failure or _recorded_failure(entry)
        if failure is not None:
            raise failure
        return entry.get("outputs", {})

    async def _history_entry(self, prompt_id: str) -> dict[str, Any]:
        return json.loads(await self._request("GET", f"/history/{prompt_id}") or b"{}").get(prompt_id, {})

    async def _ended_while_away(self, prompt_id: str) -> bool:
        """Open the dropped socket again; whether the run ended in between."""
        for pause in RECONNECT_SECONDS:
            await asyncio.sleep(pause)
            try:
                await self._connect()
                return bool(await self._history_entry(prompt_id))
            except ClientError as error:
                last = error
        raise ClientError(f"the connection was lost and could not be opened again: {last}")


def _base_url(url: str) -> str:
    parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ClientError(f"'{url}' is no server address; give one such as http://127.0.0.1:8188")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"


def _reason(error: BaseException) -> str:
    return str(error) or ("no answer in time" if isinstance(error, asyncio.TimeoutError) else type(error).__name__)


def _rejection(content: bytes) -> PromptRejected | None:
    """The typed error of POST /prompt, None where the answer is something else."""
    try:
        answer = json.loads(content)
    except ValueError:
        return None
    if not isinstance(answer, dict) or not isinstance(answer.get("error"), dict):
        return None
    return PromptRejected(answer["error"], answer.get("node_errors") or {})


def _event(text: str) -> Event | None:
    """A JSON message, None for what has another shape: third-party packs send what they like."""
    try:
        message = json.loads(text)
    except ValueError:
        return None
    if not isinstance(message, dict) or not isinstance(message.get("data"), dict):
        return None
    return Event(str(message.get("type")), message["data"])


def _preview(data: bytes) -> Preview | None:
    """Decode the two preview layouts (big-endian event number first); None for other binary messages."""
    number = int.from_bytes(data[:4], "big")
    if number == PREVIEW_IMAGE:
        return Preview("png" if int.from_bytes(data[4:8], "big") == 2 else "jpeg", bytes(data[8:]))
    if number == PREVIEW_IMAGE_WITH_METADATA:
        end = 8 + int.from_bytes(data[4:8], "big")
        try:
            metadata = json.loads(data[8:end])
        except ValueError:
            return None
        return Preview(str(metadata.get("image_type", "image/jpeg")).rpartition("/")[2], bytes(data[end:]), metadata)
    return None


def _recorded_failure(entry: Mapping[str, Any]) -> ClientError | None:
    """The failure that the history tells of, for a run whose messages were missed."""
    for name, data in (entry.get("status") or {}).get("messages", []):
        if name == "execution_error" and data.get("exception_type") != "ExecutionBlocked":
            return ExecutionFailed(data)
        if name == "execution_interrupted":
            return ExecutionInterrupted("the run was interrupted on the server")
    return None


def _ignore(_: object) -> None:
    """The default listener."""
