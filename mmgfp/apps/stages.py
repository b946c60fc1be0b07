"""Stages that run as processes of their own.

What `tools/pipeline.py` and `tools/ablation.py` share. A stage that has finished is
not run again, so the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.runner import find_latest_checkpoint

from mmgfp.apps.cli import check_checkpoint, load_config
from mmgfp.engine.registry import PRUNING_HOOKS, is_named
from mmgfp.utils.errors import ConfigError, MMGFPError
from mmgfp.utils.io import atomic_write

PROGRESS = re.compile(r'(Epoch|Iter)\((train|val|test)\)|pruned|saved the compact')


@dataclass(frozen=True)
class Candidate:
    """One row of the table: a config with its overrides, and its weights."""

    name: str
    config: str
    checkpoint: str
    options: tuple[str, ...] = ()


class StageError(MMGFPError):
    """A tool that the pipeline started has failed."""


class Pipeline:
    """Runs tools in order and remembers which have finished.

    Args:
        tools: The folder of the tools.
        work_dir: Where every stage has its folder.
        options: The user's config overrides as `key=value`, given to each stage
            before its own.
    """

    def __init__(self, tools: Path, work_dir: Path, options: Sequence[str]) -> None:
        self.tools = tools
        self.work_dir = work_dir
        self.options = list(options)
        self.stages: list[str] = []

    def run(self, stage: str, tool: str, *args: str, options: Sequence[str]) -> None:
        """Runs `<tools>/<tool>.py args` unless this very command has finished.

        Raises:
            StageError: If the tool fails.
        """
        self.stages.append(stage)
        done = self.work_dir / 'done' / f'{stage}.json'
        overrides = [*self.options, *options]
        command = [tool, *args]
        command += ['--cfg-options', *overrides] if overrides else []
        if done.is_file() and json.loads(done.read_text())['command'] == command:
            print(f'{stage}: finished before (to redo it, delete {done})', flush=True)
            return
        print(f'{stage}: {" ".join(command)}', flush=True)
        began = time.perf_counter()
        log = self.work_dir / 'logs' / f'{stage}.log'
        program = [sys.executable, str(self.tools / f'{tool}.py')]
        code = run_logged([*program, *command[1:]], log)
        if code:
            raise StageError(
                f'{stage} must exit with status 0 (got {code}); see {log}; '
                'the same command goes on from here'
            )
        note = {'command': command, 'seconds': time.perf_counter() - began}
        write_json(done, note)

    def train(self, stage: str, config: str, options: Sequence[str] = ()) -> Path:
        """Trains, prunes or fine-tunes; returns the stage's folder."""
        folder = self.work_dir / stage
        where = ('--work-dir', str(folder), '--resume')
        self.run(stage, 'train', config, *where, options=options)
        return folder

    def test(
        self, candidate: Candidate, label: str, options: Sequence[str] = ()
    ) -> dict[str, float]:
        """Tests a candidate, under further overrides; returns its metrics."""
        folder = self.work_dir / 'results'
        metrics = folder / f'{label}.json'
        self.run(
            label,
            'test',
            *(candidate.config, candidate.checkpoint, '--json', str(metrics)),
            *('--work-dir', str(folder / 'logs')),
            options=[*candidate.options, *options],
        )
        return json.loads(metrics.read_text())

    def seconds(self) -> dict[str, int]:
        """Wall-clock seconds by stage, tests left out.

        Of a stage that was interrupted, those of the run in which it finished.
        """
        notes = {
            stage: self.work_dir / 'done' / f'{stage}.json'
            for stage in self.stages
            if not stage.startswith('test')
        }
        return {
            stage: round(json.loads(path.read_text())['seconds'])
            for stage, path in notes.items()
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the pipeline and the ablation are both told."""
    parser.add_argument('baseline', help='config that trains the original model')
    parser.add_argument('prune', help='config that prunes it')
    parser.add_argument('finetune', help='config that fine-tunes the pruned model')
    parser.add_argument('--work-dir', type=Path, required=True)
    parser.add_argument(
        '--checkpoint', help='weights of the original model, which is not trained then'
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        default=[],
        help='config entries to override in every stage, as key.sub=value',
    )
    parser.add_argument(
        '--latency-rounds',
        type=int,
        default=50,
        help='how often each model is timed on the CPU; 0 times nothing',
    )
    parser.add_argument(
        '--batches',
        nargs='+',
        type=int,
        default=[1],
        metavar='N',
        help='batch sizes that are timed',
    )


def run_logged(command: Sequence[str], log: Path) -> int:
    """Runs a command, writes what it says to a log and shows its progress.

    Args:
        command: The program and its arguments.
        log: A file that is appended to.

    Returns:
        The exit status. If it is not 0, the last lines are shown.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    last: deque[str] = deque(maxlen=20)
    with (
        log.open('a') as file,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        for line in process.stdout or ():
            file.write(line)
            file.flush()
            last.append(line)
            if PROGRESS.search(line):
                print(line, end='', flush=True)
    if process.returncode:
        print(*last, sep='', end='', flush=True)
    return process.returncode


def write_json(path: Path, data: Any) -> None:
    """Writes indented JSON, whole or not at all."""
    atomic_write(path, lambda tmp: tmp.write_text(json.dumps(data, indent=2) + '\n'))


def last_checkpoint(folder: Path) -> str:
    """Returns the newest checkpoint of a training run."""
    found = find_latest_checkpoint(str(folder))
    if found is None or not Path(found).is_file():
        raise StageError(
            f'{folder} must hold a checkpoint (got {found}); '
            'delete the folder and run again'
        )
    return str(found)


def pruned_checkpoint(folder: Path, config: str) -> str:
    """Returns the checkpoint of the last target that a pruning run met."""
    found = folder.glob(f'{Path(config).stem}_*.pth')
    reached = [path for path in found if not path.stem.endswith('_unfinished')]
    if not reached:
        raise StageError(
            f'{folder} must hold a checkpoint of the reached target (got none); '
            'raise max_iters or units_per_step, delete the folder and '
            f'{folder.parent / "done" / folder.name}.json'
        )
    return str(max(reached, key=lambda path: path.stat().st_mtime))


def original(pipeline: Pipeline, config: str, checkpoint: str | None) -> Candidate:
    """Trains the original model, or takes the weights that the user has.

    Raises:
        ConfigError: If there is no such checkpoint.
    """
    if checkpoint is None:
        checkpoint = last_checkpoint(pipeline.train('baseline', config))
    check_checkpoint('--checkpoint', checkpoint)
    return Candidate('baseline', config, checkpoint)


def parse_options(options: Sequence[str]) -> dict[str, Any]:
    """Parses `key=value` overrides as the other tools do."""
    parser = argparse.ArgumentParser()
    parser.add_argument('--options', nargs='*', action=DictAction, default={})
    return parser.parse_args(['--options', *options]).options


def find_hook(cfg: Config) -> tuple[int, Mapping[str, Any]]:
    """Finds the pruning hook's place in `custom_hooks`, and its settings.

    Raises:
        ConfigError: If there is none with an `input_shape`.
    """
    for place, hook in enumerate(cfg.get('custom_hooks') or []):
        if is_named(hook.get('type'), *PRUNING_HOOKS) and 'input_shape' in hook:
            return place, hook
    raise ConfigError(
        f'{cfg.filename} must have a FisherPruningHook with input_shape in '
        'custom_hooks (got none); add input_shape=(3, H, W) to it'
    )


def input_shape(config: str, options: Sequence[str] = ()) -> tuple[int, ...]:
    """Reads the input shape (C, H, W) that the pruning hook counts costs at."""
    _, hook = find_hook(load_config(config, parse_options(options)))
    return tuple(hook['input_shape'])
