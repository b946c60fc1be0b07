"""Processes that train together: what they exchange, and what they end up with."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from support.configs import small_prune_config
from support.runs import (
    Cut,
    artifacts,
    assert_equal,
    assert_ranks_agree,
    buffers,
    ended,
    logged,
    plain_classifier,
    steady_classifier,
    tiny_classifier,
    train,
)
from support.toy_runner import hook_of

from mmgfp import PruningConfig
from mmgfp.criteria.fisher import Fisher

# -- runs ---------------------------------------------------------------------


def steady_detector(folder, batch):
    """FCOS, whose losses are means over the positive samples of all processes."""
    config = small_prune_config(folder, interval=5, units_per_step=10)
    config.model.backbone.norm_eval = True
    config.model.type = 'FCOS'
    config.model.bbox_head = dict(
        type='FCOSHead',
        num_classes=10,
        in_channels=48,
        feat_channels=16,
        stacked_convs=1,
        strides=[8, 16, 32, 64],
        regress_ranges=((-1, 16), (16, 32), (32, 64), (64, 1e8)),
        norm_cfg=None,
    )
    config.model.train_cfg = None
    config.train_dataloader.batch_size = batch
    config.train_dataloader.sampler.shuffle = False
    # Clipping and Adam would blow up the rounding that differs.
    config.optim_wrapper = dict(optimizer=dict(type='SGD', lr=1e-4))
    config.train_cfg.max_iters = 20
    return config


def record(runner, rank):
    """Write what each decision is based on to ``statistics_<rank>.pth``."""
    scores, seen = Fisher.scores, []

    def recorded(self, reduce=None):
        importance = scores(self, reduce)
        seen.append(torch.from_numpy(importance.values.copy()))
        torch.save(seen, Path(runner.work_dir) / f'statistics_{rank}.pth')
        return importance

    Fisher.scores = recorded


def recorded(config, rank=0):
    return torch.load(Path(config.work_dir) / f'statistics_{rank}.pth')


# -- several processes are one ------------------------------------------------


@pytest.mark.parametrize(
    'made', [steady_classifier, pytest.param(steady_detector, marks=pytest.mark.slow)]
)
def test_two_processes_decide_like_one_with_twice_the_batch(made, tmp_path):
    one, two = made(tmp_path / 'one', 4), made(tmp_path / 'two', 2)
    assert train(one, change=record) == [0]
    assert train(two, change=record, processes=2) == [0, 0]
    expected, got = recorded(one), recorded(two)
    assert len(got) == len(expected) == 4
    for number, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        # Later ones also differ by the rounding of the weights in between.
        close = dict(rtol=1e-5 if number == 0 else 1e-3, atol=1e-12)
        torch.testing.assert_close(mine, theirs, equal_nan=True, **close)
    assert_equal(recorded(two, 0), recorded(two, 1))
    assert ended(two)['kept'] == ended(one)['kept']
    assert ended(two)['iteration'] == 20
    assert_ranks_agree(two)
    assert len(artifacts(two)) == 1


# -- what may differ between processes ----------------------------------------


class EmptyImages(Hook):
    """Takes the boxes off the images of this process, in every third iteration."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter % 3 == 1:
            for sample in data_batch['data_samples']:
                sample.gt_instances = sample.gt_instances[:0]


def empty_images_in_rank_1(runner, rank):
    if rank == 1:
        runner.register_hook(EmptyImages(), 'VERY_HIGH')


@pytest.mark.slow
def test_uneven_images_uneven_last_batches_and_images_without_boxes(tmp_path):
    """15 images are 8 and 7: the last batch of an epoch is smaller in one process."""
    config = small_prune_config(tmp_path, interval=2, units_per_step=15)
    scales = [(64, 64), (96, 64), (64, 80)]
    resize = dict(type='RandomChoiceResize', scales=scales, keep_ratio=False)
    loader = config.train_dataloader
    loader.dataset.pipeline.insert(2, resize)
    loader.dataset.indices = 15
    loader.drop_last = False
    loader.sampler = dict(type='DefaultSampler', round_up=False)
    config.train_cfg.max_iters = 6
    changes = dict(change=empty_images_in_rank_1, processes=2)
    assert train(config, **changes) == [0, 0]
    assert_ranks_agree(config)


# -- trouble ------------------------------------------------------------------


def decide_otherwise_in_rank_1(runner, rank):
    if rank == 1:
        scores = Fisher.scores

        def wrong(self, reduce=None):
            right = scores(self, reduce)
            return replace(right, values=right.values[::-1].copy())

        Fisher.scores = wrong


def test_processes_that_disagree_stop_with_both_hashes(tmp_path):
    config = steady_classifier(tmp_path, 2)
    config.custom_hooks[0].interval = 2
    changes = dict(change=decide_otherwise_in_rank_1, processes=2)
    assert train(config, **changes) == [2, 2]
    for rank in range(2):
        error = logged(config, rank).splitlines()[-1]
        words = 'error: structure must be the same in all processes (got hashes '
        assert error.startswith(words)
        hashes, _, remedy = error.removeprefix(words).partition('); ')
        one, two = hashes.split(', ')
        assert len(one) == len(two) == 16 and one != two
        assert remedy.startswith('resume from the last checkpoint')
    assert not artifacts(config)


def keep_nothing(runner, rank):
    """Lets discovery fail, which happens in the main process alone."""
    hook = hook_of(runner)
    hook.config = PruningConfig.of(hook.config, keep=['nothing'])


def test_failure_of_the_main_process_stops_all(tmp_path):
    config = steady_classifier(tmp_path, 2)
    assert train(config, change=keep_nothing, processes=2) == [2, 2]
    first, second = (logged(config, r).splitlines()[-1] for r in range(2))
    assert first.startswith('error: keep must be ')
    assert second.startswith(f'error: in the main process: ConfigError: {first[7:]}')


# -- resuming -----------------------------------------------------------------

ASKED = [143, 143]


@pytest.mark.parametrize(
    ('make', 'cut', 'codes'),
    [
        (tiny_classifier, Cut('decided', 5), [-9, -9]),
        pytest.param(tiny_classifier, Cut('asked', 5), ASKED, marks=pytest.mark.slow),
        pytest.param(plain_classifier, Cut('asked', 5), ASKED, marks=pytest.mark.slow),
    ],
    ids=['killed', 'asked', 'asked-plain'],
)
def test_resumed_processes_end_like_uninterrupted_ones(make, cut, codes, tmp_path):
    """With dropout and flips, which draw on each process' own random state."""
    whole, config = make(tmp_path / 'a'), make(tmp_path / 'b')
    assert train(whole, processes=2) == [0, 0]
    assert train(config, cut=cut, processes=2) == codes
    assert train(config, resume=True, processes=2) == [0, 0]
    for rank in range(2):
        one, two = ended(whole, rank), ended(config, rank)
        if rank:  # MMEngine saves the running statistics of the main process only
            for name in buffers(one['weights']):
                del one['weights'][name], two['weights'][name]
        assert_equal(one, two)
    assert_ranks_agree(config)
