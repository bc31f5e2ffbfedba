"""LoRA adapters merged into a checkpoint's weights, one tensor at a time, in float32, as the reference applies them.

A weight W is seen as [fan_out, fan_in], a convolution's input channels times its kernel. With s = alpha / rank ·
strength the step is V = W + s·B·A, or W + s·U·M·Vᵀ with the first singular vectors of the unadapted weight. Types with
magnitudes then divide each row by its norm and multiply it by its magnitude, and likewise, after that, each column.
Strength 0 leaves the weight alone. Several adapters follow one another in the order in which they are given.
Sources of the arithmetic: the published reference implementation; for `use_rslora`, s = alpha / √rank · strength, PEFT.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from sa3_convert.arrays import Floats
from sa3_convert.checkpoint.lora_file import LoraFile, LoraRequest, bind, read_lora
from sa3_convert.checkpoint.tensor_file import TensorFile
from sa3_convert.errors import LoraError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

_NORM_EPS: Final = 1e-12


@dataclass(frozen=True, slots=True)
class Lora:
    """An adapter that fits a checkpoint, and how strongly it is applied."""

    file: LoraFile
    strength: float
    layers: Mapping[str, str]
    """Layer in the adapter by name of the checkpoint's tensor."""

    def changes(self, name: str) -> bool:
        """Tell whether it changes a tensor of the checkpoint."""
        return self.strength != 0 and name in self.layers

    def applied(self, name: str, weight: "Tensor", unadapted: "Tensor") -> "Tensor":
        """Return the weight after the adapters before this one with this one in it; all float32, of one shape."""
        kind, layer = self.file.type, self.layers[name]
        factors = self.file.tensors.tensors({stored: factor for factor, stored in self.file.layers[layer].items()})
        result = weight.flatten(1) + self.file.scale(layer, self.strength) * self._step(factors, unadapted)
        for dim, magnitude in ((1, kind.rows), (0, kind.columns)):
            if magnitude is not None:
                norm = result.norm(dim=dim, keepdim=True) + _NORM_EPS
                result = result / norm * factors[magnitude].flatten().unsqueeze(dim)
        return result.view(weight.shape)

    def _step(self, factors: "Mapping[str, Tensor]", unadapted: "Tensor") -> "Tensor":
        """Return the low-rank step [fan_out, fan_in]."""
        if not self.file.type.bases_of_weight:
            return factors["lora_B"] @ factors["lora_A"]
        if "U" in factors:
            left, right = factors["U"], factors["V"]
        else:
            import torch

            bases = singular_bases(unadapted.flatten(1).numpy(), self.file.rank)
            left, right = map(torch.from_numpy, bases)
        return left @ factors["M_xs"] @ right.T


def singular_bases(weight: Floats, rank: int) -> tuple[Floats, Floats]:
    """Return the first left and right singular vectors of a weight, [fan_out, rank] and [fan_in, rank].

    Each left vector's largest value is positive; otherwise their signs would be the linear algebra library's choice.
    Computed in float64 and rounded: where singular values lie close together, a decomposition in float32 turns its
    vectors by more than float32's rounding, and in another way on every machine.
    """
    left, _, right = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    left, right = left[:, :rank], right[:rank].T
    signs = np.sign(np.take_along_axis(left, np.abs(left).argmax(axis=0)[np.newaxis], axis=0))
    return (left * signs).astype(np.float32), (right * signs).astype(np.float32)


def open_loras(requests: Sequence[LoraRequest], weights: TensorFile, checkpoint: str) -> tuple[Lora, ...]:
    """Open adapters, in the order in which they are applied, and hold them to a checkpoint's `model.safetensors`."""
    loras: list[Lora] = []
    for request in requests:
        file = read_lora(request.path)
        twin = next((lora.file.path for lora in loras if lora.file.sha256 == file.sha256), None)
        if twin is not None:
            again = f"again as {request.path}" if twin != request.path else "twice"
            raise UsageError(f"--lora {twin} is given {again}. Give it once, with the strength that you want.")
        shapes = {name: entry.shape for name, entry in weights.entries.items()}
        loras.append(Lora(file, request.strength, bind(file, shapes, checkpoint)))
    return tuple(loras)


def merged(name: str, weight: "Tensor", loras: Sequence[Lora]) -> "Tensor":
    """Return `weight` after those adapters that change it."""
    import torch

    result = weight
    for lora in loras:
        if lora.changes(name):
            result = lora.applied(name, result, weight)
    if not torch.isfinite(result).all():
        raise LoraError(f"{name} is not finite after {', '.join(str(lora.file.path) for lora in loras)}.")
    return result
