"""Pruning of the installed libraries' configs at random, and its verification."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from torch import nn

from mmgfp.apps.analysis import coverage
from mmgfp.discovery.unit_sets import random_units
from mmgfp.discovery.verified import DISAGREES
from mmgfp.discovery.verify import disagreement
from mmgfp.engine.batch_calls import BatchCalls
from mmgfp.engine.demo_batch import demo_batch
from mmgfp.engine.model_building import build_model, init_weights
from mmgfp.groups import Grouping
from mmgfp.pruner import GroupFisherPruner
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.trial_runs import undisturbed

LIBRARIES = ('mmdet', 'mmpretrain')
#: Outcomes of a config; see `examine`.
STATUSES = ('agrees', 'disagrees', 'failed', 'not run')
#: Folders that hold parts of configs.
PARTS = ('_base_', 'common', 'dsdl')
#: Parts of the names of smaller and of larger variants of a model.
SMALL = re.compile(
    r'r18|r50|res(net|next|nest|2net)?-?50|resnet18|tiny|small|nano|atto|[-_](t|s)[-_]'
)
LARGE = re.compile(
    r'101|152|huge|giant|large|base|x101|[-_](b|l|x|g|h)[-_\d]|\dgf|effb|w40|w48|m36|m48'
    r'|lvis|v3det|dconv|mdpool|dpool'
)
#: Number of configs of a family that are tried until the loss of one runs.
CANDIDATES = 3
#: Sides of the demo batch in pixels, tried until the loss runs; None leaves the size to
#: the config. Some models need more positions than a small image has.
SIDES = {'mmdet': (None, 256, 512), 'mmpretrain': (None,)}
#: Progress that a training run past its warm-up announces through the message hub.
PROGRESS = {'iter': 10_000, 'epoch': 10, 'max_iters': 20_000}


def preload() -> None:
    """Import the modules that every config needs, before processes are forked."""
    for library in LIBRARIES:
        for part in ('models', 'datasets', 'engine', 'evaluation'):
            import_module(f'{library}.{part}')


def list_configs(library: str) -> list[str]:
    """List the configs of an installed library as ``library::family/name.py``."""
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
    """Read ``library::family/name.py``, whatever characters the name contains."""
    library, _, path = config.partition('::')
    return Config.fromfile(_root(library) / path)


def family_of(config: str) -> str:
    """Return the folder of a config as ``library::family``.

    Examples:
        >>> family_of('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py')
        'mmdet::retinanet'
    """
    return config.split('/', 1)[0]


def by_family(configs: Sequence[str]) -> list[list[str]]:
    """Group configs by family folder, those with names of small models first.

    Examples:
        >>> by_family(['mmdet::ssd/ssd512.py', 'mmdet::ssd/ssd512_tiny.py'])
        [['mmdet::ssd/ssd512_tiny.py', 'mmdet::ssd/ssd512.py']]
    """
    families: dict[str, list[str]] = {}
    for config in configs:
        families.setdefault(family_of(config), []).append(config)
    return [sorted(names, key=_size_hint) for names in families.values()]


def next_of(names: Sequence[str], results: Mapping[str, Any]) -> str | None:
    """Return the config of a family to examine next; None once the loss of one has run.

    Args:
        names: The family's configs, the best first. At most `CANDIDATES` are tried.
        results: Results so far, by config.
    """
    tried = 0
    for name in names:
        if name in results:
            tried += 1
            if results[name]['status'] != 'not run' or tried == CANDIDATES:
                return None
        elif _has_model(name):
            return name
    return None


def known_of(names: Sequence[str], results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the results of the configs that `next_of` chose, the family's own last."""
    known: list[dict[str, Any]] = []
    for result in (results[n] for n in names if n in results):
        if len(known) < CANDIDATES:
            known.append(result)
        if result['status'] != 'not run':
            break
    return known


def _size_hint(config: str) -> tuple[bool, bool, bool, int, str]:
    name = config.rpartition('/')[2]
    nested = config.count('/') > 1
    return nested, bool(LARGE.search(name)), not SMALL.search(name), len(name), name


def examine(
    config: str, enter: Callable[[str], None] = lambda stage: None
) -> dict[str, Any]:
    """Trace a config's model, prune 30 % at random and compare; report every failure.

    Args:
        config: ``library::family/name.py``.
        enter: Called with the name of each stage when it begins.

    Returns:
        dict: Plain data; ``status`` is ``'agrees'``, ``'disagrees'``, ``'failed'``,
        or ``'not run'`` where the loss itself could not be computed.
    """
    start = time.perf_counter()
    result: dict[str, Any] = {'config': config, 'status': 'not run', 'reason': ''}
    library = config.partition('::')[0]
    stage = 'config'

    def begin(name: str) -> None:
        nonlocal stage
        stage = name
        enter(name)

    try:
        cfg = read_config(config)
        begin('model')
        torch.manual_seed(0)
        os.chdir(_root(library).parent)  # some configs name others by relative paths
        model = build_model(cfg)
        _initialize(model)
        _unpad(model)
        MessageHub.get_current_instance().update_info_dict(PROGRESS)
        calls = _running_calls(model, cfg, SIDES[library], begin)
        begin('tracing')
        result |= {'status': 'failed', 'size': calls.size}
        result |= _prune(model, calls)
    except Exception as error:  # collecting failures is the purpose of the zoo
        result['reason'] = f'{stage}: {_one_line(error)}'
    return result | {'seconds': round(time.perf_counter() - start, 1)}


def _running_calls(
    model: Any,
    cfg: Config,
    sides: Sequence[int | None],
    begin: Callable[[str], None],
) -> BatchCalls:
    """Return the calls on the smallest demo batch on which the model's loss runs."""
    for side in sides:
        try:
            begin('batch')
            size = None if side is None else (side, side)
            calls = BatchCalls(model, demo_batch(cfg, size=size))
            begin('loss')
            with torch.no_grad(), undisturbed(model):
                calls.loss(model)
            return calls
        except Exception as error:  # any kind: the next size may run
            failure = error
    raise failure


@torch.no_grad()
def _initialize(model: Any) -> None:
    """Initialise the weights, with random values in place of all-zero ones.

    Learned boxes of zeros are degenerate, and a predictor of zeros would hide any
    difference in its inputs.
    """
    init_weights(model)
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            parameter.normal_(std=0.01)


def _unpad(model: Any) -> None:
    """Drop fixed-size padding: some configs pad every image to 1024 x 1024."""
    augments = getattr(model.data_preprocessor, 'batch_augments', None)
    if isinstance(augments, nn.ModuleList):
        others = (a for a in augments if type(a).__name__ != 'BatchFixedSizePad')
        model.data_preprocessor.batch_augments = nn.ModuleList(others)


def _prune(model: Any, calls: BatchCalls) -> dict[str, Any]:
    """Prune and compare the loss; `discover` has verified the groups on the outputs."""
    pruner = GroupFisherPruner(model)
    profiles = calls.profile(model)
    start = time.perf_counter()
    # Not prepared, as what can be pruned may not be enough for a target.
    discovery = pruner.discover(calls.loss, calls.forward, calls.images, profiles)
    grouping = discovery.grouping
    prepared = time.perf_counter() - start
    kept = random_units(grouping.groups, 0.3, np.random.default_rng(1))
    compared = 'loss'
    try:
        wrong = disagreement(model, grouping.groups, kept, calls.steady_loss)
    except Exception as error:  # not due to pruning: the masked model is uncut
        compared = f'outputs (loss in double precision: {_one_line(error)})'
        wrong = disagreement(model, grouping.groups, kept, calls.forward)
    shares = coverage(model, grouping, profiles)
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
    """Count frozen layers by reason, and name those that verification froze."""
    disagreeing = {f.layer: f.reason for f in grouping.frozen if DISAGREES in f.reason}
    reasons = Counter(r for f in grouping.frozen for r in f.reason.split('; '))
    return {'disagreeing': disagreeing, 'frozen': dict(reasons.most_common())}


def _one_line(error: Exception) -> str:
    words = ' '.join(str(error).split())
    return f'{type(error).__name__}: {words[:3000]}'


@cache
def _has_model(config: str) -> bool:
    try:
        return 'model' in read_config(config)
    except Exception:  # `examine` will report why it cannot be read
        return True
