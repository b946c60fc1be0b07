"""Nets that hypothesis draws: what is found, scored, cut, saved and loaded agrees.

None may be silently wrong: what cannot be pruned or scored is left alone with a reason.
"""

import copy

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from support.pruning import importance_of, iterate, prepared, seen_by, warnings_of
from support.random_nets import RandomNet, specifications
from support.reference import weight_fisher
from support.toys import grouped, images, square_loss

from mmgfp.discovery.comparing import difference
from mmgfp.discovery.probing import random_probe
from mmgfp.discovery.unit_sets import random_units
from mmgfp.discovery.verify import find_disagreements, masked_and_compact
from mmgfp.surgery.compact import compact, compact_
from mmgfp.surgery.structure import STRUCTURE_KEY, PruneStructure, shapes_of
from mmgfp.utils.errors import TraceError
from mmgfp.utils.io import save_checkpoint
from mmgfp.utils.layers import is_layer

#: The same examples at each run, none of which has a time limit of its own.
FIXED = settings(
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def forward(model, batch=None):
    batch = images() if batch is None else batch
    return model(batch.to(next(model.parameters())))


def once(model, batch=None):
    return square_loss(forward(model, batch))


def mirrored(model, batch=None):
    batch = images() if batch is None else batch
    return once(model, batch) + once(model, batch.flip(3))


def compared(model, batch=None):
    batch = images() if batch is None else batch
    pairs = zip(forward(model, batch), forward(model, batch.flip(3)), strict=True)
    return square_loss(tuple(a - 2 * b for a, b in pairs))


def apart(model, batch=None):
    """Each image by a forward pass of its own."""
    batch = images() if batch is None else batch
    return sum(once(model, image) for image in batch.split(1)) / len(batch)


#: Losses of one or of several forward passes; all are means over the images.
losses = st.sampled_from([once, once, mirrored, compared, apart])


def assert_all_channels_have_a_place(net, grouping):
    """Each output channel of each layer is in a group, or stays for a reason."""
    staying = {f.layer: f for f in grouping.frozen}
    assert all(f.reason for f in grouping.frozen)
    first_names = {id(p): n for n, p in net.named_parameters()}
    for name, layer in net.named_modules():
        if not is_layer(layer):
            continue
        weight = first_names[id(layer.weight)]
        dim = int(getattr(layer, 'transposed', False) and layer.groups == 1)
        removable = [
            m.index
            for group in grouping.groups
            for m in group.members
            if (m.name, m.dim) == (weight, dim)
        ]
        count = sum(index.size for index in removable)
        frozen = staying[name].channels if name in staying else 0
        assert count + frozen == layer.weight.shape[dim], (name, count, frozen)


def assert_scores(pruner, loss):
    """Fisher information equals that of masks on weights, image by image."""
    net = pruner.model.eval()  # the loss of an image depends on no other image
    iterate(pruner, loss)
    losses = [loss(net, image) / len(images()) for image in images().split(1)]
    groups = pruner.units.grouping.groups
    expected = weight_fisher(net, lambda model: losses, groups)
    found = torch.from_numpy(importance_of(pruner))
    if warnings_of(pruner):  # some inputs are not counted, as the user is told
        counts = torch.from_numpy(seen_by(pruner)[pruner.units.group_of] > 0)
        found, expected = found[counts], expected[counts]
    least = 1e-12 * float(expected.max()) if len(expected) else 0
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=least)
    net.train()


def assert_cuts(net, groups, kept, loss):
    """Masked and compact agree in both modes, on images that discovery has not seen."""
    masked, small = masked_and_compact(random_probe(net).double(), groups, kept)
    batch = images(3, seed=1)
    for training in (False, True):
        pair = masked.train(training), small.train(training)
        with torch.no_grad():
            found = [(loss(m, batch), forward(m, batch)) for m in pair]
        assert difference(*found) < 1e-6


def assert_survives_a_file(specification, net, structure, folder):
    """A new net of the same specification becomes the compact one."""
    small = compact(net, structure).eval()
    path = folder / 'small.pth'
    state = {'state_dict': small.state_dict(), STRUCTURE_KEY: structure.to_dict()}
    save_checkpoint(state, path)
    structure.save(folder / 'small.json')
    found = PruneStructure.load(path)
    assert found == structure == PruneStructure.load(folder / 'small.json')
    again = compact_(RandomNet(*copy.deepcopy(specification)).double(), found)
    again.load_state_dict(torch.load(path, weights_only=True)['state_dict'])
    with torch.no_grad():
        assert difference(forward(again.eval()), forward(small)) == 0


def assert_prunes(specification, loss, number, folder):
    torch.manual_seed(number)
    net = RandomNet(*specification)
    if not net.needs_verification:
        # Groups hold without verification's help. With pads of channels they need not:
        # whether code computes them from widths, no graph shows, so that only what
        # verification leaves counts.
        grouping = grouped(net, loss)
        assert grouping.groups, grouping.frozen  # there's a layer inside a head
        assert find_disagreements(net, grouping, forward, number) == []
        assert_all_channels_have_a_place(net, grouping)
    net.double()
    try:
        pruner = prepared(net, loss, forward, target={'flops': 1 - 1e-9})
    except TraceError as error:
        assert 'every layer is left alone because: ' in str(error)
        return
    grouping = pruner.units.grouping
    assert_all_channels_have_a_place(net, grouping)
    assert_scores(pruner, loss)
    pruner.close()

    groups, rng = grouping.groups, np.random.default_rng(number)
    kept = random_units(groups, rng.uniform(0, 1, len(groups)), rng)
    assert_cuts(net, groups, kept, loss)
    structure = PruneStructure.of(groups, kept, shapes_of(net))
    assert_survives_a_file(specification, net, structure, folder)


#: What `assert_prunes` is given, but for the folder.
nets = given(specification=specifications, loss=losses, number=st.integers(0, 99))


@settings(FIXED, max_examples=12)
@nets
def test_random_nets(specification, loss, number, tmp_path):
    assert_prunes(specification, loss, number, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('part', range(8))
def test_many_random_nets(part, tmp_path):
    @seed(part)
    @settings(FIXED, max_examples=250)
    @nets
    def prune(specification, loss, number):
        assert_prunes(specification, loss, number, tmp_path)

    prune()
