"""The hazard lint: walks any ONNX graph and reports what MNN is known to get wrong or not to support."""

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from sa3_convert.errors import ConversionError
from sa3_convert.mnn.compatibility import DEFAULT_TARGET, MnnVersion
from sa3_convert.passes import ir_tools
from sa3_convert.passes.hazard_kinds import HAZARD_KINDS
from sa3_convert.passes.hazard_rules import Facts, HazardKind, Severity

_SHOWN = 3


@dataclass(frozen=True)
class Hazard:
    """One construct at one node."""

    kind: HazardKind
    node: str
    operator: str

    @property
    def id(self) -> str:
        """The kind's name, stable across versions."""
        return self.kind.id

    @property
    def severity(self) -> Severity:
        """What it does: see `hazard_rules.Severity`."""
        return self.kind.severity


def find_hazards(model: ir.Model, *, target_mnn: MnnVersion = DEFAULT_TARGET) -> list[Hazard]:
    """Report every known hazard, in graph order; sub-graphs and local functions included.

    Types and shapes that the graph does not state are inferred and noted in it; where they stay unknown, a rule that
    needs them reports the node.

    Args:
        model: not changed but for inferred types and shapes.
        target_mnn: the oldest MNN that the graph must be right on.

    Raises:
        ConversionError: a node is not as its operator is.

    """
    ShapeInferencePass()(model)
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.graph.subgraphs(), *model.functions.values()]
    run_time = ir_tools.depends_on_inputs(model.graph)
    data = ir_tools.depends_on_inputs(model.graph, by_content=True)
    for inner in graphs[1:]:
        everything = {*inner.inputs, *(out for node in inner for out in node.outputs)}
        run_time |= everything
        data |= everything
    functions = frozenset((function.domain, function.name) for function in model.functions.values())
    facts = Facts(target_mnn, frozenset(run_time), frozenset(data), functions, model.opset_imports.get("", 0))
    return [
        Hazard(kind, node.name or (node.outputs[0].name or ""), node.op_type)
        for graph in graphs
        for node in graph
        for kind in HAZARD_KINDS
        if _is_found(kind, node, facts)
    ]


def _is_found(kind: HazardKind, node: ir.Node, facts: Facts) -> bool:
    try:
        return kind.found is not None and kind.found(node, facts)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        name = node.name or ", ".join(value.name or "" for value in node.outputs)
        raise ConversionError(
            f"{node.op_type} {name!r} is no valid ONNX: it lacks inputs or attributes, or they do not fit ({error})."
        ) from None


def refuse_hazards(
    model: ir.Model,
    *,
    target_mnn: MnnVersion = DEFAULT_TARGET,
    severities: Collection[Severity] = ("wrong", "unsupported", "cuda"),
) -> None:
    """Raise if a graph has hazards of the given severities.

    Raises:
        ConversionError: what each does, where, and what to write instead.

    """
    by_kind: dict[HazardKind, list[Hazard]] = defaultdict(list)
    for hazard in find_hazards(model, target_mnn=target_mnn):
        if hazard.severity in severities:
            by_kind[hazard.kind].append(hazard)
    if not by_kind:
        return
    lines = [f"{model.graph.name or 'The graph'} has constructs that MNN gets wrong or does not support:"]
    for kind, hazards in by_kind.items():
        where = ", ".join(f"{hazard.operator} {hazard.node!r}" for hazard in hazards[:_SHOWN])
        more = f" and {len(hazards) - _SHOWN} more" if len(hazards) > _SHOWN else ""
        lines.append(
            f"  {kind.id} ({kind.severity}; MNN {kind.mnn}) at {where}{more}: {kind.happens}. Fix: {kind.fix}."
        )
    raise ConversionError("\n".join(lines))
