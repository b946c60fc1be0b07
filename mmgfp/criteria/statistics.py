"""Fisher information of units between two decisions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmgfp.criteria.fisher import unit_gradients
from mmgfp.utils.errors import ConfigError

#: Sums a flat tensor over all processes, in place, and says how many there are.
Reduce = Callable[[Tensor], int]


@dataclass(frozen=True)
class Importance:
    """What a decision is based on, of all processes together.

    Attributes:
        values: Accumulated Fisher information by unit, (U,); NaN where no gradient
            was seen.
        dropped: Iterations that were dropped, as their gradients were not finite.
        dropped_in_row: How many of them were the last ones; of several processes,
            the mean, rounded up.
    """

    values: np.ndarray
    dropped: int
    dropped_in_row: int


class UnitStatistics:
    """Adds up the importance of units, iteration by iteration, where gradients are.

    Nothing is read back from a device before a decision asks for it.

    Args:
        units: The unit of each input channel by layer, (C,), -1 for none.
        group_of: Group of each unit, (U,).
        device: Where gradients are.
    """

    def __init__(
        self,
        units: Mapping[str, Tensor],
        group_of: np.ndarray,
        device: torch.device | str = 'cpu',
    ) -> None:
        self._group_of = group_of
        self._group = torch.from_numpy(group_of).to(device)
        # One flat tensor, so that processes exchange it at once: importance by unit,
        # (U,); iterations with a gradient by group, (G,); iterations dropped in all,
        # and in a row.
        self._parts = (len(group_of), int(group_of.max(initial=-1)) + 1, 2)
        self._flat = torch.zeros(sum(self._parts), dtype=torch.float64, device=device)
        self.read(units)

    def read(self, units: Mapping[str, Tensor]) -> None:
        """Go on with layers that read these units, as after some were cut out.

        Args:
            units: The unit of each input channel by layer, (C,), -1 for none.
        """
        self._units = {n: index.to(self._flat.device) for n, index in units.items()}
        self._groups_read = {
            name: np.unique(self._group_of[index[index >= 0].numpy()])
            for name, index in units.items()
        }

    def add(
        self, gradients: Mapping[str, Tensor], lost: Iterable[str], scale: float = 1.0
    ) -> None:
        """Add the squared mask gradients of one iteration.

        An iteration in which any of them is not finite is dropped and counted. A group
        all of whose gradients are zero was not seen: losses touch what they have no
        use for with a product by zero, and a branch scaled by zero gets none yet.

        Args:
            gradients: Mask gradients (N, C) by layer.
            lost: Layers whose gradients are incomplete; the groups that they read
                are left out.
            scale: What the loss was multiplied with before backward.
        """
        if not gradients:
            return
        units = unit_gradients(gradients, self._units, len(self._group_of))  # (N, U)
        squares = (units.double() / scale).square().sum(0)  # (U,)
        blind = self._groups_of(lost)
        if len(blind):
            wanted = torch.from_numpy(~np.isin(self._group_of, blind))
            squares = squares.where(wanted.to(squares.device), 0)
        bad = ~squares.isfinite().all()
        seen = squares.new_zeros(self._parts[1])  # (G,)
        seen.index_add_(0, self._group, (squares > 0).double())
        fresh = torch.cat([squares, (seen > 0).double()])
        self._flat[:-2] += fresh.where(~bad, 0)
        self._flat[-2] += bad
        self._flat[-1] = (self._flat[-1] + 1) * bad

    @property
    def importance(self) -> np.ndarray:
        """Squares added up in this process by unit, (U,); a view if on a CPU."""
        return self._flat[: self._parts[0]].cpu().numpy()

    @property
    def seen(self) -> np.ndarray:
        """Iterations with a gradient in this process by group, (G,), likewise."""
        return self._flat[self._parts[0] : -2].cpu().numpy()

    def collect(self, reduce: Reduce | None = None) -> Importance:
        """What has been added since `reset`.

        Losses are means over the images of a process; so the squares of W processes
        are divided by W², which is what one process sees that has all the images.

        Args:
            reduce: Sums over processes.
        """
        flat = self._flat.clone()
        processes = 1 if reduce is None else reduce(flat)
        squares, seen, dropped = flat.cpu().split(self._parts)
        values = squares.numpy() / processes**2
        values[(seen.numpy() == 0)[self._group_of]] = np.nan
        every, row = map(int, dropped)
        return Importance(values, every, -(-row // processes))

    def reset(self) -> None:
        """Start anew, as after a decision; dropped iterations still count."""
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

    def state_dict(self) -> Tensor:
        """What a resumed run needs, as a copy."""
        return self._flat.cpu().clone()

    def load_state_dict(self, state: Tensor) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ConfigError: The state is of other units.
        """
        shape = tuple(state.shape) if isinstance(state, Tensor) else None
        if shape != self._flat.shape:
            raise ConfigError(
                'checkpoint',
                f'statistics of {len(self._group_of)} units',
                f'a tensor of shape {shape}' if shape else type(state).__name__,
                'resume with the configuration that the run was started with',
            )
        self._flat.copy_(state)

    def _groups_of(self, layers: Iterable[str]) -> np.ndarray:
        """Numbers of the groups that the layers read."""
        parts = [self._groups_read[name] for name in layers]
        return np.unique(np.concatenate([np.empty(0, dtype=int), *parts]))
