"""Variants of the hook, and the comparison of what they leave."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from support.tooling import ROOT, load_tool

from mmgfp import FisherPruningHook
from mmgfp.apps.stages import find_hook, parse_options
from mmgfp.engine.model_building import build_model
from mmgfp.utils.errors import ConfigError

CIFAR = [
    str(ROOT / f'configs/cifar10/resnet20_cifar10{stage}.py')
    for stage in ('', '_prune', '_finetune')
]


ablation = load_tool('ablation')


def parse(*flags):
    return ablation.parse_args([*CIFAR, '--work-dir', 'work', *flags])


def test_variants_are_the_papers_unless_told():
    assert list(ablation.variants_of(parse())) == ['M', 'F', 'U', 'I']
    told = parse('--variant', 'U', '--variant', 'slow', 'interval=50', 'normalize=none')
    assert ablation.variants_of(told) == {
        'U': ['normalize=none', 'divisor=1'],
        'slow': ['interval=50', 'normalize=none'],
    }


@pytest.mark.parametrize(
    ('flags', 'words'),
    [
        (['--variant', 'slow'], 'variant slow must have settings'),
        (['--variant', 'M', '--variant', 'M'], 'got the name twice'),
    ],
)
def test_variants_without_a_meaning_are_refused(flags, words):
    with pytest.raises(ConfigError, match=words):
        ablation.variants_of(parse(*flags))


def test_each_variant_changes_the_hook_wherever_it_stands(tmp_path):
    config = Config.fromfile(CIFAR[1])
    config.custom_hooks.insert(0, dict(type='EMAHook'))
    place, hook = find_hook(config)
    assert place == 1 and hook['interval'] == 25
    config.dump(tmp_path / 'prune.py')
    args = parse()
    args.prune = str(tmp_path / 'prune.py')
    comparison = ablation.comparison_of(args)
    comparison.check_configs()
    assert [run.name for run in comparison.runs] == [f'{n}, flops=0.5' for n in 'MFUI']
    files = dict(baseline_checkpoint='a.pth')
    for run, settings in zip(comparison.runs, ablation.PAPER.values(), strict=True):
        hooks = comparison.prune_config(run, files).custom_hooks
        assert hooks[0] == dict(type='EMAHook')
        changed = {k: v for k, v in hooks[1].items() if k != 'type'}
        FisherPruningHook(**changed)  # raises on anything unknown
        expected = parse_options(settings)
        assert {k: changed[k] for k in expected} == expected


def write_images(folder, count):
    rng = np.random.default_rng(0)
    for name in range(10):
        for i in range(count):
            image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            path = Path(folder, f'class_{name}', f'{i}.png')
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), image)


@pytest.mark.slow
def test_ablation_ends_in_a_table(tmp_path, run_tool):
    write_images(tmp_path / 'data/train', 8)
    write_images(tmp_path / 'data/test', 2)
    write_images(tmp_path / 'more/test', 1)
    model = build_model(Config.fromfile(CIFAR[0]))
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'start.pth')
    settings = ['interval=1', 'units_per_step=60']
    done = run_tool(
        'ablation.py',
        *(*CIFAR, '--work-dir', tmp_path / 'work', '--checkpoint'),
        *(tmp_path / 'start.pth', '--latency-rounds', 2, '--batches', 1, 2),
        *('--variant', 'M', 'normalize=memory', *settings),
        *('--variant', 'I', 'coupled=False', *settings),
        *('--also', 'more', f'test_dataloader.dataset.data_root={tmp_path}/more/'),
        *('--cfg-options', f'data_root={tmp_path}/data/'),
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    results = json.loads((tmp_path / 'work/results.json').read_text())
    baseline, *variants = results['rows']
    assert [row['model'] for row in results['rows']] == ['baseline', 'M', 'I']
    assert baseline['macs'] == pytest.approx(40.8e6, rel=1e-3)
    for row in variants:
        assert row['macs'] <= baseline['macs'] / 2
        assert row['latency_ms'].keys() == {'1', '2'}
        assert row['also']['more']['name'] == 'top-1'
        assert row['metric']['std'] is None
    assert set(results['seconds']) == {'baseline', 'M', 'I'}
    text = (tmp_path / 'work/results.md').read_text()
    assert '- all that are pruned: `interval=1, units_per_step=60`' in text
    assert 'top-1, more' in text and '- I: `coupled=False`' in text
    assert '- command: `python ' in text
    # What -I leaves alone: the residual stream keeps its width.
    (path,) = (tmp_path / 'work/pruned/I').rglob('*_flops50.pth')
    weights = torch.load(path, weights_only=True)['state_dict']
    assert weights['backbone.layer3.2.conv2.weight'].shape[0] == 64
    assert weights['backbone.layer3.2.conv1.weight'].shape[0] < 64
