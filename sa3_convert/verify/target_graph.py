"""What a `.mnn` file says about a tensor: which operator makes it, and how what it is made of is stored."""

from collections.abc import Collection

from sa3_convert.mnn.contents import ModelStorage, OperatorStorage

_TABLE_TYPES = ("int8", "uint8")
_NAMES_ARE_NOT_VALUES = frozenset({"Const", "Input"})


class TargetGraph:
    """Operators of a file by the tensors that they make."""

    def __init__(self, storage: ModelStorage) -> None:
        main = [operator for operator in storage.operators if not operator.graph]
        self._producer = {
            name: operator
            for operator in main
            if operator.type not in _NAMES_ARE_NOT_VALUES
            for name in operator.outputs
        }
        self._constants = {c.name: c for c in storage.constants if not c.graph}
        self._half = "fp16" in storage.totals()

    @property
    def tensors(self) -> Collection[str]:
        """Names of all tensors that operators make."""
        return self._producer.keys()

    def operator(self, name: str) -> str:
        """Return MNN's name for the operator behind a tensor; layout conversions in between are skipped."""
        operator = self._producer[name]
        while operator.type in ("Reshape", "ConvertTensor") and operator.inputs:
            before = self._producer.get(operator.inputs[0])
            if before is None or (before.weight is None and before.type not in ("Reshape", "ConvertTensor")):
                break
            operator = before
        return operator.type if operator.function is None else f"{operator.type} {operator.function}"

    def stored(self, name: str, given: Collection[str]) -> str:
        """Return the coarsest type of the weights and constants between a tensor and the tensors in `given`."""
        kinds = {"fp32"}
        unpacked = False
        seen: set[str] = set()
        waiting = [name]
        while waiting:
            tensor = waiting.pop()
            if tensor in seen:
                continue
            seen.add(tensor)
            operator = self._producer.get(tensor)
            if operator is not None:
                kinds |= self._kinds(operator)
                # Two numbers to a byte are taken apart with a floor, for which whole bytes have no use.
                unpacked |= operator.function == "floor"
                waiting += [source for source in operator.inputs if source not in given]
        coarsest = min(kinds, key=_bits)
        return "int4" if unpacked and coarsest in _TABLE_TYPES else coarsest

    def _kinds(self, operator: OperatorStorage) -> set[str]:
        kinds = set() if operator.weight is None else {operator.weight.type}
        # Among half floats, a norm's gain is rounded to half as well, although MNN stores it as float32.
        if self._half and operator.parameters:
            kinds.add("fp16")
        for source in operator.inputs:
            constant = self._constants.get(source)
            # Whole numbers of a table that is gathered from; int32 and int64 are shapes and indices.
            if constant is not None and (constant.is_float or constant.type in _TABLE_TYPES):
                kinds.add(constant.type)
        return kinds


def _bits(kind: str) -> int:
    return int(kind.lstrip("bfpuint"))
