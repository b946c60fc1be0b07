"""Compressed weights: which layers, and why others stay dense."""

import pytest
import torch
from torch import nn
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from mmgfp.sparsity import semi_structured
from mmgfp.sparsity.config import SparsityConfig
from mmgfp.sparsity.kinds import build_sparsifier
from mmgfp.sparsity.semi_structured import to_semi_structured
from mmgfp.utils.errors import ConfigError


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)
        self.wide = nn.Linear(64, 32)
        self.narrow = nn.Linear(32, 6)
        self.head = nn.Linear(32, 32)


def small():
    """The head stays dense."""
    torch.manual_seed(0)
    model = Small().half()
    build_sparsifier(model, SparsityConfig(kind='nm', keep=['head'])).decide(0.5)
    return model.eval()


@pytest.fixture
def cores(monkeypatch):
    """Let a CPU do what a GPU with sparse tensor cores would: compress a matrix."""

    def compress(weight):
        if weight.shape[0] % 16:
            raise RuntimeError(
                f'shape {tuple(weight.shape)} is not supported!\nAnd so on'
            )
        packed = sparse_semi_structured_from_dense_cutlass(weight)
        return sparse_semi_structured_to_dense_cutlass(*packed)

    monkeypatch.setattr(semi_structured, 'has_sparse_cores', lambda device: True)
    monkeypatch.setattr(semi_structured, 'to_sparse_semi_structured', compress)


def test_layers_that_follow_the_pattern_are_compressed(cores):
    model, reference = small(), small()
    assert to_semi_structured(model) == {
        'conv': 'torch has no sparse kernel for convolutions',
        'narrow': 'shape (6, 32) is not supported!',
        'head': 'not 2:4 sparse',
    }
    for name, weight in model.named_parameters():
        assert weight.requires_grad == (name != 'wide.weight')
        assert torch.equal(weight, reference.get_parameter(name))


def test_models_without_such_layers_are_refused(cores):
    words = 'model must be one with a layer that can be converted .got none; 0: not 2:4'
    with pytest.raises(ConfigError, match=words):
        to_semi_structured(nn.Sequential(nn.Linear(64, 32)))


def test_other_devices_are_refused():
    words = r'model must be on a GPU with sparse tensor cores .*\(got cpu\); move it'
    with pytest.raises(ConfigError, match=words):
        to_semi_structured(small())
