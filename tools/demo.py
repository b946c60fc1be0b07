"""Prune a small detector on handwritten digits: minutes on two CPU cores."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / 'configs' / 'demo'
NAME = 'retinanet_r18_fpn_digits'
WEIGHTS = CONFIGS / f'{NAME}.pth'  # converged, so that training is no stage here


def main() -> int:
    """Run the pipeline on the demo's configs and weights, with any further flags."""
    stages = [CONFIGS / f'{NAME}{stage}.py' for stage in ('', '_prune', '_finetune')]
    command = [
        sys.executable,
        str(ROOT / 'tools' / 'pipeline.py'),
        *(str(path.relative_to(ROOT)) for path in stages),
        *('--checkpoint', str(WEIGHTS.relative_to(ROOT))),
        *('--work-dir', 'work_dirs/demo'),
        *sys.argv[1:],
    ]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == '__main__':
    sys.exit(main())
