"""Gradient accumulation and clipping: what they change, and what they must not."""

import numpy as np
import pytest
import torch
from support.toy_runner import Call, pruner_of, toy_runner


def watched(folder, **options):
    """Decisions and importance of a run by iteration, and its final weights."""
    importance, kept = [], []

    def watch(runner):
        importance.append(pruner_of(runner).criterion.statistics.importance.copy())
        kept.append(pruner_of(runner).units.kept.copy())

    runner = toy_runner(folder, hooks=[Call(after_train_iter=watch)], **options)
    runner.train()
    return importance, kept, runner.model.state_dict()


def test_accumulating_two_batches_equals_one_of_both(tmp_path):
    """Twice the iterations, with an interval of twice as many."""
    hook = dict(target=dict(flops=0.2), units_per_step=2)
    whole = watched(tmp_path / 'a', batch=4, iters=6, hook=hook | dict(interval=3))
    halves = watched(
        tmp_path / 'b',
        batch=2,
        iters=12,
        hook=hook | dict(interval=6),
        optim=dict(accumulative_counts=2),
    )
    assert whole[0][1].any() and (~whole[1][-1]).sum() == 4
    for n in range(6):
        assert halves[0][2 * n + 1] == pytest.approx(whole[0][n], rel=1e-9)
        assert (halves[1][2 * n + 1] == whole[1][n]).all()
    for name, weight in whole[2].items():
        torch.testing.assert_close(halves[2][name], weight)


def test_clipping_changes_no_statistics_of_an_iteration(tmp_path):
    """Weights differ from the second iteration on, since the first step does."""
    plain, clipped = (
        watched(tmp_path, iters=2, hook=dict(interval=9), optim=optim)
        for optim in ({}, dict(clip_grad=dict(max_norm=1e-3)))
    )
    assert (plain[0][0] == clipped[0][0]).all() and plain[0][0].all()
    assert not np.allclose(plain[0][1], clipped[0][1])


def test_clipping_sees_the_gradients_of_the_compact_model(tmp_path):
    """Masked columns have none; the norm is that of what is left."""
    norms = []

    def watch(runner):
        norms.append(runner.message_hub.get_scalar('train/grad_norm').current())
        if len(norms) < 3:
            small.append(pruner_of(runner).compact())

    small = []
    runner = toy_runner(
        tmp_path,
        iters=3,
        hooks=[Call(after_train_iter=watch)],
        hook=dict(interval=1, units_per_step=3, target=dict(flops=0.2)),
        optim=dict(clip_grad=dict(max_norm=1e-3)),
    )
    runner.train()
    images = runner.train_dataloader.dataset.images
    for n, model in enumerate(small):
        batch = images[2 * n + 2 : 2 * n + 4]
        model.train()(batch, mode='loss')['loss'].backward()
        grads = [p.grad.flatten() for p in model.parameters()]
        assert norms[n + 1] == pytest.approx(torch.cat(grads).norm().item(), rel=1e-6)
