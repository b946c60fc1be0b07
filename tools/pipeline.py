"""Train, prune, fine-tune, deploy and compare: one run from config to table.

Every stage is one of the other tools in a process of its own. A stage that has
finished is not run again, so the same command goes on after an interruption.
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

import torch
from mmengine.config import DictAction
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import find_latest_checkpoint, load_checkpoint

from mmgfp.cli import load_config, run_cli
from mmgfp.errors import ConfigError, MMGFPError
from mmgfp.io import atomic_write
from mmgfp.latency import measure_latency
from mmgfp.results import machine_facts, markdown, print_table, table_cells
from mmgfp.structure import PruneStructure
from mmgfp.visualization import layer_widths, plot_channels

TOOLS = Path(__file__).resolve().parent
PROGRESS = re.compile(r'(Epoch|Iter)\((train|val|test)\)|pruned|saved the compact')


@dataclass(frozen=True)
class Variant:
    """One row of the table: a config with its overrides, and its weights."""

    name: str
    config: str
    checkpoint: Path
    options: tuple[str, ...]


class StageError(MMGFPError):
    """A tool that the pipeline started has failed."""


class Pipeline:
    """Runs tools in order and remembers which have finished.

    Args:
        work_dir: Where every stage has its folder.
        options: The user's config overrides as `key=value`, given to each stage.
    """

    def __init__(self, work_dir: Path, options: Sequence[str]) -> None:
        self.work_dir = work_dir
        self.options = list(options)

    def run(self, stage: str, tool: str, *args: str, options: Sequence[str]) -> None:
        """Runs `tools/<tool>.py args` unless this very command has finished.

        Raises:
            StageError: If the tool fails.
        """
        done = self.work_dir / 'done' / f'{stage}.json'
        overrides = [*options, *self.options]
        command = [str(TOOLS / f'{tool}.py'), *args]
        command += ['--cfg-options', *overrides] if overrides else []
        if done.is_file() and json.loads(done.read_text())['command'] == command:
            print(f'{stage}: finished before (to redo it, delete {done})', flush=True)
            return
        print(f'{stage}: {" ".join(command)}', flush=True)
        began = time.perf_counter()
        log = self.work_dir / 'logs' / f'{stage}.log'
        code = run_logged([sys.executable, *command], log)
        if code:
            raise StageError(
                stage,
                'exit status 0',
                str(code),
                f'see {log}; the same command goes on from here',
            )
        note = {'command': command, 'seconds': time.perf_counter() - began}
        write_json(done, note)

    def seconds(self, stage: str) -> float:
        """Wall-clock seconds of the run in which the stage finished."""
        note = json.loads((self.work_dir / 'done' / f'{stage}.json').read_text())
        return float(note['seconds'])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('baseline', help='config that trains the original model')
    parser.add_argument('prune', help='config that prunes it')
    parser.add_argument('finetune', help='config that fine-tunes the pruned model')
    parser.add_argument('--work-dir', type=Path, required=True)
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
    return parser.parse_args()


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


def last_checkpoint(folder: Path) -> Path:
    """Returns the newest checkpoint of a training run."""
    found = find_latest_checkpoint(str(folder))
    if found is None or not Path(found).is_file():
        raise StageError(
            str(folder), 'a checkpoint', str(found), 'delete the folder and run again'
        )
    return Path(found)


def pruned_checkpoint(folder: Path, config: str) -> Path:
    """Returns the checkpoint of the last target that a pruning run met."""
    found = folder.glob(f'{Path(config).stem}_*.pth')
    reached = [path for path in found if not path.stem.endswith('_unfinished')]
    if not reached:
        raise StageError(
            str(folder),
            'a checkpoint of the reached target',
            'none',
            'raise max_iters or units_per_step, delete the folder and '
            f'{folder.parent / "done" / folder.name}.json',
        )
    return max(reached, key=lambda path: path.stat().st_mtime)


def run_stages(args: argparse.Namespace) -> tuple[Pipeline, list[Variant]]:
    """Trains, prunes, fine-tunes and deploys; returns what is to be compared."""
    root: Path = args.work_dir
    pipeline = Pipeline(root, args.cfg_options)

    def train(stage: str, config: str, options: Sequence[str] = ()) -> Path:
        folder = root / stage
        where = ('--work-dir', str(folder), '--resume')
        pipeline.run(stage, 'train', config, *where, options=options)
        return folder

    trained = last_checkpoint(train('baseline', args.baseline))
    folder = train('prune', args.prune, [f'load_from={trained}'])
    pruned = pruned_checkpoint(folder, args.prune)
    rebuild = (f'model.structure={pruned}',)
    folder = train('finetune', args.finetune, [f'load_from={pruned}', *rebuild])
    tuned = last_checkpoint(folder)
    name = Path(args.finetune).stem
    pipeline.run(
        'deploy',
        'deploy_pruned',
        *(args.finetune, str(tuned), '--out', str(root / 'deploy'), '--name', name),
        *('--input-shape', *map(str, input_shape(args.prune, args.cfg_options))),
        options=rebuild,
    )
    deployed = root / 'deploy' / name
    return pipeline, [
        Variant('baseline', args.baseline, trained, ()),
        Variant('pruned', args.finetune, pruned, rebuild),
        Variant('fine-tuned', f'{deployed}.py', deployed.with_name(f'{name}.pth'), ()),
    ]


def measure(
    pipeline: Pipeline, variant: Variant, shape: Sequence[int]
) -> dict[str, Any]:
    """Tests a variant and counts its costs for one image (C, H, W)."""
    folder = pipeline.work_dir / 'results'
    metrics, costs = (
        folder / f'{variant.name}_{kind}.json' for kind in ('metrics', 'costs')
    )
    what = (variant.config, str(variant.checkpoint))
    pipeline.run(
        f'test_{variant.name}',
        'test',
        *what,
        *('--json', str(metrics), '--work-dir', str(folder / 'logs')),
        options=variant.options,
    )
    pipeline.run(
        f'analyze_{variant.name}',
        'analyze',
        *what,
        *('--input-shape', *map(str, shape), '--json', str(costs)),
        options=variant.options,
    )
    found = json.loads(costs.read_text())
    return {
        'model': variant.name,
        'metrics': json.loads(metrics.read_text()),
        **{key: found[key] for key in ('macs', 'memory', 'params')},
    }


def parse_options(options: Sequence[str]) -> dict[str, Any]:
    """Parses `key=value` overrides as the other tools do."""
    parser = argparse.ArgumentParser()
    parser.add_argument('--options', nargs='*', action=DictAction, default={})
    return parser.parse_args(['--options', *options]).options


def input_shape(config: str, options: Sequence[str] = ()) -> tuple[int, ...]:
    """Reads the input shape (C, H, W) that the pruning hook counts costs at."""
    for hook in load_config(config, parse_options(options)).get('custom_hooks', []):
        if hook.get('type') == 'FisherPruningHook' and 'input_shape' in hook:
            return tuple(hook.input_shape)
    raise ConfigError(
        config,
        'a FisherPruningHook with input_shape in custom_hooks',
        'none',
        'add input_shape=(3, H, W) to it',
    )


def build(variant: Variant, options: Sequence[str]) -> torch.nn.Module:
    """Builds a variant's model with its weights, in eval mode."""
    cfg = load_config(variant.config, parse_options([*variant.options, *options]))
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    model = MODELS.build(cfg.model)
    load_checkpoint(model, str(variant.checkpoint), map_location='cpu')
    return model.eval()


def describe(args: argparse.Namespace, pipeline: Pipeline) -> dict[str, Any]:
    """Says how the numbers came about: configs, seed, times, machine."""
    stages = ('baseline', 'prune', 'finetune', 'deploy')
    cfg = load_config(args.baseline, parse_options(args.cfg_options))
    return {
        'configs': [args.baseline, args.prune, args.finetune],
        'seed': cfg.get('randomness', {}).get('seed'),
        'seconds': {stage: round(pipeline.seconds(stage)) for stage in stages},
        **machine_facts(),
    }


def add_latency(
    rows: Sequence[dict[str, Any]],
    models: Mapping[str, torch.nn.Module],
    shape: Sequence[int],
    rounds: int,
) -> None:
    """Times the networks on the CPU for one image (C, H, W), into the rows."""
    image = torch.rand(1, *shape)  # (1, C, H, W)
    times = measure_latency(models, image, rounds, mode='tensor')
    for row in rows:
        row['latency_ms'] = times[row['model']]


def draw(original: torch.nn.Module, pruned: Path, path: Path) -> None:
    """Draws the channels that each layer of the pruned model kept."""
    shapes = {name: list(p.shape) for name, p in original.named_parameters()}
    plot_channels(layer_widths(PruneStructure.load(pruned), shapes), path)


def main() -> None:
    """Runs every stage, measures, writes the results."""
    args = parse_args()
    shape = input_shape(args.prune, args.cfg_options)
    pipeline, variants = run_stages(args)
    rows = [measure(pipeline, variant, shape) for variant in variants]
    models = {variant.name: build(variant, args.cfg_options) for variant in variants}
    if args.latency_rounds:
        add_latency(rows, models, shape, args.latency_rounds)
    facts = {**describe(args, pipeline), 'input_shape': list(shape)}
    cells = table_cells(rows)
    text = markdown(cells, facts)
    write_json(args.work_dir / 'results.json', {'rows': rows, **facts})
    atomic_write(args.work_dir / 'results.md', lambda tmp: tmp.write_text(text))
    draw(models['baseline'], variants[1].checkpoint, args.work_dir / 'channels.png')
    print_table(cells)
    print(f'in {args.work_dir}: results.md, results.json, channels.png, deploy/')


if __name__ == '__main__':
    run_cli(main)
