"""Models that make data: each a family on layers and losses alone, with `loss`, `sample` and often `log_prob`."""

from torch import nn

GENERATORS: dict[str, type[nn.Module]] = {}
