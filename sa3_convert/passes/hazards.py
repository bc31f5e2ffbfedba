"""The hazard lint, and what MNN is known to get wrong or not to support: how to recognise it, what to do instead.

The lint walks any ONNX graph and refuses it by these rows; each probe of `doctor` belongs to one of them, so that both
speak of the same list. CPU rows were measured with MNN 3.6.1 on x86-64 and are measured again by the tests and by
`doctor`; CUDA rows come from its source. What older versions do with a converted file was measured with their wheels,
3.0.0 to 3.6.0. Forms of single operators are in `operator_kinds`.
"""

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from sa3_convert.errors import ConversionError
from sa3_convert.mnn.compatibility import DEFAULT_TARGET, MnnVersion
from sa3_convert.passes import hazard_rules as rules
from sa3_convert.passes import ir_tools
from sa3_convert.passes.hazard_rules import CPU, Facts, HazardKind, Severity
from sa3_convert.passes.operator_kinds import OPERATOR_KINDS

_CUDA = "up to 3.6.1, CUDA, from the source"
_LINT = "refused by the lint"
_INTEGER_ARITHMETIC = "Add And Equal Greater GreaterOrEqual Less LessOrEqual Max Min Mul Or Sub Xor"
_wrong = partial(HazardKind, severity="wrong", mnn=CPU)
_unsupported = partial(HazardKind, severity="unsupported", mnn=CPU)
_cuda = partial(HazardKind, severity="cuda", mnn=_CUDA)
_info_cuda = partial(HazardKind, severity="info", mnn=_CUDA)
_info = partial(HazardKind, severity="info", mnn=CPU)
_tool = partial(HazardKind, severity="tool", mnn=CPU)

HAZARD_KINDS: tuple[HazardKind, ...] = (
    _wrong(
        "where-broadcast-else",
        "when the first branch has the full shape and the second must be broadcast, the second is read out of bounds",
        "blend arithmetically, c·a + (1 − c)·b, or Expand the second branch",
        "networks blend arithmetically; " + _LINT,
        rules.on("Where", rules.where_reads_else_out_of_bounds),
    ),
    _wrong(
        "reduce-axes-input",
        "axes given as an input (opset 18 on) are ignored, and all axes are reduced",
        "fuse the weight norm, or write Mul, ReduceSum, Sqrt",
        "pass fuse_weight_norm; " + _LINT,
        rules.on("ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceSumSquare", rules.reduces_over_everything),
    ),
    _wrong(
        "resize-linear-1d",
        "linear Resize of one dimension gives zeros in about every third process that runs the same file",
        "give it a second spatial dimension of 1, or interpolate with a MatMul",
        "no network resizes; " + _LINT,
        rules.on("Resize", rules.resizes_one_dimension),
    ),
    _wrong(
        "round-half-to-even",
        "Round goes away from zero at halves, ONNX to even",
        "Floor(x + 0.5) if halves may go up, and say so",
        "no network rounds; " + _LINT,
        rules.operator("Round"),
    ),
    _wrong(
        "modulo-truncated",
        "Mod of floats, or with fmod = 1, takes the divisor's sign, not the dividend's, or neither",
        "x − k·Floor(x/k), or keep x non-negative",
        "no network takes remainders; " + _LINT,
        rules.on("Mod", rules.truncated_modulo),
    ),
    _wrong(
        "int64-constant",
        "integers are 32 bits wide; larger constants are clamped",
        "compute with floats, or with smaller numbers",
        "networks count with floats; " + _LINT,
        rules.clamps_a_constant,
    ),
    _wrong(
        "dequantize-after-gather",
        "DequantizeLinear of anything but a constant, or along its first axis, gives wrong numbers",
        "Cast, then multiply by the gathered scale",
        "pass quantise_embedding spells it with Cast and Mul; " + _LINT,
        rules.on("DequantizeLinear", rules.dequantises_what_mnn_does_not_expect),
    ),
    _wrong(
        "half-external-data",
        "float16 initialisers in external data are misread: the model does not load, or computes noise",
        "keep initialisers float32 and let the converter halve them",
        "exports are float32; " + _LINT,
        rules.reads_half_from_a_file,
    ),
    _unsupported(
        "not-supported",
        "the converter does not know the operator and writes no file",
        "export at opset 18, where it decomposes, and use additive float masks",
        "exported at opset 18; " + _LINT,
        rules.operator(
            "IsNaN", "IsInf", "GroupNormalization", "RMSNormalization", "Attention", "RotaryEmbedding", "Mish"
        ),
    ),
    _unsupported(
        "local-function",
        "the converter does not know functions of the model's own and writes no file",
        "inline them",
        "inlined by the export; " + _LINT,
        rules.calls_a_function,
    ),
    _cuda(
        "integer-unary",
        "the float kernel runs on the integer's bits",
        "enter masks as floats and keep them additive",
        "masks are additive floats; " + _LINT,
        rules.on("Abs BitwiseNot Neg Not Sign", rules.has_integer_data),
    ),
    _cuda(
        "integer-division",
        "integer division is not dispatched",
        "divide floats, then Floor",
        "lengths become floats; " + _LINT,
        rules.on("Div Mod", rules.has_integer_data),
    ),
    _info_cuda(
        "integer-arithmetic",
        "integer and boolean arithmetic is the least tested part of the back-end",
        "enter masks as floats and keep them additive",
        "masks are additive floats",
        rules.on(_INTEGER_ARITHMETIC, rules.has_integer_data),
    ),
    _info(
        "gather-negative",
        "with --optimizeLevel 2 the guard for negative indices is dropped and the wrong rows are read",
        "count from the front, or convert with --optimizeLevel 1, the default",
        "mnn.convert asks for --optimizeLevel 1",
        rules.on("Gather", rules.gathers_from_the_end),
    ),
    HazardKind(
        "softmax-low-rows",
        "rows whose maximum is below about −70 come out wrong on axes longer than 32",
        "subtract_row_maximum, or convert for 3.6",
        "pass subtract_row_maximum, by --target-mnn; " + _LINT,
        rules.on("LogSoftmax Softmax", rules.softmax_without_maximum),
        severity="cuda",
        mnn="up to 3.5.0, CUDA, from the source",
    ),
    HazardKind(
        "shape-range",
        "Shape with start or end: these versions refuse the whole file",
        "Slice the whole shape, or convert for 3.5",
        "pass use_whole_shapes, by --target-mnn; " + _LINT,
        rules.on("Shape", rules.shape_with_range),
        severity="unsupported",
        mnn="3.0.0 to 3.4.1, CPU of x86-64, measured, converted by 3.6.1",
    ),
    HazardKind(
        "silu-unknown",
        "x · Sigmoid(x) becomes one operator, which this version cannot run",
        "x / (1 + Exp(−x)), or convert for 3.1",
        "pass spell_silu, by --target-mnn; " + _LINT,
        rules.silu,
        severity="unsupported",
        mnn="3.0.0, CPU of x86-64, measured, converted by 3.6.1",
    ),
    HazardKind(
        "half-scales-unread",
        "weights with FP16 scales: these versions crash (SIGFPE)",
        "scales: fp32, or convert for 3.6",
        "mnn.target refuses the pair",
        severity="tool",
        mnn="3.0.0 to 3.5.0, CPU of x86-64, measured, converted by 3.6.1",
    ),
    _info(
        "unfused-weight-norm",
        "right as Mul, ReduceSum, Sqrt, which the converter folds; wrong as ReduceL2 (see reduce-axes-input)",
        "run fuse_weight_norm",
        "pass fuse_weight_norm",
        rules.on("Conv ConvTranspose Gemm MatMul", rules.weight_is_a_norm),
    ),
    _info(
        "nan-hidden",
        "some operators give a number for NaN: a broken model can look sound from outside",
        "check the tensors before them",
        "checkpoints and every verification's inputs are finite; bisect looks at each tensor",
    ),
    _tool(
        "half-constants",
        "--fp16 halves every float constant, π and frequencies too: the phases of Fourier features become noise",
        "sums of parts that half holds exactly, multiplied by something that cannot be folded",
        "pass make_fp16_safe",
    ),
    _tool(
        "fp16-cancels-bits",
        "--fp16 in the same call cancels --weightQuantBits",
        "two passes: quantise from ONNX, then --fp16 from MNN to MNN",
        "mnn.convert makes two passes; mnn.audit reads the file",
    ),
    _tool(
        "block-size-ignored",
        "a block size that is not a multiple of 16, or does not divide the inputs, silently becomes one per channel",
        "a multiple of 16 that divides the inputs",
        "recipes are checked; mnn.audit reads the file",
    ),
    _tool(
        "symmetry-flag",
        "weights are asymmetric by default although the help says otherwise, and the flag without a value is symmetric",
        "--weightQuantAsymmetric=0 or =1",
        "mnn.layer_rules always gives the value; mnn.audit reads the file",
    ),
    _tool(
        "weights-left-float",
        "three-dimensional constants of a MatMul, tables of a Gather, and a weight that more than four MatMuls share "
        "are not quantised",
        "two-dimensional weights, used once; quantise a table in the graph",
        "pass quantise_embedding; mnn.audit reads the file",
    ),
    _tool(
        "gelu-approximated",
        "exact GELU becomes the tanh form",
        "--useGeluApproximation 0",
        "mnn.convert asks for it",
    ),
    _tool(
        "success-claimed",
        "the converter reports success for what it did not write: a missing folder, 99 bits, a flag it does not know",
        "judge the file",
        "mnn.convert loads, audits and runs what was written",
    ),
    _tool(
        "shared-scratch",
        "all weights pass through a file of a fixed name in the working directory: two conversions in one folder "
        "exchange weights",
        "a folder per conversion",
        "mnn.isolated starts each in its own",
    ),
    _tool(
        "split-weights-half",
        "the second pass to FP16 leaves an unusable file when the weights lie in a file of their own (from 2000 MB)",
        "floats: fp32 for such models",
        "mnn.convert refuses",
    ),
    _tool(
        "words-ignored",
        "precision and memory given to the bindings as words are ignored",
        "numbers",
        "mnn.session gives numbers",
    ),
    _tool(
        "backend-replaced",
        "a backend that is not there is replaced by the CPU, with a line on standard output",
        "ask createRuntime first and getSessionInfo afterwards",
        "mnn.session does both and refuses",
    ),
    _cuda(
        "half-overflow",
        "precision normal rounds the inputs of every Linear to half, which ends at 65504; the text encoder's "
        "gelu(gate)·up has no bound",
        "scale up by a power of two and the following norm's eps by its square",
        "pass scale_gated_products",
    ),
    HazardKind(
        "softmax-low-precision",
        "with precision low Softmax reads half buffers as float",
        "precision normal or high",
        "placement refuses precision low on CUDA unless its probe is right",
        severity="cuda",
        mnn="3.6.0 on, CUDA, from the source",
    ),
    _info_cuda(
        "weights-unpacked",
        "with memory normal quantised weights are unpacked to half on the device: they save disk, not its memory",
        "memory low",
        "told by `run` with the device's memory",
    ),
    _info_cuda(
        "loops",
        "broadcasts over several dimensions become loops of small kernels",
        "hint 4 = 0xFFFF − 4 removes the binary ones",
        "probed; nothing is done",
    ),
    *OPERATOR_KINDS,
)
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
