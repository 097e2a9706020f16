"""The palettes of the room: the declared tables are whole, every node has a help page that knows its inputs, refusals name the node."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rectiflow.errors import NodeInputError
from rectiflow.nodes import editing, inversion, masks, prediction, samplers, schedules
from rectiflow.nodes.declare import Node
from rectiflow.samplers.flow_maps import FLOW_MAPS
from rectiflow.samplers.inversion import INVERTERS
from rectiflow.samplers.known_part import KNOWN_MODES
from rectiflow.samplers.masks import COMBINATIONS, TASKS
from rectiflow.samplers.model_shift import SCHEDULERS
from rectiflow.samplers.prediction import VELOCITY_SIGNS
from rectiflow.samplers.registry import LAST_STEP, SOLVERS
from rectiflow.samplers.rf_inversion import TRENDS
from rectiflow.samplers.sampler_object import START_FROM
from rectiflow.samplers.schedules import GRIDS

NODES = [
    value for module in (samplers, schedules, inversion, editing, masks, prediction) for value in vars(module).values()
    if isinstance(value, type) and issubclass(value, Node) and value.TITLE and value.__module__ == module.__name__
]
DOCS = Path(samplers.__file__).parent.parent / "web" / "docs"


def inputs_of(node) -> dict:
    table = node.INPUT_TYPES()
    return {**table["required"], **table.get("optional", {})}


@pytest.mark.parametrize("node", NODES)
def test_tables_are_whole(node):
    assert node.__name__.startswith("Rectiflow") and node.DESCRIPTION and node.CATEGORY.startswith("rectiflow/")
    for name, (_kind, options) in inputs_of(node).items():
        assert options["tooltip"], name
    optional = [declared.optional for declared in node.INPUTS]
    assert optional == sorted(optional), "optional inputs come last"


@pytest.mark.parametrize("node", NODES)
def test_help_page_knows_every_input(node):
    page = (DOCS / f"{node.__name__}.md").read_text()
    for name in inputs_of(node):
        assert name in page, name
    assert "## Reference" in page and "## Graph" in page


def test_drop_downs_offer_what_the_room_has():
    assert set(inputs_of(samplers.RectiflowFlowODESampler)["solver"][0]) | {"rf_solver"} == set(SOLVERS)
    assert tuple(inputs_of(samplers.RectiflowFlowODESampler)["last_step"][0]) == LAST_STEP
    assert tuple(inputs_of(samplers.RectiflowRFSolverSampler)["start_from"][0]) == START_FROM
    assert tuple(inputs_of(inversion.RectiflowFlowInvertSampler)["solver"][0]) == tuple(INVERTERS)
    assert tuple(inputs_of(inversion.RectiflowFlowInvert)["solver"][0]) == tuple(INVERTERS)
    assert tuple(inputs_of(editing.RectiflowRFInversionReverseSampler)["trend"][0]) == TRENDS
    assert tuple(inputs_of(schedules.RectiflowFlowShiftSigmas)["scheduler"][0]) == SCHEDULERS
    assert set(inputs_of(schedules.RectiflowFlowSchedule)["kind"][0]) == set(GRIDS)
    assert tuple(inputs_of(masks.RectiflowVideoMaskBuilder)["task"][0]) == TASKS
    assert tuple(inputs_of(masks.RectiflowVideoMaskCombine)["operation"][0]) == COMBINATIONS
    assert tuple(inputs_of(masks.RectiflowMaskedVideoCondition)["known"][0]) == KNOWN_MODES
    assert set(inputs_of(prediction.RectiflowFlowMapSampler)["kind"][0]) == set(FLOW_MAPS)
    assert tuple(inputs_of(prediction.RectiflowFlowUNetSampling)["velocity_sign"][0]) == VELOCITY_SIGNS


def test_schedule_nodes_that_need_no_model():
    (sigmas,) = schedules.RectiflowUniformFlowSigmas().execute(steps=2, start=1.0, end=0.0)
    assert sigmas.tolist() == [1.0, 0.5, 0.0]
    shifted, alpha = schedules.RectiflowReshiftSigmas().execute(sigmas=sigmas, from_alpha=1.0, to_alpha=3.0)
    assert shifted.tolist() == [1.0, 0.75, 0.0] and alpha == 3.0
    for kind in GRIDS:
        (sigmas,) = schedules.RectiflowFlowSchedule().execute(steps=20, kind=kind, shift=1.0, mu=0.6, alpha=6.0, beta=20.0, denoise=0.5)
        assert len(sigmas) == 21 and sigmas[0] < 1 and sigmas[-1] == 0


@pytest.mark.parametrize(("node", "inputs", "message"), [
    (schedules.RectiflowUniformFlowSigmas, {"steps": 2, "start": 0.5, "end": 0.5}, "Uniform Flow Sigmas: input 'end'"),
    (schedules.RectiflowUniformFlowSigmas, {"steps": 2, "start": float("nan"), "end": 0.5}, "Uniform Flow Sigmas: input 'start'"),
    (
        schedules.RectiflowReshiftSigmas, {"sigmas": torch.tensor([14.6, 0.0]), "from_alpha": 1.0, "to_alpha": 3.0},
        "Reshift Sigmas: input 'sigmas'",
    ),
])
def test_refusals_name_node_and_input(node, inputs, message):
    with pytest.raises(NodeInputError, match=message):
        node().execute(**inputs)
