"""What the probes find on the CPU wheel: every known defect, and none besides."""

from collections.abc import Mapping

import onnx_ir as ir
import pytest

from sa3_convert.components import Component
from sa3_convert.errors import BackendError, ConversionError
from sa3_convert.lab.doctor.examine import diagnose, examine
from sa3_convert.lab.doctor.graphs import proto, rewritten
from sa3_convert.lab.doctor.probe import GraphProbe, ToolProbe
from sa3_convert.lab.doctor.probes import PROBES
from sa3_convert.lab.doctor.records import RECORDS, changes
from sa3_convert.lab.doctor.results import Diagnosis, ProbeResult
from sa3_convert.mnn.compatibility import has_backend
from sa3_convert.passes.hazards import HAZARD_KINDS, find_hazards
from sa3_convert.passes.operator_kinds import OPERATOR_KINDS

UNPROBED = {
    "unfused-weight-norm": "right as it stands; the reductions are probed",
    "split-weights-half": "needs more than 2000 MB of weights",
    "weights-unpacked": "is about a GPU's memory, not about numbers",
    "shape-range": "is about older versions than this project installs; `mnn.compatibility` sees it in a file",
    "silu-unknown": "the same",
    "half-scales-unread": "the same",
    **{kind.id: "kept with the results of ONNX's node tests; no graph of ours has it" for kind in OPERATOR_KINDS},
}
"""Rows of the hazard table without a probe, and why."""


@pytest.fixture(scope="module")
def diagnosis() -> Diagnosis:
    return diagnose("cpu")


@pytest.fixture(scope="module")
def results(diagnosis: Diagnosis) -> Mapping[str, ProbeResult]:
    return {result.probe: result for result in diagnosis.results}


def test_exactly_the_recorded_defects_are_found(diagnosis: Diagnosis) -> None:
    found = changes(diagnosis)
    assert found is not None
    assert not found, found.describe()


def test_the_pinned_version_is_recorded(diagnosis: Diagnosis) -> None:
    # A new MNN fails here: look at what the test above says of it, then add its record.
    assert (diagnosis.mnn, "cpu", diagnosis.architecture) in RECORDS


def test_every_probe_has_its_own_name() -> None:
    assert len({probe.id for probe in PROBES}) == len(PROBES)


def test_probes_and_lint_speak_of_the_same_list() -> None:
    kinds = {kind.id for kind in HAZARD_KINDS}
    probed = {probe.hazard for probe in PROBES} - {None}
    assert probed | UNPROBED.keys() == kinds
    assert not probed & UNPROBED.keys()


def test_every_probe_is_of_a_hazard_or_of_something_needed() -> None:
    for probe in PROBES:
        if isinstance(probe, GraphProbe):
            assert (probe.hazard is None) != (not probe.needed_by), probe.id


def test_every_component_needs_something() -> None:
    needed = {component for probe in PROBES if isinstance(probe, GraphProbe) for component in probe.needed_by}
    assert needed == set(Component)


def test_the_lint_finds_the_hazard_in_each_probe_that_a_graph_shows() -> None:
    shown = {kind.id for kind in HAZARD_KINDS if kind.found is not None}
    for probe in PROBES:
        if isinstance(probe, GraphProbe) and probe.hazard in shown and not probe.external_data:
            model = ir.serde.deserialize_model(proto(probe))
            assert probe.hazard in {hazard.id for hazard in find_hazards(model, target_mnn="3.5")}, probe.id


def test_the_lint_passes_what_the_components_need() -> None:
    for probe in PROBES:
        if isinstance(probe, GraphProbe) and probe.needed_by:
            found = find_hazards(rewritten(probe), target_mnn="3.6")
            assert {hazard.id for hazard in found if hazard.severity != "info"} == set(), probe.id


def test_every_setting_is_tried_where_precision_or_memory_matter(results: Mapping[str, ProbeResult]) -> None:
    assert len(results["softmax"].answers) == 3
    assert len(results["conv-int8"].answers) == 9
    low, normal = (results["linear-int8"].at(f"precision high, memory {m}").db or 0 for m in ("low", "normal"))
    assert 36 < low < normal


def test_a_defect_says_what_is_done_about_it(results: Mapping[str, ProbeResult]) -> None:
    assert "fuse_weight_norm" in results["reducel2-axes"].avoided
    assert "make_fp16_safe" in results["fourier-features-half"].avoided


def test_an_unsupported_operator_is_quoted(results: Mapping[str, ProbeResult]) -> None:
    assert "IsNaN" in results["isnan-operator"].worst.detail


def test_what_mnn_refuses_while_checking_a_tool_is_a_failure() -> None:
    def refuse(folder: object) -> str | None:
        raise ConversionError("killed by signal 11\nand more")

    (found,) = examine("cpu", [ToolProbe(id="t", asks="a", hazard="success-claimed", check=refuse)])
    assert (found.worst.outcome, found.worst.detail) == ("fails", "killed by signal 11")


def test_a_backend_that_is_not_there_is_not_probed() -> None:
    if has_backend("cuda"):
        pytest.skip("this MNN has CUDA")
    with pytest.raises(BackendError, match="CUDA"):
        examine("cuda", [])
