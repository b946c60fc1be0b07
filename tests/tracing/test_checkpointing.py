"""Activation checkpointing: tracing looks through it, statistics do not change."""

from functools import partial

import pytest
import torch
import torch.utils.checkpoint as cp
from mmcv.ops import roi_align
from support.configs import slim_retinanet
from support.pruning import importance_of, iterate, prepared, seen_by, warnings_of
from support.toys import Net, conv, reasons_of, toy_loss
from torch.utils.checkpoint import checkpoint

from mmgfp.discovery.grouping import build_groups
from mmgfp.tracing import trace_loss
from mmgfp.utils.trial_runs import without_checkpointing

pytestmark = pytest.mark.filterwarnings('ignore:torch.utils.checkpoint')


def run_plain(function, x):
    return function(x)


def reentrant(function, x):
    return cp.checkpoint(function, x, use_reentrant=True)


def imported(function, x):
    """By a name that a module has imported."""
    return checkpoint(function, x, use_reentrant=True)


#: Held by an object, whose attributes nobody can find.
held = partial(checkpoint, use_reentrant=True)


def applied(function, x):
    return cp.CheckpointFunction.apply(function, True, x)


def hooked(function, x):
    return checkpoint(function, x, use_reentrant=False)


def sequential(function, x):
    return cp.checkpoint_sequential([function], 1, x, use_reentrant=True)


class Block(torch.nn.Module):
    """A residual block whose branch may be run again in backward."""

    def __init__(self, run):
        super().__init__()
        self.run = run
        self.conv1, self.conv2 = conv(6, 5), conv(5, 6)
        self.bn = torch.nn.BatchNorm2d(5)

    def forward(self, x):
        def branch(x):
            return x + self.conv2(self.bn(self.conv1(x)).relu())

        return self.run(branch, x)


def block_net(run):
    torch.manual_seed(0)
    parts = dict(stem=conv(3, 6), block=Block(run), head=conv(6, 4))
    return Net(lambda n, x: n.head(n.block(n.stem(x).relu())), **parts).double()


loss = partial(toy_loss, count=3)


def statistics(model, loss=loss, forward=None, count=3):
    """A pruner after one training step, and its importance."""
    pruner = prepared(model, loss, forward, count, strict=True)
    iterate(pruner, loss)
    assert not warnings_of(pruner) and (seen_by(pruner) == 1).all()
    return pruner, importance_of(pruner)


@pytest.mark.parametrize(
    'run', [reentrant, imported, held, applied, hooked, sequential]
)
def test_statistics_are_those_without(run):
    plain, expected = statistics(block_net(run_plain))
    pruner, importance = statistics(block_net(run))
    for one in (plain, pruner):
        assert [g.name for g in one.units.grouping.groups] == ['stem', 'block.conv1']
    assert importance.min() > 0 and importance == pytest.approx(expected, rel=1e-9)


def turned_net(run):
    """The images are put in another order ahead of a block that may be run again."""
    net = block_net(run)
    net.run = lambda n, x: n.head(n.block(n.stem(x).relu()[[2, 0, 1]]))
    return net


def test_what_a_part_is_given_is_known_inside():
    """conv1 and conv2 run again in backward, on images in another order."""
    sums = []
    for run in (run_plain, reentrant):
        pruner = prepared(turned_net(run), loss, count=3)
        loss(pruner.model).backward()
        sums.append(pruner.criterion.tap.take())
    plain, again = sums
    assert set(again) == {'block.conv1', 'block.conv2'} == set(plain) - {'head'}
    for name in again:
        torch.testing.assert_close(again[name], plain[name])


def test_rois_given_to_a_part_keep_their_images():
    """A head on RoIs that is run again in backward, of 1, 2 and no RoIs an image."""
    rois = torch.tensor([[1.0, 0, 0, 4, 4], [0, 2, 2, 8, 8], [1, 1, 1, 5, 5]]).double()

    def build(run):
        def forward(n, x):
            pooled = roi_align(n.stem(x), rois, 2)
            return run(lambda y: n.head(n.tower(y).relu()), pooled)

        torch.manual_seed(0)
        parts = dict(stem=conv(3, 6), tower=conv(6, 5), head=conv(5, 4))
        return Net(forward, **parts).double()

    expected = statistics(build(run_plain))[1]
    assert statistics(build(reentrant))[1] == pytest.approx(expected, rel=1e-9)


def test_what_becomes_of_rows_inside_is_not_known_outside(caplog):
    """Reordered in a checkpointed part: its readers cannot tell, and say so."""

    def run(n, x):
        return n.head(reentrant(lambda y: n.block(y[[2, 0, 1]]), n.stem(x).relu()))

    net = block_net(run_plain)
    net.run = run
    pruner = prepared(net, loss, count=3)
    iterate(pruner, loss)
    assert 'the inputs of head are not counted' in caplog.text
    assert 'rows may be moved in a checkpointed part' in caplog.text
    assert seen_by(pruner).tolist() == [0, 1]  # stem's channels, conv1's


def test_checkpointing_is_only_set_aside():
    before = cp.checkpoint
    with pytest.raises(RuntimeError), without_checkpointing():
        assert cp.checkpoint is checkpoint is not before
        assert 'apply' in vars(cp.CheckpointFunction)
        raise RuntimeError
    assert cp.checkpoint is checkpoint is before
    assert 'apply' not in vars(cp.CheckpointFunction)


def test_a_graph_that_checkpointing_hides_names_the_way_out():
    """A loss of one's own, traced as it is: what the block reads stays."""
    net = block_net(reentrant)
    trace = trace_loss(net, loss(net), strict=True)
    reasons = reasons_of(build_groups(net, trace))
    assert 'use_reentrant=False' in reasons['stem']
    net = block_net(hooked)
    assert build_groups(net, trace_loss(net, loss(net), strict=True)).units == 11


def test_detector_with_cp():
    importance = []
    for with_cp in (False, True):
        model, calls = slim_retinanet(with_cp=with_cp)
        model.double()
        calls.data['inputs'] = calls.data['inputs'].double()
        _, found = statistics(model, calls.loss, calls.forward, 2)
        importance.append(found)
    assert len(found) > 300
    assert importance[1] == pytest.approx(importance[0], rel=1e-9)
