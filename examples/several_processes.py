"""Prune in two processes, cut the run off, and go on: minutes on two CPU cores.

The RetinaNet of handwritten digits in the repository is pruned by two processes, on two
GPUs where there are as many, else on the CPU. A second run with the same config is
stopped after its first checkpoint and resumed: it ends with the same channels and, on a
CPU, the same weights. Run it in the repository, whole or cell by cell (`# %%`).
"""

# %% A config that prunes, with half of the batch in each process
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

import mmgfp
from mmgfp import PruneStructure

ROOT = Path(mmgfp.__file__).parent.parent
DEMO = ROOT / 'configs/demo/retinanet_r18_fpn_digits'
WORK = Path(os.environ.get('MMGFP_WORK', 'work_dirs/examples/several_processes'))
ITERATIONS = int(os.environ.get('MMGFP_ITERATIONS', 100))

WORK.mkdir(parents=True, exist_ok=True)
(WORK / 'prune.py').write_text(f"""\
_base_ = '{DEMO}_prune.py'
load_from = '{DEMO}.pth'
train_cfg = dict(max_iters={2 * ITERATIONS})
data = dict(data_root='{WORK / 'digits'}', spec=dict(num_train={16 * ITERATIONS}))
train_dataloader = dict(batch_size=8, dataset=data)
default_hooks = dict(checkpoint=dict(interval={max(ITERATIONS // 4, 1)}))
custom_hooks = [
    dict(
        type='FisherPruningHook',
        target=dict(flops=0.5),
        normalize='memory',
        interval={max(ITERATIONS // 20, 1)},
        iterations={ITERATIONS},
        divisor=4,
        input_shape=(3, 128, 128),
    )
]
""")
ENVIRONMENT = dict(os.environ)
if torch.cuda.device_count() < 2:  # MMEngine would want a GPU for each process
    ENVIRONMENT['CUDA_VISIBLE_DEVICES'] = ''


def start(name, *options):
    """Start a run by torchrun, or go on with it."""
    command = [
        *(sys.executable, '-m', 'torch.distributed.run'),
        *('--standalone', '--nproc_per_node=2', str(ROOT / 'tools/train.py')),
        *(str(WORK / 'prune.py'), '--launcher', 'pytorch'),
        *('--work-dir', str(WORK / name), *options),
    ]
    return subprocess.Popen(command, env=ENVIRONMENT)


def finish(run):
    """Wait for a run's end."""
    if run.wait():
        sys.exit(f'the run ended with status {run.returncode}')


# %% A run from its start to its target
finish(start('whole'))

# %% The same, stopped as a scheduler would do it: both processes save, then end
run = start('cut')
while run.poll() is None and not [*(WORK / 'cut').glob('iter_*.pth')]:
    time.sleep(0.1)
run.send_signal(signal.SIGTERM)  # torchrun passes it on, and ends with a traceback
print(f'stopped, with status {run.wait()}')

# %% The same command with --resume goes on from the last checkpoint
finish(start('cut', '--resume'))

# %% Both have taken the same decisions
files = [WORK / name / 'prune_flops50.pth' for name in ('whole', 'cut')]
structures = [PruneStructure.load(file) for file in files]
print(f'same channels: {structures[0] == structures[1]}')
one, two = (torch.load(file, weights_only=True) for file in files)
states = one['state_dict'], two['state_dict']
print(f'same weights: {all(states[0][k].equal(states[1][k]) for k in states[0])}')
left = one['meta']['costs']['macs']['ratio']
print(f'pruned to {left:.1%} of the MACs: {files[1]}, and a report beside it')
