"""Write a detector with 8 bits for onnxruntime, and test it: minutes on a CPU core.

The RetinaNet of handwritten digits in the repository, not pruned, as a file in floating
point and one that was calibrated on training images. Run it in the repository, whole or
cell by cell (`# %%`). A pruned model is exported likewise, from the config and weights
that tools/deploy_pruned.py wrote. Needed: mmgfp with onnxruntime.
"""

# %% One command; its options are in docs/export.md
import os
import subprocess
import sys
from pathlib import Path

import mmgfp

ROOT = Path(mmgfp.__file__).parent.parent
DEMO = ROOT / 'configs/demo/retinanet_r18_fpn_digits'
WORK = Path(os.environ.get('MMGFP_WORK', 'work_dirs/examples/eight_bits'))
IMAGES = os.environ.get('MMGFP_IMAGES', '100')

command = [
    *(sys.executable, str(ROOT / 'tools/export.py'), f'{DEMO}.py', f'{DEMO}.pth'),
    *('--out', str(WORK), '--name', 'digits', '--format', 'onnx', '--nms'),
    *('--int8', '--calib', IMAGES, '--eval'),
    *('--cfg-options', f'data_root={WORK / "digits"}/'),
]
subprocess.run(command, check=True)

# %% What was written
for name in ('digits', 'digits_int8'):
    print(f'{name}: {(WORK / name).with_suffix(".onnx").stat().st_size / 1e6:.2f} MB')
