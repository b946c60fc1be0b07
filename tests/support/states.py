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


def state_of(run):
    """All that a test's training goes on from, as it is after saving and loading."""
    parts = ('model', 'optimizer', 'pruner')
    return saved_and_loaded({part: getattr(run, part).state_dict() for part in parts})
