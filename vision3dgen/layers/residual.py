"""Residual blocks that know no task."""

from jaxtyping import Float
from torch import Tensor, nn


class ResidualLinear(nn.Module):
    """Two linear layers on each row, a ReLU before either, beside the identity or a linear shortcut.

    x (*N, inputs) -> (*N, outputs): shortcut(x) + fc_1(relu(fc_0(relu(x)))). It starts as the shortcut plus a constant.
    Names and initialization are those of Occupancy Networks (Mescheder et al. 2019, arXiv:1812.03828).
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        width = min(inputs, outputs)
        self.fc_0 = nn.Linear(inputs, width)
        self.fc_1 = nn.Linear(width, outputs)
        self.shortcut = None if inputs == outputs else nn.Linear(inputs, outputs, bias=False)
        nn.init.zeros_(self.fc_1.weight)

    def forward(self, x: Float[Tensor, "*N C"]) -> Float[Tensor, "*N C2"]:
        aside = x if self.shortcut is None else self.shortcut(x)
        return aside + self.fc_1(self.fc_0(x.relu()).relu())
