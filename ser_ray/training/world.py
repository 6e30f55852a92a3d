"""The worker processes of a training, which communicate by `torch.distributed`."""

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class World:
    """This worker's rank, and the number of workers."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> "World":
        """Return the rank and size of the process group, or (0, 1) if there is no group."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def rank_slice(self) -> slice:
        """Slice that selects this worker's share of a sequence: every `size`-th entry."""
        return slice(self.rank, None, self.size)

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum a tensor over all workers, in place, and return it."""
        if self.size > 1:
            dist.all_reduce(values)
        return values
