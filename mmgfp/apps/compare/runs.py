"""The runs of a comparison, each in a folder of its own, several at a time."""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmgfp.apps.analysis import costs_of
from mmgfp.apps.cli import load_config, write_json
from mmgfp.apps.compare.settings import Comparison, Run
from mmgfp.apps.comparison import build
from mmgfp.apps.pipeline import Candidate, Pipeline
from mmgfp.apps.processes import Processes
from mmgfp.apps.stages import (
    deploy,
    find_hook,
    last_checkpoint,
    original,
    pruned_checkpoint,
)
from mmgfp.utils.errors import MMGFPError
from mmgfp.utils.io import atomic_write

Result = dict[str, Any]


class RunFailed(MMGFPError):
    """A run has no result."""


class RunExecutor:
    """Takes runs from their configs to their results.

    Args:
        comparison: What is compared.
        tools: The folder of the tools.
        work_dir: Where each run has its folder.
        processes: Starts the tools.

    Attributes:
        shape: Size (C, H, W) of the image for which costs are counted.
    """

    def __init__(
        self, comparison: Comparison, tools: Path, work_dir: Path, processes: Processes
    ) -> None:
        self.comparison = comparison
        self.tools = tools
        self.work_dir = work_dir
        self.processes = processes
        _, hook = find_hook(load_config(comparison.prune, dict(comparison.options)))
        self.shape = tuple(hook['input_shape'])
        self._building = threading.Lock()  # registries of models are not thread-safe
        self._pruning: dict[Path, threading.Lock] = defaultdict(threading.Lock)
        self._baseline: Candidate | None = None

    def baseline(self) -> Result:
        """Train the original model unless its weights are given, and measure it.

        Raises:
            MMGFPError: If that fails: there is nothing to prune.
        """
        folder = self.work_dir / 'baseline'
        pipeline = self._pipeline(folder, 'baseline')
        config = write_config(self.comparison.baseline_config(), folder / 'baseline.py')
        self._baseline = original(pipeline, config, self.comparison.checkpoint)
        return self._measured(pipeline, self._baseline, {'variant': 'baseline'})

    def __call__(self, run: Run) -> Result:
        """Return the result of a run: that of before, or else a new one.

        Raises:
            Exception: Whatever goes wrong.
        """
        facts: Result = {'variant': run.variant.name, 'seed': run.seed}
        facts |= {'target': run.target_text, 'run': run.name}
        folder = self.work_dir / 'runs' / run.folder
        pipeline = self._pipeline(folder, run.name)
        if run.variant.is_pruned:
            facts |= self._pruned(run)
            files = {**self._files, 'pruned_checkpoint': facts['pruned']}
            cfg = self.comparison.finetune_config(run, files)
            config = write_config(cfg, folder / 'finetune.py')
        else:
            config = write_config(
                self.comparison.train_config(run, self._files), folder / 'train.py'
            )
        if (saved := self._saved(folder)) is not None:
            return saved
        stage = Path(config).stem
        checkpoint = last_checkpoint(pipeline.train(stage, config))
        candidate = Candidate(run.name, config, checkpoint)
        if run.variant.is_pruned:
            candidate = deploy(pipeline, candidate, self.shape, '--rounds', '0')
        return self._measured(pipeline, candidate, facts)

    @property
    def _files(self) -> dict[str, str]:
        """Files of the original model, which `baseline` makes."""
        assert self._baseline is not None
        config, checkpoint = self._baseline.config, self._baseline.checkpoint
        return {'baseline_config': config, 'baseline_checkpoint': checkpoint}

    def _pipeline(self, folder: Path, label: str) -> Pipeline:
        return Pipeline(self.tools, folder, label=label, processes=self.processes)

    def _pruned(self, run: Run) -> Result:
        """Prune the original model, or take what a run with the same pruning has."""
        first = self._prunes_first(run)
        folder = self.work_dir / 'pruned' / first.folder
        with self._pruning[folder]:
            pipeline = self._pipeline(folder, first.name)
            cfg = self.comparison.prune_config(first, self._files)
            config = write_config(cfg, folder / 'prune.py')
            checkpoint = pruned_checkpoint(pipeline.train('prune', config), config)
            return {'pruned': checkpoint, 'prune_seconds': pipeline.seconds()['prune']}

    def _prunes_first(self, run: Run) -> Run:
        """Return the first run that prunes as this one does, fine-tuning aside."""

        def pruning(other: Run) -> tuple[Any, ...]:
            variant = other.variant
            options = dict(variant.pruning), dict(variant.prune)
            return (*options, other.targets, other.seed, variant.is_pruned)

        same = (r for r in self.comparison.runs if pruning(r) == pruning(run))
        return next(same)

    def _made_with(self) -> Result:
        """Return what a result depends on beside its configs."""
        also = {name: list(test) for name, test in self.comparison.also.items()}
        return {'also': also, 'input_shape': list(self.shape)}

    def _saved(self, folder: Path) -> Result | None:
        path = folder / 'result.json'
        saved = json.loads(path.read_text()) if path.is_file() else {}
        return saved if saved.get('made_with') == self._made_with() else None

    def _measured(
        self, pipeline: Pipeline, candidate: Candidate, facts: Result
    ) -> Result:
        """Test a model and count its costs; write all that is known of it, whole."""
        result = {**facts, 'config': candidate.config}
        result |= {'checkpoint': candidate.checkpoint, 'made_with': self._made_with()}
        result['metrics'] = pipeline.test(candidate, 'test')
        result['also'] = {
            name: pipeline.test(candidate, f'test_{number}', options)
            for number, (name, options) in enumerate(self.comparison.also.items())
        }
        with self._building:
            model, calls = build(candidate, ())
            result['costs'] = costs_of(model, calls.profile(model, self.shape))
        result['seconds'] = pipeline.seconds()
        write_json(pipeline.work_dir / 'result.json', result)
        return result


def write_config(cfg: Config, path: Path) -> str:
    """Write the whole config of a stage, or see that it is the one that was there.

    Returns:
        The path.

    Raises:
        RunFailed: If there was another one.
    """
    text = cfg.pretty_text
    if not path.is_file():
        atomic_write(path, lambda tmp: tmp.write_text(text))
    elif path.read_text() != text:
        raise RunFailed(
            str(path),
            'the config that this comparison makes',
            'the one of other settings',
            f'delete {path.parent} to make it anew, or name another --work-dir',
        )
    return str(path)


def run_all(
    runs: Sequence[Run],
    execute: Callable[[Run], Result],
    jobs: int,
    processes: Processes,
    describe: Callable[[Result], str],
) -> tuple[list[Result], dict[str, str]]:
    """Execute all runs, whatever becomes of single ones.

    Args:
        runs: The runs.
        execute: Returns the result of a run.
        jobs: How many run at a time.
        processes: The tools that they start, which end if this is interrupted.
        describe: Says in a few words what a result is.

    Returns:
        The results, in the order of ``runs``, and the reasons of runs that have none,
        by their names.
    """
    results: dict[str, Result] = {}
    failures: dict[str, str] = {}
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(execute, run): run for run in runs}
        try:
            for number, future in enumerate(as_completed(futures), 1):
                run = futures[future]
                try:
                    results[run.name] = future.result()
                    outcome = describe(results[run.name])
                except Exception as error:  # tools, libraries and disks raise many
                    failures[run.name] = outcome = _reason(error)
                print(f'{number} of {len(runs)}: {run.name}: {outcome}', flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            processes.stop()  # else the pool would wait for the ends of trainings
            raise
    names = [run.name for run in runs]
    return (
        [results[name] for name in names if name in results],
        {name: failures[name] for name in names if name in failures},
    )


def _reason(error: Exception) -> str:
    words = ' '.join(str(error).split())[:500]
    return (
        words if isinstance(error, MMGFPError) else f'{type(error).__name__}: {words}'
    )
