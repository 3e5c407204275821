"""Work over items divided between processes, and put together so that no item is counted twice or left out."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def share(count: int) -> range:
    """Which of `range(count)` this process takes: every world-th from its rank on; all of them if it is alone.

    Shares are disjoint and cover; with fewer things than processes some are empty.
    """
    from accelerate import PartialState  # slow to import

    state = PartialState()
    return range(state.process_index, count, state.num_processes)


def gather_items(indices: Sequence[int], values: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """What all processes measured of items `range(count)`, in order, on the CPU of every process.

    `indices` are the items this process measured and `values[name]` (len(indices), ...) its measurements; a process
    without items may give no names. A mean of the result adds the same numbers in the same order as one process does,
    whatever their distribution. Raises ValueError, in every process, for an item measured twice or not at all, and for
    names or lengths that do not fit.

    Differs: accelerate's `gather_for_metrics` pads with repeated items and cuts them off again, which relies on its own
    samplers.
    """
    from accelerate.utils import gather_object

    shares = gather_object([(list(indices), {name: value.detach().cpu() for name, value in values.items()})])
    owned = [index for own, _ in shares for index in own]
    if sorted(owned) != list(range(count)):
        missing = sorted(set(range(count)) - set(owned))
        extra = sorted({index for index in owned if owned.count(index) > 1 or not 0 <= index < count})
        raise ValueError(f"each of {count} items must be measured once; missing {missing[:5]}, repeated {extra[:5]}")
    measured = [(own, named) for own, named in shares if own]
    names = sorted({name for _, named in measured for name in named})
    for own, named in measured:
        if sorted(named) != names or any(len(value) != len(own) for value in named.values()):
            shapes = {name: tuple(value.shape) for name, value in named.items()}
            raise ValueError(f"every process must measure {names} of each of its {len(own)} items, one gave {shapes}")
    place = torch.tensor(owned, dtype=torch.long).argsort()
    return {name: torch.cat([named[name] for _, named in measured])[place] for name in names}
