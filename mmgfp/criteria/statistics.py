"""Sums over iterations of what a criterion sees of each unit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmgfp.criteria.base import Reduce
from mmgfp.utils.errors import ConfigError

#: Names of the parts of the statistics, in the order in which they lie in memory.
PARTS = ('importance', 'seen', 'nonfinite')


@dataclass(frozen=True)
class Sums:
    """Statistics of all processes together.

    Attributes:
        values: Sum of each unit, (U,); NaN where its group was never seen.
        nonfinite: Iterations that do not count, as a value was not finite.
        nonfinite_in_row: How many of them were the last ones; the mean of the
            processes, rounded up.
    """

    values: np.ndarray
    nonfinite: int
    nonfinite_in_row: int


class UnitStatistics:
    """Adds up a value of each unit, iteration by iteration, on the model's device.

    Nothing is read back from a device before a decision asks for it.

    Args:
        group_of: Group of each unit, (U,).
        device: Where the values are.
    """

    def __init__(
        self, group_of: np.ndarray, device: torch.device | str = 'cpu'
    ) -> None:
        self.group_of = group_of
        self.device = torch.device(device)
        self._group = torch.from_numpy(group_of).to(device)
        # One flat tensor, so that processes exchange it at once: sums by unit, (U,);
        # iterations with a value by group, (G,); iterations that do not count, in all
        # and in a row.
        self._sizes = (len(group_of), int(group_of.max(initial=-1)) + 1, 2)
        self._flat = torch.zeros(sum(self._sizes), dtype=torch.float64, device=device)

    def add(self, values: Tensor, unseen: np.ndarray | None = None) -> None:
        """Add the values of one iteration.

        An iteration in which any of them is not finite does not count, and is counted
        as such. A group all of whose values are zero was not seen: losses touch what
        they have no use for with a product by zero, and a branch scaled by zero gets no
        gradient yet.

        Args:
            values: A value for each unit, not negative, (U,).
            unseen: Groups of which this iteration shows only a part.
        """
        if unseen is not None and len(unseen):
            is_seen = torch.from_numpy(~np.isin(self.group_of, unseen))
            values = values.where(is_seen.to(values.device), 0)
        bad = ~values.isfinite().all()
        nonzero = values.new_zeros(self._sizes[1])  # (G,)
        nonzero.index_add_(0, self._group, (values > 0).double())
        fresh = torch.cat([values, (nonzero > 0).double()])
        self._flat[:-2] += fresh.where(~bad, 0)
        self._flat[-2] += bad
        self._flat[-1] = (self._flat[-1] + 1) * bad

    @property
    def importance(self) -> np.ndarray:
        """Sums of this process by unit, (U,); a view if on a CPU."""
        return self._flat[: self._sizes[0]].cpu().numpy()

    @property
    def seen(self) -> np.ndarray:
        """Iterations of this process in which each group had values, (G,), likewise."""
        return self._flat[self._sizes[0] : -2].cpu().numpy()

    def collect(self, reduce: Reduce | None = None) -> tuple[Sums, int]:
        """Return the sums of all processes since `reset`, and how many they are.

        Args:
            reduce: Sums over processes.
        """
        flat = self._flat.clone()
        processes = 1 if reduce is None else reduce(flat)
        sums, seen, nonfinite = flat.cpu().split(self._sizes)
        values = sums.numpy().copy()
        values[(seen.numpy() == 0)[self.group_of]] = np.nan
        total, in_row = map(int, nonfinite)
        return Sums(values, total, -(-in_row // processes)), processes

    def reset(self) -> None:
        """Start anew, as after a decision; what did not count is still counted."""
        self._flat[:-2] = 0

    def gather(self, reduce: Reduce | None, keep: bool) -> None:
        """Let one process have what all have added up, before it is saved.

        Args:
            reduce: Sums over processes; None where there is only one.
            keep: Whether this process is the one.
        """
        if reduce is not None:
            reduce(self._flat)
            if not keep:
                self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._flat.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the sums by name, on the CPU."""
        return dict(
            zip(PARTS, self._flat.cpu().clone().split(self._sizes), strict=True)
        )

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ConfigError: If the state is of other units.
        """
        saved = [state.get(name, 0.0) for name in PARTS]
        parts = [torch.as_tensor(part, device=self.device) for part in saved]
        shapes = [tuple(part.shape) for part in parts]
        if shapes != [(size,) for size in self._sizes]:
            raise ConfigError(
                'checkpoint',
                f'statistics of {len(self.group_of)} units',
                f'tensors of shapes {shapes}',
                'resume with the configuration that the run was started with',
            )
        self._flat.copy_(torch.cat([part.to(self._flat) for part in parts]))
