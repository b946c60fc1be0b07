"""The kinds of sparsity by name."""

from __future__ import annotations

from torch import nn

from mmgfp.sparsity.config import SparsityConfig
from mmgfp.sparsity.magnitude import Magnitude
from mmgfp.sparsity.movement import Movement
from mmgfp.sparsity.n_of_m import SRSTE, FixedNOfM
from mmgfp.sparsity.sparsifier import Sparsifier


def build_sparsifier(model: nn.Module, config: SparsityConfig) -> Sparsifier:
    """Return what holds weights of a model at zero as the options say.

    Args:
        model: The model; nothing is zero yet.
        config: The options of the run.

    Raises:
        ConfigError: If the model has no weights that can be set to zero.
    """
    if config.kind == 'magnitude':
        return Magnitude(model, config)
    if config.kind == 'movement':
        return Movement(model, config)
    return SRSTE(model, config) if config.sr_ste else FixedNOfM(model, config)
