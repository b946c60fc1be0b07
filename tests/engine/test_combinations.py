"""Any two options meet in a run that reaches its target, or are refused in one line."""

import copy
import re

import pytest
import torch
from mmengine.runner import Runner
from support.combinations import check_end, pairwise
from support.runs import (
    artifacts,
    assert_ranks_agree,
    one_stage,
    tiny_classifier,
    train,
)

from mmgfp import PruningConfig
from mmgfp.utils.errors import ConfigError

#: Options by a short name of each value; the first one of each is the default.
FACTORS = {
    'criterion': {
        'fisher': 'fisher',
        'taylor': 'taylor',
        'taylor of weights': dict(type='taylor', of='weights'),
        'l1': 'l1',
        'l2': 'l2',
        'fpgm': 'fpgm',
        'lamp': 'lamp',
        'bn_scale': dict(type='bn_scale', sparsity=1e-4),
        'activation': 'activation',
        'random': 'random',
    },
    'schedule': {
        'fixed': dict(units_per_step=4),
        'auto': dict(schedule=dict(type='auto', share=0.5)),
        'linear': dict(iterations=10),
        'cubic': dict(schedule=dict(type='cubic', iterations=10)),
        'one_shot': dict(schedule='one_shot'),
    },
    'scope': {'global': 'global', 'local': 'local'},
    'recover': {'off': False, 'on': True},
    'compensate': {
        'none': 'none',
        'fisher': dict(method='fisher', images=8),
        'bn': dict(method='bn', images=8),
    },
    'compact_interval': {'none': None, '4': 4},
    'statistics_interval': {'1': 1, '2': 2},
    'average': {'none': [], 'EMA': [dict(type='EMAHook', momentum=0.3)]},
    'precision': {
        'single': {},
        'half': dict(type='CpuAmpOptimWrapper', dtype=torch.bfloat16),
        'scaler': dict(type='CpuAmpOptimWrapper', scaler=dict(init_scale=2.0**8)),
    },
    'processes': {'1': 1, '2': 2},
    'teacher': {'none': [], 'distillation': [dict(type='DistillationHook')]},
    'blocks': {'off': False, 'on': True},
    'weights': {'dense': [], '2:4': [dict(type='SparsityHook', kind='nm', interval=2)]},
}

_ADD_UP = ('fisher', 'taylor')
_AT_ONCE = 'units_per_step or schedule must be one that goes with the criterion'
#: All pairs that are refused, and how the line begins (docs/limits.md).
REFUSED = {
    **{
        (('schedule', 'auto'), ('criterion', name)): _AT_ONCE
        for name in FACTORS['criterion']
        if name not in _ADD_UP
    },
    **{
        (('blocks', 'on'), ('criterion', name)): 'criterion must be one that scores res'
        for name in FACTORS['criterion']
        if name not in _ADD_UP
    },
    (
        ('blocks', 'on'),
        ('scope', 'local'),
    ): "scope must be 'global' where",
    (('blocks', 'on'), ('recover', 'on')): 'blocks must be False',
    (('recover', 'on'), ('criterion', 'taylor of weights')): 'criterion must be one',
    (('recover', 'on'), ('schedule', 'one_shot')): 'schedule must be one of several',
    (('recover', 'on'), ('compact_interval', '4')): 'compact_interval must be None',
    (('recover', 'on'), ('compensate', 'fisher')): "compensate must be 'none'",
    (('recover', 'on'), ('compensate', 'bn')): "compensate must be 'none'",
}
ROWS = pairwise(FACTORS, REFUSED)
DEFAULTS = {name: next(iter(values)) for name, values in FACTORS.items()}


def options_of(row):
    """The options of pruning."""
    value = {name: FACTORS[name][row[name]] for name in row}
    names = ('criterion', 'scope', 'recover', 'blocks', 'compensate')
    names += ('compact_interval', 'statistics_interval')
    # What a SparsityHook takes: no masked channels are left for it.
    divisor = 8 if row['weights'] != 'dense' else 2
    fixed = dict(interval=2, target=dict(flops=0.7), divisor=divisor)
    return copy.deepcopy(
        fixed | {name: value[name] for name in names} | value['schedule']
    )


def config_of(row, folder, teacher):
    """A run of a small ResNet with the options of a row."""
    config = one_stage(tiny_classifier(folder))
    iterations = 30 if row['weights'] == 'dense' else 40
    config.train_cfg = dict(type='IterBasedTrainLoop', max_iters=iterations)
    config.update(val_cfg=None, val_dataloader=None, val_evaluator=None)
    config.default_hooks.checkpoint.update(save_best=None, interval=4)
    config.optim_wrapper.update(FACTORS['precision'][row['precision']])
    further = [
        *FACTORS['average'][row['average']],
        *FACTORS['teacher'][row['teacher']],
        *FACTORS['weights'][row['weights']],
    ]
    for hook in copy.deepcopy(further):
        if hook['type'] == 'DistillationHook':
            hook['checkpoint'] = str(teacher)
        config.custom_hooks.append(hook)
    config.custom_hooks[0] = dict(type='ChannelPruningHook', **options_of(row))
    return config


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp('teacher')
    config = config_of(DEFAULTS, folder, None)
    config.custom_hooks = []
    path = folder / 'teacher.pth'
    torch.save({'state_dict': Runner.from_cfg(config).model.state_dict()}, path)
    return path


def quick_and_slow():
    """All rows; those in one process that bring most pairs together are quick."""
    quick = [i for i, row in enumerate(ROWS) if row['processes'] == '1'][:6]
    for i, row in enumerate(ROWS):
        marks = () if i in quick else pytest.mark.slow
        changed = [v for f, v in row.items() if v != DEFAULTS[f]]
        yield pytest.param(row, marks=marks, id=', '.join(changed) or 'defaults')


@pytest.mark.parametrize('row', quick_and_slow())
def test_run_ends_at_its_target_with_masked_equal_to_compact(row, tmp_path, teacher):
    config = config_of(row, tmp_path, teacher)
    if row['processes'] == '2':
        assert train(config, change=check_end, processes=2) == [0, 0]
        assert_ranks_agree(config)
    else:
        torch.manual_seed(0)
        runner = Runner.from_cfg(config)
        check_end(runner, 0)
        runner.train()
    assert [path.name for path in artifacts(config)] == ['tiny_flops70.pth']


@pytest.mark.parametrize(
    'pair', REFUSED, ids=lambda pair: ', '.join(v for _, v in pair)
)
def test_refused_pairs_say_why_in_one_line(pair):
    with pytest.raises(ConfigError) as error:
        PruningConfig(**options_of(DEFAULTS | dict(pair)))
    line = str(error.value)
    assert line.startswith(REFUSED[pair])
    assert re.fullmatch(r'.+ must be .+ \(got .+\); .+', line)


def test_every_pair_is_in_a_row_or_refused():
    names = list(FACTORS)
    for i, one in enumerate(names):
        for two in names[i + 1 :]:
            for a in FACTORS[one]:
                for b in FACTORS[two]:
                    pair = ((one, a), (two, b))
                    is_refused = pair in REFUSED or pair[::-1] in REFUSED
                    rows = [r for r in ROWS if r[one] == a and r[two] == b]
                    assert bool(rows) != is_refused, pair
