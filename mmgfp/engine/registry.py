"""Pruning algorithms by name, so that a config can choose one."""

from mmengine.registry import Registry

from mmgfp.pruner import GroupFisherPruner

#: Pruning algorithms; a class here offers what `GroupFisherPruner` offers.
PRUNERS = Registry('pruner', locations=['mmgfp.pruner'])
PRUNERS.register_module(module=GroupFisherPruner)
