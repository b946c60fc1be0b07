"""Models and model files to be measured: a model in one runtime on one batch.

Run as a program, the module opens one and prints how much memory that took.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.runner import load_checkpoint

from mmgfp.apps.cli import build_from, check_checkpoint, load_config
from mmgfp.export.graphs import ExportGraph, end_to_end_graph, raw_graph
from mmgfp.runtimes import RUNTIMES, Session, open_model
from mmgfp.utils.errors import ConfigError

#: The runtime of models that are built from a config.
EAGER = 'torch'
GRAPHS: dict[str, Callable[[Any], ExportGraph]] = {
    'raw': raw_graph,
    'end-to-end': end_to_end_graph,
}
SOURCES = 'a .py config with ":" and its checkpoint, a deployed folder, or a model file'


@dataclass(frozen=True)
class Subject:
    """A model to measure in a runtime on one batch.

    Attributes:
        source: ``CONFIG`` or ``CONFIG:CHECKPOINT`` for PyTorch, a file for others.
        runtime: ``torch`` or a name in `mmgfp.runtimes.RUNTIMES`.
        size: (N, C, H, W) of the batch.
        outputs: 'raw' or 'end-to-end', of a model that is built from a config.
        threads: Threads that a run may use.
    """

    source: str
    runtime: str
    size: tuple[int, ...]
    outputs: str
    threads: int

    def open(self) -> Callable[[], Any]:
        """Return a call that runs the model on a random batch.

        Raises:
            ConfigError: If the model cannot be built, or its file not be opened or run
                on such a batch.
        """
        rng = np.random.default_rng(0)
        if self.runtime == EAGER:
            torch.set_num_threads(self.threads)
            graph = build_graph(self.source, self.outputs, self.size)
            image = torch.from_numpy(rng.random(self.size, np.float32))
            return partial(_infer, graph, image)
        session = open_model(self.source, self.runtime, self.threads)
        return partial(session.run, random_inputs(session, self.size, rng))


def _infer(graph: ExportGraph, image: torch.Tensor) -> Any:
    with torch.inference_mode():
        return graph(image)


def random_inputs(
    session: Session, size: Sequence[int], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Return a random batch of what a file reads.

    Args:
        session: The file; sizes that it fixes have to be those of the batch.
        size: (N, C, H, W).
        rng: Source of the numbers.

    Raises:
        ConfigError: If the file fixes another size, or has several inputs.
    """
    fixed = session.inputs or {'image': (None,) * 4}
    if len(fixed) != 1:
        got = ', '.join(fixed)
        raise ConfigError('model file', 'one input', got, 'give a file of an image')
    ((name, wanted),) = fixed.items()
    if reads_bytes(wanted):
        number, channels, height, width = size
        size = (number, height, width, channels)
        batch: np.ndarray = rng.integers(0, 256, size, dtype=np.uint8)
    else:
        batch = rng.random(tuple(size), np.float32)
    pairs = zip(wanted, size, strict=False)  # the number of axes is checked first
    if len(wanted) != 4 or any(w not in (None, s) for w, s in pairs):
        raise ConfigError(
            f'the batch for input {name}',
            f'of size {wanted}, as the file fixes it',
            str(tuple(size)),
            'give that size, or export the file with --dynamic',
        )
    return {name: batch}


def reads_bytes(size: Sequence[int | None]) -> bool:
    """Return whether an input of this size is an image as loaded, (N, H, W, C)."""
    return len(size) == 4 and size[3] in (1, 3) and size[1] not in (1, 3)


def build_graph(source: str, outputs: str, size: Sequence[int]) -> ExportGraph:
    """Build the model of ``CONFIG:CHECKPOINT`` as a graph of tensors.

    Args:
        source: The config, with the checkpoint; random weights without one.
        outputs: 'raw' or 'end-to-end'.
        size: (N, C, H, W), on which the graph runs once.
    """
    config, checkpoint = split_source(source)
    model = build_from(load_config(config))
    if checkpoint:
        check_checkpoint('checkpoint', checkpoint)
        load_checkpoint(model, checkpoint, map_location='cpu', logger='silent')
    model.eval()  # not chained: where distillation overrides it, it returns None
    if outputs == 'raw':
        return raw_graph(model, torch.zeros(1, *size[1:]))
    return GRAPHS[outputs](model)


def split_source(source: str) -> tuple[str, str | None]:
    """Split ``CONFIG:CHECKPOINT``; a colon of ``mmdet::config`` splits nothing.

    Examples:
        >>> split_source('a.py:b.pth')
        ('a.py', 'b.pth')
        >>> split_source('mmdet::yolox/yolox_s_8xb8-300e_coco.py')
        ('mmdet::yolox/yolox_s_8xb8-300e_coco.py', None)
        >>> split_source('/a/b.py:https://host/c.pth')
        ('/a/b.py', 'https://host/c.pth')
    """
    config, found, checkpoint = source.partition('.py:')
    return (f'{config}.py', checkpoint) if found else (source, None)


def resolve(source: str) -> str:
    """Return ``CONFIG:CHECKPOINT`` of a deployed folder; anything else as it is.

    Raises:
        ConfigError: If it is none of `SOURCES`.
    """
    path = Path(source)
    if path.is_dir():
        pairs = [p for p in path.glob('*.py') if p.with_suffix('.pth').is_file()]
        if len(pairs) != 1:
            got = f'{len(pairs)} in {source}'
            remedy = 'name CONFIG:CHECKPOINT instead'
            raise ConfigError('model', 'one config with weights', got, remedy)
        return f'{pairs[0]}:{pairs[0].with_suffix(".pth")}'
    if is_file(source) or split_source(source)[0].endswith('.py'):
        return source
    raise ConfigError('model', SOURCES, source, 'check the path')


def is_file(source: str) -> bool:
    """Return whether this names a model file that some runtime opens."""
    return any(Path(source).suffix in RUNTIMES[n].suffixes for n in RUNTIMES.names())


def peak_memory(subject: Subject) -> dict[str, float | None]:
    """Measure the memory of a model that runs alone in a process of its own.

    It is Linux' high-water mark of resident memory, ``VmHWM``, of a process that opens
    the model and runs it twice. `getrusage` would not do: its peak is inherited from
    the process that started the other.

    Returns:
        Mebibytes: the `peak_mb` of the whole process, and `growth_mb` over what it held
        when all libraries were imported; None on systems that do not tell.

    Raises:
        ConfigError: If the model cannot be opened or run there.
    """
    command = [
        sys.executable,
        '-W',
        'ignore',
        '-m',
        __name__,
        json.dumps(asdict(subject)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ['no message'])[-1]
        got = f'{last[:200]} (status {done.returncode})'
        remedy = 'leave it out with --no-memory'
        raise ConfigError(
            f'{subject.source} alone in a process', 'running', got, remedy
        )
    return json.loads(done.stdout.splitlines()[-1])


def _status(key: str) -> float | None:
    """Return an entry of this process' /proc/self/status in MiB."""
    path = Path('/proc/self/status')
    lines = path.read_text().splitlines() if path.is_file() else []
    sizes = [
        int(line.split()[1]) / 1024 for line in lines if line.startswith(f'{key}:')
    ]
    return sizes[0] if sizes else None


def _main() -> None:
    subject = Subject(**json.loads(sys.argv[1]))
    if subject.runtime == EAGER:
        # Libraries count before the model does.
        build_from(load_config(split_source(subject.source)[0]))
    else:
        __import__(RUNTIMES[subject.runtime].package)
    before = _status('VmRSS')
    run = subject.open()
    for _ in range(2):
        run()
    peak = _status('VmHWM')
    growth = None if peak is None or before is None else peak - before
    print(json.dumps({'peak_mb': peak, 'growth_mb': growth}))


if __name__ == '__main__':
    _main()
