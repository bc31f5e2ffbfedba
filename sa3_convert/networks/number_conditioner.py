"""The duration conditioner: a number of seconds to one conditioning token."""

from torch import Tensor, nn

from sa3_convert.checkpoint.layout import NumberConditionerLayout
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
        normalised = (seconds.clamp(self.low, self.high) - self.low) / (self.high - self.low)
        output: Tensor = self.embedder(normalised[:, None]).unsqueeze(1)
        return output
