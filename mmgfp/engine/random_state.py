"""Random states of a process, as a checkpoint holds them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Return the states of all generators of this process, in plain types and tensors.

    Examples:
        >>> state = random_state()
        >>> sorted(state)
        ['cuda', 'numpy', 'python', 'torch']
        >>> drawn = random.random(), float(torch.rand(()))
        >>> set_random_state(state)
        >>> drawn == (random.random(), float(torch.rand(())))
        True
    """
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    # Arrays of uint32 are no plain type, and torch has no arithmetic for them.
    key = torch.from_numpy(numpy_state['state']['key'].astype(np.int64))
    return {
        'python': {'version': version, 'words': list(words), 'gauss': gauss},
        'numpy': {**numpy_state, 'state': {**numpy_state['state'], 'key': key}},
        'torch': torch.get_rng_state(),
        'cuda': torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Go on where `random_state` was taken.

    Generators of GPUs are left alone where the number of GPUs is another one.
    """
    python, numpy_state = state['python'], state['numpy']
    random.setstate((python['version'], tuple(python['words']), python['gauss']))
    # A runner may have loaded the checkpoint onto a GPU.
    key = numpy_state['state']['key'].cpu().numpy().astype(np.uint32)
    np.random.set_state({**numpy_state, 'state': {**numpy_state['state'], 'key': key}})
    torch.set_rng_state(state['torch'].cpu())
    if len(state['cuda']) == torch.cuda.device_count() and state['cuda']:
        torch.cuda.set_rng_state_all([s.cpu() for s in state['cuda']])
