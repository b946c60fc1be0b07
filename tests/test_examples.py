"""Every example in a docstring runs, and the main names have one."""

import doctest
import importlib
import pkgutil
from importlib.util import find_spec

import pytest

import mmgfp

MODULES = [
    module.name
    for module in pkgutil.walk_packages(mmgfp.__path__, 'mmgfp.')
    if '>>> ' in find_spec(module.name).loader.get_source(module.name)
]
#: Classes and functions that a reader meets first.
MAIN = [
    'mmgfp.apps.analysis.costs_of',
    'mmgfp.apps.latency.milliseconds',
    'mmgfp.report.snapshot.layer_widths',
    'mmgfp.apps.tables.table_cells',
    'mmgfp.demo.digits.DigitsSpec',
    'mmgfp.demo.resnet_cifar.SlimResNetCIFAR',
    'mmgfp.engine.hooks.exact_resume.ExactResumeHook',
    'mmgfp.engine.hooks.pruning.ChannelPruningHook',
    'mmgfp.engine.model_building.build_model',
    'mmgfp.pruner.ChannelPruner',
    'mmgfp.selection.costs.Cost',
    'mmgfp.selection.costs.CostTable',
    'mmgfp.selection.schedules.CubicSchedule',
    'mmgfp.selection.targets.Target',
]


def load(name):
    """Import a module, or skip the test where an optional package is missing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name.startswith('mmgfp'):
            raise
        pytest.skip(f'{name} needs {error.name}')


@pytest.mark.parametrize('name', MODULES)
def test_examples_do_what_they_show(name):
    assert doctest.testmod(load(name)).failed == 0


@pytest.mark.parametrize('name', MAIN)
def test_main_names_have_an_example(name):
    module, _, member = name.rpartition('.')
    doc = getattr(load(module), member).__doc__
    assert 'Examples:\n' in doc and '>>> ' in doc
