"""A run on another device than the CPU, and one under another default of torch.

`support.other_device` stands in for a GPU: its tensors refuse to meet those of the CPU,
but have values, so that a whole run is compared with the same run on the CPU. What the
stand-in cannot show: kernels of a GPU and their rounding, autograd's thread for each
device, streams, memory, random numbers of a GPU's own generator, NCCL.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
from support import toys
from support.device_runs import (
    CRITERIA,
    DETECTORS,
    MODELS,
    assert_same_run,
    net,
    prune,
    run,
    two_stages,
)
from support.other_device import DEVICE, DeviceTensor, other_device

CPU = 'cpu'
# The stand-in calls itself `meta`, but copies into its tensors do arrive.
pytestmark = pytest.mark.filterwarnings('ignore:.*copying from a non-meta parameter')


@pytest.mark.parametrize('build', MODELS.values(), ids=MODELS)
def test_a_run_on_another_device_is_that_of_the_cpu(build):
    expected = run(build, CPU)
    with other_device():
        found = run(build, DEVICE)
        every = [t for m in (found[0].model, found[1]) for t in m.state_dict().values()]
        assert all(isinstance(t, DeviceTensor) for t in every)
        assert_same_run(found, expected)


@pytest.mark.parametrize('criterion', CRITERIA, ids=str)
def test_every_criterion_on_another_device(criterion):
    build, options = toys.ResidualPair, dict(criterion=criterion)
    expected = run(build, CPU, **options)
    assert_same_run(run(build, CPU, partial(torch.device, 'meta'), **options), expected)
    with other_device():
        assert_same_run(run(build, DEVICE, **options), expected)


@pytest.mark.parametrize('name', DETECTORS)
def test_models_of_openmmlab_on_another_device(name):
    build = DETECTORS[name]()
    expected = prune(build, CPU).units.kept
    with other_device():
        kept = prune(build, DEVICE).units.kept
    assert (~expected).sum() == 40
    assert np.array_equal(kept, expected)


@pytest.mark.parametrize('build', [net(two_stages), toys.Shuffle])
def test_the_default_device_may_be_another_than_the_models(build):
    assert_same_run(run(build, CPU, partial(torch.device, 'meta')), run(build, CPU))


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_the_default_dtype_may_be_another_than_the_models(dtype):
    build = net(two_stages)
    assert_same_run(run(build, CPU, partial(default_dtype, dtype)), run(build, CPU))


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
