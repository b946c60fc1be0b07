"""Combinations of options: rows in which all pairs meet, and what their runs show."""

import itertools
import random

import torch
from mmengine.hooks import EMAHook, Hook

from mmgfp import ChannelPruningHook, SparsityHook
from mmgfp.sparsity.masks import follows_pattern


def pairwise(factors, refused=(), seed=0):
    """Rows in which any two values of two factors meet, but for refused pairs.

    Greedy: a row begins with a pair that has not met yet; each other factor, in random
    order, takes the value that meets most of those there for the first time.

    Args:
        factors: Values by the name of the factor.
        refused: Pairs ``((factor, value), (factor, value))`` that no row may hold.
        seed: Seed of the order.

    Returns:
        list: Dicts with a value for each factor.
    """
    draw = random.Random(seed)
    cells = [[(f, v) for v in values] for f, values in factors.items()]
    banned = {frozenset(pair) for pair in refused}
    # A dict, as a set of texts has another order in each process.
    missing = dict.fromkeys(
        pair
        for one, two in itertools.combinations(cells, 2)
        for pair in map(frozenset, itertools.product(one, two))
        if pair not in banned
    )
    rows = []
    while missing:
        row = sorted(next(iter(missing)), key=str)
        rest = [c for c in cells if c[0][0] not in dict(row)]
        draw.shuffle(rest)
        for values in rest:
            with_row = {v: [frozenset((v, w)) for w in row] for v in values}
            allowed = [v for v in values if not banned & set(with_row[v])]
            row.append(
                max(allowed, key=lambda v: sum(p in missing for p in with_row[v]))
            )
        for pair in itertools.combinations(row, 2):
            missing.pop(frozenset(pair), None)
        rows.append({f: dict(row)[f] for f in factors})
    return rows


class EndChecks(Hook):
    """Compares masked and compact models at the end of a run, in each process."""

    priority = 'LOWEST'

    def after_train(self, runner):
        (hook,) = [h for h in runner.hooks if isinstance(h, ChannelPruningHook)]
        pruner = hook.pruner
        assert pruner.done, pruner.units.totals
        model = getattr(runner.model, 'module', runner.model)
        averages = [h.ema_model.module for h in runner.hooks if isinstance(h, EMAHook)]
        for copied in (None, *averages):
            masked = _outputs(model if copied is None else copied)
            compact = _outputs(pruner.compact(copied))
            torch.testing.assert_close(compact, masked, rtol=1e-4, atol=1e-5)
        for each in runner.hooks:
            if isinstance(each, SparsityHook):
                assert each.sparsifier.begun and each.sparsifier.masks
                for name in each.sparsifier.masks:
                    assert follows_pattern(model.state_dict()[name], 2, 4)


@torch.no_grad()
def _outputs(model):
    """The logits of two images."""
    was_training = model.training
    model.eval()
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    logits = model.head(model.extract_feat(x))
    model.train(was_training)
    return logits


def check_end(runner, rank):
    """Let `EndChecks` see a run, as `runs.train` takes it."""
    runner.register_hook(EndChecks())
