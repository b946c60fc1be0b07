"""The runs of a comparison, each in a folder of its own, several at a time."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from mmgfp.apps.analysis import costs_of
from mmgfp.apps.cli import load_config, write_json
from mmgfp.apps.compare.kept_configs import write_config
from mmgfp.apps.compare.prunings import SharedPrunings
from mmgfp.apps.compare.settings import Comparison
from mmgfp.apps.compare.variants import Run
from mmgfp.apps.comparison import build
from mmgfp.apps.pipeline import Candidate, Pipeline
from mmgfp.apps.processes import Processes
from mmgfp.apps.stages import deploy, find_hook, last_checkpoint, original
from mmgfp.apps.weight_files import digests_of
from mmgfp.utils.errors import MMGFPError

Result = dict[str, Any]


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
        # Configs and commands name it: it must read alike however it was given.
        self.work_dir = work_dir.resolve()
        self.processes = processes
        _, hook = find_hook(load_config(comparison.prune, dict(comparison.options)))
        self.shape = tuple(hook['input_shape'])
        self._building = threading.Lock()  # registries of models are not thread-safe
        self._pruned = SharedPrunings(self.work_dir / 'pruned', self._pipeline)
        self._baseline: Candidate | None = None

    def baseline(self) -> Result:
        """Train the original model unless its weights are given, and measure it.

        Raises:
            MMGFPError: If that fails: there is nothing to prune.
        """
        folder = self.work_dir / 'baseline'
        pipeline = self._pipeline(folder, 'baseline')
        text = self.comparison.baseline_config().pretty_text
        config = write_config(text, folder / 'baseline.py')
        checkpoint = self.comparison.checkpoint
        if checkpoint is not None and '://' not in checkpoint:
            checkpoint = str(Path(checkpoint).resolve())
        self._baseline = original(pipeline, config, checkpoint)
        made_with = self._made_with(config, self._baseline.checkpoint)
        if (saved := self._saved(folder, made_with)) is not None:
            return saved
        facts = {'variant': 'baseline'}
        return self._measured(pipeline, self._baseline, facts, made_with)

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
            cfg = self.comparison.prune_config(run, self._files)
            facts |= self._pruned(run, cfg)
            files = {**self._files, 'pruned_checkpoint': facts['pruned']}
            cfg = self.comparison.finetune_config(run, files)
            config = write_config(cfg.pretty_text, folder / 'finetune.py')
        else:
            cfg = self.comparison.train_config(run, self._files)
            config = write_config(cfg.pretty_text, folder / 'train.py')
        made_with = self._made_with(config)
        if (saved := self._saved(folder, made_with)) is not None:
            return {**saved, **facts, 'commits': saved['commits']}
        stage = Path(config).stem
        checkpoint = last_checkpoint(pipeline.train(stage, config))
        candidate = Candidate(run.name, config, checkpoint)
        if run.variant.is_pruned:
            candidate = deploy(pipeline, candidate, self.shape, '--rounds', '0')
        return self._measured(pipeline, candidate, facts, made_with)

    @property
    def _files(self) -> dict[str, str]:
        """Files of the original model, which `baseline` makes."""
        assert self._baseline is not None
        config, checkpoint = self._baseline.config, self._baseline.checkpoint
        return {'baseline_config': config, 'baseline_checkpoint': checkpoint}

    def _pipeline(self, folder: Path, label: str) -> Pipeline:
        return Pipeline(self.tools, folder, label=label, processes=self.processes)

    def _made_with(self, *files: str) -> Result:
        """Return what a result depends on beside the texts of its configs.

        Args:
            *files: The config that makes a model, and weights beside those it names.
        """
        also = {name: list(test) for name, test in self.comparison.also.items()}
        weights = digests_of(files)
        return {'also': also, 'input_shape': list(self.shape), 'weights': weights}

    def _saved(self, folder: Path, made_with: Result) -> Result | None:
        path = folder / 'result.json'
        saved = json.loads(path.read_text()) if path.is_file() else {}
        done = [folder / 'done' / f'{stage}.json' for stage in saved.get('stages', ())]
        # Whoever wants a stage to run anew deletes its note.
        is_whole = bool(done) and all(map(Path.is_file, done))
        return saved if is_whole and saved.get('made_with') == made_with else None

    def _measured(
        self,
        pipeline: Pipeline,
        candidate: Candidate,
        facts: Result,
        made_with: Result,
    ) -> Result:
        """Test a model and count its costs; write all that is known of it, whole."""
        result = {**facts, 'config': candidate.config}
        result |= {'checkpoint': candidate.checkpoint, 'made_with': made_with}
        result['metrics'] = pipeline.test(candidate, 'test')
        result['also'] = {
            name: pipeline.test(candidate, f'test_{number}', options)
            for number, (name, options) in enumerate(self.comparison.also.items())
        }
        with self._building:
            model, calls = build(candidate, ())
            result['costs'] = costs_of(model, calls.profile(model, self.shape))
        result['seconds'] = pipeline.seconds()
        result['stages'] = pipeline.stages
        commits = [*facts.get('commits', ()), *pipeline.commits()]
        result['commits'] = list(dict.fromkeys(commits))
        write_json(pipeline.work_dir / 'result.json', result)
        return result


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
                    result = future.result()
                    outcome = describe(result)
                    results[run.name] = result
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
