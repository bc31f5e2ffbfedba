"""Does a file hold what the recipe asked for? Decided by what is stored, never by the flags that were given.

Every layer with a weight is a convolution in a `.mnn` (a linear becomes a 1×1 convolution). Each is held to the bits,
symmetry and block that the recipe gives its name; all that is not quantised, constants included, to the recipe's float
type. Biases and norms stay float32 in every MNN file and are not judged. The summary of what was found goes into the
manifest by `ModelStorage.summary()`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from sa3_convert.errors import ConversionError
from sa3_convert.mnn.file.contents import ConstantStorage, ModelStorage, OperatorStorage
from sa3_convert.mnn.file.weights import WeightStorage
from sa3_convert.mnn.layer_rules import check_rules, layer_name
from sa3_convert.recipe import ComponentRecipe, WeightScheme

TableType = Literal["fp32", "fp16", "bf16", "int8", "int4"]

_SHOWN: Final = 10
_LAYERS: Final = frozenset(
    {"Convolution", "ConvolutionDepthwise", "Deconvolution", "DeconvolutionDepthwise", "InnerProduct", "Convolution3D"}
)
_PRODUCTS: Final = frozenset({"MatMul", "BatchMatMul"})
_LOOKUPS: Final = frozenset({"Gather", "GatherV2"})
_VIEWS: Final = frozenset(
    {"Cast", "ConvertTensor", "Copy", "ExpandDims", "Flatten", "Identity", "Permute", "Reshape", "Squeeze",
     "Transpose", "Unsqueeze"}
)  # fmt: skip
_UNPACKING_STEPS: Final = 5
_STRUCTURE_BYTES: Final = 1 << 16
_STRUCTURE_BYTES_PER_OPERATOR: Final = 1 << 10
"""Names and geometry of an operator take about 130 bytes."""


@dataclass(frozen=True, slots=True)
class TokenTable:
    """An embedding: a constant whose rows are looked up by an input."""

    name: str
    type: TableType
    shape: tuple[int, ...]
    """As stored: of int4, half the columns."""
    bytes: int


@dataclass(frozen=True, slots=True)
class AuditSummary:
    """What was found in a file that passed."""

    layers: int
    quantised: int
    kept_float: tuple[str, ...]
    """Layers that the recipe's rules keep in floating point."""
    tables: tuple[TokenTable, ...]


def audit(storage: ModelStorage, recipe: ComponentRecipe) -> AuditSummary:
    """Raise if something is stored in another way than the recipe asks; every such layer or constant is named."""
    flow = _Flow(storage)
    scheme = recipe.weights
    layers = [(layer_name(operator.name), weight) for operator, weight in storage.weighted()]
    hidden = list(_hidden_weight_faults(storage, flow, recipe))
    if scheme is not None:
        if not layers and not hidden:
            raise ConversionError(
                f"{storage.path.name} has no layers with weights, but the recipe quantises weights. "
                "Leave `weights` out of this component's recipe."
            )
        if layers:
            check_rules(scheme, [name for name, _ in layers])
    tables = list(flow.token_tables())
    faults = [
        *_layer_faults(layers, recipe),
        *hidden,
        *_table_faults(tables, recipe),
        *_constant_faults(storage, recipe, {table.name for table in tables}),
        *_unknown_faults(storage),
    ]
    if faults:
        shown = faults[:_SHOWN] + ([f"and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else [])
        raise ConversionError(
            f"{storage.path.name} does not hold what the recipe asks for:\n"
            + "\n".join(f"  {fault}" for fault in shown)
            + "\nThe file was not kept. Change the recipe, or report this with the graph."
        )
    return AuditSummary(
        layers=len(layers),
        quantised=sum(weight.is_quantised for _, weight in layers),
        kept_float=tuple(name for name, weight in layers if scheme is not None and not weight.is_quantised),
        tables=tuple(tables),
    )


def token_tables(storage: ModelStorage) -> Iterator[TokenTable]:
    """Yield the tables whose rows a model looks up by its inputs."""
    return _Flow(storage).token_tables()


def _layer_faults(layers: list[tuple[str, WeightStorage]], recipe: ComponentRecipe) -> Iterator[str]:
    for name, weight in layers:
        bits, block = (None, None) if recipe.weights is None else recipe.weights.for_layer(name)
        wanted = recipe.floats if bits is None else f"int{bits}"
        if weight.activations_too:
            yield f"layer {name}: calculates with integers, which no recipe asks for"
        elif weight.type != wanted:
            yield f"layer {name}: {weight.type} instead of {wanted}"
        elif bits is not None and recipe.weights is not None:
            yield from _scheme_faults(name, weight, recipe.weights, block)


def _scheme_faults(name: str, weight: WeightStorage, scheme: WeightScheme, block: int | None) -> Iterator[str]:
    if weight.symmetric != scheme.symmetric:
        stored, wanted = ("symmetric", "asymmetric") if weight.symmetric else ("asymmetric", "symmetric")
        yield f"layer {name}: {stored} instead of {wanted}"
    if weight.scale_type != scheme.scales:
        yield f"layer {name}: {weight.scale_type} scales instead of {scheme.scales}"
    outputs, inputs = weight.shape[:2]
    stored_block = weight.block_size or inputs
    if weight.rows < outputs:
        yield f"layer {name}: {weight.rows} scales for {outputs} output channels"
    elif block is None and weight.block_size is not None:
        yield f"layer {name}: blocks of {weight.block_size} instead of one scale per channel"
    elif block is not None and stored_block != min(block, inputs):
        stored = f"blocks of {stored_block}" if weight.block_size else f"one scale per channel ({inputs} inputs)"
        yield f"layer {name}: {stored} instead of blocks of {block}"


def _hidden_weight_faults(storage: ModelStorage, flow: "_Flow", recipe: ComponentRecipe) -> Iterator[str]:
    """Yield layers without weights of their own, and products with a constant that the converter left alone.

    Kernels that a caller gives, as those of adapters, are no weights of the model.
    """
    for operator in storage.operators:
        name = layer_name(operator.name)
        bits = None if recipe.weights is None else recipe.weights.for_layer(name)[0]
        if operator.type in _LAYERS and operator.weight is None:
            if len(operator.inputs) < 2:
                yield f"layer {name}: holds no weights"
            elif bits is not None and not flow.is_given(operator, 1):
                yield f"layer {name}: its weight {operator.inputs[1]} is computed when it runs, not stored as int{bits}"
        elif operator.type in _PRODUCTS and bits is not None:
            for constant in filter(None, (flow.constant(operator, index) for index in (0, 1))):
                if constant.is_float and len(constant.shape) >= 2:
                    yield (
                        f"layer {name}: its weight {constant.name} {list(constant.shape)} stayed {constant.type} "
                        f"instead of int{bits}; MNN quantises 2-D weights that at most four products share"
                    )


def _table_faults(tables: list[TokenTable], recipe: ComponentRecipe) -> Iterator[str]:
    wanted = recipe.floats if recipe.embedding == "float" else recipe.embedding
    for table in tables:
        if table.type != wanted:
            yield f"embedding {table.name} {list(table.shape)}: {table.type} instead of {wanted}"
    if not tables and recipe.embedding != "float":
        yield f"no embedding was found, but the recipe stores it as {wanted}"


def _constant_faults(storage: ModelStorage, recipe: ComponentRecipe, tables: set[str]) -> Iterator[str]:
    for constant in storage.constants:
        if constant.name in tables:
            continue
        if constant.values is None and constant.elements:
            yield f"constant {constant.name} {list(constant.shape)}: has no values"
        elif constant.is_float and constant.values is not None and constant.type != recipe.floats:
            yield f"constant {constant.name} {list(constant.shape)}: {constant.type} instead of {recipe.floats}"


def _unknown_faults(storage: ModelStorage) -> Iterator[str]:
    """Yield a fault when much of the file is nothing that is known: weights in a form that is not read."""
    if storage.overhead_bytes > _STRUCTURE_BYTES + _STRUCTURE_BYTES_PER_OPERATOR * len(storage.operators):
        yield f"{storage.overhead_bytes:,} bytes of the file are neither weights nor constants as they are known here"


class _Flow:
    """Who computes and who uses which tensor."""

    def __init__(self, storage: ModelStorage) -> None:
        self._storage = storage
        self._constants = {(constant.graph, constant.name): constant for constant in storage.constants}
        self._makers = {
            (operator.graph, output): operator for operator in storage.operators for output in operator.outputs
        }
        self._users: dict[tuple[str, str], list[OperatorStorage]] = {}
        for operator in storage.operators:
            for name in operator.inputs:
                self._users.setdefault((operator.graph, name), []).append(operator)

    def constant(self, operator: OperatorStorage, index: int) -> ConstantStorage | None:
        """Return the constant that an operator's input is, if only views stand in between."""
        if index >= len(operator.inputs):
            return None
        name = operator.inputs[index]
        seen: set[str] = set()
        while name not in seen:
            seen.add(name)
            found = self._constants.get((operator.graph, name))
            maker = self._makers.get((operator.graph, name))
            if found is not None or maker is None or maker.type not in _VIEWS or not maker.inputs:
                return found
            name = maker.inputs[0]
        return None

    def is_given(self, operator: OperatorStorage, index: int) -> bool:
        """Whether an operator's input follows from the model's inputs, with no constants but numbers and shapes."""
        waiting, seen = [operator.inputs[index]], set[str]()
        while waiting:
            name = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            constant, maker = self._constants.get((operator.graph, name)), self._makers.get((operator.graph, name))
            if constant is not None:
                is_shape = constant.type in ("int32", "int64") and len(constant.shape) == 1
                if constant.elements > 1 and not is_shape:
                    return False
            elif maker is None or maker.weight is not None or maker.parameters:
                return False
            else:
                waiting += maker.inputs
        return True

    def token_tables(self) -> Iterator[TokenTable]:
        """Yield two-dimensional constants with rows of more than one number that are looked up by no constant."""
        found: dict[str, TokenTable] = {}
        for operator in self._storage.operators:
            if operator.type not in _LOOKUPS:
                continue
            table, ids = self.constant(operator, 0), self.constant(operator, 1)
            if table is None or ids is not None or len(table.shape) != 2 or table.shape[1] < 2:
                continue
            kind = self._table_type(table, operator)
            if kind is not None:
                found.setdefault(table.name, TokenTable(table.name, kind, table.shape, table.bytes))
        yield from found.values()

    def _table_type(self, table: ConstantStorage, lookup: OperatorStorage) -> TableType | None:
        types: Mapping[str, TableType] = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16"}
        if table.type in ("int8", "uint8"):
            return "int4" if self._is_unpacked(lookup) else "int8"
        return types.get(table.type)

    def _is_unpacked(self, lookup: OperatorStorage) -> bool:
        """Whether what is looked up is taken apart: a floor follows soon, which whole numbers have no use for."""
        layer = [lookup]
        for _ in range(_UNPACKING_STEPS):
            outputs = [(operator.graph, output) for operator in layer for output in operator.outputs]
            layer = list({id(user): user for output in outputs for user in self._users.get(output, ())}.values())
            if any(user.function == "floor" for user in layer):
                return True
        return False
