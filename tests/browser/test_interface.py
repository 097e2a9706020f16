"""The real interface against our server: it boots, lists our graphs, runs them, and shows what came of it."""

from __future__ import annotations

import json

import pytest

# Files that the interface asks for and that need not exist, and services on the internet that these tests cannot reach.
OPTIONAL = ("user.css", "favicon.ico", "/userdata?dir=", "comfy.templates.json", "ERR_NAME_NOT_RESOLVED", "ERR_INTERNET_DISCONNECTED")
# Interface 1.27.10 logs the first on a fresh user folder on ComfyUI as well: it tells of a setting that it has not registered yet.
# The second is about loaders that it takes for granted and this host does not have (ControlNetLoader among them); it goes on.
KNOWN_OF_THE_INTERFACE = ("Cannot read properties of undefined (reading 'id')", "at Proxy.getRegisteredNodeTypes")
TEMPLATE_DIALOG = "document.querySelector('[role=dialog]')"


def leaf(text: str) -> str:
    """The innermost element of the dialog with exactly this text."""
    return f"[...{TEMPLATE_DIALOG}.querySelectorAll('*')].find(e => e.children.length === 0 && e.textContent.trim() === '{text}')"


def typed(text: str) -> str:
    """Write into the dialog's search box, as a person does: cards far down are not made before they are looked for."""
    return f"""(() => {{
        const box = {TEMPLATE_DIALOG}.querySelector('input[type=text], input[type=search], input:not([type])')
        if (!box) return false
        Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set.call(box, '{text}')
        box.dispatchEvent(new Event('input', {{bubbles: true}}))
        return true
    }})()"""


def unexpected(errors: list[str]) -> list[str]:
    return [error for error in errors if not any(known in error for known in OPTIONAL + KNOWN_OF_THE_INTERFACE)]


def test_it_boots_with_all_nodes_and_no_error_of_ours(interface):
    interface.screenshot("boot")
    registered = interface.run("Object.keys(LiteGraph.registered_node_types)")
    assert {"KSampler", "SaveImage", "RectiflowLoadTiny", "TestingValue"} <= set(registered)
    assert unexpected(interface.browser.errors) == []
    assert len(interface.run("app.api.clientId")) >= 32


def test_a_template_is_opened_queued_and_its_picture_appears(interface):
    interface.empty()
    interface.run("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    interface.wait(leaf("rectiflow"))
    interface.run(f"{leaf('rectiflow')}.click()")
    interface.run(typed("text_to_image"))
    interface.wait(leaf("text_to_image"))
    interface.screenshot("templates")
    interface.run(f"{leaf('text_to_image')}.click()")
    interface.wait("app.graph._nodes.some(node => node.type === 'RectiflowLoadTiny')")
    interface.run("app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    interface.screenshot("graph")
    interface.queue()
    sampler = "app.graph._nodes.find(node => node.type === 'KSampler')"
    interface.wait(f"{sampler}.imgs?.[0]?.naturalWidth > 0", 60)
    interface.screenshot("preview")
    address = interface.picture_of("SaveImage", 120)
    interface.screenshot("result")
    assert "type=output" in address
    assert interface.server.get(address[address.index("/view") :]).headers["content-type"] in ("image/png", "image/webp")


def test_nodes_are_added_linked_and_run_by_script(interface):
    interface.empty()
    interface.run(
        """(() => {
            const make = type => { const node = LiteGraph.createNode(type); app.graph.add(node); return node }
            const ours = make('RectiflowExamplePicture'), core = make('PreviewImage')
            ours.pos = [100, 200]; core.pos = [500, 200]
            ours.connect(0, core, 0)
        })()"""
    )
    assert interface.run("Object.keys(app.graph.links).length || app.graph.links.size") == 1
    interface.queue()
    assert "type=temp" in interface.picture_of("PreviewImage")


def test_a_dropped_picture_restores_its_graph(interface):
    interface.empty()
    graph = interface.server.get("/api/workflow_templates/rectiflow/text_to_image.json").json()
    prompt = {"1": {"class_type": "EmptyImage", "inputs": {}}}
    pixels = {"1": {"class_type": "TestingPicture", "inputs": {"seed": 1, "size": 64, "seconds": 0.0}}}
    prompt = {**pixels, "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "dropped"}}}
    entry = interface.server.finished(interface.server.queue(prompt, extra_data={"extra_pnginfo": {"workflow": graph}}))
    name = entry["outputs"]["2"]["images"][0]["filename"]
    interface.run(
        f"""(async () => {{
            const blob = await (await fetch('/api/view?filename={name}&type=output')).blob()
            const transfer = new DataTransfer()
            transfer.items.add(new File([blob], '{name}', {{type: 'image/png'}}))
            const canvas = document.querySelector('#graph-canvas')
            const at = {{bubbles: true, cancelable: true, dataTransfer: transfer, clientX: 900, clientY: 700}}
            canvas.dispatchEvent(new DragEvent('dragover', at))
            canvas.dispatchEvent(new DragEvent('drop', at))
        }})()"""
    )
    interface.wait(f"app.graph._nodes.length === {len(graph['nodes'])}")
    assert sorted(interface.types()) == sorted(node["type"] for node in graph["nodes"])


@pytest.mark.parametrize("kind", ["execution", "validation"])
def test_an_error_marks_the_failing_node(interface, kind):
    interface.empty()
    node_id = interface.run(
        f"""(() => {{
            const make = type => {{ const node = LiteGraph.createNode(type); app.graph.add(node); return node }}
            const bad = make('{"TestingFail" if kind == "execution" else "VAEDecode"}')
            const show = make('{"TestingShow" if kind == "execution" else "PreviewImage"}')
            bad.pos = [100, 300]; show.pos = [500, 300]
            bad.connect(0, show, {"show.inputs.findIndex(input => input.name === 'value')" if kind == "execution" else 0})
            return bad.id
        }})()"""
    )
    interface.queue()
    if kind == "execution":
        error = interface.wait("app.lastExecutionError && JSON.stringify(app.lastExecutionError)")
        assert json.loads(error)["node_id"] == str(node_id) and "this node fails" in error
    else:
        errors = json.loads(interface.wait("app.lastNodeErrors && JSON.stringify(app.lastNodeErrors)"))
        assert [problem["type"] for problem in errors[str(node_id)]["errors"]] == ["required_input_missing"] * 2
    interface.screenshot(f"{kind}_error")


def test_workflows_and_settings_are_kept_on_the_server(interface):
    interface.run("app.api.storeUserData('workflows/from_the_page.json', {nodes: []})")
    interface.run("app.api.storeSetting('Testing.Kept', [1, 2])")
    assert interface.run("app.api.getUserData('workflows/from_the_page.json').then(answer => answer.json())") == {"nodes": []}
    assert interface.server.get("/settings/Testing.Kept").json() == [1, 2]
    listed = interface.run("app.api.listUserDataFullInfo('workflows')")
    assert [file["path"] for file in listed] == ["from_the_page.json"]


def test_the_queue_panel_understands_our_jobs(interface):
    """The interface throws a page of jobs away when a field is missing, and says so on its console."""
    interface.empty()
    history = interface.run("app.api.getHistory(10)")
    finished = history if isinstance(history, list) else history["History"]
    assert len(finished) >= 2
    waiting = interface.run("app.api.getQueue()")
    assert waiting["Running"] == [] and waiting["Pending"] == []
    assert unexpected(interface.browser.errors) == []
