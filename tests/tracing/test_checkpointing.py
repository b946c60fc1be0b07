"""Activation checkpointing: tracing looks through it, statistics do not change."""

import pytest
import torch
import torch.utils.checkpoint as cp
from mmcv.ops import roi_align
from mmengine.hub import get_config
from support.toys import Net, conv, images, square_loss
from torch.utils.checkpoint import checkpoint

from mmgfp import GroupFisherPruner
from mmgfp.engine.batch_calls import BatchCalls
from mmgfp.engine.demo_batch import demo_batch
from mmgfp.engine.model_building import build_model
from mmgfp.utils.trial_runs import without_checkpointing

pytestmark = pytest.mark.filterwarnings('ignore:torch.utils.checkpoint')


def run_plain(function, x):
    return function(x)


def reentrant(function, x):
    return cp.checkpoint(function, x, use_reentrant=True)


def imported(function, x):
    """By a name that a module has imported."""
    return checkpoint(function, x, use_reentrant=True)


def hooked(function, x):
    return checkpoint(function, x, use_reentrant=False)


def sequential(function, x):
    return cp.checkpoint_sequential([function], 1, x, use_reentrant=True)


class Block(torch.nn.Module):
    """A residual block whose branch may be run again in backward."""

    def __init__(self, run):
        super().__init__()
        self.run = run
        self.conv1, self.bn, self.conv2 = (
            conv(6, 5),
            torch.nn.BatchNorm2d(5),
            conv(5, 6),
        )

    def forward(self, x):
        def branch(x):
            return x + self.conv2(self.bn(self.conv1(x)).relu())

        return self.run(branch, x)


def block_net(run):
    torch.manual_seed(0)
    parts = dict(stem=conv(3, 6), block=Block(run), head=conv(6, 4))
    return Net(lambda n, x: n.head(n.block(n.stem(x).relu())), **parts).double()


def loss(model):
    return square_loss(model(images(3).double()))


def statistics(model, loss, forward=None, count=3):
    """A pruner after one training step, and its importance."""
    pruner = GroupFisherPruner(model, interval=10**6, strict=True)
    pruner.prepare(loss, forward or loss, count)
    loss(model).backward()
    pruner.step()
    assert (
        not pruner.checks.warned | pruner.criterion.warned
        and (pruner.criterion.statistics.seen == 1).all()
    )
    return pruner, pruner.criterion.statistics.importance


@pytest.mark.parametrize('run', [reentrant, imported, hooked, sequential])
def test_statistics_are_those_without(run):
    plain, expected = statistics(block_net(run_plain), loss)
    pruner, importance = statistics(block_net(run), loss)
    names = [g.name for g in pruner.units.grouping.groups]
    assert (
        names
        == [g.name for g in plain.units.grouping.groups]
        == ['stem', 'block.conv1']
    )
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
        pruner = GroupFisherPruner(turned_net(run), interval=10**6)
        pruner.prepare(loss, loss, 3)
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
        torch.manual_seed(0)
        parts = dict(stem=conv(3, 6), tower=conv(6, 5), head=conv(5, 4))
        return Net(
            lambda n, x: run(
                lambda y: n.head(n.tower(y).relu()), roi_align(n.stem(x), rois, 2)
            ),
            **parts,
        ).double()

    expected = statistics(build(run_plain), loss)[1]
    assert statistics(build(reentrant), loss)[1] == pytest.approx(expected, rel=1e-9)


def test_what_becomes_of_rows_inside_is_not_known_outside(caplog):
    """Reordered in a checkpointed part: its readers cannot tell, and say so."""
    net = block_net(run_plain)
    net.run = lambda n, x: n.head(
        reentrant(lambda y: n.block(y[[2, 0, 1]]), n.stem(x).relu())
    )
    pruner = GroupFisherPruner(net, interval=10**6)
    pruner.prepare(loss, loss, 3)
    loss(net).backward()
    pruner.step()
    assert 'the inputs of head are not counted' in caplog.text
    assert 'rows may be moved in a checkpointed part' in caplog.text
    assert pruner.criterion.statistics.seen.tolist() == [
        0,
        1,
    ]  # stem's channels, conv1's


def test_checkpointing_is_only_set_aside():
    before = cp.checkpoint
    with pytest.raises(RuntimeError), without_checkpointing():
        assert cp.checkpoint is checkpoint is not before
        raise RuntimeError
    assert cp.checkpoint is checkpoint is before


def slim_retinanet(with_cp):
    cfg = get_config('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py')
    cfg.model.backbone.update(
        depth=18, base_channels=8, frozen_stages=-1, init_cfg=None, with_cp=with_cp
    )
    cfg.model.neck.update(in_channels=[8, 16, 32, 64], out_channels=8)
    cfg.model.bbox_head.update(in_channels=8, feat_channels=8, num_classes=3)
    torch.manual_seed(0)
    model = build_model(cfg).double()
    calls = BatchCalls(model, demo_batch(cfg, 2, (64, 64)))
    calls.data['inputs'] = calls.data['inputs'].double()
    return model, calls


def test_detector_with_cp():
    importance = []
    for with_cp in (False, True):
        model, calls = slim_retinanet(with_cp)
        pruner, found = statistics(model, calls.loss, calls.forward, 2)
        importance.append(found)
    assert len(found) > 300
    assert importance[1] == pytest.approx(importance[0], rel=1e-9)
