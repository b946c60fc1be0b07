"""Every config of the installed libraries: is it pruned, how much, and proven?"""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub

from mmgfp.analysis import coverage
from mmgfp.engine.demo_batch import build_model, demo_batch
from mmgfp.engine.inputs import BatchCalls
from mmgfp.errors import ConfigError
from mmgfp.groups import Grouping
from mmgfp.pruner import DISPROVED, GroupFisherPruner
from mmgfp.recording import undisturbed
from mmgfp.verify import disagreement, random_units

LIBRARIES = ('mmdet', 'mmpretrain')
#: Folders that hold parts of configs.
PARTS = ('_base_', 'common', 'dsdl')
#: What names of the smaller and of the larger variants of a model contain.
SMALL = re.compile(
    r'r18|r50|res(net|next|nest|2net)?-?50|resnet18|tiny|small|nano|atto|[-_](t|s)[-_]'
)
LARGE = re.compile(
    r'101|152|huge|giant|large|base|x101|[-_](b|l|x|g|h)[-_\d]|\dgf|effb|w40|w48|m36|m48'
    r'|lvis|v3det|dconv|mdpool|dpool'
)


def preload() -> None:
    """Import what every config needs, before processes are forked."""
    for library in LIBRARIES:
        for part in ('models', 'datasets', 'engine', 'evaluation'):
            import_module(f'{library}.{part}')


def list_configs(library: str) -> list[str]:
    """Configs of an installed library as ``library::family/name.py``, sorted."""
    root = _root(library)
    paths = (p.relative_to(root) for p in root.glob('*/**/*.py'))
    names = (p.as_posix() for p in paths if p.parts[0] not in PARTS)
    return sorted(f'{library}::{n}' for n in names if '/_' not in n)


def _root(library: str) -> Path:
    spec = find_spec(library)
    if spec is None or spec.origin is None:
        raise ConfigError(
            'library', 'an installed one', library, 'install it or name another'
        )
    return Path(spec.origin).parent / '.mim' / 'configs'


def read_config(config: str) -> Config:
    """Read ``library::family/name.py``; names may hold what mmengine rejects."""
    library, _, path = config.partition('::')
    return Config.fromfile(_root(library) / path)


def family_of(config: str) -> str:
    """Folder of a config, ``library::family``."""
    return config.split('/', 1)[0]


def one_per_family(configs: Sequence[str]) -> list[str]:
    """The config of each family folder that a small model's name speaks for."""
    families: dict[str, list[str]] = {}
    for config in configs:
        families.setdefault(family_of(config), []).append(config)
    chosen = []
    for names in families.values():
        names.sort(key=_size_hint)
        with_model = (n for n in names if _has_model(n))
        chosen += [n for n in [next(with_model, None)] if n is not None]
    return chosen


def _size_hint(config: str) -> tuple[bool, bool, bool, int, str]:
    name = config.rpartition('/')[2]
    nested = config.count('/') > 1
    return nested, bool(LARGE.search(name)), not SMALL.search(name), len(name), name


def examine(
    config: str, enter: Callable[[str], None] = lambda stage: None
) -> dict[str, Any]:
    """Trace, prune 30 % at random and compare; everything that went wrong is said.

    Args:
        config: ``library::family/name.py``.
        enter: Is told the stage that begins.

    Returns:
        dict: Plain data; ``status`` is ``'agrees'``, ``'disagrees'``, ``'failed'``
        or ``'not run'`` where the loss itself could not be computed.
    """
    start = time.perf_counter()
    result: dict[str, Any] = {'config': config, 'status': 'not run', 'reason': ''}
    stage = 'config'

    def begin(name: str) -> None:
        nonlocal stage
        stage = name
        enter(name)

    try:
        cfg = read_config(config)
        begin('model')
        torch.manual_seed(0)
        os.chdir(_root(config.partition('::')[0]).parent)  # some name other configs
        model = build_model(cfg)
        MessageHub.get_current_instance().update_info('iter', 10_000)  # as in a run
        begin('batch')
        calls = BatchCalls(model, demo_batch(cfg))
        begin('loss')
        with torch.no_grad(), undisturbed(model):
            calls.loss(model)
        begin('tracing')
        result['status'] = 'failed'
        result |= _prune(model, calls)
    except Exception as error:  # the zoo's very purpose is to collect these
        result['reason'] = f'{stage}: {_one_line(error)}'
    return result | {'seconds': round(time.perf_counter() - start, 1)}


def _prune(model: Any, calls: BatchCalls) -> dict[str, Any]:
    """Prune; prepared groups are proven on outputs, here the loss is compared, too."""
    pruner = GroupFisherPruner(model)
    work = calls.work(model)
    start = time.perf_counter()
    grouping = pruner.prepare(calls.loss, calls.forward, calls.images, work)
    prepared = time.perf_counter() - start
    pruner.close()
    alive = random_units(grouping.groups, 0.3, np.random.default_rng(1))
    compared = 'loss'
    try:
        wrong = disagreement(model, grouping.groups, alive, calls.steady_loss)
    except Exception as error:  # not of pruning: the masked model is a whole one
        compared = f'outputs (loss in double precision: {_one_line(error)})'
        wrong = disagreement(model, grouping.groups, alive, calls.forward)
    shares = coverage(model, grouping, work)
    return {
        'status': 'disagrees' if wrong else 'agrees',
        'reason': wrong or '',
        'compared': compared,
        'groups': len(grouping.groups),
        'units': grouping.units,
        'channels': round(shares['channels'], 4),
        'macs': round(shares['macs'], 4),
        'prepare_seconds': round(prepared, 1),
        **_frozen(grouping),
    }


def _frozen(grouping: Grouping) -> dict[str, Any]:
    """Frozen layers by reason, and those that the proof froze, by name."""
    disproved = {f.layer: f.reason for f in grouping.frozen if DISPROVED in f.reason}
    reasons = Counter(r for f in grouping.frozen for r in f.reason.split('; '))
    return {'disproved': disproved, 'frozen': dict(reasons.most_common())}


def _one_line(error: Exception) -> str:
    words = ' '.join(str(error).split())
    return f'{type(error).__name__}: {words[:300]}'


def _has_model(config: str) -> bool:
    try:
        return 'model' in read_config(config)
    except Exception:  # `examine` reports why it cannot be read
        return True


def render(results: Sequence[dict[str, Any]]) -> str:
    """A Markdown page: how many families and configs, then one line for each."""
    lines = ['# Which configs can be pruned', '', _INTRODUCTION, '']
    lines += ['| library | configs | loss runs | pruned and agree | families | of |']
    lines += ['|---|---|---|---|---|---|']
    for library in LIBRARIES:
        own = [r for r in results if r['config'].startswith(f'{library}::')]
        ran = [r for r in own if r['status'] != 'not run']
        good = [r for r in ran if r['status'] == 'agrees']
        lost = {family_of(r['config']) for r in ran} - {
            family_of(r['config']) for r in good
        }
        families = {family_of(r['config']) for r in ran}
        row = [library, len(own), len(ran), len(good)]
        row += [len(families) - len(lost), len(families)]
        lines.append('| ' + ' | '.join(map(str, row)) + ' |')
    for status, title in TITLES.items():
        chosen = [r for r in results if r['status'] == status]
        if chosen:
            lines += ['', f'## {title}', '', *_table(chosen)]
    return '\n'.join(lines) + '\n'


def _table(results: Sequence[dict[str, Any]]) -> list[str]:
    if 'groups' not in results[0]:
        lines = ['| config | reason |', '|---|---|']
        return lines + [f'| `{r["config"]}` | {_cell(r["reason"])} |' for r in results]
    lines = ['| config | units | channels | MACs | s | most frozen, disproved |']
    lines.append('|---|---|---|---|---|---|')
    for r in results:
        reasons = [f'{n} × {why}' for why, n in list(r['frozen'].items())[:2]]
        reasons += [f'disproved: {", ".join(r["disproved"])}'] * bool(r['disproved'])
        reasons += [r['reason']] * bool(r['reason'])
        lines.append(
            f'| `{r["config"]}` | {r["units"]} | {r["channels"]:.1%} | {r["macs"]:.1%} '
            f'| {r["seconds"]:g} | {_cell("; ".join(reasons))} |'
        )
    return lines


def _cell(text: str) -> str:
    return text.replace('|', '/')[:240]


TITLES = {
    'disagrees': 'Masked and compact disagree',
    'failed': 'Not pruned',
    'agrees': 'Pruned, and masked equals compact',
    'not run': 'The loss does not run here',
}
_INTRODUCTION = """Written by `tools/zoo.py`. Each config is built with random weights;
its loss runs on a made-up batch on the CPU; 30 % of the units go at random; the masked
and the compact model must agree to 1e-4. "channels" and "MACs" are the shares that
units can reach; "s" is the time of the whole check on the machine it ran on."""
