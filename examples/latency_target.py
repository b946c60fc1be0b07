"""Prune a detector to a latency in milliseconds, and verify it: minutes on a CPU core.

The layers of the RetinaNet of handwritten digits in the repository are timed in
onnxruntime on this machine; the model is pruned until the profile predicts what was
asked for, deployed, and timed beside the unpruned one. Run it in the repository, whole
or cell by cell (`# %%`), on a machine that does nothing else (docs/latency.md).
Needed: mmgfp with onnxruntime.
"""

# %% What layers take at any widths
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.runner import Runner

import mmgfp
from mmgfp.engine.deploy import deploy, read_deployable
from mmgfp.selection.latency_profile import LatencyProfile

ROOT = Path(mmgfp.__file__).parent.parent
DEMO = ROOT / 'configs/demo/retinanet_r18_fpn_digits'
WORK = Path(os.environ.get('MMGFP_WORK', 'work_dirs/examples/latency_target'))
ITERATIONS = int(os.environ.get('MMGFP_ITERATIONS', 100))
CUTS = os.environ.get('MMGFP_CUTS', '25')


def tool(name, *arguments):
    """Run one of the repository's tools."""
    command = [sys.executable, str(ROOT / f'tools/{name}.py'), *map(str, arguments)]
    subprocess.run(command, check=True)


table = WORK / 'latency.json'
size = ('--input-shape', 3, 128, 128)
tool('profile_latency', f'{DEMO}.py', '--out', table, '--cuts', CUTS, *size)

# %% The target, as the share of the whole model's time that the hook takes
profile = LatencyProfile.load(table)
whole = sum(sum(layer.times) for layer in profile.layers.values())  # ms at full width
goal = float(os.environ.get('MMGFP_MILLISECONDS', 0.6 * whole))
if goal >= whole:
    sys.exit(f'the model takes {whole:.2f} ms as it is; ask for less than that')

# %% Prune it while it trains
config = Config.fromfile(f'{DEMO}_prune.py')
config.work_dir, config.load_from = str(WORK / 'prune'), f'{DEMO}.pth'
dataset = config.train_dataloader.dataset
dataset.data_root = str(WORK / 'digits')
dataset.spec.update(num_train=8 * ITERATIONS, num_val=60)
config.train_cfg.max_iters = 2 * ITERATIONS
config.custom_hooks = [
    dict(
        type='FisherPruningHook',
        latency_profile=str(table),
        target=dict(latency=goal / whole),
        normalize='latency',
        divisor='auto',
        interval=max(ITERATIONS // 20, 1),
        iterations=ITERATIONS,
    )
]
Runner.from_cfg(config).train()
(pruned,) = (WORK / 'prune').glob('*_latency*.pth')
predicted = torch.load(pruned, weights_only=True)['meta']['costs']['latency']

# %% Deploy it; fine-tuning (one_stage.py) would come first, and changes no time
config = Config.fromfile(f'{DEMO}.py')
deploy(config, read_deployable(config, pruned), WORK / 'small', 'small')

# %% Time both, in turns. Runs of one model in a row, as in the profile, find warmer
# caches, so both may take longer than there; the share is what was aimed at.
times = WORK / 'times.json'
command = [f'{DEMO}.py:{DEMO}.pth', WORK / 'small', '--runtime', 'onnxruntime']
tool('benchmark', *command, '--no-memory', '--json', times, *size)
rows = json.loads(times.read_text())['rows']
before, after = (row['cpu_ms']['median'] for row in rows)
print(f'profiled: {whole:.2f} ms; target: {goal:.2f} ms')
print(f'predicted: {predicted["remaining"]:.2f} ms, {predicted["ratio"]:.1%}')
print(f'measured: {before:.2f} ms before, {after:.2f} ms after, {after / before:.1%}')
print(f'the model is in {WORK / "small"}, the profile in {table}')
