"""Unpruned models with weights in a file, and configs of what is left of them."""

from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from mmgfp.discovery.unit_sets import random_units
from mmgfp.surgery.structure import PruneStructure, shapes_of
from support.roundtrip import traced


def cut_model(config, folder, size, draw=None):
    """A config's model, its weights in a file, and a structure without 40 %.

    Args:
        config: What to build.
        folder: Where the files go.
        size: Height and width of the images that it is traced on.
        draw: Called with each parameter beforehand.
    """
    found = traced(config, size)
    groups = found.grouping.groups
    kept = random_units(groups, 0.4, np.random.default_rng(0))
    structure = PruneStructure.of(groups, kept, shapes_of(found.model))
    paths = {name: str(folder / name) for name in ('structure.json', 'full.pth')}
    structure.save(paths['structure.json'])
    for parameter in found.model.parameters() if draw else ():
        draw(parameter)
    torch.save({'state_dict': found.model.state_dict()}, paths['full.pth'])
    return SimpleNamespace(
        config=config,
        scope=config.default_scope,
        model=found.model,
        full=found.model.state_dict(),
        structure=structure,
        files=paths,
    )


def unlike_each_other(parameter):
    """Draw a parameter as if it had been trained."""
    nn.init.normal_(parameter)


def pruned_entry(case, init='pruned', **options):
    """The ``model`` of a config that trains what is left."""
    if init == 'original':
        options = {'original': case.files['full.pth'], **options}
    return dict(
        type='PrunedModel',
        architecture=case.config.model.to_dict(),
        structure=case.files['structure.json'],
        init=init,
        **options,
    )
