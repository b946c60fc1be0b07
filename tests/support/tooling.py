"""The repository's tools as modules."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def load_tool(name):
    """Import ``tools/<name>.py`` without running it."""
    path = ROOT / 'tools' / f'{name}.py'
    spec = importlib.util.spec_from_file_location(f'tool_{name}', path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
