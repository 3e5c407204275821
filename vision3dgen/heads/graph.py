"""Graph convolutions on the edges of meshes, by the name of what runs them."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vision3dgen.ops import GraphConv

Convolution = Literal["csr", "geometric"]


class GeometricGraphConv(nn.Module):
    """`ops.GraphConv`, w0(x) + sum over neighbors of w1(x), with torch-geometric carrying the sums.

    Parameters, values and gradients are the same: weights of one load into the other.
    """

    def __init__(self, input_dim: int, output_dim: int):
        super().__init__()
        from torch_geometric.nn import SimpleConv  # deferred: importing it takes as long as importing torch

        self.w0 = nn.Linear(input_dim, output_dim)
        self.w1 = nn.Linear(input_dim, output_dim)
        self.propagate = SimpleConv(aggr="sum")
        for linear in (self.w0, self.w1):
            nn.init.normal_(linear.weight, std=0.01)
            nn.init.zeros_(linear.bias)

    def forward(self, verts: Float[Tensor, "V C"], edges: Int[Tensor, "E 2"]) -> Float[Tensor, "V O"]:
        """New features (V, output_dim) from features (V, input_dim) and undirected edges (E, 2)."""
        both = torch.cat([edges, edges.flip(1)]).t()  # (2, 2E) from, to
        summed: Tensor = self.propagate(self.w1(verts), both)
        return self.w0(verts) + summed


GRAPH_CONVOLUTIONS: dict[Convolution, type[GraphConv] | type[GeometricGraphConv]] = {
    "csr": GraphConv,
    "geometric": GeometricGraphConv,
}
