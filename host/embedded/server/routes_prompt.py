"""POST /prompt and what happens to prompts afterwards: queue, history, interruption, jobs."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import uuid
from typing import Any

from aiohttp import web

from ..context import use_host
from ..execution.validation import Validation, validate_prompt
from .jobs import job_detail, list_jobs, parse_query
from .json_text import dumps, nested_deeper_than
from .prompt_queue import DuplicateNumber, DuplicatePrompt, QueueFull
from .state import Server, json_answer, read_json, server_of, text_answer

__all__ = ["ROUTES", "API_ROUTES"]

MAX_ID = 200
MAX_IDS = 1000


class Refused(Exception):
    """A prompt that is not taken: what POST /prompt answers."""

    def __init__(self, kind: str, message: str, details: str = "", status: int = 400, **extra_info: Any):
        super().__init__(message)
        self.status = status
        self.error = {"type": kind, "message": message, "details": details, "extra_info": extra_info}


# -- POST /prompt


async def post_prompt(request: web.Request) -> web.Response:
    """Validate a prompt and queue it; every refusal is `{"error": {type, message, details, extra_info}, "node_errors"}`."""
    server = server_of(request)
    try:
        body = _parse_body(await _read_bounded(request, server.options.limits.prompt_bytes))
        for handler in server.prompt_handlers:
            body = _handled(handler, body)
        return await _queue_prompt(server, body)
    except Refused as refusal:
        return json_answer({"error": refusal.error, "node_errors": {}}, refusal.status)


async def _read_bounded(request: web.Request, limit: int) -> bytes:
    """The body, given up on as soon as it is over the limit."""
    too_large = Refused("prompt_too_large", f"The prompt is larger than {limit} bytes", f"allowed: {limit} bytes with its workflow", 413)
    if (request.content_length or 0) > limit:
        raise too_large
    body = bytearray()
    async for block in request.content.iter_any():
        body += block
        if len(body) > limit:
            raise too_large
    return bytes(body)


def _parse_body(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused("invalid_json", "The body is not JSON", str(error)) from error
    if not isinstance(value, dict):
        raise Refused("invalid_json", "The body is not a JSON object", f"got {type(value).__name__}")
    return value


def _handled(handler, body: dict[str, Any]) -> dict[str, Any]:
    try:
        changed = handler(body)
    except Exception:  # a third-party pack's mistake must not cost the prompt
        logging.exception("A prompt handler of a node pack failed and was skipped")
        return body
    return changed if isinstance(changed, dict) else body


async def _queue_prompt(server: Server, body: dict[str, Any]) -> web.Response:
    number, front = _number(body)
    prompt_id = _prompt_id(body)
    extra_data = _extra_data(body)
    prompt = body.get("prompt")
    if prompt is None:
        raise Refused("no_prompt", "No prompt provided", "No prompt provided")
    _check_size(server, prompt)
    if server.queue.knows(prompt_id):
        raise _duplicate(prompt_id)
    outcome = await _validated(server, prompt, body.get("partial_execution_targets"), prompt_id)
    if not outcome.valid:
        logging.info("Prompt refused: %s", outcome.error["message"])
        return json_answer({"error": outcome.error, "node_errors": outcome.node_errors}, 400)
    try:
        job = server.queue.put(prompt_id, prompt, extra_data, outcome.outputs, number, front)
    except DuplicatePrompt as error:
        raise _duplicate(prompt_id) from error
    except DuplicateNumber as error:
        raise Refused(
            "duplicate_number", f"Another waiting prompt has number {number}", "leave number out or choose another one"
        ) from error
    except QueueFull as error:
        raise Refused("queue_full", f"The queue is full: {error}", "wait, or delete waiting prompts", 429) from error
    except RecursionError as error:
        raise Refused("invalid_extra_data", "extra_data is nested too deeply") from error
    logging.info("got prompt")
    return json_answer({"prompt_id": prompt_id, "number": job.number, "node_errors": outcome.node_errors})


def _number(body: dict[str, Any]) -> tuple[float | None, bool]:
    """(place in the queue or None for the end, whether at the front)."""
    number, front = body.get("number"), bool(body.get("front", False))
    if number is None:
        return None, front
    if isinstance(number, bool) or not isinstance(number, (int, float)) or abs(number) > 2**53 or not math.isfinite(number):
        raise Refused(
            "invalid_number", "number is not a finite number", f"got {str(number)[:100]}; allowed: -2^53 to 2^53; leave it out for the end"
        )
    return float(number), front


def _prompt_id(body: dict[str, Any]) -> str:
    prompt_id = body.get("prompt_id")
    if prompt_id is None:
        return str(uuid.uuid4())
    if not isinstance(prompt_id, str) or not 1 <= len(prompt_id) <= MAX_ID or not prompt_id.isprintable():
        raise Refused("invalid_prompt_id", "prompt_id is not usable", f"allowed: text of 1 to {MAX_ID} printable characters, best a UUID")
    return prompt_id


def _duplicate(prompt_id: str) -> Refused:
    return Refused(
        "duplicate_prompt_id", f"prompt_id '{prompt_id}' was used already", "leave it out or choose a new UUID", prompt_id=prompt_id
    )


def _extra_data(body: dict[str, Any]) -> dict[str, Any]:
    extra_data, client_id = body.get("extra_data"), body.get("client_id")
    if extra_data is None:
        extra_data = {}
    if not isinstance(extra_data, dict):
        raise Refused("invalid_extra_data", "extra_data is not an object", f"got {type(extra_data).__name__}")
    if client_id is not None and not isinstance(client_id, str):
        raise Refused("invalid_client_id", "client_id is not text", f"got {type(client_id).__name__}")
    if client_id is not None:
        extra_data = {**extra_data, "client_id": client_id}
    return extra_data


def _check_size(server: Server, prompt: Any) -> None:
    limits = server.options.limits
    if isinstance(prompt, dict) and len(prompt) > limits.prompt_nodes:
        raise Refused(
            "prompt_too_large", f"The prompt has {len(prompt)} nodes; allowed: {limits.prompt_nodes}",
            "split the graph, or run parts of it with partial_execution_targets", nodes=len(prompt), limit=limits.prompt_nodes,
        )  # fmt: skip
    if nested_deeper_than(prompt, limits.prompt_depth):
        raise Refused("prompt_too_deep", f"The prompt is nested more than {limits.prompt_depth} deep", "flatten the values of its inputs")


async def _validated(server: Server, prompt: Any, targets: Any, prompt_id: str) -> Validation:
    """Validate in the validation thread, which has an event loop of its own for asynchronous checks of nodes."""
    if targets is not None and not (isinstance(targets, list) and all(isinstance(target, str) for target in targets)):
        raise Refused("invalid_targets", "partial_execution_targets is not a list of node ids")

    def validate() -> Validation:
        with use_host(server.host):
            return asyncio.run(validate_prompt(server.host.registry, prompt, targets, prompt_id))

    return await asyncio.get_running_loop().run_in_executor(server.validation, validate)


async def get_prompt(request: web.Request) -> web.Response:
    return json_answer({"exec_info": {"queue_remaining": server_of(request).queue.remaining}})


# -- queue and history


async def get_queue(request: web.Request) -> web.Response:
    queue = server_of(request).queue
    running = queue.running()
    waiting = ", ".join(job.text for job in queue.waiting())
    return text_answer(f'{{"queue_running": [{running.text if running else ""}], "queue_pending": [{waiting}]}}')


def _ids(body: dict[str, Any], key: str = "delete") -> list[str]:
    ids = body.get(key, [])
    if not isinstance(ids, list) or len(ids) > MAX_IDS or not all(isinstance(item, str) for item in ids):
        raise web.HTTPBadRequest(text=f"{key} must be a list of at most {MAX_IDS} prompt ids.")
    return ids


async def post_queue(request: web.Request) -> web.Response:
    queue, body = server_of(request).queue, await read_json(request)
    ids = _ids(body)
    if body.get("clear"):
        queue.clear()
    queue.delete(ids)
    return web.Response()


def _integer(request: web.Request, name: str) -> int | None:
    text = request.query.get(name)
    if text is None:
        return None
    if not text.lstrip("-").isdigit() or not text.isascii() or len(text) > 12:
        raise web.HTTPBadRequest(text=f"{name} must be a whole number.")
    return int(text)


async def get_history(request: web.Request) -> web.Response:
    max_items, offset = _integer(request, "max_items"), _integer(request, "offset")
    if max_items is not None and max_items < 0:
        raise web.HTTPBadRequest(text="max_items must not be negative.")
    entries = server_of(request).queue.history(max_items, -1 if offset is None else offset)
    return text_answer("{" + ", ".join(f"{dumps(entry.prompt_id)}: {entry.text}" for entry in entries) + "}")


async def get_history_entry(request: web.Request) -> web.Response:
    entry = server_of(request).queue.finished(request.match_info["prompt_id"])
    return text_answer("{}" if entry is None else f"{{{dumps(entry.prompt_id)}: {entry.text}}}")


async def post_history(request: web.Request) -> web.Response:
    queue, body = server_of(request).queue, await read_json(request)
    ids = _ids(body)
    if body.get("clear"):
        queue.forget_all()
    queue.forget(ids)
    return web.Response()


async def post_interrupt(request: web.Request) -> web.Response:
    """Stop what runs now; with a prompt_id only if it is that prompt."""
    server, body = server_of(request), await read_json(request, object, default={})
    prompt_id = body.get("prompt_id") if isinstance(body, dict) else None
    server.worker.interrupt(prompt_id if isinstance(prompt_id, str) and prompt_id else None)
    return web.Response()


async def post_free(request: web.Request) -> web.Response:
    queue, body = server_of(request).queue, await read_json(request)
    for name in ("unload_models", "free_memory"):
        if body.get(name):
            queue.set_flag(name)
    return web.Response()


# -- jobs (only under /api)


async def get_jobs(request: web.Request) -> web.Response:
    try:
        query = parse_query(dict(request.query))
    except ValueError as error:
        return json_answer({"error": str(error)}, 400)
    return json_answer(list_jobs(server_of(request).queue, query))


async def get_job(request: web.Request) -> web.Response:
    server = server_of(request)
    detail = await server.in_thread(job_detail, server.queue, request.match_info["id"])
    return json_answer({"error": "Job not found"}, 404) if detail is None else json_answer(detail)


def _cancel(server: Server, prompt_ids: list[str]) -> bool:
    """Delete waiting jobs and stop the running one if it is among them; whether any was found."""
    found = bool(server.queue.delete(prompt_ids))
    for prompt_id in prompt_ids:
        found = server.worker.interrupt(prompt_id) or found
    return found


async def cancel_job(request: web.Request) -> web.Response:
    server, prompt_id = server_of(request), request.match_info["id"]
    if not server.queue.knows(prompt_id):
        return json_answer({"error": "Job not found"}, 404)
    return json_answer({"cancelled": _cancel(server, [prompt_id])})


async def cancel_jobs(request: web.Request) -> web.Response:
    try:
        ids = _ids(await read_json(request), "job_ids")
        for item in ids:
            uuid.UUID(item)
    except (web.HTTPBadRequest, ValueError) as error:
        return json_answer({"error": getattr(error, "text", None) or f"A job id is not a UUID: {error}"}, 400)
    if not ids:
        return json_answer({"error": "job_ids is empty"}, 400)
    return json_answer({"cancelled": _cancel(server_of(request), ids)})


ROUTES = (
    web.get("/prompt", get_prompt),
    web.post("/prompt", post_prompt),
    web.get("/queue", get_queue),
    web.post("/queue", post_queue),
    web.get("/history", get_history),
    web.get("/history/{prompt_id}", get_history_entry),
    web.post("/history", post_history),
    web.post("/interrupt", post_interrupt),
    web.post("/free", post_free),
)
API_ROUTES = (
    web.get("/api/jobs", get_jobs),
    web.post("/api/jobs/cancel", cancel_jobs),
    web.get("/api/jobs/{id}", get_job),
    web.post("/api/jobs/{id}/cancel", cancel_job),
)
