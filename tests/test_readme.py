"""README keeps its promises: its commands exist, its links lead somewhere, its table lists the nodes there are."""

from __future__ import annotations

import re
import shlex
from itertools import groupby
from pathlib import Path

import pytest
import rectiflow
from rectiflow.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TABLE = re.compile(r"(<!-- nodes: [^\n]*-->\n)(.*?)(<!-- end of nodes -->)", re.DOTALL)


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def node_table() -> str:
    """A table a group, a row a node, with the first sentence of its description."""
    nodes = sorted(rectiflow.NODE_CLASS_MAPPINGS.items(), key=lambda item: (item[1].GROUP, item[1].TITLE))
    lines = []
    for group, members in groupby(nodes, key=lambda item: item[1].GROUP):
        lines += [f"| {group} | |", "|---|---|"]
        for class_id, cls in members:
            sentence = re.split(r"(?<=[.:]) (?=[A-Z])|\n", cls.DESCRIPTION, maxsplit=1)[0].rstrip(":")
            lines.append(f"| [{cls.TITLE}](web/docs/{class_id}.md) | {sentence.replace('|', '/')} |")
        lines.append("")
    return "\n".join(lines)


def test_the_table_lists_the_nodes_there_are(request):
    readme = read(ROOT / "README.md")
    if request.config.getoption("--update-snapshot"):
        (ROOT / "README.md").write_text(TABLE.sub(lambda found: f"{found[1]}{node_table()}{found[3]}", readme), encoding="utf-8")
        return
    assert TABLE.search(readme)[2] == node_table(), "./rectiflow test tests/test_readme.py --update-snapshot writes it anew"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", read(page)) if "://" not in target]
    missing = [target for target in targets if target and not (page.parent / target).exists()]
    assert not missing


def commands(page: Path) -> list[list[str]]:
    blocks = re.findall(r"```sh\n(.*?)```", read(page), re.DOTALL)
    lines = (line for block in blocks for line in block.splitlines() if "./rectiflow" in line)
    words = (shlex.split(line, comments=True) for line in lines)
    return [line[line.index("./rectiflow") + 1 :] for line in words]


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_commands_exist_and_their_files_too(page):
    found = commands(page)
    assert found
    for command, *arguments in found:
        assert command in COMMANDS
        for argument in arguments:
            if argument.startswith(("workflows/", "tests/")):
                assert (ROOT / argument).exists(), argument


def test_every_graph_is_listed():
    graphs = {page.stem for page in (ROOT / "workflows").glob("*.json")}
    assert graphs == set(re.findall(r"\[(\w+)\]\(workflows/\w+\.json\)", read(ROOT / "README.md")))


def test_the_first_two_commands():
    assert [command[0] for command in commands(ROOT / "README.md")][:2] == ["run", "test"]
    assert commands(ROOT / "README.md")[0][1] == "workflows/api/text_to_image.json"


def test_overrides_in_examples_fit_their_graphs():
    """Each `--set` of README names a node and an input that the graph before it has."""
    import json

    from rectiflow.cli.overrides import find_node, parse_override

    for command, *arguments in commands(ROOT / "README.md"):
        if command == "run" and arguments[0].startswith("workflows/api/"):
            prompt = json.loads(read(ROOT / arguments[0]))
            for flag, text in zip(arguments, arguments[1:]):
                if flag == "--set":
                    override = parse_override(text)
                    assert override.input_name in prompt[find_node(prompt, override.node)]["inputs"]


def test_the_pictures_sources_are_named():
    """Twemoji's licence asks for attribution wherever the pictures, or what was trained on them, go."""
    readme = read(ROOT / "README.md")
    for words in ("CC BY 4.0", "emoji-datasource-twitter 16.0.0", "Apache License 2.0", "emoji-datasource-google 16.0.0"):
        assert words in readme
