"""Networks made ready to generate: fused attention, products of halves, and what stays the same computed once."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sa3_convert.networks.autoencoder import fuse_weight_norms
from sa3_convert.networks.dit import CONDITIONED
from sa3_convert.networks.layers import attend


def accelerate(network: nn.Module, *, half: bool) -> None:
    """Fuse attention and weight norms of a built network in place; with `half` its products store and compute halves.

    All between products stays float32 (Fourier features, rotary positions, norms, what blocks add up), and fused
    attention sums its softmax in float32 whatever it is given, so this is what `passes.half` makes of an ONNX.
    """
    fuse_weight_norms(network)
    for module in network.modules():
        if hasattr(module, "attend"):
            setattr(module, "attend", _attend_in_half if half else _attend)  # noqa: B010 (mypy takes it for a module)
        if half and isinstance(module, (nn.Linear, nn.Conv1d, nn.Embedding)):
            product: nn.Module = module.half()
            product.forward = _in_half(module.forward)


def _in_half(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Any]:
    def halved(x: Tensor) -> Tensor:
        return forward(x.half() if x.is_floating_point() else x).float()

    return halved


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, *, cap: float | None = None) -> Tensor:
    """Do what `layers.attend` does, fused where logits are not capped."""
    if cap is not None:
        return attend(q, k, v, bias, cap=cap)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)


def _attend_in_half(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, *, cap: float | None = None) -> Tensor:
    if cap is None:
        mask = None if bias is None else bias.half()
        return _attend(q.half(), k.half(), v.half(), mask).float()
    logits = torch.tanh((q.half() @ k.half().transpose(-1, -2)).float() / cap) * cap
    weights = torch.softmax(logits if bias is None else logits + bias, dim=-1)
    return (weights.half() @ v.half()).float()


class Remembered:
    """What follows from the conditioning alone, under several conditions: recorded in one run, and used in others.

    A condition's tensors stay in their places when it is recorded anew, so that a CUDA graph that reads them stays
    right.
    """

    def __init__(self, network: nn.Module) -> None:
        self._kept: dict[nn.Module, Tensor] | None = None
        self._records = False
        for name, module in network.named_modules():
            if name.rpartition(".")[2] in CONDITIONED:
                module.forward = self._remembering(module, module.forward)

    def under(self, kept: dict[nn.Module, Tensor], *, record: bool) -> None:
        """Use what is kept of a condition from now on, or record it."""
        self._kept, self._records = kept, record

    def _remembering(self, module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Any]:
        def remembered(x: Tensor) -> Tensor:
            assert self._kept is not None
            if self._records:
                made = forward(x)
                if module in self._kept:
                    self._kept[module].copy_(made)
                else:
                    self._kept[module] = made
            return self._kept[module]

        return remembered
