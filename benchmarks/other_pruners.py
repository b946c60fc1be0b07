"""A classifier pruned by Torch-Pruning, in the training that a run of mmgfp has.

Each decision is made after `--every` iterations with the data and the rates of the
pruning config of a comparison, at an even pace of the MACs; then the result is
fine-tuned as the comparison's first variant is. It needs Torch-Pruning
(requirements/other-tools.txt):

    python -m benchmarks.other_pruners configs/compare/cifar10_criteria.py \
        resnet20_cifar10.pth --way magnitude --share 0.5 --seed 0 --work-dir DIR
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.runner import Runner, load_checkpoint
from torch import nn

from mmgfp.apps.analysis import costs_of
from mmgfp.apps.cli import check_checkpoint, load_config, run_cli, write_json
from mmgfp.apps.compare.settings import Comparison, read_comparison
from mmgfp.apps.stages import input_shape, parse_options
from mmgfp.engine.demo_batch import demo_calls
from mmgfp.report.quantities import main_metric
from mmgfp.runtimes.base import require
from mmgfp.utils.io import check_folder

#: Parts in which Torch-Pruning takes channels until the MACs are low enough.
PARTS = 400


@dataclass(frozen=True)
class Way:
    """A way to prune by Torch-Pruning.

    Attributes:
        importance: Makes what scores channels, given the package.
        is_global: Whether layers compete; otherwise all lose the same share.
        is_sparse: Whether groups are driven to zero in training, and all channels go
            at the end of it (DepGraph's group sparsity).
    """

    importance: Callable[[Any], Any]
    is_global: bool = True
    is_sparse: bool = False


def _magnitude(tp: Any) -> Any:
    return tp.importance.GroupMagnitudeImportance(p=2)


WAYS = {
    'magnitude': Way(_magnitude),
    'magnitude, local': Way(_magnitude, is_global=False),
    'taylor': Way(lambda tp: tp.importance.GroupTaylorImportance()),
    'group norm': Way(_magnitude, is_sparse=True),
}


class Budget:
    """The training that comes with a comparison: data, rates and lengths.

    Args:
        comparison: Its configs count, and how its first variant is fine-tuned.
        options: Entries to override in all configs.
        seed: Of all random numbers.
        work_dir: Where runners write.
    """

    def __init__(
        self, comparison: Comparison, options: list[str], seed: int, work_dir: Path
    ) -> None:
        self._comparison, self._seed, self._work_dir = comparison, seed, work_dir
        self._options = parse_options(options)
        self._original = load_config(comparison.baseline, self._options)
        self.shape = input_shape(comparison.prune, options)

    def pruning(self) -> Runner:
        """Return a runner of the original model with the pruning config's training."""
        return self._runner(self._comparison.prune, {})

    def finetuned(self, model: nn.Module) -> tuple[str, float]:
        """Fine-tune a model; return the name of the metric and its value."""
        finetune = self._comparison.variants[0].finetune
        runner = self._runner(self._comparison.finetune, finetune)
        runner.model = model
        runner.train()
        return main_metric(runner.test(), self._comparison.metric)

    def costs(self, model: nn.Module) -> dict[str, int]:
        """Count the costs of a model as mmgfp does, for one image."""
        calls = demo_calls(self._original, model)
        return costs_of(model, calls.profile(model, self.shape))

    def batches(self, runner: Runner) -> Iterator[Any]:
        """Yield training batches of a runner without end."""
        loader = Runner.build_dataloader(runner.cfg.train_dataloader, self._seed)
        while True:
            yield from loader

    def _runner(self, path: str, entries: Any) -> Runner:
        cfg = load_config(path, self._options)
        cfg.merge_from_dict(deepcopy(dict(entries)))
        cfg.model = deepcopy(self._original.model)
        cfg.custom_hooks = cfg.load_from = None
        cfg.randomness = dict(seed=self._seed)
        cfg.work_dir = str(self._work_dir)
        return Runner.from_cfg(cfg)


def prune(
    budget: Budget, checkpoint: str, way: Way, share: float, decisions: int, every: int
) -> nn.Module:
    """Return a model that was pruned while it trained.

    Args:
        budget: The training.
        checkpoint: Weights of the original model.
        way: How.
        share: The share of the MACs that is left.
        decisions: How many decisions are made.
        every: Iterations before each of them.
    """
    tp: Any = require('torch_pruning', 'other-tools')
    runner = budget.pruning()
    model: Any = runner.model
    model.init_weights()  # else it would be done when fine-tuning begins
    load_checkpoint(model, checkpoint, map_location='cpu')
    kind = tp.pruner.GroupNormPruner if way.is_sparse else tp.pruner.BasePruner
    pruner = kind(
        model.eval(),
        torch.rand(1, *budget.shape),
        importance=way.importance(tp),
        global_pruning=way.is_global,
        pruning_ratio=1.0,
        iterative_steps=PARTS,
        ignored_layers=[model.head],  # whose outputs are classes
    )
    full, batches = budget.costs(model)['macs'], budget.batches(runner)
    for done in range(1, decisions + 1):
        train(runner, [next(batches) for _ in range(every)], way, pruner)
        limit = full * (1 - (1 - share) * done / decisions)
        if not way.is_sparse or done == decisions:
            while budget.costs(model)['macs'] > limit:
                pruner.step()
    return model


def train(runner: Runner, batches: list[Any], way: Way, pruner: Any) -> None:
    """Train a runner's model on some batches, and leave their gradients summed up.

    The optimizer begins anew, as parameters are others after each decision.
    """
    model: Any = runner.model.train()
    wrapper = runner.build_optim_wrapper(deepcopy(runner.cfg.optim_wrapper))
    sums: dict[nn.Parameter, torch.Tensor] = {}
    if way.is_sparse:
        pruner.update_regularizer()
    for batch in batches:
        loss, _ = model.parse_losses(
            model(**model.data_preprocessor(batch, True), mode='loss')
        )
        wrapper.zero_grad()
        loss.backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                sums[parameter] = parameter.grad + sums.get(parameter, 0)
        if way.is_sparse:
            pruner.regularize(model)
        wrapper.step()
    for parameter, gradient in sums.items():
        parameter.grad = gradient
    model.eval()


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('comparison', help='a config of tools/compare.py')
    parser.add_argument('checkpoint', help='weights of the original model')
    parser.add_argument('--way', choices=WAYS, required=True)
    parser.add_argument('--share', type=float, default=0.5, help='MACs that are left')
    parser.add_argument('--decisions', type=int, default=20)
    parser.add_argument('--every', type=int, default=10, help='iterations before each')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--work-dir', type=Path, required=True)
    parser.add_argument('--cfg-options', nargs='+', default=[])
    return parser.parse_args()


def main() -> None:
    """Run from the command line."""
    args = parse_args()
    check_checkpoint('checkpoint', args.checkpoint)
    check_folder(args.work_dir)
    comparison = read_comparison(args.comparison)
    budget = Budget(comparison, args.cfg_options, args.seed, args.work_dir)
    how = (WAYS[args.way], args.share, args.decisions, args.every)
    model = prune(budget, args.checkpoint, *how)
    costs = budget.costs(model)
    name, metric = budget.finetuned(model)
    result = {'way': args.way, 'seed': args.seed, name: metric, **costs}
    write_json(args.work_dir / 'result.json', result)
    print(result)


if __name__ == '__main__':
    run_cli(main)
