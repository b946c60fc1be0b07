"""EMAHook: the averaged copy is masked with the model and ends compact, too."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.hooks import EMAHook
from mmengine.registry import MODELS
from support.roundtrip import pruned_model
from support.toy_runner import Call, pruner_of, toy_loader, toy_runner

from mmgfp.discovery.comparing import difference
from mmgfp.surgery.structure import PruneStructure

MOMENTUM = 0.3
EMA = dict(type='EMAHook', momentum=MOMENTUM)
HOOK = dict(interval=2, units_per_step=4, target=dict(flops=0.5))


def averaged(runner):
    (hook,) = [h for h in runner.hooks if isinstance(h, EMAHook)]
    return hook.ema_model.module


def weights(model):
    return copy.deepcopy(model.state_dict())


def pruned_columns(runner, model):
    """The columns of ``model`` that read pruned units, by weight and dimension."""
    groups, parameters = pruner_of(runner).units.grouping.groups, model.state_dict()
    kept = np.split(pruner_of(runner).units.kept, np.cumsum([g.units for g in groups]))
    columns = {}
    for group, group_kept in zip(groups, kept, strict=False):
        for m in group.members:
            if m.role == 'in':
                index = torch.from_numpy(m.index[~group_kept].reshape(-1))
                columns[m.name, m.dim] = parameters[m.name].index_select(m.dim, index)
    return columns


def cut(state, structure):
    """Weights cut by hand to a structure."""
    small = dict(state)
    for name, dims in structure.kept.items():
        for dim, kept in dims.items():
            small[name] = small[name].index_select(dim, torch.tensor(kept))
    return small


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A run to its target with averaging and validation, and what was seen of it.

    ``sources`` are the weights after each iteration, ``validated`` the masked columns
    of the model while it was validated, with its weights and the averaged ones before.
    """
    folder = tmp_path_factory.mktemp('ema')
    seen = {'sources': [], 'columns': [], 'validated': []}
    before = {}

    def after_iteration(runner):
        seen['sources'].append(weights(runner.model))
        seen['columns'].append(pruned_columns(runner, averaged(runner)))
        before.update(average=weights(averaged(runner)))

    def while_validating(runner):
        columns = pruned_columns(runner, runner.model)
        seen['validated'].append((columns, weights(runner.model), before['average']))

    watch = Call(after_train_iter=after_iteration, before_val_iter=while_validating)
    runner = toy_runner(
        folder,
        iters=40,
        hook=HOOK,
        hooks=[EMA, watch],
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=40, val_interval=3),
        val_cfg=dict(type='ValLoop'),
        val_dataloader=toy_loader(4, count=4),
        val_evaluator=dict(type='NoMetric'),
    )
    first = weights(runner.model)
    runner.train()
    (artifact,) = Path(runner.work_dir).glob('*_flops50.pth')
    return dict(seen, runner=runner, first=first, artifact=artifact)


def test_artifact_holds_the_averaged_weights_cut(run):
    """Those of the last iteration before; the model's own are beside them."""
    checkpoint = torch.load(run['artifact'], weights_only=True)
    structure = PruneStructure.from_dict(checkpoint['prune_structure'])
    average = run['sources'][0]  # averaging begins with a copy
    for source in run['sources'][1:-1]:
        average = {
            n: s if 'running' in n or 'num' in n else a.lerp(s, MOMENTUM)
            for (n, s), a in zip(source.items(), average.values(), strict=True)
        }
    assert len(run['sources']) > 5 and structure.kept
    expected = {'state_dict': average, 'source_state_dict': run['sources'][-1]}
    for key, state in expected.items():
        saved = checkpoint[key]
        for name, tensor in cut(state, structure).items():
            torch.testing.assert_close(saved[name], tensor, msg=f'{key} {name}')
    name = 'net.fpn1.weight'
    assert not torch.equal(checkpoint['state_dict'][name], saved[name])


def test_artifact_works_like_the_masked_average(run):
    toy = dict(type='ToyDetector')
    small = pruned_model(toy, run['artifact'])
    checkpoint = torch.load(run['artifact'], weights_only=True)
    small.load_state_dict(checkpoint['state_dict'])
    masked = MODELS.build(toy)
    state = dict(run['sources'][-1])
    structure = PruneStructure.from_dict(checkpoint['prune_structure'])
    for name, tensor in checkpoint['state_dict'].items():  # put back where it was
        for dim, kept in structure.kept.get(name, {}).items():
            shape = list(tensor.shape)
            shape[dim] = structure.sizes[name][dim]
            index = torch.tensor(kept)
            tensor = tensor.new_zeros(shape).index_copy(dim, index, tensor)
        state[name] = tensor
    masked.load_state_dict(state)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        outputs = [m.eval()(images) for m in (masked, small)]
    assert difference(*outputs) < 1e-9


def test_masked_columns_of_the_average_are_zero(run):
    counts = [sum(c.numel() for c in columns.values()) for columns in run['columns']]
    assert counts[0] == 0 < counts[2] < counts[-1]
    assert not any(c.any() for columns in run['columns'] for c in columns.values())


def test_validation_sees_the_masked_average(run):
    assert len(run['validated']) >= 2
    for columns, state, average in run['validated']:
        assert sum(c.numel() for c in columns.values())
        assert not any(c.any() for c in columns.values())
        assert all(torch.equal(t, average[n]) for n, t in state.items())


def test_average_that_starts_later(tmp_path):
    """Until then it is a copy of the model, masked like it."""
    runner = toy_runner(
        tmp_path,
        iters=4,
        hook=HOOK | dict(target=dict(flops=0.2)),
        hooks=[EMA | dict(begin_iter=99)],
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=100, val_interval=100),
    )
    runner.register_hook(Call(after_train_iter=_stop_after(4)), 'LOWEST')
    runner.train()
    assert (~pruner_of(runner).units.kept).sum() == 8
    state = averaged(runner).state_dict()
    assert all(torch.equal(t, state[n]) for n, t in runner.model.state_dict().items())


def _stop_after(iterations):
    def stop(runner):
        runner.train_loop.stop_training = runner.iter + 1 >= iterations

    return stop
