"""Residual blocks that may go whole, found by trying and verified.

A block qualifies if zeroing one of the last norms or layers that it calls, weight and
bias, lets it return its input exactly, bit by bit: its branch adds nothing then, and
`torch.nn.Identity` can take its place. No class is known by name.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import nn

from mmgfp.discovery.block_trials import blocks_called, parameters_of, rescaled
from mmgfp.discovery.comparing import OutputCheck
from mmgfp.discovery.probing import TrainingCheck, random_probe
from mmgfp.groups import Grouping, ResidualBlock
from mmgfp.surgery.blocks import block_mask
from mmgfp.surgery.compact import compact
from mmgfp.surgery.masking import ColumnMask
from mmgfp.surgery.structure import PruneStructure, shapes_of
from mmgfp.tracing import RowUse
from mmgfp.utils.layers import matches
from mmgfp.utils.trial_runs import (
    Forward,
    LossFunction,
    copy_module,
)

logger = logging.getLogger('mmgfp')


def with_blocks(
    model: nn.Module,
    grouping: Grouping,
    rows: RowUse,
    loss: LossFunction,
    forward: Forward,
    keep: Sequence[str] = (),
) -> Grouping:
    """Return a grouping with the residual blocks of its model that may go.

    Blocks return their input exactly, both in a training step and in eval mode with
    norms and biases set at random; and the model without them, and without some units
    of each group, gives what the masked one gives. Of blocks within blocks the outer
    ones count.

    Args:
        model: The module; it is left as it is.
        grouping: Its groups, verified.
        rows: What its layers read.
        loss: Computes the training loss of the module it is given, on a real batch.
        forward: Returns all outputs that the module it is given has at inference.
        keep: Names or patterns of layers that are left alone, with the blocks around.
    """
    training = blocks_called(model, loss)
    probe = random_probe(model)
    inference = blocks_called(rescaled(probe), forward)
    blocks: list[ResidualBlock] = []
    for name, _ in model.named_modules():
        last = training.get(name)
        if last is None or inference.get(name) != last:
            continue
        block = ResidualBlock(name, last)
        if any(outer.holds(name) for outer in blocks):
            continue
        is_traced = any(block.holds(weight) for weight in grouping.inputs)
        reason = None if is_traced else 'took no part in the loss'
        if reason := reason or _why_not(model, block, rows, keep):
            logger.debug('block %s stays: %s', name, reason)
        else:
            blocks.append(block)
    blocks = _verified(model, probe, grouping, blocks, loss, forward)
    if not blocks:
        logger.warning('blocks=True, but no residual block of the model may go')
    return replace(grouping, blocks=tuple(blocks))


def _why_not(
    model: nn.Module, block: ResidualBlock, rows: RowUse, keep: Sequence[str]
) -> str | None:
    """Return why a block that returns its input stays nevertheless."""
    names = [
        n for n, _ in model.named_modules() if f'{n}.'.startswith(f'{block.name}.')
    ]
    if any(matches(n, pattern) for n in [block.name, *names] for pattern in keep):
        return 'kept as configured'
    if block.last in rows.lost or block.last not in rows.called:
        return rows.lost.get(block.last, 'what its last layer reads cannot be watched')
    if any(block.holds(n) for n in rows.first | rows.entry | rows.reentry):
        return 'it reads the images'
    inside = set(model.get_submodule(block.name).modules())
    tensors = {id(p) for m in inside for p in m._parameters.values() if p is not None}
    for name, module in model.named_modules(remove_duplicate=False):
        if name == block.name or block.holds(name):
            continue
        if module in inside or any(id(p) in tensors for p in parameters_of(module)):
            return f'{name} shares something with it'
    return None


def _verified(
    model: nn.Module,
    probe: nn.Module,
    grouping: Grouping,
    blocks: list[ResidualBlock],
    loss: LossFunction,
    forward: Forward,
) -> list[ResidualBlock]:
    """Return the blocks without which the model gives what the masked one gives."""
    check = _Check(model, probe, grouping, loss, forward)
    if blocks and check(blocks):
        reasons = {block.name: check([block]) for block in blocks}
        for name, reason in reasons.items():
            if reason:
                logger.debug('block %s stays: %s', name, reason)
        blocks = [block for block in blocks if not reasons[block.name]]
        if blocks and (reason := check(blocks)):
            logger.debug('all blocks stay: without several of them, %s', reason)
            return []
    return blocks


class _Check:
    """Compares a masked and a compact model without blocks and half of all units."""

    def __init__(
        self,
        model: nn.Module,
        probe: nn.Module,
        grouping: Grouping,
        loss: LossFunction,
        forward: Forward,
    ) -> None:
        self._probe, self._grouping = probe, grouping
        self._outputs = OutputCheck(forward)
        self._training = TrainingCheck(model, loss)

    def __call__(self, blocks: Sequence[ResidualBlock]) -> str | None:
        """Return why the two disagree, None if they agree."""
        groups = self._grouping.groups
        grouping = replace(self._grouping, blocks=tuple(blocks))
        parts = [np.arange(g.units) % 2 == 0 for g in groups]
        kept = np.concatenate([*parts, np.zeros(len(blocks), dtype=bool)])
        masked = copy_module(self._probe)
        masks = [block_mask(masked, block) for block in blocks]
        ColumnMask(masked, [*groups, *masks]).update(kept)
        names = grouping.blocks_among(~kept)
        structure = PruneStructure.of(groups, kept, shapes_of(self._probe), names)
        small = compact(self._probe, structure)
        return self._outputs(masked, small) or self._training.agrees(masked, small)
