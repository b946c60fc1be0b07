"""Prune a one-stage detector by an entry in its config: minutes on two CPU cores.

A RetinaNet that has learned to detect handwritten digits (its weights are in the
repository) is pruned to half of its multiply-adds, fine-tuned for a while, and written
as a config and weights that need nothing else. Run it in the repository, whole or cell
by cell (`# %%`). `mmgfp prune` does all of this in one command (docs/recipes.md).
"""

# %% The config that trained it
import os
from pathlib import Path

from mmengine.config import Config
from mmengine.runner import Runner

import mmgfp  # registers the hooks and PrunedModel
from mmgfp.engine.deploy import deploy, read_deployable

DEMO = Path(mmgfp.__file__).parent.parent / 'configs/demo'
WORK = Path(os.environ.get('MMGFP_WORK', 'work_dirs/examples/one_stage'))
ITERATIONS = int(os.environ.get('MMGFP_ITERATIONS', 200))


def trained():
    """The config that trained the detector, with fewer images."""
    config = Config.fromfile(DEMO / 'retinanet_r18_fpn_digits.py')
    config.data_root = str(WORK / 'digits')
    for split in ('train', 'val', 'test'):
        dataset = config[f'{split}_dataloader'].dataset
        dataset.data_root = config.data_root
        dataset.spec.update(num_train=8 * ITERATIONS, num_val=60)
        if split != 'train':
            evaluator = config[f'{split}_evaluator']
            evaluator.ann_file = f'{config.data_root}/annotations/val.json'
    return config


def by_iterations(config, name, count):
    """Let a config train so many iterations, and validate at their end."""
    config.work_dir = str(WORK / name)
    config.train_cfg = dict(type='IterBasedTrainLoop', max_iters=count)
    config.train_cfg['val_interval'] = count
    config.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=True)
    config.log_processor = dict(by_epoch=False)
    config.default_hooks.checkpoint = dict(
        type='CheckpointHook', by_epoch=False, interval=count
    )
    config.param_scheduler = []
    return config


# %% Prune it while it trains: the weights, a tenth of the rate, and the hook
config = by_iterations(trained(), 'prune', 2 * ITERATIONS)
config.load_from = str(DEMO / 'retinanet_r18_fpn_digits.pth')
config.optim_wrapper.optimizer.lr = 2e-4
config.val_cfg = config.val_dataloader = config.val_evaluator = None
config.custom_hooks = [
    dict(
        type='FisherPruningHook',
        target=dict(flops=0.5),
        normalize='memory',
        interval=max(ITERATIONS // 20, 1),
        iterations=ITERATIONS,
        divisor=4,  # the layers are narrow
        input_shape=(3, 128, 128),
    )
]
runner = Runner.from_cfg(config)
runner.train()
(pruned,) = Path(config.work_dir).glob('*_flops50.pth')
print(f'pruned: {pruned}, and a report beside it')

# %% Fine-tune it: the same model, cut down to what the file says
config = by_iterations(trained(), 'finetune', ITERATIONS)
config.load_from = str(pruned)
config.model = dict(
    type='PrunedModel', architecture=config.model, structure=str(pruned)
)
config.optim_wrapper.optimizer.lr = 5e-4
runner = Runner.from_cfg(config)
runner.train()

# %% Write it as a folder that is complete in itself
weights = Path(config.work_dir) / f'iter_{ITERATIONS}.pth'
files = deploy(config, read_deployable(config, weights), WORK / 'small', 'small')
print(', '.join(map(str, files.values())))
