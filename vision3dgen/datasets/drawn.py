"""Items that draw something, such as a view, points or a caption, each from a stream of its own."""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch


class DrawnItems(torch.utils.data.Dataset[dict[str, Any]], ABC):
    """A dataset whose item draws from (seed, epoch, index): neither order nor workers nor ranks change it."""

    seed: int
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        """Draw otherwise than in the epochs before; the same again for the same epoch."""
        self.epoch = epoch

    @abstractmethod
    def __len__(self) -> int:
        """How many items there are."""

    @abstractmethod
    def _item(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """Item `index`, from 0 on, with what it draws from `rng`."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        """An item by its number, negative from the end."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} items")
        index %= len(self)
        return self._item(index, np.random.default_rng([self.seed, self.epoch, index]))
