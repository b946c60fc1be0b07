"""Weights of a compact network, written back into the whole one."""

import copy

import numpy as np
import pytest
import torch
from support.runs import assert_equal
from support.toys import TOYS, grouped

from mmgfp.discovery.unit_sets import random_units
from mmgfp.surgery.compact import compact
from mmgfp.surgery.expand import take_over
from mmgfp.surgery.structure import PruneStructure, shapes_of


@pytest.mark.parametrize('toy', TOYS)
def test_writing_back_is_the_inverse_of_cutting(toy):
    """What was not cut takes on each new value, and nothing else changes."""
    torch.manual_seed(0)
    net = toy().double()
    groups = grouped(net).groups
    kept = random_units(groups, 0.4, np.random.default_rng(0))
    structure = PruneStructure.of(groups, kept, shapes_of(net))
    small = compact(net, structure)
    before = copy.deepcopy(net.state_dict())
    assert take_over(net, small, structure) == []
    assert_equal(dict(net.state_dict()), dict(before))

    with torch.no_grad():
        for tensor in small.state_dict().values():
            tensor += 1
    assert take_over(net, small, structure) == [*before]
    after = net.state_dict()
    assert_equal(dict(compact(net, structure).state_dict()), dict(small.state_dict()))
    others = sum(int((after[n] != t).sum()) for n, t in before.items())
    assert others == sum(t.numel() for t in small.state_dict().values())
    assert others < sum(t.numel() for t in before.values())
