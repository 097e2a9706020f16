"""What GET /api/jobs says of a prompt, derived from the queue and the history: pure functions, no state.

A job's status is pending, in_progress, completed, failed or cancelled; times are milliseconds since 1970.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .prompt_queue import Finished, Job, PromptQueue

__all__ = ["STATUSES", "JobQuery", "describe_finished", "describe_unfinished", "job_detail", "list_jobs", "parse_query"]

STATUSES = ("pending", "in_progress", "completed", "failed", "cancelled")
SORT_KEYS = ("created_at", "execution_duration")
SORT_ORDERS = ("asc", "desc")
MAX_LIMIT = 1000
PREVIEWABLE = ("images", "video", "audio", "3d", "text")
# By the ending of the file, because nodes put videos under "gifs" and "images" as well.
MEDIA_OF_EXTENSION = {
    **dict.fromkeys((".mp4", ".webm", ".mov", ".mkv", ".avi"), "video"),
    **dict.fromkeys((".mp3", ".wav", ".ogg", ".flac", ".opus", ".m4a"), "audio"),
    **dict.fromkeys((".glb", ".gltf", ".obj", ".fbx", ".stl"), "3d"),
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".avif"), "images"),
}


@dataclass(frozen=True)
class JobQuery:
    """The filters of GET /api/jobs."""

    statuses: frozenset[str] = frozenset(STATUSES)
    workflow_id: str | None = None
    sort_by: str = "created_at"
    descending: bool = True
    limit: int | None = None
    offset: int = 0


def parse_query(query: dict[str, str]) -> JobQuery:
    """Read the query string; raises ValueError with a sentence for the client."""
    statuses = frozenset(part.strip() for part in query.get("status", "").split(",") if part.strip()) or frozenset(STATUSES)
    unknown = statuses - set(STATUSES)
    if unknown:
        raise ValueError(f"Unknown status '{min(unknown)}'; allowed: {', '.join(STATUSES)}")
    sort_by, order = query.get("sort_by", "created_at"), query.get("sort_order", "desc").lower()
    if sort_by not in SORT_KEYS:
        raise ValueError(f"Unknown sort_by '{sort_by}'; allowed: {', '.join(SORT_KEYS)}")
    if order not in SORT_ORDERS:
        raise ValueError(f"Unknown sort_order '{order}'; allowed: {', '.join(SORT_ORDERS)}")
    limit = _integer(query, "limit", 1)
    offset = _integer(query, "offset", 0) or 0
    return JobQuery(statuses, query.get("workflow_id"), sort_by, order == "desc", None if limit is None else min(limit, MAX_LIMIT), offset)


def _integer(query: dict[str, str], name: str, low: int) -> int | None:
    if name not in query:
        return None
    text = query[name]
    if not (text.isascii() and text.isdigit() and len(text) < 12 and int(text) >= low):
        raise ValueError(f"{name} got '{text[:40]}'; allowed: a whole number of at least {low}")
    return int(text)


def describe_unfinished(job: Job, status: str) -> dict[str, Any]:
    """The list entry of a waiting or running prompt."""
    return {
        "id": job.prompt_id,
        "status": status,
        "priority": job.number,
        "create_time": job.create_time,
        "outputs_count": 0,
        "workflow_id": _workflow_id(job.extra_data),
    }


def describe_finished(job: Job, outputs: dict[str, Any], status: dict[str, Any]) -> dict[str, Any]:
    """The list entry of a prompt that ran; `outputs` and `status` are those of its history entry."""
    events = {event: data for event, data in status["messages"]}
    error = events.get("execution_error")
    if "execution_interrupted" in events:
        state = "cancelled"
    elif status["completed"] and status["status_str"] == "success":
        state = "completed"
    else:
        state = "failed"
    ending = error or events.get("execution_interrupted") or events.get("execution_success") or {}
    results = list(_results(outputs))
    previewable = [result for result in results if result["mediaType"] in PREVIEWABLE]
    entry = {
        "id": job.prompt_id,
        "status": state,
        "priority": job.number,
        "create_time": job.create_time,
        "execution_start_time": events.get("execution_start", {}).get("timestamp"),
        "execution_end_time": ending.get("timestamp"),
        "outputs_count": len(results),
        "previewable_outputs_count": len(previewable),
        "preview_output": _best_preview(previewable),
        "workflow_id": _workflow_id(job.extra_data),
    }
    if state == "failed":
        entry["execution_error"] = error
    return entry


def _results(outputs: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """Every file and text in the ui outputs, with the node and the kind of medium."""
    for node_id, ui in outputs.items():
        if not isinstance(ui, dict):
            continue
        for key, values in ui.items():
            for value in values if isinstance(values, (list, tuple)) else ():
                if isinstance(value, dict) and isinstance(value.get("filename"), str):
                    extension = os.path.splitext(value["filename"])[1].lower()
                    yield {**value, "nodeId": node_id, "mediaType": MEDIA_OF_EXTENSION.get(extension, key)}
                elif key == "text" and isinstance(value, str):
                    yield {"nodeId": node_id, "mediaType": "text", "content": value[:1000]}


def _best_preview(previewable: list[dict[str, Any]]) -> dict[str, Any] | None:
    """A saved file before a temporary one, a file before a text."""
    for wanted in ("output", "temp", None):
        for result in previewable:
            if result.get("type") == wanted:
                return result
    return previewable[0] if previewable else None


def _workflow_id(extra_data: dict[str, Any]) -> str | None:
    info = extra_data.get("extra_pnginfo")
    workflow = info.get("workflow") if isinstance(info, dict) else None
    identifier = workflow.get("id") if isinstance(workflow, dict) else None
    return identifier if isinstance(identifier, str) else None


def list_jobs(queue: PromptQueue, query: JobQuery) -> dict[str, Any]:
    """The answer of GET /api/jobs."""
    running = queue.running()
    jobs = [describe_unfinished(running, "in_progress")] if running else []
    jobs += [describe_unfinished(job, "pending") for job in queue.waiting()]
    seen = {job["id"] for job in jobs}
    jobs += [entry.summary for entry in queue.history() if entry.prompt_id not in seen]
    jobs = [job for job in jobs if job["status"] in query.statuses and query.workflow_id in (None, job["workflow_id"])]
    jobs.sort(key=_sort_key(query.sort_by), reverse=query.descending)
    page = jobs[query.offset :] if query.limit is None else jobs[query.offset : query.offset + query.limit]
    pagination = {
        "offset": query.offset,
        "limit": len(page) if query.limit is None else query.limit,
        "total": len(jobs),
        "has_more": query.offset + len(page) < len(jobs),
    }
    return {"jobs": page, "pagination": pagination}


def _sort_key(sort_by: str):
    if sort_by == "created_at":
        return lambda job: job["create_time"]
    return lambda job: (job.get("execution_end_time") or 0) - (job.get("execution_start_time") or 0)


def job_detail(queue: PromptQueue, prompt_id: str) -> dict[str, Any] | None:
    """The answer of GET /api/jobs/{id}: the list entry, the outputs and the graph; None for an unknown id."""
    running = queue.running()
    for job, status in [(running, "in_progress")] + [(job, "pending") for job in queue.waiting()]:
        if job is not None and job.prompt_id == prompt_id:
            return {**describe_unfinished(job, status), "outputs": {}, "workflow": _workflow(json.loads(job.text))}
    entry = queue.finished(prompt_id)
    return None if entry is None else _finished_detail(entry)


def _finished_detail(entry: Finished) -> dict[str, Any]:
    kept = json.loads(entry.text)
    return {
        **entry.summary,
        "outputs": kept["outputs"],
        "execution_status": kept["status"],
        "execution_meta": kept.get("meta", {}),
        "workflow": _workflow(kept["prompt"]),
    }


def _workflow(item: list[Any]) -> dict[str, Any]:
    return {"prompt": item[2], "extra_data": item[3]}
