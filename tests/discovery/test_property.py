"""Any net that hypothesis can draw: what is found, cut, saved and loaded agrees."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support.random_nets import RandomNet, specifications
from support.toys import grouped, images

from mmgfp.discovery.verify import (
    difference,
    disagreement,
    find_disagreements,
    masked_and_compact,
    random_units,
)
from mmgfp.surgery.compact import compact_
from mmgfp.surgery.structure import STRUCTURE_KEY, PruneStructure, shapes_of
from mmgfp.utils.io import save_checkpoint

#: The same examples at each run, none of which has a time limit of its own.
FIXED = settings(
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def forward(model):
    like = next(model.parameters())
    return model(images().to(like))


def assert_prunes(specification, seed, folder):
    """Groups hold without verification's help, cut at random, and survive a file."""
    torch.manual_seed(seed)
    net = RandomNet(*specification)
    grouping = grouped(net)
    groups = grouping.groups
    assert groups, grouping.frozen  # there is always a layer inside a head
    assert find_disagreements(net, grouping, forward, seed) == []

    rng = np.random.default_rng(seed)
    kept = random_units(groups, rng.uniform(0, 1, len(groups)), rng)
    assert disagreement(net, groups, kept, forward) is None
    masked, small = masked_and_compact(net.double(), groups, kept)
    with torch.no_grad():
        outputs = [forward(m.eval()) for m in (masked, small)]
    assert difference(*outputs) < 1e-4

    structure = PruneStructure.of(groups, kept, shapes_of(net))
    state = small.state_dict()
    path = folder / 'small.pth'
    save_checkpoint({'state_dict': state, STRUCTURE_KEY: structure.to_dict()}, path)
    structure.save(folder / 'small.json')
    found = PruneStructure.load(path)
    assert found == structure == PruneStructure.load(folder / 'small.json')
    again = compact_(RandomNet(*copy.deepcopy(specification)).double(), found)
    again.load_state_dict(torch.load(path, weights_only=True)['state_dict'])
    with torch.no_grad():
        assert difference(forward(again.eval()), outputs[1]) == 0


@settings(FIXED, max_examples=25)
@given(specification=specifications, seed=st.integers(0, 99))
def test_random_nets(specification, seed, tmp_path):
    assert_prunes(specification, seed, tmp_path)


@pytest.mark.slow
@settings(FIXED, max_examples=1000)
@given(specification=specifications, seed=st.integers(0, 99))
def test_many_random_nets(specification, seed, tmp_path):
    assert_prunes(specification, seed, tmp_path)
