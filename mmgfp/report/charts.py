"""Charts of a report as SVG, which stands in the page itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from itertools import groupby
from typing import TYPE_CHECKING, Any

from mmgfp.report.history import History, Points
from mmgfp.report.snapshot import Snapshot
from mmgfp.selection.costs import COSTS

if TYPE_CHECKING:  # as drawing needs matplotlib, which training does without
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mmgfp.report.run import Run

#: Colours that the colour-blind can tell apart, on white and on black (Okabe and Ito,
#: "Color Universal Design", 2008); lines differ in their markers as well.
COLORS = ('#0072B2', '#E69F00', '#009E73', '#CC79A7', '#D55E00', '#56B4E9')
MARKERS = 'osD^vP'
#: What was there before pruning.
BEFORE = '#9aa5b1'
#: Stands for the colour of text, which the page chooses.
INK = '#010203'
#: Points of a line; of more, some are left out.
MOST_POINTS = 400
STYLE: dict[Any, Any] = {
    'svg.fonttype': 'none',  # text stays text: small, and to be searched
    'svg.hashsalt': 'mmgfp',  # the same page for the same run
    'text.parse_math': False,  # names may hold any character
    'font.size': 9,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'figure.facecolor': 'none',
    'axes.facecolor': 'none',
    'legend.frameon': False,
    'text.color': INK,
    'axes.labelcolor': INK,
    'axes.edgecolor': INK,
    'xtick.color': INK,
    'ytick.color': INK,
}


def tradeoff(history: History, snapshots: Sequence[Snapshot]) -> str:
    """Draw the loss and the remaining shares of all costs against iterations.

    Args:
        history: What was logged while pruning.
        snapshots: Pruned models, whose iterations are marked.

    Returns:
        An SVG element.
    """
    with _drawing(9.0, 5.0) as (figure, svg):
        loss, share = figure.subplots(2, 1, sharex=True)
        _line(loss, history.loss, 0, 'loss')
        loss.set_ylabel('training loss')
        for number, (name, points) in enumerate(history.shares.items(), 1):
            percent = {step: 100 * value for step, value in points.items()}
            _line(share, percent, number, COSTS[name].label)
        share.set_ylabel('% of the unpruned model')
        _count_iterations(share)
        share.legend(ncols=4, loc='lower left')
        for snapshot in snapshots:
            if snapshot.iteration is not None:
                for axes in (loss, share):
                    axes.axvline(snapshot.iteration, color=INK, lw=0.8, ls=':')
                place = (snapshot.iteration, 1.02)
                at_top = loss.get_xaxis_transform()
                loss.text(*place, snapshot.label, transform=at_top, ha='right')
    return svg('The loss and the remaining costs over the run')


def finetuning(history: History) -> str:
    """Draw the loss while fine-tuning; return an SVG element."""
    with _drawing(9.0, 2.6) as (figure, svg):
        axes = figure.subplots()
        _line(axes, history.loss, 0, 'loss')
        axes.set_ylabel('training loss')
        _count_iterations(axes)
    return svg('The loss while fine-tuning')


def _count_iterations(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel('iteration')
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def channels(snapshots: Sequence[Snapshot]) -> str:
    """Draw the channels that each layer had and has left, as the paper's figure 7.

    Args:
        snapshots: Pruned models of one original.

    Returns:
        An SVG element, as wide as its layers need.
    """
    widths = snapshots[0].widths
    names = list(widths)
    edges = [i - 0.5 for i in range(len(names) + 1)]
    with _drawing(max(9.0, 0.15 * len(names)), 4.4) as (figure, svg):
        axes = figure.subplots()
        totals = [total for _, total in widths.values()]
        axes.stairs(totals, edges, fill=True, color=BEFORE, alpha=0.6, label='original')
        for number, snapshot in enumerate(snapshots):
            kept = [snapshot.widths[name][0] for name in names]
            color = COLORS[number % len(COLORS)]
            axes.stairs(kept, edges, fill=True, color=color, label=snapshot.label)
        _mark_stages(axes, names)
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylabel('output channels')
        axes.legend(loc='upper left', ncols=4, bbox_to_anchor=(0, -0.05))
    return svg('The channels that each layer had and has left')


def _mark_stages(axes: Axes, names: Sequence[str]) -> None:
    """Part stages by lines, and name them above."""
    start = 0
    axes.set_xticks([])
    for stage, members in groupby(names, stage_of):
        end = start + len(list(members))
        if start:
            axes.axvline(start - 0.5, color=INK, lw=0.6, ls=':')
        place = ((start + end - 1) / 2, 1.02)
        at_top = axes.get_xaxis_transform()
        text = axes.text(*place, stage, transform=at_top, rotation=45)
        text.set(fontsize=7, rotation_mode='anchor')
        start = end


def stage_of(layer: str) -> str:
    """Return the part of a model that a layer is in.

    Examples:
        >>> stage_of('backbone.layer2.0.conv1'), stage_of('neck.lateral_convs.0.conv')
        ('backbone.layer2', 'neck')
    """
    parts = layer.split('.')
    return '.'.join(parts[: 2 if parts[0] == 'backbone' else 1])


def compared(runs: Sequence[Run]) -> str:
    """Draw the loss of several runs against the share of MACs that remains.

    Args:
        runs: Runs that logged both.

    Returns:
        An SVG element.
    """
    with _drawing(9.0, 3.6) as (figure, svg):
        axes = figure.subplots()
        for number, run in enumerate(runs):
            _line(axes, loss_by_share(run.history), number, run.name)
        axes.set_xlabel('MACs, % of the unpruned model')
        axes.set_ylabel('training loss')
        axes.invert_xaxis()
        axes.legend()
    return svg('The loss of each run against the MACs that remain')


def loss_by_share(history: History) -> dict[float, float]:
    """Return the loss by the percentage of MACs that remained when it was logged.

    Of several values for the same percentage, the last one counts.

    Examples:
        >>> loss_by_share(History({
        ...     'loss': {1: 0.5, 2: 0.75, 3: 1.0}, 'pruning/macs_ratio': {2: 0.5}}))
        {100.0: 0.5, 50.0: 1.0}
    """
    shares = history.shares.get('macs', {})
    found = {}
    for step, loss in history.loss.items():
        before = [share for at, share in shares.items() if at <= step]
        found[100.0 * (before[-1] if before else 1.0)] = loss
    return found


def _line(axes: Axes, points: Mapping[Any, float], number: int, label: str) -> None:
    kept = thinned(points)
    axes.plot(
        list(kept),
        list(kept.values()),
        color=COLORS[number % len(COLORS)],
        label=label,
        lw=1.4,
        marker=MARKERS[number % len(MARKERS)],
        ms=4,
        markevery=max(len(kept) // 12, 1),
    )


def thinned(points: Mapping[Any, float]) -> Points:
    """Return points in equal steps, so many that a page stays small, with the last.

    Examples:
        >>> some = thinned({step: 1.0 for step in range(1000)})
        >>> len(some), max(some)
        (334, 999)
    """
    step = -(-len(points) // MOST_POINTS)
    items = list(points.items())
    return dict([*items[:-1:step], *items[-1:]]) if items else {}


@contextmanager
def _drawing(
    width: float, height: float
) -> Iterator[tuple[Figure, Callable[[str], str]]]:
    """Draw in the style of a report, in inches; give the figure and what ends it."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout='constrained')
        text = StringIO()
        yield figure, lambda label: _element(text.getvalue(), label)
        figure.savefig(text, format='svg', metadata={'Date': None})


def _element(document: str, label: str) -> str:
    """Return the element of an SVG document, fit to stand in a page with others."""
    svg = document[document.index('<svg') :]
    svg = re.sub(r'<metadata>.*?</metadata>', '', svg, flags=re.DOTALL)
    # Groups are named alike in each chart, and nothing refers to them.
    svg = re.sub(r'<g id="[^"]*"', '<g', svg).replace(INK, 'currentColor')
    return svg.replace('<svg ', f'<svg role="img" aria-label="{label}" ', 1)
