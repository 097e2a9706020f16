"""`nodes`, `doctor`, `--help`: what a person asks before anything runs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import rectiflow
from rectiflow.cli import COMMANDS
from rectiflow.cli.checks import pinned_versions


def test_help_lists_every_command(shell):
    answer = shell.call("--help")
    assert answer.status == 0
    for name, summary in COMMANDS.items():
        assert name in answer.out and summary in answer.out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(shell, command):
    answer = shell.call(command, "--help")
    assert answer.status == 0 and f"rectiflow {command}" in answer.out


def test_no_command_shows_the_help(shell):
    answer = shell.call()
    assert answer.status == 2 and "doctor" in answer.out


def test_version(shell):
    assert shell.call("--version").out == f"rectiflow {rectiflow.__version__}\n"


def test_nodes_by_category(shell):
    answer = shell.call("nodes")
    lines = answer.out.splitlines()
    assert answer.status == 0
    for class_id, title in rectiflow.NODE_DISPLAY_NAME_MAPPINGS.items():
        assert any(line.split() == [class_id, *title.split()] for line in lines)
    assert any(line.split()[:1] == ["KSampler"] for line in lines)


@pytest.mark.parametrize("name", ["KSampler", "ksampler", "Load Tiny Model", "RectiflowLoadTiny"])
def test_one_node(shell, name):
    answer = shell.call("nodes", name)
    assert answer.status == 0 and "outputs" in answer.out and "MODEL" in answer.out


def test_a_node_shows_ranges_and_choices(shell):
    shown = shell.call("nodes", "KSampler").out
    assert "steps  INT  = 20  from 1 to 10000" in shown
    assert "one of: euler," in shown and "more" in shown


def test_nodes_as_json(shell):
    one = json.loads(shell.call("nodes", "SaveImage", "--json").out)
    assert list(one) == ["SaveImage"] and one["SaveImage"]["output_node"] is True
    every = json.loads(shell.call("nodes", "--json").out)
    assert every["SaveImage"] == one["SaveImage"] and set(rectiflow.NODE_CLASS_MAPPINGS) <= set(every)


def test_an_unknown_node(shell):
    answer = shell.call("nodes", "RectiflowLoadTinny")
    assert answer.status == 2 and "RectiflowLoadTiny" in answer.err


def test_doctor_finds_this_environment(shell):
    answer = shell.call("doctor", "--json")
    found = json.loads(answer.out)
    flat = {finding["name"]: finding for section in found.values() for finding in section}
    assert flat["torch"]["state"] in ("ok", "note") and flat["device"]["value"]
    assert flat["our nodes"]["value"] == str(len(rectiflow.NODE_CLASS_MAPPINGS))
    assert answer.status == int(any(finding["state"] == "fault" for finding in flat.values()))
    assert all(finding["remedy"] for finding in flat.values() if finding["state"] == "fault")


def test_doctor_names_a_missing_package_and_its_remedy():
    """In a Python where aiohttp and safetensors cannot be imported or found."""
    code = """
import importlib.metadata, sys
original = importlib.metadata.version
def version(name):
    if name in ("safetensors", "aiohttp"):
        raise importlib.metadata.PackageNotFoundError(name)
    return original(name)
importlib.metadata.version = version
from rectiflow.cli import main
sys.exit(main(["doctor"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    missing = [line for line in done.stdout.splitlines() if "not installed" in line]
    assert any("safetensors" in line for line in missing) and any("aiohttp" in line for line in missing)
    assert "./rectiflow" in done.stdout and "to mend" in done.stdout


def test_doctor_knows_the_pins():
    pins = pinned_versions()
    assert pins["torch"] == {"2.13.0"} and len(pins["numpy"]) == 2, "one numpy for Python 3.10, one for later ones"
