"""Measure what pruning costs, as ratios of things that take turns in one process.

Each part and model is an entry of JSON beside the facts of the machine, and rows of a
table for docs/performance.md. Absolute times say something about the machine, too.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import (
    decision,
    discovering,
    growth,
    latency,
    schedule,
    shipping,
    step,
)
from benchmarks.models import SUBJECTS, Subject
from mmgfp.apps.cli import run_cli
from mmgfp.apps.tables import machine_facts
from mmgfp.selection.latency_profile import LatencyProfile


@dataclass(frozen=True)
class Part:
    """Something that is measured.

    Attributes:
        about: What it is.
        measure: Measures it: a model, its calls, repeats and the device.
        table: Rows of a table, from what was measured by label.
        subjects: Names of the models.
        is_sized: Whether ``measure`` is given the size of the shipped image.
    """

    about: str
    measure: Callable[..., dict[str, Any]]
    table: Callable[..., list[list[str]]]
    subjects: tuple[str, ...]
    is_sized: bool = False


PARTS = {
    'step': Part(
        'an iteration of training with and without pruning',
        step.measure_step,
        step.table,
        ('retinanet', 'faster-rcnn', 'resnet50'),
    ),
    'discovery': Part(
        'finding and proving the coupled channels',
        discovering.measure_discovery,
        discovering.table,
        ('retinanet', 'faster-rcnn', 'resnet50'),
    ),
    'decision': Part(
        'a decision for one unit, ten, and as many as are safe',
        decision.measure_decision,
        decision.table,
        ('retinanet', 'retinanet-r101', 'faster-rcnn', 'resnet50'),
    ),
    'schedule': Part(
        'the way to half the MACs, masked and cut; --repeats has no say',
        schedule.measure_schedule,
        schedule.table,
        ('retinanet', 'resnet50'),
    ),
    'latency': Part(
        'pruned models against the original, and which cost tells',
        latency.measure_latency,
        latency.table,
        ('retinanet', 'resnet50'),
    ),
    'shipping': Part(
        'exported pruned models against the original, in the runtimes that ship',
        shipping.measure_shipping,
        shipping.table,
        (
            'retinanet',
            'faster-rcnn',
            'resnet50',
            'mobilenet-v2',
            'retinanet-mobilenet-v2',
        ),
        is_sized=True,
    ),
    'growth': Part(
        'steps, discovery and decisions by size of model and image',
        growth.measure_growth,
        growth.table,
        (
            'retinanet-r18',
            'retinanet',
            'retinanet-r101',
            'retinanet-384',
            'retinanet-512',
        ),
    ),
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(
        prog='python -m benchmarks',
        description=__doc__,
        epilog='parts and their models:\n' + _contents(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        '--only', metavar='PARTS', default=','.join(PARTS), help='parts, with commas'
    )
    parser.add_argument(
        '--models',
        default=','.join(SUBJECTS),
        help='likewise; each part measures those of its own that are named',
    )
    parser.add_argument('--device', default='cpu', help='cpu or cuda')
    parser.add_argument('--threads', type=int, help="of torch's, on the CPU")
    parser.add_argument('--repeats', type=int, default=9, help='rounds that are timed')
    parser.add_argument('--json', type=Path, metavar='FILE')
    parser.add_argument(
        '--profiles',
        type=Path,
        metavar='FOLDER',
        help='latency profiles of exported models, <model>.json; those of '
        'onnxruntime and as many threads',
    )
    parser.add_argument('--page', type=Path, metavar='FILE', help='Markdown tables')
    args = parser.parse_args(argv)
    for field, known in (('only', PARTS), ('models', SUBJECTS)):
        names = getattr(args, field).split(',')
        unknown = [n for n in names if n not in known]
        if unknown:
            expected = ', '.join(known)
            parser.error(f'--{field} must be some of {expected} (got {unknown})')
        setattr(args, field, names)
    args.only = [n for n in args.only if {*PARTS[n].subjects} & {*args.models}]
    if not args.only:
        parser.error(f'--models: no part that is asked for measures {args.models}')
    return args


def _contents() -> str:
    return '\n'.join(
        f'  {name}: {part.about}\n    {", ".join(part.subjects)}'
        for name, part in PARTS.items()
    )


def machine(device: str) -> dict[str, Any]:
    """Return the facts of the machine and of the command."""
    facts = machine_facts()
    if device != 'cpu':
        facts['gpu'] = torch.cuda.get_device_name(device)
    return {**facts, 'device': device, 'system': platform.platform()}


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table; the first row is its head."""
    head, *body = rows
    lines = [head, ['---'] + ['---:'] * (len(head) - 1), *body]
    return '\n'.join(f'| {" | ".join(cells)} |' for cells in lines)


def _shipping(subject: Subject, args: argparse.Namespace) -> dict[str, Any]:
    """Return the image size of an exported model, and its latency profile if any."""
    name = next(n for n, s in SUBJECTS.items() if s is subject)
    file = args.profiles / f'{name}.json' if args.profiles else None
    if file is None or not file.is_file():
        return {'size': subject.shipped}
    return {'size': LatencyProfile.load(file).input_shape, 'profile': file}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all that is asked for; what is done is written at once."""
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    results: dict[str, Any] = {'machine': machine(args.device)}
    for name in args.only:
        part, measured = PARTS[name], results.setdefault(name, {})
        for subject in (SUBJECTS[n] for n in part.subjects if n in args.models):
            model, calls = subject.build(args.device)
            extra = _shipping(subject, args) if part.is_sized else {}
            label = subject.label
            if part.is_sized:
                label = f'{subject.name}, {" × ".join(map(str, extra["size"][1:]))}'
            measured[label] = part.measure(
                model, calls, args.repeats, args.device, **extra
            )
            if args.json:
                args.json.write_text(json.dumps(results, indent=1) + '\n')
        print(markdown(part.table(measured)), end='\n\n', flush=True)
    if args.page:
        pages = [markdown(PARTS[name].table(results[name])) for name in args.only]
        args.page.write_text('\n\n'.join(pages) + '\n')


if __name__ == '__main__':
    run_cli(main)
