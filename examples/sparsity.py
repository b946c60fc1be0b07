"""Set two of every four weights of a detector to zero: minutes on two CPU cores.

The RetinaNet of handwritten digits in the repository trains on for a while with a
`SparsityHook`; the zeros are where sparse tensor cores want them. Run it in the
repository, whole or cell by cell (`# %%`). docs/sparsity.md says what it gains, where.
"""

# %% The config that trained it, and the hook
import json
import os
from pathlib import Path

from mmengine.config import Config
from mmengine.runner import Runner

import mmgfp  # registers the hook

DEMO = Path(mmgfp.__file__).parent.parent / 'configs/demo'
WORK = Path(os.environ.get('MMGFP_WORK', 'work_dirs/examples/sparsity'))
ITERATIONS = int(os.environ.get('MMGFP_ITERATIONS', 200))

config = Config.fromfile(DEMO / 'retinanet_r18_fpn_digits.py')
config.work_dir = str(WORK)
config.load_from = str(DEMO / 'retinanet_r18_fpn_digits.pth')
dataset = config.train_dataloader.dataset
dataset.update(data_root=str(WORK / 'digits'))
dataset.spec.update(num_train=8 * ITERATIONS, num_val=60)
config.val_cfg = config.val_dataloader = config.val_evaluator = None
config.train_cfg = dict(type='IterBasedTrainLoop', max_iters=ITERATIONS)
config.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=True)
config.param_scheduler = []
config.optim_wrapper.optimizer.lr = 5e-4
config.log_processor = dict(by_epoch=False)
config.default_hooks.checkpoint = dict(
    type='CheckpointHook', by_epoch=False, interval=ITERATIONS
)
config.custom_hooks = [dict(type='SparsityHook', kind='nm')]
Runner.from_cfg(config).train()

# %% What is left of each layer; those that stay dense are in the log, with reasons
report = json.loads((WORK / 'sparsity.json').read_text())
for name, layer in report['layers'].items():
    print(f'{name}: {layer["density"]:.0%}')
print(f'{report["density"]:.1%} of the weights that could go are left')
