"""The duration conditioner: a number of seconds to one conditioning token."""

from torch import Tensor, nn

from sa3_convert.checkpoint.dimensions import NumberConditionerLayout
from sa3_convert.networks.layers import ExpoFourierFeatures


class _Embedder(nn.Module):
    def __init__(self, layout: NumberConditionerLayout) -> None:
        super().__init__()
        self.embedding = nn.Sequential(
            ExpoFourierFeatures(layout.features), nn.Linear(layout.features, layout.output_dim)
        )

    def forward(self, normalised: Tensor) -> Tensor:
        output: Tensor = self.embedding(normalised)
        return output


class NumberConditioner(nn.Module):
    """Clamp to the range, bring to 0 … 1, Fourier features, one linear."""

    def __init__(self, layout: NumberConditionerLayout) -> None:
        super().__init__()
        self.low, self.high = layout.min_value, layout.max_value
        self.embedder = _Embedder(layout)

    def forward(self, seconds: Tensor) -> Tensor:
        """Return the embedding [B, 1, output_dim] float32 of `seconds` [B] float32."""
        offset = seconds.clamp(self.low, self.high) - self.low
        # Converters turn a division by a constant into a product with its reciprocal. That rounds differently, and the
        # features magnify the last bit to 4·10⁻³ rad. This divisor is the same number, but no constant.
        span = offset.clamp(min=self.high - self.low)
        output: Tensor = self.embedder((offset / span)[:, None]).unsqueeze(1)
        return output
