"""Normalizations torch does not have."""

from jaxtyping import Float
from torch import Tensor, nn


class ConditionalBatchNorm1d(nn.Module):
    """Batch normalization over points whose scale and shift are linear functions of a code.

    x (B, C, N), code (B, K, 1) -> (B, C, N): gamma(code) * batchnorm(x) + beta(code). gamma starts at 1, beta at 0.
    Source: de Vries et al. 2017; parameter names and initialization of Occupancy Networks (Mescheder et al. 2019).
    """

    def __init__(self, code_channels: int, channels: int):
        super().__init__()
        self.conv_gamma = nn.Conv1d(code_channels, channels, 1)
        self.conv_beta = nn.Conv1d(code_channels, channels, 1)
        self.bn = nn.BatchNorm1d(channels, affine=False)
        for layer, start in ((self.conv_gamma, 1.0), (self.conv_beta, 0.0)):
            nn.init.zeros_(layer.weight)
            assert layer.bias is not None
            nn.init.constant_(layer.bias, start)

    def forward(self, x: Float[Tensor, "B C N"], code: Float[Tensor, "B K 1"]) -> Float[Tensor, "B C N"]:
        return self.conv_gamma(code) * self.bn(x) + self.conv_beta(code)
