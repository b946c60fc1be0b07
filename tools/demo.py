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
    """Run all stages on the demo's configs and weights, with any further flags."""
    folder = CONFIGS.relative_to(ROOT)
    command = [
        sys.executable,
        str(ROOT / 'tools' / 'prune.py'),
        *(str(folder / f'{NAME}.py'), str(WEIGHTS.relative_to(ROOT))),
        *('--prune-config', str(folder / f'{NAME}_prune.py')),
        *('--finetune-config', str(folder / f'{NAME}_finetune.py')),
        *('--work-dir', 'work_dirs/demo'),
        *sys.argv[1:],
    ]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == '__main__':
    sys.exit(main())
