"""Pages lead where they say, what they show runs, and the site can be built."""

import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import HOOKS
from support.browser import BROWSER, NAMES, dom_of
from support.latency import made_up, write
from support.pages import PAGES, Page, read
from support.tooling import ROOT, load_tool

from mmgfp.selection.costs import LayerProfile
from mmgfp_command import TOOLS

RECIPES = read('docs/recipes.md')
#: Configs and parts of them that pages show; test_extending.py runs that of its page.
CONFIGS = [
    pytest.param(block, id=f'{path.stem}-{number}')
    for path in PAGES
    for number, block in enumerate(Page(path.read_text()).blocks())
    if path.stem != 'extending'
    and re.search(r'^(custom_hooks = |model = dict)', block, re.M)
]
#: Command lines of the tools that pages show in blocks of their own.
COMMANDS = sorted(
    {
        line
        for path in PAGES
        for block in Page(path.read_text()).blocks('bash')
        for line in re.findall(
            r'(?:tools/\w+\.py|^mmgfp \w+) [^\n#|;]*', block.replace('\\\n', ' '), re.M
        )
    }
)


@pytest.mark.parametrize('path', PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_that_exist(path):
    for link in Page(path.read_text()).links():
        name, _, anchor = link.partition('#')
        target = path.parent / name if name else path
        assert target.exists(), f'{link} leads nowhere'
        if anchor:
            known = Page(target.read_text()).anchors()
            assert anchor in known, f'{link} names none of the headings {known}'


def test_links_and_headings_are_found():
    page = Page(
        '# What it is, and `why`\n[a](b.md#c) ![d](e.png) [w](https://x.y)\n'
        'and [f\n](g.md), not `[h](i)`\n```python\n# [j](k)\nl = 1\n```\n'
    )
    assert page.links() == ['b.md#c', 'e.png', 'g.md']
    assert page.anchors() == {'what-it-is-and-why'}
    assert page.blocks() == ['# [j](k)\nl = 1\n']


def test_every_page_is_in_the_menu_of_the_site():
    menu = (ROOT / 'docs/index.md').read_text()
    for path in ROOT.glob('docs/*.md'):
        assert path.stem == 'index' or f'\n{path.stem}\n' in menu, path.name


@pytest.mark.parametrize('block', CONFIGS)
def test_config_of_a_page_can_be_read_and_its_hooks_built(block, tmp_path, monkeypatch):
    """Where it builds on others, or on a latency profile, they are there."""
    monkeypatch.chdir(tmp_path)
    layer = LayerProfile(macs_positions=64 * 64, out_positions=64 * 64)
    profile = made_up({'a.weight': (4, 3, 1, 1)}, {'a.weight': layer})
    write(profile, tmp_path / 'table.json')
    base = "_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'"
    (tmp_path / 'my_config.py').write_text(base)
    for name in ('my_prune.py', 'my_finetune.py'):
        (tmp_path / name).write_text(RECIPES.block(f'# {name}\n'))
    (tmp_path / 'shown.py').write_text(block)
    config = Config.fromfile('shown.py')
    for hook in config.get('custom_hooks', []):
        HOOKS.build(hook)
    if config.get('model', {}).get('type') == 'PrunedModel':
        assert config.model.architecture.type == 'RetinaNet'
        assert config.model.structure == config.load_from


def test_recipe_for_plain_pytorch_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    scope = {'__name__': 'recipe'}
    exec(RECIPES.block('GroupFisherPruner('), scope)
    small, again, images = (scope[n] for n in ('small', 'again', 'images'))
    assert small.stem.out_channels == small.body.out_channels < 16
    torch.testing.assert_close(small(images), again(images))


@pytest.mark.parametrize('command', COMMANDS)
def test_tools_take_the_arguments_that_pages_give_them(command, monkeypatch):
    words = shlex.split(command.replace(' C H W', ' 3 64 64'))
    if words[0] == 'mmgfp':
        words[:2] = [TOOLS[words[1]]]
    monkeypatch.setattr(sys, 'argv', words)
    assert vars(load_tool(Path(words[0]).stem).parse_args())


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    """The site, built with warnings as errors."""
    if missing := [n for n in ('sphinx', 'furo', 'myst_parser') if not find_spec(n)]:
        pytest.skip(f'needs {", ".join(missing)}: pip install "mmgfp[docs]"')
    folder = tmp_path_factory.mktemp('site')
    command = [sys.executable, '-m', 'sphinx', '--fail-on-warning', '--keep-going']
    command += ['-q', '-d', folder / 'doctrees', ROOT / 'docs', folder / 'html']
    env = os.environ | {'PYTHONPATH': str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / 'html'


@pytest.mark.slow
def test_site_has_the_options_and_the_files_outside_of_its_folder(site):
    options = (site / 'options.html').read_text()
    assert 'compact_interval' in options and 'max_inputs' in options
    (page,) = (site / '_downloads').glob('*/CONTRIBUTING.md')
    assert page.read_text() == (ROOT / 'CONTRIBUTING.md').read_text()


@pytest.mark.slow
def test_site_takes_nothing_from_the_network(site):
    pages = list(site.rglob('*.html'))
    assert len(pages) > 30
    for page in pages:
        taken = re.findall(r'(?:src|<link [^>]*href)="([^"]*)"', page.read_text())
        assert not [address for address in taken if '//' in address], page.name


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason=f'needs one of {", ".join(NAMES)}')
def test_search_of_the_site_works_in_a_browser(site, tmp_path):
    page, said = dom_of(site / 'search.html', 'q=latency', tmp_path)
    assert said == []
    found = re.findall(r'<li class="kind-\w+"><a href="([\w/-]+)\.html', page)
    assert found[0] == 'latency' and 'paper' not in found
    page, _ = dom_of(site / 'search.html', 'q=xyzzyx', tmp_path)
    assert '<li class="kind-' not in page and 'did not match any documents' in page
