"""States and steps of pruners, made comparable."""

import io

import torch


def picked(steps):
    """Units by iteration, for comparison."""
    return [None if s is None else s.units.tolist() for s in steps]


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def saved_and_loaded(state):
    return torch.load(io.BytesIO(saved(state)), weights_only=True)
