"""Numbers of MNN's file format: which field of which table means what (alibaba/MNN 3.6.1, `schema/default/*.fbs`).

Only what tells where weights and constants are and how they are stored. Fields of a FlatBuffers schema are only ever
appended, so files of older and newer versions read the same way.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Final


class Net(IntEnum):
    """The root table."""

    LABEL = 0
    EXTRA_INFO = 2
    OPERATORS = 3
    OUTPUT_NAMES = 4
    SOURCE = 6
    TENSOR_NAMES = 7
    SUBGRAPHS = 10
    UUID = 11


EXTRA_INFO_VERSION: Final = 2


class SubGraph(IntEnum):
    """A body of a loop or a branch."""

    NAME = 0
    TENSOR_NAMES = 3
    OPERATORS = 4


class Op(IntEnum):
    """One operator; `PARAMETER` is a union whose kind is a `Kind`."""

    INPUTS = 0
    PARAMETER_KIND = 1
    PARAMETER = 2
    NAME = 3
    OUTPUTS = 4
    TYPE = 5
    EXTERNAL_PATH = 7


class Kind(IntEnum):
    """Kinds of operator parameters that are looked into."""

    BATCH_NORM = 5
    BINARY = 6
    BLOB = 7
    CONVOLUTION_2D = 9
    INNER_PRODUCT = 20
    INPUT = 21
    LSTM = 24
    NORMALIZE = 27
    PRELU = 32
    SCALE = 58
    UNARY = 70
    RNN = 72
    CONVOLUTION_3D = 80
    LAYER_NORM = 88
    GROUP_NORM = 95


class Input(IntEnum):
    """What an Input operator says of itself."""

    DIMENSIONS = 0
    TYPE = 1


class Blob(IntEnum):
    """A constant tensor. `EXTERNAL` is [offset, bytes] in the `.weight` file."""

    DIMENSIONS = 0
    TYPE = 2
    EXTERNAL = 9


BLOB_VECTORS: Final[Mapping[int, int]] = {3: 1, 4: 1, 5: 4, 6: 8, 7: 4}
"""Field of a Blob that can hold its values → bytes per item."""


class Convolution(IntEnum):
    """Convolution2D and Convolution3D up to `BIAS`; `EXTERNAL` is [offset, weights, (scales,) bias, (indices)]."""

    COMMON = 0
    WEIGHT = 1
    BIAS = 2
    QUANTISED = 3
    INT8 = 4
    EXTERNAL = 6


class Common(IntEnum):
    """Geometry of a Convolution2D."""

    KERNEL_X = 2
    KERNEL_Y = 3
    OUTPUTS = 10


class Common3D(IntEnum):
    """Geometry of a Convolution3D."""

    KERNELS = 2
    OUTPUTS = 6


CONVOLUTION_3D_EXTERNAL: Final = 3


class InnerProduct(IntEnum):
    """The old form of a linear layer."""

    OUTPUTS = 0
    WEIGHT = 3
    BIAS = 4
    QUANTISED = 7


class Quantised(IntEnum):
    """How a weight is stored when not as float32 (IDSTQuan)."""

    BUFFER = 0
    SCALES = 1
    ENCODING = 2
    MULTIPLIER = 4
    MINIMUM = 8
    """Integer that the stored minimum of an asymmetric row stands for; 0 means −128."""
    ASYMMETRIC = 9
    """Number of rows when each has a minimum and a scale, 0 when it has a scale alone."""
    WIDE_SHAPE = 11
    SPARSE_ELEMENTS = 12
    SPARSE_INDEX = 13
    HALF_SCALES = 14
    SCALE_TYPE = 15


class Encoding(IntEnum):
    """Values of `Quantised.ENCODING`."""

    CODEBOOK = 1
    SPARSE_CODEBOOK = 2
    HALF = 3
    INT8 = 4


class Int8(IntEnum):
    """Weights of a layer whose activations are quantised as well (QuantizedFloatParam)."""

    WEIGHT = 0
    BIAS = 1
    SCALES = 2


@dataclass(frozen=True, slots=True)
class FloatVectors:
    """Float32 vectors of a parameter table, by role; `external` is the field of [offset, bytes, bytes, …]."""

    fields: Mapping[int, str]
    external: int | None = None


FLOAT_VECTORS: Final[Mapping[int, FloatVectors]] = {
    Kind.BATCH_NORM: FloatVectors({1: "slope", 2: "mean", 3: "variance", 4: "bias", 5: "a", 6: "b"}),
    Kind.NORMALIZE: FloatVectors({3: "scale"}),
    Kind.PRELU: FloatVectors({1: "slope"}),
    Kind.SCALE: FloatVectors({1: "scale", 2: "bias"}, external=3),
    Kind.LAYER_NORM: FloatVectors({2: "gamma", 3: "beta"}, external=5),
    Kind.GROUP_NORM: FloatVectors({2: "gamma", 3: "beta"}, external=6),
}

BLOB_FIELDS: Final[Mapping[int, range]] = {Kind.LSTM: range(3, 8), Kind.RNN: range(4, 14)}
"""Fields that are constant tensors of a recurrent layer."""

DATA_TYPES: Final[Mapping[int, tuple[str, int]]] = {
    1: ("fp32", 4),
    2: ("fp64", 8),
    3: ("int32", 4),
    4: ("uint8", 1),
    5: ("int16", 2),
    6: ("int8", 1),
    9: ("int64", 8),
    10: ("bool", 1),
    14: ("bf16", 2),
    17: ("uint16", 2),
    19: ("fp16", 2),
}
"""Number of a data type → our name, bytes per element."""

SOURCES: Final = ("Caffe", "TensorFlow", "TFLite", "ONNX", "Torch")

FUNCTION_NUMBER: Final = 0
"""Field of a unary or binary operator's parameter that says which function it is."""

_UNARY: Final = (
    "abs neg floor ceil square sqrt rsqrt exp log sin cos tan asin acos atan reciprocal log1p bnll acosh sinh asinh "
    "atanh sign round cosh erf erfc erfinv expm1 sigmoid tanh hardswish gelu gelu_standard silu"
)
_BINARY: Final = (
    "add sub mul div max_temp min_temp pow realdiv minimum maximum greater greater_equal less floordiv "
    "squared_difference equal less_equal floormod ? mod atan2 logical_or not_equal bitwise_and bitwise_or bitwise_xor "
    "logical_xor left_shift right_shift mul_silu"
)
FUNCTIONS: Final[Mapping[int, tuple[str, ...]]] = {
    Kind.UNARY: tuple(_UNARY.split()),
    Kind.BINARY: tuple(_BINARY.split()),
}
"""Names of what a unary or binary operator computes, by number."""

_OPERATOR_RUNS: Final = {
    0: "AbsVal QuantizedAdd ArgMax AsString InstanceNorm BatchToSpaceND Copy BinaryOp Bnll Cast Concat Const "
    "Convolution ConvolutionDepthwise Crop CropAndResize ImageProcess Deconvolution DeconvolutionDepthwise Dequantize "
    "DetectionOutput Dropout Eltwise ELU Unique Exp ExpandDims Fill Flatten Im2Col Gather GatherV2 Im2Seq InnerProduct "
    "Input Interp Log LRN LSTM MatMul MoE NonMaxSuppression NonMaxSuppressionV2 Normalize Pack Padding Permute Pooling "
    "Power PReLU PriorBox Proposal QuantizedAvgPool QuantizedBiasAdd QuantizedConcat QuantizedDepthwiseConv2D "
    "QuantizedLogistic RasterAndInterpolate QuantizedMaxPool Texture RasterDiff QuantizedReshape QuantizedSoftmax "
    "QuantizeMaxMin QuantizeV2 Range Rank ReduceJoin Reduction ReLU ReLU6 RequantizationRange Requantize Reshape "
    "Resize RNN ROIPooling Scale Selu Seq2Out Shape Sigmoid Size Slice SliceTf Softmax SpaceToBatchND SpatialProduct "
    "Col2Im Segment Squeeze StridedSlice CastLike StringSplit StringToNumber TanH TfQuantizedConv2D Threshold Tile "
    "TopKV2 Transpose UnaryOp Unpack Where Moments RNNSequenceGRU BatchMatMul Unsqueeze CosineSimilarity DepthToSpace "
    "SpaceToDepth ReverseSequence Pooling3D Convolution3D MatrixBandPart GatherND DetectionPostProcess UnravelIndex "
    "ScatterNd OneHot BroadcastTo Dilation2D Interp3D",
    128: "Raster ConvertTensor ArgMin LinSpace RandomUniform TensorArray TensorArraySize TensorArrayRead "
    "TensorArrayWrite TensorArrayGather TensorArrayScatter TensorArraySplit TensorArrayConcat LSTMBlockCell Reverse "
    "ROIAlign RandomNormal TensorArrayInsert TensorArrayErase EyeLike CumSum Det CumProd ScatterElements "
    "GatherElements Svd Histogram DynamicQuant Stft",
    256: "Plugin Select ZerosLike Broastcast SetDiff1D ReluGrad Identity PoolGrad SoftmaxGrad Conv2DBackPropFilter "
    "TrainableParam BatchNorm ConvTranspose3D ZeroGrad",
    299: "Attention FmhaV2 Fmhca SeqLen2Spatial SplitGeLU GroupNorm LinearAttention RoPE FusedLinear GatedRMSNorm",
    512: "Extra ConvInt8 Int8ToFloat DepthwiseConvInt8",
    517: "FloatToInt8 EltwiseInt8",
    600: "While If",
    603: "LayerNorm GridSample",
}

OPERATOR_NAMES: Final[Mapping[int, str]] = {
    start + index: name for start, names in _OPERATOR_RUNS.items() for index, name in enumerate(names.split())
}
"""Number of an operator type → MNN's name for it."""
