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
from typing import IO, Any

from mmgfp.apps.cli import REFUSAL, REFUSED, write_json
from mmgfp.apps.processes import Processes, StageError
from mmgfp.apps.tables import CHECKOUT, commit_of
from mmgfp.apps.weight_files import digests_of

#: Lines of a stage's output that are shown while it runs.
PROGRESS = re.compile(
    r'(Epoch|Iter)\((train|val|test)\)|pruned \d+ units?|saved the compact'
    r'|following channels|verifying \d+ groups|too narrow to lose channels'
    r'|resumed epoch|asked to end'
)


@dataclass(frozen=True)
class Candidate:
    """One model to compare: a config with its overrides, and its weights."""

    name: str
    config: str
    checkpoint: str
    options: tuple[str, ...] = ()


class Pipeline:
    """Sequence of tool runs that remembers which have finished.

    Args:
        tools: The folder of the tools.
        work_dir: Where every stage has its folder.
        options: The user's config overrides as `key=value`; every stage gets them
            before those of its own.
        label: What lines of output begin with, where several pipelines print.
        processes: Starts the tools.
    """

    def __init__(
        self,
        tools: Path,
        work_dir: Path,
        options: Sequence[str] = (),
        label: str = '',
        processes: Processes | None = None,
    ) -> None:
        self.tools = tools
        self.work_dir = work_dir
        self.options = list(options)
        self.stages: list[str] = []
        self.label = f'{label}: ' if label else ''
        self.processes = processes or Processes()

    def run(
        self, stage: str, tool: str, *args: str, options: Sequence[str] = ()
    ) -> None:
        """Run `<tools>/<tool>.py args` unless this very command has finished.

        Raises:
            StageError: If the tool fails.
        """
        self.stages.append(stage)
        done = self.work_dir / 'done' / f'{stage}.json'
        overrides = [*self.options, *options]
        command = [tool, *args]
        command += ['--cfg-options', *overrides] if overrides else []
        weights = digests_of(command)
        before = json.loads(done.read_text()) if done.is_file() else {}
        # With another config or override the stage is another one and runs again, and
        # so it is with other weights in a file of the same name.
        if before.get('command') == command and before.get('weights') in (
            weights,
            None,  # of an earlier version
        ):
            folder = self.work_dir / stage  # where training would be resumed
            made = f'{done} and {folder}' if folder.is_dir() else done
            self._say(f'{stage}: finished before (to redo it, delete {made})')
            return
        self._say(f'{stage}: {" ".join(command)}')
        done.unlink(missing_ok=True)  # what it stands for is about to change
        began = time.perf_counter()
        log = self.work_dir / 'logs' / f'{stage}.log'
        program = [sys.executable, str(self.tools / f'{tool}.py')]
        code, last = self._run_logged([*program, *command[1:]], log)
        if code:
            if is_refusal(code, last):
                raise StageError(
                    f'{stage}: {last.removeprefix(REFUSAL)} (see {log}; a corrected '
                    'command goes on in this folder)'
                )
            raise StageError(
                f'{stage} must exit with status 0 (got {code}: {last}); see {log}; '
                'once its cause is mended, the same command continues from here'
            )
        seconds = time.perf_counter() - began
        note = {'command': command, 'weights': weights, 'seconds': seconds}
        write_json(done, {**note, 'commit': commit_of(CHECKOUT)})

    def train(self, stage: str, config: str, options: Sequence[str] = ()) -> Path:
        """Train, prune or fine-tune; return the stage's folder.

        Raises:
            StageError: If the folder is of a run from other weights or with other
                overrides, which would be resumed, or training fails.
        """
        folder = self.work_dir / stage
        note = folder / 'started_from.json'
        start: dict[str, Any] = dict(digests_of([config, *options]))
        others = [o for o in options if o.partition('=')[0] not in start]
        start['--cfg-options'] = [*self.options, *others]
        before = {}
        # A folder with nothing to go on from may begin otherwise.
        if note.is_file() and has_begun(self.work_dir, stage):
            before = json.loads(note.read_text())
        # Of what an earlier version did not note, nothing is known.
        others = [n for n, now in start.items() if before.get(n, now) != now]
        if others:
            done = self.work_dir / 'done' / f'{stage}.json'
            raise StageError(
                f'{folder} must be of a run with these weights and options (got one '
                f'with others: {", ".join(others)}); delete it and {done} to run the '
                'stage anew, or name another --work-dir'
            )
        write_json(note, {**start, **before})
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

    def commits(self) -> list[str]:
        """Return mmgfp's commits that the stages were run with, where they are known.

        What was interrupted counts by the run in which it finished.
        """
        paths = (self.work_dir / 'done' / f'{stage}.json' for stage in self.stages)
        commits = [json.loads(path.read_text()).get('commit') for path in paths]
        return list(dict.fromkeys(commit or 'unknown' for commit in commits))

    def _run_logged(self, command: Sequence[str], log: Path) -> tuple[int, str]:
        """Run a command, append its output to a log and show its progress.

        Args:
            command: The program and its arguments.
            log: The file to append to.

        Returns:
            The exit status, and the last line of output. Where that is not 0, the last
            lines are shown, unless the tool has put what is wrong into the very last.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        last: deque[str] = deque(maxlen=20)
        with log.open('a') as file, self.processes.start(command) as process:
            try:
                self._follow(process, file, last)
            except SystemExit:  # SIGTERM: what the tool says at its end is wanted, too
                process.terminate()
                self._follow(process, file, last)
                raise
        words = next((text for text in reversed(last) if text), 'no output')
        if process.returncode and not is_refusal(process.returncode, words):
            self._say('\n'.join(last))
        return process.returncode, words

    def _follow(
        self, process: subprocess.Popen[str], log: IO[str], last: deque[str]
    ) -> None:
        for line in process.stdout or ():
            log.write(line)
            log.flush()  # so that the log can be followed while the stage runs
            last.append(line.rstrip())
            if PROGRESS.search(line):
                self._say(line.rstrip())

    def _say(self, text: str) -> None:
        """Print lines in one go, as other pipelines may print at the same time."""
        lines = (f'{self.label}{line}\n' for line in text.splitlines())
        print(''.join(lines), end='', flush=True)


def is_refusal(code: int, last: str) -> bool:
    """Return whether a tool has refused what it was given.

    Args:
        code: Its exit status.
        last: The last line of its output.
    """
    return code == REFUSED and last.startswith(REFUSAL)


def has_begun(work_dir: Path, stage: str) -> bool:
    """Return whether a stage has finished, or left something to go on from.

    One that was refused, or killed early, has not.
    """
    folder = work_dir / stage
    # Checkpoints may be elsewhere; MMEngine notes here where the last one is.
    files = (work_dir / 'done' / f'{stage}.json', folder / 'last_checkpoint')
    return any(map(Path.is_file, files)) or any(folder.glob('*.pth'))
