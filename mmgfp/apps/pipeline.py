"""Sequences of tool runs, each a process of its own.

A finished stage is not run again, so the same command continues after an interruption.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmgfp.apps.cli import write_json
from mmgfp.utils.errors import MMGFPError

#: Lines of a stage's output that are shown while it runs.
PROGRESS = re.compile(r'(Epoch|Iter)\((train|val|test)\)|pruned|saved the compact')


@dataclass(frozen=True)
class Candidate:
    """One model to compare: a config with its overrides, and its weights."""

    name: str
    config: str
    checkpoint: str
    options: tuple[str, ...] = ()


class StageError(MMGFPError):
    """A tool that the pipeline started has failed, or left no checkpoint."""


class Pipeline:
    """Sequence of tool runs that remembers which have finished.

    Args:
        tools: The folder of the tools.
        work_dir: Where every stage has its folder.
        options: The user's config overrides as `key=value`; every stage gets them
            before those of its own.
    """

    def __init__(self, tools: Path, work_dir: Path, options: Sequence[str]) -> None:
        self.tools = tools
        self.work_dir = work_dir
        self.options = list(options)
        self.stages: list[str] = []

    def run(self, stage: str, tool: str, *args: str, options: Sequence[str]) -> None:
        """Run `<tools>/<tool>.py args` unless this very command has finished.

        Raises:
            StageError: If the tool fails.
        """
        self.stages.append(stage)
        done = self.work_dir / 'done' / f'{stage}.json'
        overrides = [*self.options, *options]
        command = [tool, *args]
        command += ['--cfg-options', *overrides] if overrides else []
        # With another config or override the stage is another one and runs again.
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
                'the same command continues from here'
            )
        note = {'command': command, 'seconds': time.perf_counter() - began}
        write_json(done, note)

    def train(self, stage: str, config: str, options: Sequence[str] = ()) -> Path:
        """Train, prune or fine-tune; return the stage's folder."""
        folder = self.work_dir / stage
        where = ('--work-dir', str(folder), '--resume')
        self.run(stage, 'train', config, *where, options=options)
        return folder

    def test(
        self, candidate: Candidate, label: str, options: Sequence[str] = ()
    ) -> dict[str, float]:
        """Test a candidate, under further overrides; return its metrics."""
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
        """Return the wall-clock seconds of each stage but the tests.

        An interrupted stage counts only the run in which it finished.
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


def run_logged(command: Sequence[str], log: Path) -> int:
    """Run a command, append its output to a log and show its progress.

    Args:
        command: The program and its arguments.
        log: The file to append to.

    Returns:
        The exit status. Unless it is 0, the last lines of output are shown.
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
            file.flush()  # so that the log can be followed while the stage runs
            last.append(line)
            if PROGRESS.search(line):
                print(line, end='', flush=True)
    if process.returncode:
        print(*last, sep='', end='', flush=True)
    return process.returncode
