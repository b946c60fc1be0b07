"""Measure what pruning costs, as ratios of things that take turns in one process.

Each part and model is a line of JSON beside the facts of the machine, and a row of a
table for docs/performance.md. Absolute times say something about the machine, too.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import discovering, step
from benchmarks.models import SUBJECTS
from mmgfp.cli import run_cli
from mmgfp.results import machine_facts

#: By name what is measured of a model and how its table looks.
PARTS: dict[str, tuple[Callable[..., Any], Callable[..., list[list[str]]]]] = {
    'step': (step.measure_step, step.table),
    'discovery': (discovering.measure_discovery, discovering.table),
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(prog='python -m benchmarks', description=__doc__)
    parser.add_argument('--only', default=','.join(PARTS), help='parts, with commas')
    parser.add_argument('--models', default=','.join(SUBJECTS), help='likewise')
    parser.add_argument('--device', default='cpu', help='cpu or cuda')
    parser.add_argument('--threads', type=int, help="of torch's, on the CPU")
    parser.add_argument('--repeats', type=int, default=9)
    parser.add_argument('--json', type=Path, metavar='FILE')
    parser.add_argument('--page', type=Path, metavar='FILE', help='Markdown tables')
    args = parser.parse_args(argv)
    for field, known in (('only', PARTS), ('models', SUBJECTS)):
        names = getattr(args, field).split(',')
        unknown = [n for n in names if n not in known]
        if unknown:
            parser.error(f'--{field}: expected some of {", ".join(known)}: {unknown}')
        setattr(args, field, names)
    return args


def machine(device: str) -> dict[str, Any]:
    """What the numbers were measured with."""
    facts = machine_facts()
    if device != 'cpu':
        facts['gpu'] = torch.cuda.get_device_name(device)
    return {**facts, 'device': device, 'system': platform.platform()}


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table; the first row is its head."""
    head, *body = rows
    lines = [head, ['---'] + ['---:'] * (len(head) - 1), *body]
    return '\n'.join(f'| {" | ".join(cells)} |' for cells in lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all that is asked for; what is done is written at once."""
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    results: dict[str, Any] = {'machine': machine(args.device)}
    for part in args.only:
        measure, table = PARTS[part]
        found = results[part] = {}
        for name in args.models:
            subject = SUBJECTS[name]
            model, calls = subject.build(args.device)
            found[subject.label] = measure(model, calls, args.repeats, args.device)
            if args.json:
                args.json.write_text(json.dumps(results, indent=1) + '\n')
        print(markdown(table(found)), end='\n\n', flush=True)
    if args.page:
        pages = [markdown(PARTS[part][1](results[part])) for part in args.only]
        args.page.write_text('\n\n'.join(pages) + '\n')


if __name__ == '__main__':
    run_cli(main)
