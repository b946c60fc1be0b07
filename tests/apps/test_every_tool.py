"""Every tool on every kind of model: one and two stages, masks, a classifier."""

import json
from pathlib import Path

import pytest
import torch
from support.small_configs import stages

RATIO = 0.7


def succeed(done):
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['retinanet', 'faster', 'mask', 'classifier'])
def test_every_tool(kind, run_tool, tmp_path):
    configs, work = stages(tmp_path, kind), tmp_path / 'work'
    common = ('--work-dir', work, '--latency-rounds', 1)
    own = ('--prune-config', configs[1], '--finetune-config', configs[2])
    # train thrice, test thrice, deploy, and all costs and times
    done = run_tool('prune.py', configs[0], *own, *common, limit=1800)
    assert 'fine-tuned' in succeed(done)
    rows = json.loads((work / 'results.json').read_text())['rows']
    baseline, pruned, tuned = rows
    for cost in ('macs', 'memory', 'params'):
        assert pruned[cost] == tuned[cost] < baseline[cost]
    assert pruned['macs'] <= RATIO * baseline['macs']
    assert all(row['latency_ms']['1'] > 0 and row['metrics'] for row in rows)
    if kind == 'mask':
        assert {'coco/bbox_mAP', 'coco/segm_mAP'} <= tuned['metrics'].keys()

    weights, report = work / 'baseline/epoch_1.pth', tmp_path / 'report.json'
    shape = ('--input-shape', 3, 64, 64, '--json', report)
    succeed(run_tool('analyze.py', configs[1], weights, *shape))
    assert json.loads(report.read_text())['macs'] == baseline['macs']

    # The fine-tuned checkpoint names no size, but its config the pruned one that does.
    checkpoint = work / 'finetune/epoch_1.pth'
    (artifact,) = (work / 'prune').glob('prune_flops70.pth')
    assert 'input_shape' not in torch.load(checkpoint, weights_only=False)['meta']
    command = [configs[2], checkpoint, '--out', tmp_path / 'out', '--rounds', 1]
    options = ['--cfg-options', f'model.structure={artifact}']
    said = succeed(run_tool('deploy_pruned.py', *command, *options))
    assert f'an image of (3, 64, 64), as {artifact} says' in said
    summary = json.loads((tmp_path / 'out/summary.json').read_text())
    for cost in ('macs', 'memory', 'params'):
        assert summary['pruned'][cost] == tuned[cost]
        assert summary['original'][cost] == baseline[cost]
    assert all(summary[key]['latency_ms'] > 0 for key in ('original', 'pruned'))

    other = ('--work-dir', tmp_path / 'ablation', '--latency-rounds', 1)
    variant = ('--variant', 'U', '--checkpoint', weights)
    done = run_tool('ablation.py', *configs, *other, *variant, limit=1800)
    assert 'U' in succeed(done)
    results = json.loads((tmp_path / 'ablation/results.json').read_text())
    assert [row['model'] for row in results['rows']] == ['baseline', 'U']
    assert results['rows'][0]['macs'] == baseline['macs']
    assert results['rows'][1]['macs'] <= RATIO * baseline['macs']
    assert Path(tmp_path / 'ablation/channels_U.png').stat().st_size > 0
