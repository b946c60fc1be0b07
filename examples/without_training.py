"""Prune a detector without training, and look at the report: minutes on a CPU core.

Some training images score the channels of a RetinaNet that detects handwritten digits
(its weights are in the repository); those that matter least go, and the layers that
read them are refitted. Run it in the repository, whole or cell by cell (`# %%`).
"""

# %% One command; everything about it is in docs/compensation.md
import json
import os
import subprocess
import sys
from pathlib import Path

import mmgfp

ROOT = Path(mmgfp.__file__).parent.parent
DEMO = ROOT / 'configs/demo/retinanet_r18_fpn_digits'
WORK = Path(os.environ.get('MMGFP_WORK', 'work_dirs/examples/without_training'))
IMAGES = os.environ.get('MMGFP_IMAGES', '256')

command = [
    *(sys.executable, str(ROOT / 'tools/prune.py')),
    *(f'{DEMO}.py', f'{DEMO}.pth', '--no-train', '--target', 'flops=0.7'),
    *('--images', IMAGES, '--max-images', IMAGES, '--divisor', '4'),
    *('--work-dir', str(WORK), '--cfg-options', f'data_root={WORK / "digits"}/'),
]
subprocess.run(command, check=True)

# %% What it cost and brought
result = json.loads((WORK / 'summary.json').read_text())
for row in result['rows']:
    print(f'{row["model"]}: {row["macs"] / 1e6:.0f} M MACs, mAP {row["metric"]:.1f}')
print(f'open {WORK / "report.html"} in a browser')
