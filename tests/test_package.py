"""The package's own rules: who imports whom, how long things are, what is light."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest
from support.tooling import ROOT

PACKAGE = ROOT / 'mmgfp'
FILES = {
    '.'.join(p.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__'): p
    for p in PACKAGE.rglob('*.py')
}
#: What a newcomer reads, as the page on the architecture lists it.
PATH = re.findall(
    r'^\d\. `(mmgfp/[\w/]+\.py)`',
    (ROOT / 'docs' / 'architecture.md').read_text(),
    re.MULTILINE,
)
#: Packages that may import OpenMMLab.
OPENMMLAB = {f'mmgfp.{part}' for part in ('engine', 'export', 'apps', 'demo')}
MOST_LINES = {'function': 50, 'class': 250, 'reading path': 2000}


def imports_of(name):
    """Modules that one imports when it runs, type checking left out."""
    found = set()
    stack = [ast.parse(FILES[name].read_text())]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.If) and 'TYPE_CHECKING' in ast.unparse(node.test):
            stack += node.orelse
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f'{node.module}.{a.name}' for a in node.names} | {node.module}
        else:
            stack += ast.iter_child_nodes(node)
    return found


def part_of(name):
    """The package a module is in; those at the top stand for themselves."""
    return '.'.join(name.split('.')[:2])


def own(names):
    return {n for n in names if n in FILES and n != 'mmgfp'}


def test_no_package_imports_one_that_imports_it():
    graph = {}
    for name in FILES.keys() - {'mmgfp'}:
        parts = {part_of(n) for n in own(imports_of(name))} - {part_of(name)}
        graph.setdefault(part_of(name), set()).update(parts)
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    # Stages know nothing of what orchestrates them.
    stages = ['tracing', 'discovery', 'criteria', 'selection', 'surgery', 'utils']
    for stage in (f'mmgfp.{s}' for s in stages):
        assert graph[stage] <= {f'mmgfp.{s}' for s in (*stages, 'groups')}
        assert order.index(stage) < order.index('mmgfp.pruner')
    assert graph['mmgfp.sparsity'] <= {'mmgfp.selection', 'mmgfp.utils'}
    beside = {f'mmgfp.{s}' for s in ('groups', 'surgery', 'tracing', 'utils')}
    assert graph['mmgfp.compensation'] <= beside
    assert 'mmgfp.engine' not in graph['mmgfp.pruner'] | graph['mmgfp.checkpoint']


def test_openmmlab_stays_in_its_place():
    for name in FILES:
        if part_of(name) not in OPENMMLAB:
            roots = {n.partition('.')[0] for n in imports_of(name)}
            assert not roots & {'mmengine', 'mmdet', 'mmcv', 'mmpretrain'}, name


def test_selection_is_arithmetic():
    """Neither its modules nor what they import needs torch."""
    reached, stack = set(), [n for n in FILES if n.startswith('mmgfp.selection.')]
    while stack:
        name = stack.pop()
        if name not in reached:
            reached.add(name)
            found = imports_of(name)
            assert 'torch' not in {n.partition('.')[0] for n in found}, name
            stack += own(found)
    assert len(reached) > 4


@pytest.mark.parametrize('heavy', ['mmdet', 'cv2', 'matplotlib', 'mmpretrain'])
def test_import_is_light(heavy):
    code = f'import mmgfp, sys; sys.exit({heavy!r} in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], check=False).returncode == 0


def test_a_wheel_has_all_files():
    text = (ROOT / 'pyproject.toml').read_text()
    shipped = re.search(r'^mmgfp = \[(.*)\]', text, re.MULTILINE)[1]
    others = {
        p for p in PACKAGE.rglob('*') if p.is_file() and '__pycache__' not in p.parts
    }
    others = {
        str(p.relative_to(PACKAGE)) for p in others if p.suffix not in ('.py', '.pyc')
    }
    assert others == set(re.findall("'(.*?)'", shipped))


def test_nothing_is_too_long_to_read():
    for path in [*PACKAGE.rglob('*.py'), *(ROOT / 'tools').glob('*.py')]:
        for node in ast.walk(ast.parse(path.read_text())):
            kind = {ast.FunctionDef: 'function', ast.ClassDef: 'class'}.get(type(node))
            if kind:
                length = node.end_lineno - node.lineno + 1
                assert length <= MOST_LINES[kind], f'{path}: {node.name}'


def test_reading_path_is_short():
    assert len(PATH) == 9
    lines = sum(len((ROOT / p).read_text().splitlines()) for p in PATH)
    assert lines <= MOST_LINES['reading path']
