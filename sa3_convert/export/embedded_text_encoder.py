"""The text encoder from rows of its embedding table: no integers in the graph, three quarters of the weights outside.

For back-ends that get integers wrong, and for clients that keep the table on the host. It computes what the contract's
text encoder does; that one stays what every bundle has.

    input_ids, attention_mask  →  inputs_embeds = table[input_ids]        [1, N, width] float32
                                  attention_bias = 0 for a token, −10⁴ for padding        [1, N] float32
"""

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from sa3_convert.components import Component, Contract, Port, contract
from sa3_convert.export.onnx import onnx_from_module
from sa3_convert.networks.build import build_network
from sa3_convert.networks.layers import MASKED
from sa3_convert.networks.text_encoder import TextEncoder

if TYPE_CHECKING:
    from sa3_convert.checkpoint.reader import Checkpoint


class _Embedded(nn.Module):
    def __init__(self, encoder: TextEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, inputs_embeds: Tensor, attention_bias: Tensor) -> Tensor:
        return self.encoder.encode(inputs_embeds, 1 - attention_bias * (1 / MASKED))


def export_embedded_text_encoder(checkpoint: "Checkpoint", path: Path) -> None:
    """Export the text encoder without its table to `path` (and `<path>.data`).

    Raises:
        UsageError: the checkpoint has no text encoder.
        CheckpointError: its weights are missing, damaged, or do not fit its configuration.
        ConversionError: the export failed or failed its checks; nothing is left under the final name.

    """
    (output,) = contract(Component.TEXT_ENCODER, checkpoint.layout).outputs
    _, tokens, width = output.shape
    ports = Contract(
        (Port("inputs_embeds", "float32", (1, tokens, width)), Port("attention_bias", "float32", (1, tokens))),
        (output,),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    state = checkpoint.state(Component.TEXT_ENCODER, scratch=path.parent)
    encoder = build_network(Component.TEXT_ENCODER, checkpoint.layout, state)
    assert isinstance(encoder, TextEncoder)
    onnx_from_module(_Embedded(encoder).eval(), ports, path)
