"""What MNN is known to get wrong or not to support, as data: how to recognise it, what happens, what to do instead.

The hazard lint refuses graphs by these rows, and each probe of `doctor` belongs to one of them, so that both speak of
the same list. CPU rows were measured with MNN 3.6.1 on x86-64 and are measured again by the tests and by `doctor`; CUDA
rows come from its source. What older versions do with a converted file was measured with their wheels, 3.0.0 to 3.6.0.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from sa3_convert.passes import hazard_rules as rules
from sa3_convert.passes.hazard_rules import Facts

Severity = Literal["wrong", "unsupported", "cuda", "tool", "info"]
"""wrong: other numbers on the CPU without an error. unsupported: no file, or none that the
target can run. cuda: wrong on CUDA. tool: the converter or the Python bindings do something else than they were asked.
info: worth knowing."""


@dataclass(frozen=True)
class HazardKind:
    """One row of the table."""

    id: str
    severity: Severity
    mnn: str
    """Where it was seen: versions and back-end."""
    happens: str
    fix: str
    """What to write or ask for instead."""
    avoided: str
    """What this project does about it, and where."""
    found: Callable[[ir.Node, Facts], bool] | None = None
    """Recognises it at a node; None where no graph shows it."""


_CPU = "3.6.1, CPU, measured"
_CUDA = "up to 3.6.1, CUDA, from the source"
_LINT = "refused by the lint"

HAZARD_KINDS: tuple[HazardKind, ...] = (
    HazardKind(
        "where-broadcast-else",
        "wrong",
        _CPU,
        "when the first branch has the full shape and the second must be broadcast, the second is read out of bounds",
        "blend arithmetically, c·a + (1 − c)·b, or Expand the second branch",
        "networks blend arithmetically; " + _LINT,
        rules.where_reads_else_out_of_bounds,
    ),
    HazardKind(
        "reduce-axes-input",
        "wrong",
        _CPU,
        "axes given as an input (opset 18 on) are ignored, and all axes are reduced",
        "fuse the weight norm, or write Mul, ReduceSum, Sqrt",
        "pass fuse_weight_norm; " + _LINT,
        rules.reduces_over_everything,
    ),
    HazardKind(
        "resize-linear-1d",
        "wrong",
        _CPU,
        "linear Resize of one dimension gives zeros in about every third process that runs the same file",
        "give it a second spatial dimension of 1, or interpolate with a MatMul",
        "no network resizes; " + _LINT,
        rules.resizes_one_dimension,
    ),
    HazardKind(
        "round-half-to-even",
        "wrong",
        _CPU,
        "Round goes away from zero at halves, ONNX to even",
        "Floor(x + 0.5) if halves may go up, and say so",
        "no network rounds; " + _LINT,
        rules.operator("Round"),
    ),
    HazardKind(
        "modulo-truncated",
        "wrong",
        _CPU,
        "Mod with fmod = 1 takes the divisor's sign, not the dividend's",
        "x − k·Floor(x/k), or keep x non-negative",
        "no network takes remainders; " + _LINT,
        rules.truncated_modulo,
    ),
    HazardKind(
        "int64-constant",
        "wrong",
        _CPU,
        "integers are 32 bits wide; larger constants are clamped",
        "compute with floats, or with smaller numbers",
        "networks count with floats; " + _LINT,
        rules.clamps_a_constant,
    ),
    HazardKind(
        "dequantize-after-gather",
        "wrong",
        _CPU,
        "DequantizeLinear of anything but a constant, or along its first axis, gives wrong numbers",
        "Cast, then multiply by the gathered scale",
        "pass quantise_embedding spells it with Cast and Mul; " + _LINT,
        rules.dequantises_what_mnn_does_not_expect,
    ),
    HazardKind(
        "half-external-data",
        "wrong",
        _CPU,
        "float16 initialisers in external data are misread: the model does not load, or computes noise",
        "keep initialisers float32 and let the converter halve them",
        "exports are float32; " + _LINT,
        rules.reads_half_from_a_file,
    ),
    HazardKind(
        "not-supported",
        "unsupported",
        _CPU,
        "the converter does not know the operator and writes no file",
        "export at opset 18, where it decomposes, and use additive float masks",
        "exported at opset 18; " + _LINT,
        rules.operator(
            "IsNaN", "IsInf", "GroupNormalization", "RMSNormalization", "Attention", "RotaryEmbedding", "Mish"
        ),
    ),
    HazardKind(
        "local-function",
        "unsupported",
        _CPU,
        "the converter does not know functions of the model's own and writes no file",
        "inline them",
        "inlined by the export; " + _LINT,
        rules.calls_a_function,
    ),
    HazardKind(
        "integer-unary",
        "cuda",
        _CUDA,
        "the float kernel runs on the integer's bits",
        "enter masks as floats and keep them additive",
        "masks are additive floats; " + _LINT,
        rules.integer_unary,
    ),
    HazardKind(
        "integer-division",
        "cuda",
        _CUDA,
        "integer division is not dispatched",
        "divide floats, then Floor",
        "lengths become floats; " + _LINT,
        rules.integer_division,
    ),
    HazardKind(
        "integer-arithmetic",
        "info",
        _CUDA,
        "integer and boolean arithmetic is the least tested part of the back-end",
        "enter masks as floats and keep them additive",
        "masks are additive floats",
        rules.integer_arithmetic,
    ),
    HazardKind(
        "gather-negative",
        "info",
        _CPU,
        "with --optimizeLevel 2 the guard for negative indices is dropped and the wrong rows are read",
        "count from the front, or convert with --optimizeLevel 1, the default",
        "mnn.convert asks for --optimizeLevel 1",
        rules.gathers_from_the_end,
    ),
    HazardKind(
        "softmax-low-rows",
        "cuda",
        "up to 3.5.0, CUDA, from the source",
        "rows whose maximum is below about −70 come out wrong on axes longer than 32",
        "subtract_row_maximum, or convert for 3.6",
        "pass subtract_row_maximum, by --target-mnn; " + _LINT,
        rules.softmax_without_maximum,
    ),
    HazardKind(
        "shape-range",
        "unsupported",
        "3.0.0 to 3.4.1, measured, converted by 3.6.1",
        "Shape with start or end: these versions refuse the whole file",
        "Slice the whole shape, or convert for 3.5",
        "pass use_whole_shapes, by --target-mnn; " + _LINT,
        rules.shape_with_range,
    ),
    HazardKind(
        "silu-unknown",
        "unsupported",
        "3.0.0, measured, converted by 3.6.1",
        "x · Sigmoid(x) becomes one operator, which this version cannot run",
        "x / (1 + Exp(−x)), or convert for 3.1",
        "pass spell_silu, by --target-mnn; " + _LINT,
        rules.silu,
    ),
    HazardKind(
        "half-scales-unread",
        "tool",
        "3.0.0 to 3.5.0, measured, converted by 3.6.1",
        "weights with FP16 scales: these versions crash (SIGFPE)",
        "scales: fp32, or convert for 3.6",
        "mnn.target refuses the pair",
    ),
    HazardKind(
        "unfused-weight-norm",
        "info",
        _CPU,
        "right as Mul, ReduceSum, Sqrt, which the converter folds; wrong as ReduceL2 (see reduce-axes-input)",
        "run fuse_weight_norm",
        "pass fuse_weight_norm",
        rules.weight_is_a_norm,
    ),
    HazardKind(
        "nan-hidden",
        "info",
        _CPU,
        "some operators give a number for NaN: a broken model can look sound from outside",
        "check the tensors before them",
        "checkpoints and every verification's inputs are finite; bisect looks at each tensor",
    ),
    HazardKind(
        "half-constants",
        "tool",
        _CPU,
        "--fp16 halves every float constant, π and frequencies too: the phases of Fourier features become noise",
        "sums of parts that half holds exactly, multiplied by something that cannot be folded",
        "pass make_fp16_safe",
    ),
    HazardKind(
        "fp16-cancels-bits",
        "tool",
        _CPU,
        "--fp16 in the same call cancels --weightQuantBits",
        "two passes: quantise from ONNX, then --fp16 from MNN to MNN",
        "mnn.convert makes two passes; mnn.audit reads the file",
    ),
    HazardKind(
        "block-size-ignored",
        "tool",
        _CPU,
        "a block size that is not a multiple of 16, or does not divide the inputs, silently becomes one per channel",
        "a multiple of 16 that divides the inputs",
        "recipes are checked; mnn.audit reads the file",
    ),
    HazardKind(
        "symmetry-flag",
        "tool",
        _CPU,
        "weights are asymmetric by default although the help says otherwise, and the flag without a value is symmetric",
        "--weightQuantAsymmetric=0 or =1",
        "mnn.layer_rules always gives the value; mnn.audit reads the file",
    ),
    HazardKind(
        "weights-left-float",
        "tool",
        _CPU,
        "three-dimensional constants of a MatMul, tables of a Gather, and a weight that more than four MatMuls share "
        "are not quantised",
        "two-dimensional weights, used once; quantise a table in the graph",
        "pass quantise_embedding; mnn.audit reads the file",
    ),
    HazardKind(
        "gelu-approximated",
        "tool",
        _CPU,
        "exact GELU becomes the tanh form",
        "--useGeluApproximation 0",
        "mnn.convert asks for it",
    ),
    HazardKind(
        "success-claimed",
        "tool",
        _CPU,
        "the converter reports success for what it did not write: a missing folder, 99 bits, a flag it does not know",
        "judge the file",
        "mnn.convert loads, audits and runs what was written",
    ),
    HazardKind(
        "shared-scratch",
        "tool",
        _CPU,
        "all weights pass through a file of a fixed name in the working directory: two conversions in one folder "
        "exchange weights",
        "a folder per conversion",
        "mnn.isolated starts each in its own",
    ),
    HazardKind(
        "split-weights-half",
        "tool",
        _CPU,
        "the second pass to FP16 leaves an unusable file when the weights lie in a file of their own (from 2000 MB)",
        "floats: fp32 for such models",
        "mnn.convert refuses",
    ),
    HazardKind(
        "words-ignored",
        "tool",
        _CPU,
        "precision and memory given to the bindings as words are ignored",
        "numbers",
        "mnn.session gives numbers",
    ),
    HazardKind(
        "backend-replaced",
        "tool",
        _CPU,
        "a backend that is not there is replaced by the CPU, with a line on standard output",
        "ask createRuntime first and getSessionInfo afterwards",
        "mnn.session does both and refuses",
    ),
    HazardKind(
        "half-overflow",
        "cuda",
        _CUDA,
        "precision normal rounds the inputs of every Linear to half, which ends at 65504; the text encoder's "
        "gelu(gate)·up has no bound",
        "scale up by a power of two and the following norm's eps by its square",
        "pass scale_gated_products",
    ),
    HazardKind(
        "softmax-low-precision",
        "cuda",
        "3.6.0 on, CUDA, from the source",
        "with precision low Softmax reads half buffers as float",
        "precision normal or high",
        "placement refuses precision low on CUDA unless its probe is right",
    ),
    HazardKind(
        "weights-unpacked",
        "info",
        _CUDA,
        "with memory normal quantised weights are unpacked to half on the device: they save disk, not its memory",
        "memory low",
        "told by `run` with the device's memory",
    ),
    HazardKind(
        "loops",
        "info",
        _CUDA,
        "broadcasts over several dimensions become loops of small kernels",
        "hint 4 = 0xFFFF − 4 removes the binary ones",
        "probed; nothing is done",
    ),
)
