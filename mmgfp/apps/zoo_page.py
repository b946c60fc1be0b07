"""Markdown page about which configs of the installed libraries can be pruned."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mmgfp.apps.tables import machine_facts
from mmgfp.apps.zoo import LIBRARIES, family_of
from mmgfp.discovery.verified import DISAGREES

#: Share of a model's MACs that a convolutional detector is expected to reach.
REACHED = 0.95
#: Kinds of reasons why a loss does not run, by words in the reason.
KINDS = {
    'missing package': r'not installed|[Pp]lease (first )?install|No module named',
    'no CPU operator': r'device cpu not found|not implemented for .CPU|CUDA|NVIDIA',
    'network': r'huggingface|[Cc]onnect|URLError|resolve host|offline|Errno -[23]\b',
    'data of another kind': r'data_preprocessor must be|lines_array',
    'too large for this machine': r'no end after|ended with -9',
}
OTHER = 'the config itself'
#: A path on the machine that wrote a reason.
PLACE = re.compile(r'(?<![\w.:/])(?:/[\w.+@-]+){2,}/')
#: The start of a reason that names one layer, a different one in each row.
READER = re.compile(r'^(?:read by|input of) \S+: ')


def render(
    results: Sequence[Mapping[str, Any]], facts: Mapping[str, Any] | None = None
) -> str:
    """Render a Markdown page: numbers of each library, then one line for each config.

    Args:
        results: Results of `mmgfp.apps.zoo.examine`.
        facts: Versions they were measured with; those of `machine_facts` by default.
    """
    facts = machine_facts() if facts is None else facts
    versions = ', '.join(f'{name} {v}' for name, v in facts['versions'].items())
    lines = ['# Which configs can be pruned', '', INTRODUCTION, '']
    lines += [f'Measured with Python {facts["python"]}, {versions}.', '']
    lines += _summary(results)
    for library in LIBRARIES:
        agreeing = [r for r in _of(library, results) if r['status'] == 'agrees']
        if agreeing:
            lines += ['', f'## {library}: pruned, masked equals compact', '']
            lines += _agreements(agreeing)
    disagreeing = [r for r in results if r.get('disagreeing')]
    if disagreeing:
        lines += ['', '## Frozen by the verification', '', DISAGREEING, '']
        lines += _table(('config', 'layers', 'why'), map(_disagreeing_row, disagreeing))
    for status, title in TITLES.items():
        chosen = [r for r in results if r['status'] == status]
        if chosen:
            lines += ['', f'## {title}', '', *_reasons(chosen, status == 'not run')]
    return '\n'.join(lines) + '\n'


def _summary(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Count configs and families of each library by outcome."""
    rows = []
    for library in LIBRARIES:
        tried = _of(library, results)
        if not tried:
            continue
        ran = [r for r in tried if r['status'] != 'not run']
        agreeing = [r for r in ran if r['status'] == 'agrees']
        wide = [r for r in agreeing if r['macs'] >= REACHED]
        families = {family_of(r['config']) for r in ran}
        # A family counts only if none of its configs failed.
        failed = {family_of(r['config']) for r in ran if r['status'] != 'agrees'}
        count = len(families - failed)
        share = f'{count} of {len(families)} ({count / max(len(families), 1):.1%})'
        rows.append((library, len(tried), len(ran), len(agreeing), len(wide), share))
    titles = ('library', 'configs tried', 'loss runs', 'pruned and agree')
    return _table((*titles, f'≥ {REACHED:.0%} of MACs', 'families that agree'), rows)


def _of(library: str, results: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [r for r in results if r['config'].startswith(f'{library}::')]


def _agreements(results: Sequence[Mapping[str, Any]]) -> list[str]:
    titles = ('config', 'units', 'channels', 'MACs', 'compared', 's')
    rows = (
        (
            f'`{_short_name(r)}`',
            r['units'],
            f'{r["channels"]:.1%}',
            f'{r["macs"]:.1%}',
            r['compared'].split(' ', 1)[0],
            f'{r["seconds"]:.0f}',
            _frozen_cell(r['frozen']),
        )
        for r in results
    )
    return _table((*titles, 'layers with frozen channels'), rows)


def _short_name(result: Mapping[str, Any]) -> str:
    return result['config'].split('::', 1)[1].removesuffix('.py')


def _frozen_cell(reasons: Mapping[str, int], most: int = 3) -> str:
    """List the most frequent reasons, each with the number of layers."""
    counts: Counter[str] = Counter()
    for reason, layers in reasons.items():
        counts[brief(reason)] += layers
    parts = [f'{n} × {reason}' for reason, n in counts.most_common(most)]
    rest = sum(counts.values()) - sum(n for _, n in counts.most_common(most))
    return '; '.join(parts + [f'{rest} for other reasons'] * bool(rest))


def brief(reason: str) -> str:
    """Shorten a reason to the part that models share: no layer, number or path.

    Examples:
        >>> brief('read by neck.1: rows are moved by Unfold')
        'rows are moved by Unfold'
    """
    if reason.startswith(DISAGREES):
        return 'frozen by the verification'
    reason = READER.sub('', tidy(reason))
    reason = re.sub(r'\d+ images, not \d+', 'other images than the batch has', reason)
    return OUTPUT if reason.startswith('an output:') else reason


def tidy(reason: str) -> str:
    """Remove line breaks and paths on this machine from a reason."""
    return ' '.join(PLACE.sub('', reason).split())


def kind_of(reason: str) -> str:
    """Say in a few words why a loss does not run.

    Examples:
        >>> kind_of('model: ImportError: No module named mamba')
        'missing package'
    """
    return next((k for k, words in KINDS.items() if re.search(words, reason)), OTHER)


def _disagreeing_row(result: Mapping[str, Any]) -> tuple[Any, ...]:
    whys = Counter(
        re.sub(r'\d+', 'N', tidy(why).removeprefix(f'{DISAGREES}: '))
        for why in result['disagreeing'].values()
    )
    most_frequent = '; '.join(w for w, _ in whys.most_common(2))
    return f'`{_short_name(result)}`', len(result['disagreeing']), most_frequent


def _reasons(results: Sequence[Mapping[str, Any]], kinds: bool) -> list[str]:
    """Write one line for each reason, with all configs that share it."""
    configs: dict[str, list[str]] = {}
    for result in results:
        name = f'`{result["config"].removesuffix(".py")}`'
        configs.setdefault(_cause(result['reason']), []).append(name)
    rows = [(why, ', '.join(names)) for why, names in configs.items()]
    if not kinds:
        return _table(('cause', 'configs'), rows)
    order = [*KINDS, OTHER]
    sorted_rows = sorted(
        ((kind_of(why), why, names) for why, names in rows),
        key=lambda row: order.index(row[0]),
    )
    return _table(('kind', 'reason', 'configs'), sorted_rows)


def _cause(reason: str, most: int = 5) -> str:
    """Return a reason; if it lists one per layer, with the first few distinct ones."""
    start, because, layers = tidy(reason).partition('left alone because: ')
    different = list(dict.fromkeys(brief(part) for part in layers.split('; ')))
    return (start + because + '; '.join(different[:most]))[:600]


def _table(titles: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = [titles, ['---'] * len(titles)]
    cells = [[str(cell).replace('|', '/') for cell in row] for row in rows]
    return ['| ' + ' | '.join(row) + ' |' for row in [*lines, *cells]]


OUTPUT = 'an output'
TITLES = {
    'disagrees': 'Masked and compact disagree',
    'failed': 'Not pruned',
    'not run': 'The loss does not run here',
}
INTRODUCTION = """\
Each model is built from its config without pretrained weights; its loss runs on a
synthetic batch on the CPU; the coupled channels are discovered and verified; then 30 %
of the units are pruned at random, and the masked and the compact model must agree to
1e-4 in double precision.

- "units": coupled channels that can be removed one unit at a time. "channels" and
  "MACs": the shares of the layers' output channels and of the multiply-accumulates that
  units reach.
- "compared": the whole training loss, or the outputs of inference where the loss itself
  does not run in double precision.
- "s": seconds for all steps on one thread.
- A family is a folder of configs; where the loss of one config does not run here, the
  next one of the folder stands for it.

`python tools/zoo.py --families --page docs/zoo.md` writes this page."""
DISAGREEING = """\
These channels seemed to be removable, but a compact model without them computes
something else, or fails. They stay; the rest of the model is pruned."""
