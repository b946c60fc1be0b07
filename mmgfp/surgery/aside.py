"""Columns of pruned units, kept aside so that the units may come back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmgfp.utils.errors import ConfigError

#: A dimension of a parameter, by the parameter's name.
Columns = tuple[str, int]


class ColumnsAside:
    """Hold the values that a mask takes out of weights, until it gives them back.

    Where two dimensions of a weight are masked, an entry that both mask is held until
    neither does.

    Args:
        parameters: Parameters of the model by name.

    Attributes:
        held: Masked entries by columns, on the device of the weight; the mask's own.
        values: Values of the masked entries by the name of the weight, of its shape,
            zero elsewhere; only of weights from which some were taken.

    Examples:
        >>> weight = torch.tensor([[1.0, 2.0, 3.0]])
        >>> held = {('weight', 1): torch.tensor([1])}
        >>> aside = ColumnsAside({'weight': weight}, held)
        >>> aside.take(('weight', 1), torch.tensor([1]))
        >>> aside.values['weight'].tolist()
        [[0.0, 2.0, 0.0]]
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], held: Mapping[Columns, Tensor]
    ) -> None:
        self._parameters = parameters
        self.held = held
        self.values: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(self, columns: Columns, entries: Tensor) -> None:
        """Hold the values of entries that are about to be masked.

        Args:
            columns: Whose entries; those masked before must be zero in the weight.
            entries: Their numbers, (K,).
        """
        name, dim = columns
        weight = self._parameters[name].detach()
        if name not in self.values:
            self.values[name] = torch.zeros_like(weight)
        # Added, as what another dimension masks is zero in the weight and held here.
        taken = weight.index_select(dim, entries)
        self.values[name].index_add_(dim, entries, taken)

    @torch.no_grad()
    def give_back(self, columns: Columns, entries: Tensor) -> None:
        """Write the values of entries that are not masked any more into the weight.

        Args:
            columns: Whose entries; they are zero in the weight.
            entries: Their numbers, (K,).
        """
        name, dim = columns
        if name not in self.values:
            return
        back = self.values[name].index_select(dim, entries)
        for (other, other_dim), held in self.held.items():
            if other == name and other_dim != dim:
                back.index_fill_(other_dim, held, 0)
        self._parameters[name].detach().index_add_(dim, entries, back)
        self.values[name].index_add_(dim, entries, back, alpha=-1)

    def columns(self, name: str, dim: int) -> tuple[Tensor, Tensor] | None:
        """Return masked entries of a weight, (K,), and its columns as they were there.

        Args:
            name: Name of the weight.
            dim: The dimension of its inputs.

        Returns:
            tuple: The entries and the columns; None if there are none.
        """
        entries = self.held.get((name, dim))
        if entries is None or not len(entries) or name not in self.values:
            return None
        return entries, self.values[name].index_select(dim, entries)

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the values on the CPU, by the name of the weight."""
        return {name: value.cpu().clone() for name, value in self.values.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Hold the values that `state_dict` gave, in place of those held now.

        Args:
            state: Values by the name of the weight.

        Raises:
            ConfigError: If one is not of the shape of its weight.
        """
        self.values = {}
        for name, value in state.items():
            weight = self._parameters.get(name)
            shape = getattr(value, 'shape', None)
            if weight is None or weight.shape != shape:
                got = f'{name} of {shape and tuple(shape)}'
                expected = 'columns kept aside of weights of this model'
                remedy = 'resume with the configuration that the run was started with'
                raise ConfigError('checkpoint', expected, got, remedy)
            self.values[name] = value.detach().to(weight, copy=True)


def values_aside(asides: Sequence[ColumnsAside | None]) -> list[dict[str, Tensor]]:
    """Return what is kept aside, by weight, of a model and of each of its copies.

    Args:
        asides: That of the model and those of its copies; None if units are gone for
            good.
    """
    return [aside.state_dict() for aside in asides if aside is not None]


def load_values_aside(
    asides: Sequence[ColumnsAside | None], values: Sequence[Mapping[str, Tensor]]
) -> None:
    """Keep aside what an interrupted run did.

    Args:
        asides: As for `values_aside`; a copy that was not there is as the model.
        values: What `values_aside` gave.

    Raises:
        ConfigError: If they are of another model.
    """
    for i, aside in enumerate(asides if values else ()):
        if aside is not None:
            aside.load_state_dict(values[i if i < len(values) else 0])
