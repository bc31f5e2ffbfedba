"""What a `.mnn` file says about a tensor: which operator makes it, and how what it is made of is stored."""

from collections.abc import Collection

from sa3_convert.mnn.contents import ModelStorage, OperatorStorage

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
                waiting += [source for source in operator.inputs if source not in given]
        return min(kinds, key=_bits)

    def _kinds(self, operator: OperatorStorage) -> set[str]:
        kinds = set() if operator.weight is None else {operator.weight.type}
        for source in operator.inputs:
            constant = self._constants.get(source)
            # Whole numbers of a table that is gathered from; int32 and int64 are shapes and indices.
            if constant is not None and (constant.is_float or constant.type in ("int8", "uint8")):
                kinds.add(constant.type)
        return kinds


def _bits(kind: str) -> int:
    return int(kind.lstrip("bfpuint"))
