"""Charts of the channels that pruning kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mmgfp.surgery.structure import PruneStructure
from mmgfp.utils.io import atomic_write


def layer_widths(
    structure: PruneStructure, shapes: Mapping[str, Sequence[int]]
) -> dict[str, tuple[int, int]]:
    """Count the output channels that each layer kept.

    Args:
        structure: The structure of the compact model.
        shapes: Original shapes by parameter name, in the order to list them.

    Returns:
        Kept and original output channels by layer name, for each layer with a
        weight of two or more dimensions, pruned or not.

    Examples:
        >>> structure = PruneStructure(
        ...     sizes={'conv.weight': [4, 3, 3, 3]}, kept={'conv.weight': {0: [0, 2]}}
        ... )
        >>> layer_widths(structure, {'conv.weight': [4, 3, 3, 3], 'conv.bias': [4]})
        {'conv': (2, 4)}
    """
    widths = {}
    for name, shape in shapes.items():
        if len(shape) >= 2 and name.endswith('.weight'):
            kept = structure.kept.get(name, {}).get(0)
            count = shape[0] if kept is None else len(kept)
            widths[name.removesuffix('.weight')] = (count, shape[0])
    return widths


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
    # The temporary file of an atomic write has no suffix that would tell the format.
    suffix = Path(path).suffix.removeprefix('.') or 'png'
    atomic_write(path, lambda tmp: figure.savefig(tmp, format=suffix, dpi=150))
