"""Latency of the server while it samples: `python bench/server.py [--quick]`. Prints p50 and p99, writes bench/results/server_latency.csv.

Twenty websockets are open and read, one of them owns the run. GET /queue, GET /object_info/KSampler and POST /prompt (a prompt
that is refused by validation) are asked in turn on one kept-open connection, first idle, then while the tiny model samples.
Goal: /queue below 50 ms at p99 while a sampler runs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path

import aiohttp
from rectiflow.tests.server.process import ServerProcess
from table import write_csv

ROOT = Path(__file__).resolve().parents[1]
SOCKETS = 20
GOAL_MS = 50
REFUSED = {"prompt": {"1": {"class_type": "VAEDecode", "inputs": {}}, "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}}}


def sampling_prompt(steps: int) -> dict:
    """The shipped text_to_image graph with more steps, so that it samples for as long as the measurement lasts."""
    prompt = json.loads((ROOT / "workflows" / "api" / "text_to_image.json").read_text(encoding="utf-8"))
    for node in prompt.values():
        if node["class_type"] == "KSampler":
            node["inputs"]["steps"] = steps
    return prompt


async def read_forever(session: aiohttp.ClientSession, client_id: str, counts: dict[str, int]) -> None:
    async with session.ws_connect(f"/ws?clientId={client_id}", max_msg_size=0) as socket:
        await socket.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
        async for message in socket:
            kind = json.loads(message.data)["type"] if message.type is aiohttp.WSMsgType.TEXT else "preview"
            counts[kind] = counts.get(kind, 0) + 1


async def timed(session: aiohttp.ClientSession, method: str, path: str, body: dict | None) -> float:
    started = time.perf_counter()
    async with session.request(method, path, json=body) as answer:
        await answer.read()
    return (time.perf_counter() - started) * 1000


async def measure(session: aiohttp.ClientSession, rounds: int) -> dict[str, list[float]]:
    requests = {"GET /queue": ("GET", "/queue", None), "GET /object_info/…": ("GET", "/object_info/KSampler", None)}
    requests["POST /prompt (refused)"] = ("POST", "/prompt", REFUSED)
    found: dict[str, list[float]] = {name: [] for name in requests}
    for _ in range(rounds):
        for name, request in requests.items():
            found[name].append(await timed(session, *request))
        await asyncio.sleep(0.005)
    return found


async def bench(server: ServerProcess, rounds: int) -> list[list]:
    rows = []
    counts: dict[str, int] = {}
    async with aiohttp.ClientSession(f"http://127.0.0.1:{server.port}") as session:
        readers = [asyncio.create_task(read_forever(session, f"client{index}", counts)) for index in range(SOCKETS)]
        await asyncio.sleep(0.5)
        rows += summary("idle", await measure(session, rounds))
        body = {"prompt": sampling_prompt(10000), "client_id": "client0"}
        async with session.post("/prompt", json=body) as answer:
            prompt_id = (await answer.json())["prompt_id"]
        while not counts.get("preview"):
            await asyncio.sleep(0.05)
        steps_before, began = counts["progress"], time.perf_counter()
        rows += summary("sampling", await measure(session, rounds))
        print(f"{(counts['progress'] - steps_before) / (time.perf_counter() - began):.1f} sampler steps a second meanwhile")
        async with session.post("/interrupt", json={"prompt_id": prompt_id}) as answer:
            await answer.read()
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
    return rows


def summary(load: str, found: dict[str, list[float]]) -> list[list]:
    rows = []
    for name, times in found.items():
        cuts = statistics.quantiles(times, n=100)
        rows.append([load, name, len(times), f"{cuts[49]:.2f}", f"{cuts[98]:.2f}", f"{max(times):.2f}"])
        print(f"{load:9} {name:24} p50 {cuts[49]:7.2f} ms   p99 {cuts[98]:7.2f} ms   worst {max(times):7.2f} ms")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the requests")
    rounds = 50 if parser.parse_args().quick else 500
    with tempfile.TemporaryDirectory() as folder, ServerProcess(Path(folder), pack=None) as server:
        rows = asyncio.run(bench(server, rounds))
    header = ["load", "request", "requests", "p50_ms", "p99_ms", "worst_ms", "sockets"]
    write_csv("server_latency", header, [[*row, SOCKETS] for row in rows])
    p99 = next(float(row[4]) for row in rows if row[:2] == ["sampling", "GET /queue"])
    print(f"goal: /queue below {GOAL_MS} ms at p99 while sampling: {'met' if p99 < GOAL_MS else 'missed'}")


if __name__ == "__main__":
    main()
