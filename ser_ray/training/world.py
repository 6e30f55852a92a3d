"""The workers of a training, as `torch.distributed` knows them."""

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class World:
    """This worker among the workers of a training."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> "World":
        """The initialised process group's, or one worker alone."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def rank_slice(self) -> slice:
        """This worker's share of a list that all have: every size-th entry."""
        return slice(self.rank, None, self.size)

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum a tensor over all workers, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values
