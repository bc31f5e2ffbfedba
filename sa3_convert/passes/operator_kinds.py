"""Forms of single operators that MNN's CPU backend computes wrongly, or dies of, without an error: rows of the table.

Found with ONNX's own node tests (tests/passes/test_node_tests.py keeps the result of each) and by running each operator
over wide ranges, with inputs as constants, and with dynamic lengths.
"""

from sa3_convert.passes import operator_rules as rules
from sa3_convert.passes.hazard_rules import CPU, HazardKind, Rule, on


def _wrong(name: str, happens: str, fix: str, found: Rule, mnn: str = CPU) -> HazardKind:
    avoided = "not in our graphs; refused by the lint"
    return HazardKind(name, happens, fix, avoided, found, severity="wrong", mnn=mnn)


OPERATOR_KINDS: tuple[HazardKind, ...] = (
    _wrong(
        "operator-unproven",
        "MNN was not shown to compute this operator right; of those that it converts, many come out wrong or end the "
        "process (LSTM, whose last state has 5 dB, GRU, If, Loop, NonMaxSuppression, OneHot, GridSample, Shrink)",
        "decompose it into operators that docs/operators.md lists",
        rules.not_shown_right,
    ),
    _wrong(
        "less-of-floats",
        "from the fifth number on, Less gives other answers",
        "Greater with its inputs exchanged",
        on("Less", rules.compares_no_integers),
    ),
    _wrong(
        "comparison-broadcast",
        "a comparison of which both sides must be broadcast reads them in the wrong order",
        "Expand one side to the full shape first",
        on("Greater GreaterOrEqual LessOrEqual", rules.compares_two_broadcasts),
    ),
    _wrong(
        "one-element-first",
        "behind a convolution, a pool or a norm over channels, a constant of one element and the result's rank as the "
        "first operand is read as if it had as many elements as the second",
        "a scalar, or the constant as the second operand",
        on(rules.BINARY, rules.one_element_first),
        "3.0.0, 3.4.1 and 3.6.1, CPU of x86-64, measured, converted by 3.6.1",
    ),
    _wrong(
        "variadic-broadcast",
        "inputs from the third on are read out of bounds when they must be broadcast; the converter dies of a single "
        "one",
        "apply the operator to two inputs at a time (Mean: Sum and Mul)",
        on("Max Mean Min Sum", rules.broadcasts_several),
    ),
    _wrong(
        "reduce-empty-axes",
        "no axes mean all or none, whatever noop_with_empty_axes says, and computed ones are not followed",
        "name the axes in a constant, or leave the reduction out",
        rules.reduces_without_axes,
    ),
    _wrong(
        "arg-extreme-last",
        "select_last_index is ignored",
        "look for the first one",
        rules.has("ArgMax ArgMin", "select_last_index", bool),
    ),
    _wrong(
        "arg-extreme-integers",
        "the integers' bits are compared as floats",
        "Cast first",
        on("ArgMax ArgMin", rules.takes_integers),
    ),
    _wrong(
        "integer-product",
        "the result is zeros",
        "Cast to float first",
        on("Conv ConvTranspose Einsum Gemm MatMul", rules.takes_integers),
    ),
    _wrong(
        "matmul-vector",
        "the loader dies of a product of two vectors, a matrix times a vector does not run",
        "Unsqueeze the vector to one column, and Squeeze the result",
        on("MatMul", rules.product_with_vector),
    ),
    _wrong(
        "gemm-transposed-input",
        "transA is ignored when the other factor is a constant",
        "Transpose the input first",
        rules.has("Gemm", "transA", bool),
    ),
    _wrong("pad-lower", "SAME_LOWER pads as SAME_UPPER does", "give pads", rules.pads_below),
    _wrong(
        "convolution-1d-output",
        "what a one-dimensional convolution returns as an output has one dimension more, of 1",
        "an Identity behind it",
        rules.convolution_at_the_end,
    ),
    _wrong(
        "convolution-output-shape",
        "output_shape is taken for what it is not: out of bounds, or the loader dies",
        "give pads and output_padding",
        rules.has("ConvTranspose", "output_shape"),
    ),
    _wrong(
        "pool-form",
        "the loader dies of a pool without strides or with three dimensions; dilations and positions are ignored, and "
        "ceil_mode counts windows that start in the padding",
        "state strides; nothing but strides and pads",
        on("AveragePool MaxPool", rules.unusual_pool),
    ),
    _wrong(
        "einsum-form",
        "a repeated index is not followed, and the process ends when no index or more than two factors are left",
        "MatMul, Mul and ReduceSum",
        on("Einsum", rules.unusual_einsum),
    ),
    _wrong(
        "split-uneven",
        "num_outputs that do not divide the axis cut it into other parts; after an empty part, other memory is read",
        "give the sizes as a constant without 0",
        on("Split", rules.uneven_split),
    ),
    _wrong(
        "slice-before-begin",
        "a start that lies before the beginning of an axis of any length reads other rows",
        "compute the start from the length, not below 0",
        on("Slice", rules.starts_before_the_axis),
    ),
    _wrong(
        "scatter-reduction",
        "reduction is ignored",
        "compute what is scattered first",
        rules.has("ScatterElements ScatterND", "reduction", lambda word: word != "none"),
    ),
    _wrong(
        "indices-negative",
        "negative indices read other memory; those that are computed may be such",
        "constant indices from 0, or Gather",
        on("GatherElements GatherND ScatterElements ScatterND", rules.indices_may_be_negative),
    ),
    _wrong(
        "cast-narrow",
        "the number stays what it is: a float16 is not rounded, a bool not 0 or 1, 300 is no uint8",
        "Greater or Equal for a bool; stay float32 or int32",
        on("Cast CastLike", rules.casts_to_less),
    ),
    _wrong(
        "type-narrow",
        "MNN computes with float32 and int32; other types are read as one of them or end the process",
        "Cast to float32 or int32 at the beginning",
        rules.narrow_type,
    ),
    _wrong(
        "softmax-flattened",
        "before opset 13 all axes from the given one on are one, which is not done; the converter dies of LogSoftmax "
        "without an axis",
        "opset 13 with an axis",
        on("LogSoftmax Softmax", rules.softmax_of_rows),
    ),
    _wrong(
        "softplus-range",
        "far from 0 (21 dB over ±30) it is another function",
        "Max(x, 0) + Log(1 + Exp(−Abs(x)))",
        on("Softplus", lambda node, facts: True),
    ),
    _wrong(
        "prelu-later-axis",
        "slopes along another axis than the channels are taken for the channels'",
        "Max(x, 0) + slope · Min(x, 0)",
        on("PRelu", rules.slope_of_later_axis),
    ),
    _wrong(
        "resize-form",
        "cubic, antialiased, cropped, corner-aligned and round-up forms come out different",
        "mode nearest with floor, or linear, with half_pixel or asymmetric coordinates",
        on("Resize", rules.unusual_resize),
    ),
    _wrong(
        "clip-inverted",
        "gives the lower limit, not the upper",
        "a lower limit below the upper",
        on("Clip", rules.limits_are_inverted),
    ),
    _wrong(
        "pad-axes",
        "the loader dies of the input that names axes, or the shape is wrong",
        "pads for all axes",
        on("Pad", rules.pads_some_axes),
    ),
    _wrong(
        "norm-without-epsilon",
        "an epsilon that is left to its default is 0 or another one",
        "state epsilon",
        rules.lacks("BatchNormalization InstanceNormalization", "epsilon"),
    ),
    _wrong(
        "batch-norm-computed",
        "the converter dies of scales, biases, means or variances that are no constants",
        "Sub, Mul and Add",
        on("BatchNormalization", rules.batch_norm_of_computed),
    ),
    _wrong(
        "layer-norm-whole",
        "axis 0 normalises nothing, or other rows",
        "Reshape to one row, and normalise its last axis",
        rules.has("LayerNormalization", "axis", lambda axis: axis == 0),
    ),
)
