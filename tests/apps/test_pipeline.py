"""The whole way, on a detector that is as small as can be."""

import json
import subprocess
import sys

import pytest
from support.tooling import ROOT

DEMO = ROOT / 'configs/demo/retinanet_r18_fpn_digits'

BASELINE = f"""
_base_ = ['{DEMO}.py']
data_root = 'digits/'
spec = dict(num_train=16, num_val=8, size=64, max_side=32)
model = dict(
    backbone=dict(base_channels=8),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=8),
    bbox_head=dict(in_channels=8, feat_channels=8),
    test_cfg=dict(score_thr=0.0),
)
data = dict(data_root=data_root, spec=spec)
train_dataloader = dict(batch_size=4, dataset=data)
val_dataloader = dict(batch_size=4, dataset=data)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/val.json')
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=1, val_interval=1)
param_scheduler = []
"""
PRUNE = """
_base_ = ['./small.py']
train_cfg = dict(
    _delete_=True, type='IterBasedTrainLoop', max_iters=200, val_interval=200
)
train_dataloader = dict(sampler=dict(type='InfiniteSampler', shuffle=True))
val_cfg = None
val_dataloader = None
val_evaluator = None
log_processor = dict(by_epoch=False)
default_hooks = dict(checkpoint=dict(by_epoch=False))
custom_hooks = [
    dict(
        type='FisherPruningHook',
        interval=2,
        target=dict(flops=0.5),
        units_per_step=40,
        divisor=1,
        input_shape=(3, 64, 64),
    )
]
"""
FINETUNE = """
_base_ = ['./small.py']
model = dict(
    _delete_=True,
    type='PrunedModel',
    architecture={{_base_.model}},
    structure='',
    backbone=dict(init_cfg=None),
)
"""


def run(folder):
    command = [ROOT / 'tools/pipeline.py', 'small.py', 'prune.py', 'finetune.py']
    flags = ['--work-dir', 'work', '--latency-rounds', '2']
    return subprocess.run(
        [sys.executable, *command, *flags],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )


@pytest.mark.slow
def test_pipeline_ends_in_a_table_and_goes_on_after_an_interruption(tmp_path):
    for name, text in (('small', BASELINE), ('prune', PRUNE), ('finetune', FINETUNE)):
        (tmp_path / f'{name}.py').write_text(text)
    first = run(tmp_path)
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-2000:]
    results = json.loads((tmp_path / 'work/results.json').read_text())
    baseline, pruned, tuned = results['rows']
    models = [row['model'] for row in results['rows']]
    assert models == ['baseline', 'pruned', 'fine-tuned']
    for cost in ('macs', 'memory', 'params'):
        assert pruned[cost] == tuned[cost] < baseline[cost]
    assert pruned['macs'] <= baseline['macs'] / 2
    assert all('coco/bbox_mAP' in row['metrics'] for row in results['rows'])
    assert set(results['seconds']) == {'baseline', 'prune', 'finetune', 'deploy'}
    assert '| fine-tuned |' in (tmp_path / 'work/results.md').read_text()
    assert (tmp_path / 'work/channels.png').stat().st_size > 0
    assert 'fine-tuned' in first.stdout

    # As after a kill during fine-tuning: the stages before it are not run again.
    for path in (tmp_path / 'work/done').iterdir():
        if path.stem not in ('baseline', 'prune'):
            path.unlink()
    second = run(tmp_path)
    assert second.returncode == 0, second.stderr[-2000:]
    assert 'baseline: finished before' in second.stdout
    assert 'prune: finished before' in second.stdout
    again = json.loads((tmp_path / 'work/results.json').read_text())
    assert again['rows'][0]['metrics'] == baseline['metrics']
