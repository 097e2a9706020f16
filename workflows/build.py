"""Writes the interface's form of every graph from its API twin, so that the two never drift.

    python -m rectiflow.workflows.build              the UI files beside this script
    python -m rectiflow.workflows.build --pictures   also runs each graph and writes its picture

workflows/api/<name>.json is what people edit; workflows/<name>.json is what the template browser lists. Nodes are laid out in
columns: a node stands right of everything it reads from.
"""

from __future__ import annotations

import argparse
import json
import textwrap
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["NOTES", "api_graph", "graph_names", "object_info", "to_ui"]

FOLDER = Path(__file__).parent
NAMESPACE = uuid.UUID("6f2b7f0e-6a39-4cf5-93a8-4d0b6c7a1c55")  # any fixed one: a graph's id follows from its name
CORE_VERSION = "0.3.64"
WIDGET_TYPES = frozenset({"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"})
OPTIONAL_SHAPE = 7  # the interface's number for the hollow circle of an optional socket

# Pixels of the interface's canvas.
COLUMN_GAP, ROW_GAP, TITLE, SLOT, WIDGET, TEXT_BOX, PREVIEW = 60, 40, 30, 20, 24, 90, 280
WIDTH, WIDE, NOTE_HEIGHT, COLUMN_HEIGHT = 270, 340, 150, 1200
PICTURE_NODES = frozenset({"SaveImage", "PreviewImage"})

# What a person reads first: two sentences on what to change.
NOTES = {
    "quantize_and_save": (
        "One seed with the weights in 32, 8, 4 and 3 bits; a short run tells **Quantize** where outliers are. Change **weight_bits** and "
        "**act_bits**; **Velocity error** says in dB what that costs. The 4-bit model is saved, a seventh of the whole one's size."
    ),
    "load_compressed": (
        "A model without one of its nine blocks, in 8 bits, is saved and loaded again; the file is all that the second picture needs. To load "
        "a file of your own, unlink **path** and write its name. **Compression Info** reads it without building the model."
    "prune_width": (
        "A fifth of the width goes: once the heads and neurons that learned masks close, once the smallest ones. Nothing is trained after it. "
        "Change **remove**; raise **iterations** to 60 and combine more prompts to learn better, under another **name**."
    ),
    "prune_and_recover": (
        "Three of nine blocks are left out, then 20 training steps bring the picture back; no data set is needed. Change **method** and "
        "**remove** of **Prune Score**, or **steps**. **Recover Pruned** goes on where its **name** stopped: change it to begin anew."
    ),
    "compressed_and_accelerated": (
        "Two of nine blocks go, training brings the picture back, weights become 8 bits, every second step is repeated, then half of the "
        "tokens. **Model Compare** says what each stage gives and costs; raise its **rounds** for steady seconds. Change any stage."
    ),
    "train_a_lora": (
        "A LoRA learns one picture in 30 steps of two examples; the same seed is drawn before and after. **Train** goes on where its "
        "**name** stopped: raise **steps** to train further, change **name** to begin anew. **lora** can be linked to Save LoRA."
    ),
    "text_to_image": (
        "Change the words in **Prompt**: *style thing on colour*, for example `twemoji rocket on black` (**Tiny Model Words** lists all). "
        "Another **seed** gives another picture; cfg 2 to 3 and 20 to 50 steps suit this model."
    ),
    "taylor_forecast": (
        "Half of the 50 steps are computed, the others are forecast; **Report** says which, and what that took. Change **interval**: 1 is "
        "the plain model, 4 shows where the picture starts to change; **order** 0 repeats steps in place of continuing their slope."
    ),
    "high_resolution_rope": (
        "A picture of twice the side the model was trained at. Change **method**: `none` is the plain model, where things repeat; "
        "`position_interpolation` stretches all frequencies alike. **train_rows** and **train_columns** are 8 for this model, 64 for Flux."
    ),
    "accelerate": (
        "One noise at three speeds; the previews have seconds, PSNR and which steps were computed. Change **speed**: 1 is the plain model, "
        "1.5 can hardly be told from it, 4 changes the picture. **Speed 2: what was chosen** says what that rests on."
    ),
    "high_resolution_attention": (
        "Twice the training side, four ways: plain; with positions stretched by **RoPE Extrapolation**; and with cheaper attention on top. "
        "**Grouped Attention** computes 60 % of the pairs here and **Context Drop** 27 %; the reports say so. Groups of 2 or factor 4 show "
        "what goes first. At this size neither is faster: that begins at some thousand tokens."
    ),
    "region_adaptive": (
        "After eight steps only half of the tokens are computed; **Map of computed tokens** shows which, bright is often. Change "
        "**sample_ratio**: 1 is the plain model, 0.2 shows where detail goes; **starvation** 0 shows tokens that are never computed again."
    ),
    "region_with_cache": (
        "A cache around region-adaptive sampling: steps the cache answers never reach the regions, and both reports say what they did. "
        "Change **interval** of the cache (1 turns it off) and **sample_ratio** of the regions (1 turns them off)."
    ),
    "gate_against_interval": (
        "One noise, three runs: every step computed, every fourth, and as many again where **Confidence-Gated Taylor** asks. Reports "
        "show where each spends its steps, the numbers how near it comes. Change **threshold** and **interval**; compare at equal steps."
    ),
    "schedule_search": (
        "One picture is sampled whole and recorded, the search picks 7 of its 16 steps, and another prompt is sampled with these. "
        "Change **budget** and watch **What a budget costs**; order 0 finds other steps than order 1. Record four and more for real use."
    ),
    "invert_with_stock_samplers": (
        "A picture becomes noise, and stock samplers draw it back: **Noise from Latent** hands them the noise, **Flow Inversion Sigmas** both "
        "schedules. Below, where each errs. Change **solver** of the inversion, or the **steps**; more make Euler's differences fade."
    ),
    "editing_by_parts": (
        "Three editors from their nodes: RF-Inversion goes up and down, Uni-Edit meets both prompts on the way, KV-Edit draws only what its "
        "mask covers. Change **What it shall show**; a later **end_percent**, a lower **alpha** or a smaller mask keep more of the picture."
    ),
    "between_two_pictures": (
        "Two pictures become noise; points on the arc between their noises become pictures again, under a mix of both prompts. Change **t** of "
        "**Noise Slerp** and the strength of the prompt's mix with it. More **steps** bring the ends back closer."
    ),
    "stochastic_and_adaptive": (
        "One noise at the start; three of the samplers add more in every step and so end at other pictures of the same kind. The last chooses "
        "its own steps: a smaller **rtol** and **atol** take more model calls. **eta** 0 makes every one of the others deterministic."
    ),
    "few_steps": (
        "Four model calls, four rules for weights that were made for few steps; the tiny model was not, so all are rough. Load such weights "
        "instead: **Flow UNet Sampling** says what their output means (InstaFlow: data_minus_noise, multiplier 1000), and tries it on a picture."
    ),
    "shift_of_the_schedule": (
        "Ten steps each, from one noise; the shift says where they lie. Above 1 they gather near noise, where layout is decided; below 1 near "
        "the picture. Set it in one place only: in the schedule, by **Reshift Sigmas**, or in the model. Change **to_alpha**."
    ),
    "is_the_flow_straight": (
        "How far the paths from noise to picture leave a straight line, at every sigma. 0 everywhere would be one step to the picture. Change "
        "**cfg**: guidance bends the paths. The previews have the figures, and what is constant along a path."
    ),
    "steering_colourise": (
        "Only brightness is known; the model finds colours that give it. The last picture adds a wish: rather blue in the masked part. Change the "
        "colour, **beta** of **Flow Score Cost** (too much burns), or the **noise_seed**."
    ),
    "outpaint_around_a_mask": (
        "Two masks become one: the border and the eyes are drawn anew, the rest is given. Change **operation** to difference or intersection, "
        "**spatial_ratio** of the border, or **resample**: 0 is faster and shows seams."
    ),
    "image_to_image": (
        "Change **denoise**: 0.4 keeps most of the picture, 0.9 nearly nothing of it. "
        "Put **Load Image** in place of **Example Picture** to use a picture of your own, best 64×64."
    ),
    "inpainting": (
        "Change the words in **Prompt** to repaint the masked part as something else; the rest of the face stays as it was. "
        "Put **Load Image** in place of **Example Picture** and draw a mask in its mask editor to use a picture of your own."
    ),
    "flow_as_epsilon_model": (
        "One model on two paths: **Convert Prediction** makes Karras schedules, which are for epsilon models, fit a flow. "
        "Change **scheduler** and **sampler_name** of the three samplers, or the **steps**; with many steps the pictures agree."
    ),
    "masked_completion": (
        "Random blocks of the picture are drawn anew, the rest is given; **Repaint Sampler** takes every step several times to fit both. "
        "Change **task** to outpaint, the **spatial_ratio** or the **seed** of **Video Mask**. For a video the masks run over time."
    ),
    "one_step_sampling": (
        "One model call against 4 and 28 from the same noise. The tiny model is not distilled, so one step gives the mean of what the "
        "prompt may mean, a blur; load distilled weights (InstaFlow: **Flow UNet Sampling**) in its place and one step is the picture. "
        "cfg stays 1."
    ),
    "samplers_side_by_side": (
        "Five solvers start from one noise and make the same number of model calls (Heun one fewer). "
        "Change the steps in the two **Flow Schedule** nodes (the second has half as many: its solvers call the model twice a step) "
        "and watch where the pictures part."
    ),
    "solver_compare": (
        "Change **solvers** (Flow ODE Sampler's help lists them) and **nfe**, the numbers of model calls each gets; a caption is the count "
        "and the PSNR against the reference. More **reference_steps** make the reference finer; the chart shows how far it is off itself."
    ),
    "guidance_side_by_side": (
        "One noise, one prompt, five ways to guide: at cfg 8 the plain rule burns the colours, and each option of **Flow Guider** "
        "holds it back in another way. Change **cfg** in all of them, or the **seed**."
    ),
    "steering_masked_edit": (
        "Sunglasses for a face, nothing inverted: **Flow Guider** edits inside the mask, **Flow Edit Cost** keeps the rest. "
        "Change the words in **Edit** or the **seed**; full_until 0.95 with beta 0.3 keeps more of what was under the mask."
    ),
    "steering_inpaint": (
        "The eyes are unknown to the model: it paints them while **FlowChef Sampler** keeps the rest. "
        "Another **seed** gives other eyes; **beta** in **Flow Latent Cost** says how hard the known part is held from the start."
    ),
    "steering_deblur": (
        "**Flow Operator** is the blur that is made and taken back: change its angle and size, or choose gaussian_blur. "
        "More **inner** steps in **FlowChef Sampler** fit the blurred picture closer."
    ),
    "steering_super_resolution": (
        "Sixteen pixels become one, and the model finds a picture that shrinks to the same pixels. "
        "Change **factor** in **Flow Operator** to 2 or 8, or the **seed**; compare with the bicubic enlargement."
    ),
    "invert_and_reconstruct": (
        "The picture is turned into noise and back, by three solvers at 40 model calls each. Lower the steps together (10, 5 and 9) "
        "and watch Euler's picture fade first. Put **Load Image** in place of **Example Picture** to use a picture of your own, best 64×64."
    ),
    "change_the_background": (
        "FlowEdit moves the picture by the difference of two prompts: change **What it shall show** (*noto cat on black*, "
        "*noto fox on white*). More **skip** keeps more of the picture, until too little changes."
    ),
    "edit_keeping_the_pose": (
        "A cat becomes a dog; the more steps share the old picture's features (**inject_steps**), the more of its pose stays. "
        "Change **What it shall show**, and describe your own picture in **What the picture shows**."
    ),
    "editing_methods": (
        "Six methods edit one picture at about 56 model calls each; the figure is the likeness to the picture, the table has costs. "
        "Change the lines of **methods**: RF-Edit keeps more with more inject_steps, FlowEdit with more skip, RF-Inversion with a late end."
    ),
}


@dataclass
class Placed:
    """A node on the canvas."""

    number: int
    class_id: str
    inputs: Mapping[str, Any]
    title: str
    info: Mapping[str, Any]
    column: int = 0
    position: tuple[int, int] = (0, 0)
    links_out: dict[int, list[int]] = field(default_factory=dict)

    def declared(self) -> Iterator[tuple[str, Any, Mapping[str, Any], bool]]:
        """(name, type, options, optional) in the order of the node's table."""
        for section in ("required", "optional"):
            for name, (kind, *options) in self.info["input"].get(section, {}).items():
                yield name, kind, options[0] if options else {}, section == "optional"

    def widgets(self) -> list[tuple[str, Any, Mapping[str, Any]]]:
        return [(name, kind, options) for name, kind, options, _ in self.declared() if _is_widget(kind, options)]

    def sockets(self) -> list[tuple[str, str, bool]]:
        return [(name, kind, optional) for name, kind, options, optional in self.declared() if not _is_widget(kind, options)]

    def size(self) -> tuple[int, int]:
        boxes = sum(bool(options.get("multiline")) for _, _, options in self.widgets())
        controls = sum(_has_control(name, options) for name, _, options in self.widgets())
        slots = max(len(self.sockets()), len(self.info["output"]))
        height = 10 + slots * SLOT + (len(self.widgets()) - boxes + controls) * WIDGET + boxes * TEXT_BOX
        pictures = self.class_id in PICTURE_NODES
        return WIDE if boxes or pictures else WIDTH, height + PREVIEW * pictures


def _is_widget(kind: Any, options: Mapping[str, Any]) -> bool:
    return (isinstance(kind, list) or kind in WIDGET_TYPES) and not options.get("forceInput")


def _has_control(name: str, options: Mapping[str, Any]) -> bool:
    """The interface adds a second widget, control_after_generate, after every seed."""
    return bool(options.get("control_after_generate")) or name in ("seed", "noise_seed")


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


def graph_names() -> list[str]:
    return sorted(path.stem for path in (FOLDER / "api").glob("*.json"))


def api_graph(name: str) -> dict[str, dict]:
    return json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))


def object_info() -> dict[str, dict]:
    """The tables of every node the embedded host has, in the form of GET /object_info."""
    from ..host.embedded import make_host

    return json.loads(json.dumps(make_host().registry.all_object_info()))


def to_ui(name: str, graph: Mapping[str, Mapping], info: Mapping[str, Mapping], note: str) -> dict[str, Any]:
    """The graph as the interface saves it (version 0.4), with a note in the upper left corner.

    Args:
        name: the file's stem; decides the graph's id.
        graph: API form; node ids are whole numbers.
        info: object_info of at least the graph's classes.
        note: Markdown for the note.
    """
    nodes = {
        key: Placed(int(key), entry["class_type"], entry["inputs"], entry.get("_meta", {}).get("title", ""), info[entry["class_type"]])
        for key, entry in graph.items()
    }
    order = _topological(nodes)
    _lay_out(order)
    links = _link_table(nodes, order)
    number = 1 + max(node.number for node in order)
    drawn = [_drawn_node(node, place, links) for place, node in enumerate(order, start=1)]
    return {
        "id": str(uuid.uuid5(NAMESPACE, name)),
        "revision": 0,
        "last_node_id": number,
        "last_link_id": len(links),
        "nodes": [_drawn_note(number, note), *drawn],
        "links": [[link, *ends] for link, ends in enumerate(links, start=1)],
        "groups": [],
        "config": {},
        "extra": {"ds": {"scale": 0.8, "offset": [40, 60]}},
        "version": 0.4,
    }


def _topological(nodes: Mapping[str, Placed]) -> list[Placed]:
    """Sources first; each node's column is one more than the furthest column it reads from."""
    order: list[Placed] = []
    done: set[str] = set()

    def visit(key: str) -> None:
        if key in done:
            return
        done.add(key)
        sources = [value[0] for value in nodes[key].inputs.values() if _is_link(value)]
        for source in sources:
            visit(source)
        nodes[key].column = 1 + max((nodes[source].column for source in sources), default=-1)
        order.append(nodes[key])

    for key in sorted(nodes, key=int):
        visit(key)
    return order


def _lay_out(order: list[Placed]) -> None:
    """Stack each column from the top; a node stands level with the source that it alone reads, so that equal rows line up."""
    readers = _readers(order)
    tops: dict[str, int] = {}
    left = 0
    for number, members in enumerate(_columns(order, readers)):
        top = _pitch(NOTE_HEIGHT) if number == 0 else 0
        for node in members:
            level = next((tops[source] for source in _sources(node) if len(readers[source]) == 1), 0)
            top = max(top, level)
            tops[str(node.number)] = top
            node.position = (left, top)
            top += _pitch(node.size()[1])
        left += max(WIDE if number == 0 else 0, *(node.size()[0] for node in members)) + COLUMN_GAP


def _columns(order: list[Placed], readers: Mapping[str, list[Placed]]) -> list[list[Placed]]:
    """Nodes that read nothing move up beside their first reader; where a column gets too high they move on to the left."""
    for node in order:
        if not _sources(node) and readers[str(node.number)]:
            node.column = max(0, min(reader.column for reader in readers[str(node.number)]) - 1)
    columns = [[node for node in order if node.column == number] for number in range(1 + max(node.column for node in order))]
    for number in range(len(columns) - 1, 0, -1):
        for node in [node for node in columns[number] if not _sources(node)]:
            if sum(_pitch(member.size()[1]) for member in columns[number]) > COLUMN_HEIGHT:
                columns[number].remove(node)
                columns[number - 1].append(node)
    return columns


def _readers(order: list[Placed]) -> dict[str, list[Placed]]:
    return {str(node.number): [other for other in order if str(node.number) in _sources(other)] for node in order}


def _pitch(height: int) -> int:
    return height + TITLE + ROW_GAP


def _sources(node: Placed) -> list[str]:
    return [value[0] for value in node.inputs.values() if _is_link(value)]


def _socket_names(node: Placed) -> list[str]:
    return [name for name, _, _ in node.sockets()] + [name for name, _, _ in node.widgets()]


def _link_table(nodes: Mapping[str, Placed], order: list[Placed]) -> list[tuple]:
    """(from node, from slot, to node, to slot, type) of every link; its number is its place, from 1."""
    links: list[tuple] = []
    for node in order:
        for place, name in enumerate(_socket_names(node)):
            value = node.inputs.get(name)
            if _is_link(value):
                source = nodes[value[0]]
                links.append((source.number, value[1], node.number, place, source.info["output"][value[1]]))
                source.links_out.setdefault(value[1], []).append(len(links))
    return links


def _drawn_node(node: Placed, place: int, links: list[tuple]) -> dict[str, Any]:
    incoming = {ends[3]: link for link, ends in enumerate(links, start=1) if ends[2] == node.number}
    inputs = [
        {"name": name, "type": kind, **({"shape": OPTIONAL_SHAPE} if optional else {}), "link": incoming.get(slot)}
        for slot, (name, kind, optional) in enumerate(node.sockets())
    ]
    values: list[Any] = []
    for slot, (name, kind, options) in enumerate(node.widgets(), start=len(inputs)):
        shown = "COMBO" if isinstance(kind, list) else kind
        inputs.append({"name": name, "type": shown, "widget": {"name": name}, "link": incoming.get(slot)})
        value = node.inputs.get(name)
        values.append(options.get("default") if value is None or _is_link(value) else value)
        if _has_control(name, options):
            values.append("fixed")
    outputs = [
        {"name": name, "type": kind, "links": node.links_out.get(slot) or None}
        for slot, (kind, name) in enumerate(zip(node.info["output"], node.info["output_name"]))
    ]
    core = not node.class_id.startswith("Rectiflow")
    titled = {"title": node.title} if node.title not in ("", node.info["display_name"]) else {}
    return {
        "id": node.number,
        "type": node.class_id,
        "pos": list(node.position),
        "size": list(node.size()),
        "flags": {},
        "order": place,
        "mode": 0,
        "inputs": inputs,
        "outputs": outputs,
        **titled,
        "properties": {
            "cnr_id": "comfy-core" if core else "rectiflow",
            **({"ver": CORE_VERSION} if core else {}),
            "Node name for S&R": node.class_id,
        },
        "widgets_values": values,
    }


def _drawn_note(number: int, note: str) -> dict[str, Any]:
    return {
        "id": number,
        "type": "MarkdownNote",
        "pos": [0, 0],
        "size": [WIDE, NOTE_HEIGHT],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "title": "What to change",
        "properties": {},
        "widgets_values": [note],
        "color": "#432",
        "bgcolor": "#653",
    }


def written(ui: Mapping[str, Any]) -> str:
    return json.dumps(ui, indent=2, ensure_ascii=False) + "\n"


def _paint(name: str) -> None:
    """Run the graph on the embedded host and keep its last picture as <name>.jpg."""
    import tempfile

    from PIL import Image

    from ..host.embedded import make_host, run_graph

    with tempfile.TemporaryDirectory() as folder:
        result = run_graph(api_graph(name), make_host(folder))
        with Image.open(result.files[-1]) as picture:
            picture.convert("RGB").save(FOLDER / f"{name}.jpg", quality=92)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=textwrap.dedent(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these graphs; all by default")
    parser.add_argument("--pictures", action="store_true", help="also run each graph and write its picture")
    options = parser.parse_args(arguments)
    unknown = set(options.names) - set(graph_names())
    if unknown:
        parser.error(f"no graph {', '.join(sorted(unknown))}; there are {', '.join(graph_names())}")
    info = object_info()
    for name in options.names or graph_names():
        ui = to_ui(name, api_graph(name), info, NOTES[name])
        (FOLDER / f"{name}.json").write_text(written(ui), encoding="utf-8")
        if options.pictures:
            _paint(name)


if __name__ == "__main__":
    main()
