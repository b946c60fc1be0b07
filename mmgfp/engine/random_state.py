"""The random states that a resumed run goes on with."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """States of all generators of this process, in plain types and tensors."""
    kind, keys, *rest = np.random.get_state()
    return {
        'python': random.getstate(),
        'numpy': [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        'torch': torch.get_rng_state(),
        'cuda': torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Go on where `random_state` was taken.

    Generators of GPUs are left alone where there is another number of them.
    """
    version, keys, gauss = state['python']
    random.setstate((version, tuple(keys), gauss))
    kind, numbers, *rest = state['numpy']
    np.random.set_state((kind, numbers.cpu().numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state['torch'].cpu())
    if len(state['cuda']) == torch.cuda.device_count() and state['cuda']:
        torch.cuda.set_rng_state_all([s.cpu() for s in state['cuda']])
