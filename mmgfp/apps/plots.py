"""Charts of kept channels, of comparisons and of sensitivity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmgfp.utils.io import atomic_write


def plot_channels(widths: Mapping[str, tuple[int, int]], path: str | Path) -> None:
    """Draw one bar per layer: the channels it had, overlaid by those it kept.

    Args:
        widths: Kept and original channels by layer name.
        path: The image file to write; its suffix chooses the format.
    """
    from matplotlib.figure import Figure

    names = list(widths)
    kept, total = zip(*widths.values(), strict=True) if widths else ((), ())
    figure = Figure(figsize=(max(6.0, 0.2 * len(names)), 5.0), layout='constrained')
    axes = figure.subplots()
    axes.bar(range(len(names)), total, color='#c9d3df', label='before')
    axes.bar(range(len(names)), kept, color='#2b6cb0', label='after pruning')
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
    axes.set_xlim(-0.7, len(names) - 0.3)
    axes.set_ylabel('output channels')
    axes.legend(frameon=False)
    for side in ('top', 'right'):
        axes.spines[side].set_visible(False)
    _save(figure, path)


def plot_curves(
    curves: Mapping[str, Mapping[str, Sequence[tuple[float, float, float]]]],
    metric: str,
    path: str | Path,
) -> None:
    """Draw a metric against each cost, one line for each variant.

    Args:
        curves: By the label of the axis and by variant, points: the share in percent,
            the mean and the spread around it. The first variant is the baseline.
        metric: The metric's name.
        path: The image file to write; its suffix chooses the format.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(curves) + 1.5, 4.2), layout='constrained')
    plots = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for axes, (label, by_variant) in zip(plots, curves.items(), strict=True):
        for number, (variant, points) in enumerate(by_variant.items()):
            shares, means, spreads = zip(*points, strict=True)
            style = {'color': f'C{(number - 1) % 10}', 'marker': 'osD^vP'[number % 6]}
            if number == 0:
                style = {'color': '#555555', 'marker': '*'}
                axes.axhline(means[0], color='#555555', linewidth=0.8, linestyle=':')
            axes.errorbar(
                *(shares, means, spreads), label=variant, capsize=3, alpha=0.8, **style
            )
        axes.set_xlabel(f"{label}, % of the baseline's")
        for side in ('top', 'right'):
            axes.spines[side].set_visible(False)
    plots[0].set_ylabel(metric)
    handles, names = plots[0].get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, loc='outside right center')
    _save(figure, path)


def plot_losses(
    losses: Sequence[Sequence[float | None]],
    names: Sequence[str],
    shares: Sequence[float],
    metric: str,
    path: str | Path,
) -> None:
    """Draw what a metric loses where a share of one group is pruned, as a map.

    Args:
        losses: By group and share; None where it was not measured.
        names: Names of the groups.
        shares: The shares.
        metric: The metric's name.
        path: The image file to write; its suffix chooses the format.
    """
    import numpy as np
    from matplotlib.figure import Figure

    values = np.array(losses, dtype=float).reshape(len(names), len(shares))
    size = (4.0 + 0.9 * len(shares), 1.2 + 0.24 * len(names))
    figure = Figure(figsize=size, layout='constrained')
    axes = figure.subplots()
    image = axes.imshow(values, cmap='Reds', aspect='auto', vmin=0.0)
    middle = np.nanmax(values, initial=0.0) / 2
    for (y, x), value in np.ndenumerate(values):
        if not np.isnan(value):
            color = 'white' if value > middle > 0 else 'black'
            text = axes.text(x, y, f'{value:.1f}', ha='center', va='center')
            text.set(fontsize=7, color=color)
    axes.set_xticks(range(len(shares)), [f'{share:.0%}' for share in shares])
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_xlabel('share of the group that is pruned')
    figure.colorbar(image, label=f'points of {metric} lost')
    _save(figure, path)


def _save(figure: Any, path: str | Path) -> None:
    # The temporary file of an atomic write has no suffix that would tell the format.
    suffix = Path(path).suffix.removeprefix('.') or 'png'
    atomic_write(path, lambda tmp: figure.savefig(tmp, format=suffix, dpi=150))
