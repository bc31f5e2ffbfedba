"""Networks that take adapters as inputs: a low-rank branch and factors beside every linear and 1×1 convolution.

    y = (1 + σ) ⊙ W·((1 + ρ) ⊙ x) + B·(A·x) + bias

With zeros for all four it is the network itself. Parameters keep their names, so the weights are the checkpoint's.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sa3_convert.checkpoint.dimensions import CheckpointLayout
from sa3_convert.components import Component, Slot, slots
from sa3_convert.networks.conditioners import NumberConditioner
from sa3_convert.networks.dit import Dit, Padding


class _Given:
    """What a network runs with: the two inputs, of which each layer cuts its own part."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.inputs: tuple[Tensor, ...] = ()

    def of(self, slot: Slot, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return ρ [in], Aᵀ [in, rank], σ [out] and Bᵀ [rank, out]."""
        inner, outer = self.inputs
        first, second = slot.inner * (self.rank + 1), slot.outer * (self.rank + 1)
        rho, a = first + slot.fan_in, first + slot.fan_in * (self.rank + 1)
        sigma, b = second + slot.fan_out, second + slot.fan_out * (self.rank + 1)
        parts = inner[first:rho], inner[rho:a], outer[second:sigma], outer[sigma:b]
        r, a_t, s, b_t = (part.to(like.dtype) for part in parts)
        return r, a_t.view(slot.fan_in, self.rank), s, b_t.view(self.rank, slot.fan_out)


class _SlottedLinear(nn.Linear):
    def __init__(self, plain: nn.Linear, slot: Slot, given: _Given) -> None:
        super().__init__(slot.fan_in, slot.fan_out, bias=plain.bias is not None)
        self._slot, self._given = slot, given

    def forward(self, x: Tensor) -> Tensor:
        rho, a, sigma, b = self._given.of(self._slot, x)
        y, low = F.linear(x * (1 + rho), self.weight) * (1 + sigma), x @ a
        if self.bias is not None:
            # The bias is one more row of B: a pass over [B, N, rank], where its own sum would be one over [B, N, out].
            low, b = F.pad(low, (0, 1), value=1.0), torch.cat((b, self.bias[None]))
        return y + low @ b


class _SlottedConv(nn.Conv1d):
    """Of kernel 1 and without a bias, on [B, channels, N]."""

    def __init__(self, slot: Slot, given: _Given) -> None:
        super().__init__(slot.fan_in, slot.fan_out, 1, bias=False)
        self._slot, self._given = slot, given

    def forward(self, x: Tensor) -> Tensor:
        rho, a, sigma, b = self._given.of(self._slot, x)
        y = F.conv1d(x * (1 + rho)[:, None], self.weight) * (1 + sigma)[:, None]
        return y + ((x.transpose(1, 2) @ a) @ b).transpose(1, 2)


def _with_slots(network: nn.Module, table: Sequence[Slot], rank: int) -> _Given:
    """Give every layer of the table its slot, in place; return what they take the inputs from."""
    given = _Given(rank)
    for slot in table:
        parent, _, name = slot.layer.rpartition(".")
        plain = network.get_submodule(slot.layer)
        slotted = _SlottedLinear(plain, slot, given) if isinstance(plain, nn.Linear) else _SlottedConv(slot, given)
        setattr(network.get_submodule(parent), name, slotted)
    return given


class SlottedDit(Dit):
    """The diffusion transformer with slots."""

    def __init__(self, layout: CheckpointLayout, rank: int, padding: Padding = "key_mask") -> None:
        assert layout.dit is not None
        super().__init__(layout.dit, padding)
        self._given = _with_slots(self, slots(Component.DIT, layout), rank)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        t: Tensor,
        cross_attn_cond: Tensor,
        global_embed: Tensor,
        local_add_cond: Tensor,
        padding_mask: Tensor,
        adapter_inner: Tensor,
        adapter_outer: Tensor,
    ) -> Tensor:
        """Return the velocity; see `Dit.forward`, and `components.SLOT_INPUTS` for the last two."""
        self._given.inputs = adapter_inner, adapter_outer
        return super().forward(x, t, cross_attn_cond, global_embed, local_add_cond, padding_mask)


class SlottedNumberConditioner(NumberConditioner):
    """The number conditioner with a slot."""

    def __init__(self, layout: CheckpointLayout, rank: int) -> None:
        assert layout.number_conditioner is not None
        super().__init__(layout.number_conditioner)
        self._given = _with_slots(self, slots(Component.NUMBER_CONDITIONER, layout), rank)

    def forward(  # type: ignore[override]
        self, seconds: Tensor, adapter_inner: Tensor, adapter_outer: Tensor
    ) -> Tensor:
        """Return the embedding; see `NumberConditioner.forward`."""
        self._given.inputs = adapter_inner, adapter_outer
        return super().forward(seconds)
