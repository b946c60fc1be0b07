"""The command `mmgfp`, which runs the tools: `mmgfp prune ...` is `tools/prune.py ...`.

It is a module beside the package, as importing the package imports torch, and help
should not take seconds.
"""

from __future__ import annotations

import ast
import importlib.util
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

#: Files in the folder of the tools, by command.
TOOLS = {
    'analyze': 'analyze',
    'prune': 'prune',
    'train': 'train',
    'test': 'test',
    'deploy': 'deploy_pruned',
    'export': 'export',
    'benchmark': 'benchmark',
    'profile': 'profile_latency',
    'sensitivity': 'sensitivity',
    'compare': 'compare',
    'report': 'report',
}


def package_folder() -> Path:
    """Return the folder of the package, without importing it."""
    spec = importlib.util.find_spec('mmgfp')
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def commands() -> dict[str, Path]:
    """Return the tools that are installed, by command.

    A wheel has them inside the package, a clone beside it.
    """
    package = package_folder()
    shipped = package / '.mim' / 'tools'
    folder = shipped if shipped.is_dir() else package.parent / 'tools'
    files = {name: folder / f'{stem}.py' for name, stem in TOOLS.items()}
    return {name: file for name, file in files.items() if file.is_file()}


def summary(tool: Path) -> str:
    """Return the first line of a tool's docstring."""
    docstring = ast.get_docstring(ast.parse(tool.read_text())) or ''
    return docstring.partition('\n')[0]


def help_text(tools: dict[str, Path]) -> str:
    """Return the commands, each with what it does."""
    width = max(map(len, tools), default=0)
    lines = [f'  {name:{width}}  {summary(tool)}' for name, tool in tools.items()]
    return '\n'.join(
        [
            'usage: mmgfp COMMAND ...',
            '',
            'Group Fisher Pruning for OpenMMLab',
            '',
            *lines,
            '',
            'mmgfp COMMAND --help says more; mmgfp --version tells the version',
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; a tool's own exit status passes through."""
    name, *rest = (sys.argv[1:] if argv is None else list(argv)) or ['']
    tools = commands()
    if name in ('', '-h', '--help'):
        print(help_text(tools))
        return 0 if name else 2
    if name == '--version':
        print(runpy.run_path(str(package_folder() / 'version.py'))['__version__'])
        return 0
    if name not in tools:
        known = ', '.join(tools)
        print(
            f'error: the command must be one of {known} (got {name}); '
            'mmgfp --help says what they do',
            file=sys.stderr,
        )
        return 2
    sys.argv = [f'mmgfp {name}', *rest]
    run(tools[name])
    return 0


def run(tool: Path) -> None:
    """Run a tool as the main module (runpy would set `sys.argv[0]` to its path)."""
    spec = importlib.util.spec_from_file_location('__main__', tool)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules['__main__'] = module
    spec.loader.exec_module(module)


if __name__ == '__main__':
    sys.exit(main())
