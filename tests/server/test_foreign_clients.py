"""Clients written for ComfyUI: the behaviour of its three example scripts, and programs of others where they are installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.parse
import urllib.request
import uuid
from io import BytesIO

import pytest
from PIL import Image
from rectiflow.tests.server.graphs import node, picture

OWN_OUTPUT = {"1": node("SolidMask", value=0.5, width=32, height=32), "2": node("MaskToImage", mask=["1", 0])}


def post(server, prompt: dict, **fields) -> dict:
    """As the example scripts do it: bytes of JSON under the standard library's content type."""
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}/prompt", data=json.dumps({"prompt": prompt, **fields}).encode())
    return json.loads(urllib.request.urlopen(request).read())


def test_basic_example_fires_and_forgets(server):
    assert set(post(server, {**OWN_OUTPUT, "3": node("PreviewImage", images=["2", 0])})) == {"prompt_id", "number", "node_errors"}


def test_websocket_example_waits_for_the_last_message_and_fetches_the_pictures(server):
    client_id, prompt_id = str(uuid.uuid4()), str(uuid.uuid4())
    with server.listen(client_id) as socket:
        post(server, picture(11, "example"), client_id=client_id, prompt_id=prompt_id)
        while True:
            message = socket.receive()
            if isinstance(message, dict) and message["type"] == "executing":
                if message["data"]["node"] is None and message["data"]["prompt_id"] == prompt_id:
                    break
    history = json.loads(urllib.request.urlopen(f"http://127.0.0.1:{server.port}/history/{prompt_id}").read())[prompt_id]
    for output in history["outputs"].values():
        for image in output["images"]:
            query = urllib.parse.urlencode({"filename": image["filename"], "subfolder": image["subfolder"], "type": image["type"]})
            body = urllib.request.urlopen(f"http://127.0.0.1:{server.port}/view?{query}").read()
            assert Image.open(BytesIO(body)).size == (64, 64)


def test_websocket_images_example_gets_its_pictures_as_binary_messages(server):
    client_id, pictures, current = str(uuid.uuid4()), [], ""
    with server.listen(client_id) as socket:
        prompt_id = post(server, {**OWN_OUTPUT, "save": node("SaveImageWebsocket", images=["2", 0])}, client_id=client_id)["prompt_id"]
        while True:
            message = socket.receive()
            if isinstance(message, bytes):
                if current == "save":
                    pictures.append(message[8:])
            elif message["type"] == "executing" and message["data"]["prompt_id"] == prompt_id:
                current = message["data"]["node"]
                if current is None:
                    break
    assert [Image.open(BytesIO(body)).size for body in pictures] == [(32, 32)]


def test_comfy_cli_runs_a_workflow(server, tmp_path):
    program = os.environ.get("COMFY_CLI") or shutil.which("comfy")
    if program is None:
        pytest.skip("comfy-cli is not installed: pip install comfy-cli into an environment of its own and name its `comfy` in COMFY_CLI")
    workflow = tmp_path / "graph.json"
    workflow.write_text(json.dumps(picture(12, "from_comfy_cli")))
    environment = {**os.environ, "HOME": str(tmp_path), "DO_NOT_TRACK": "1"}
    command = [program, "--skip-prompt", "run", "--workflow", str(workflow), "--host", "127.0.0.1", "--port", str(server.port), "--wait"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "from_comfy_cli" in result.stdout


SCRIPT = """
from comfy_script.runtime import load
load("http://127.0.0.1:{port}/")
from comfy_script.runtime.nodes import *
from comfy_script.runtime import Workflow
with Workflow(wait=True):
    mask = SolidMask(0.5, 32, 32)
    PreviewImage(MaskToImage(mask))
print("RAN")
"""


def test_comfy_script_makes_stubs_of_object_info_and_runs(server, tmp_path):
    python = os.environ.get("COMFY_SCRIPT_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import comfy_script"], capture_output=True).returncode:
        pytest.skip("comfy-script is not installed: pip install 'comfy-script[default]', and name that Python in COMFY_SCRIPT_PYTHON")
    script = tmp_path / "script.py"  # the client reads its own source
    script.write_text(SCRIPT.format(port=server.port))
    result = subprocess.run([python, str(script)], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert "RAN" in result.stdout, result.stdout + result.stderr


NODE_SCRIPT = """
import {{ Client, Workflow }} from '@stable-canvas/comfyui-client'
import WebSocket from 'ws'
const client = new Client({{ api_host: '127.0.0.1:{port}', WebSocket, fetch: globalThis.fetch }})
await client.connect()
const routes = ['getExtensions', 'getEmbeddings', 'getNodeDefs', 'getQueue', 'getHistory', 'getSystemStats', 'getUserConfig', 'getSettings']
for (const name of routes) await client[name]()
const workflow = new Workflow()
const nodes = workflow.classes
const [mask] = nodes.SolidMask({{ value: 0.5, width: 32, height: 32 }})
const [image] = nodes.MaskToImage({{ mask }})
nodes.SaveImage({{ images: image, filename_prefix: 'from_node' }})
const result = await workflow.invoke(client)
console.log('IMAGES', result.images.length)
client.close()
process.exit(0)
"""


def test_the_npm_client_uses_many_routes(server, tmp_path):
    modules = os.environ.get("COMFYUI_CLIENT_NODE_MODULES")
    if modules is None or shutil.which("node") is None:
        pytest.skip("npm install @stable-canvas/comfyui-client ws, and name its node_modules folder in COMFYUI_CLIENT_NODE_MODULES")
    os.symlink(modules, tmp_path / "node_modules")
    (tmp_path / "run.mjs").write_text(NODE_SCRIPT.format(port=server.port))
    result = subprocess.run(["node", "run.mjs"], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert "IMAGES 1" in result.stdout, result.stdout + result.stderr
