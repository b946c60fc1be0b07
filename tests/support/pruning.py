"""Pruners of small models: made ready, run for an iteration, and looked into."""

from mmgfp import GroupFisherPruner
from support.toys import toy_loss


def prepared(model, loss=toy_loss, forward=None, count=2, **options):
    """A pruner of ``model`` that is ready and, unless told otherwise, never prunes."""
    pruner = GroupFisherPruner(model, **{'interval': 10**6, **options})
    pruner.prepare(loss, forward or loss, count)
    return pruner


def iterate(pruner, loss=toy_loss):
    """Run one iteration without an optimizer's step; return the pruner's step."""
    loss(pruner.model).backward()
    return pruner.step()


def importance_of(pruner):
    """A copy of the importance that units have gathered, (U,)."""
    return pruner.criterion.statistics.importance.copy()


def seen_by(pruner):
    """In how many iterations each group was seen, (G,)."""
    return pruner.criterion.statistics.seen


def warnings_of(pruner):
    """All that the pruner has warned of."""
    return pruner.checks.warned | pruner.criterion.warned


def hooks_on(model):
    """The number of hooks on a model, its modules and its parameters."""
    kinds = ('forward', 'forward_pre', 'backward', 'backward_pre')
    names = [f'_{kind}_hooks' for kind in kinds] + ['_load_state_dict_post_hooks']
    on_modules = [getattr(m, name) for m in model.modules() for name in names]
    on_parameters = [
        getattr(p, name) or ()
        for p in model.parameters()
        for name in ('_backward_hooks', '_post_accumulate_grad_hooks')
    ]
    return sum(map(len, [*on_modules, *on_parameters]))
