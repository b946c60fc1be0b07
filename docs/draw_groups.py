"""Draw which channels go together in parts of two detectors, as discovery finds them.

Run by hand where MMDetection is installed; it writes the three pictures of
``how-it-works.md``::

    python docs/draw_groups.py

Layers and arrows are laid out here. Colours and numbers of units are what discovery
finds in RetinaNet and Faster R-CNN R50-FPN: the left edge of a layer has the colour of
the group that its input channels belong to, the right edge that of its output channels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from mmengine.hub import get_config

from mmgfp.engine.demo_batch import demo_calls
from mmgfp.engine.model_building import build_model
from mmgfp.groups import Grouping
from mmgfp.pruner import ChannelPruner

IMAGES = Path(__file__).parent / 'images'
COLOURS = ('#2b6cb0', '#dd6b20', '#2f855a', '#b83280', '#6b46c1', '#b7791f', '#0d9488')
STAYS = '#1a202c'
OTHER = '#cbd5e0'
HEIGHT, EDGE = 0.5, 0.12


@dataclass(frozen=True)
class Node:
    """A layer of the model, or an op between layers if ``layer`` is None.

    Attributes:
        x: Column of its middle.
        y: Row of its middle; rows count downwards.
        text: What is written into it.
        layer: Name of the layer, whose weight is looked up among the groups.
    """

    x: float
    y: float
    text: str
    layer: str | None = None


@dataclass(frozen=True)
class Picture:
    """A part of a model.

    Attributes:
        file: Name of the picture.
        config: Config of MMDetection that builds the model.
        nodes: Layers and ops by short names.
        arrows: Pairs of short names, from where data come and where they go.
    """

    file: str
    config: str
    nodes: Mapping[str, Node]
    arrows: tuple[tuple[str, str], ...]


def arrows(*paths: str) -> tuple[tuple[str, str], ...]:
    """Return the pairs of neighbours of paths such as ``'a b c'``."""
    return tuple(pair for path in paths for pair in pairwise(path.split()))


def bottleneck(stage: str, block: int, x: float) -> dict[str, Node]:
    """Return the three convolutions and the addition of a residual block."""
    nodes = {f'{block}+': Node(x + 4.2, 0, '+')}
    for i in (1, 2, 3):
        layer = f'backbone.{stage}.{block}.conv{i}'
        nodes[f'{block}{i}'] = Node(x + (i - 1) * 1.6, 0, f'{block}.conv{i}', layer)
    return nodes


RESNET = Picture(
    'groups_resnet.svg',
    'retinanet/retinanet_r50_fpn_1x_coco.py',
    {
        'stem': Node(0, 0, 'conv1', 'backbone.conv1'),
        **bottleneck('layer1', 0, 1.6),
        'down': Node(3.2, 1, '0.downsample', 'backbone.layer1.0.downsample.0'),
        **bottleneck('layer1', 1, 7),
    },
    arrows('stem 01 02 03 0+ 11 12 13 1+', 'stem down 0+', '0+ 1+'),
)


def pyramid() -> Picture:
    """Return the lateral and output convolutions of a pyramid and what reads it."""
    nodes, paths = {}, []
    for level in range(3):
        stage, block = ((2, 3), (3, 5), (4, 2))[level]
        last = f'backbone.layer{stage}.{block}.conv3'
        nodes |= {
            f'c{level}': Node(0, 2 - level, f'layer{stage}.{block}.conv3', last),
            f'l{level}': Node(
                2.5, 2 - level, f'lateral {level}', f'neck.lateral_convs.{level}.conv'
            ),
            f'f{level}': Node(
                5.9, 2 - level, f'fpn {level}', f'neck.fpn_convs.{level}.conv'
            ),
        }
        paths += [f'c{level} l{level}', f'f{level} cls', f'f{level} reg']
    nodes |= {
        'cls': Node(9, 0.5, 'cls_convs.0', 'bbox_head.cls_convs.0.conv'),
        'reg': Node(9, 1.5, 'reg_convs.0', 'bbox_head.reg_convs.0.conv'),
    }
    # Each level adds what the next coarser one has, upsampled.
    nodes |= {f'+{level}': Node(4.2, 2 - level, '+') for level in (0, 1)}
    paths += ['l2 f2', 'l1 +1 f1', 'l0 +0 f0', 'l2 +1 +0']
    return Picture('groups_fpn.svg', RESNET.config, nodes, arrows(*paths))


def roi_head() -> Picture:
    """Return what reads a pyramid in Faster R-CNN: the RPN, and the head of RoIs."""
    head = 'roi_head.bbox_head'
    nodes = {
        f'f{level}': Node(0, level, f'fpn {level}', f'neck.fpn_convs.{level}.conv')
        for level in range(4)
    }
    nodes |= {
        'rpn': Node(3.2, 0.5, 'rpn_conv', 'rpn_head.rpn_conv'),
        'score': Node(6, 0, 'rpn_cls', 'rpn_head.rpn_cls'),
        'delta': Node(6, 1, 'rpn_reg', 'rpn_head.rpn_reg'),
        'align': Node(2.6, 2.5, 'RoIAlign'),
        'fc1': Node(4.7, 2.5, 'shared_fcs.0', f'{head}.shared_fcs.0'),
        'fc2': Node(7, 2.5, 'shared_fcs.1', f'{head}.shared_fcs.1'),
        'cls': Node(9.4, 2, 'fc_cls', f'{head}.fc_cls'),
        'reg': Node(9.4, 3, 'fc_reg', f'{head}.fc_reg'),
    }
    levels = [f'f{level} {reader}' for level in range(4) for reader in ('rpn', 'align')]
    paths = ['rpn score', 'rpn delta', 'align fc1 fc2 cls', 'fc2 reg', *levels]
    config = 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
    return Picture('groups_roi_head.svg', config, nodes, arrows(*paths))


def groups_of(config: str) -> Grouping:
    """Return the verified groups of a model of MMDetection with random weights."""
    cfg = get_config(f'mmdet::{config}')
    cfg.model.backbone.update(frozen_stages=-1, init_cfg=None)
    model = build_model(cfg)
    calls = demo_calls(cfg, model)
    found = ChannelPruner(model).discover(calls.loss, calls.forward, calls.images)
    return found.grouping


def sides(grouping: Grouping, layer: str) -> tuple[str | None, str | None]:
    """Return the groups that a layer's input and output channels belong to."""
    reads = [g.name for g in grouping.groups if layer in g.layers('in')]
    makes = [g.name for g in grouping.groups if layer in g.layers('out')]
    return next(iter(reads), None), next(iter(makes), None)


def draw(picture: Picture, grouping: Grouping) -> None:
    """Draw a picture and write it."""
    layers = [n.layer for n in picture.nodes.values() if n.layer is not None]
    seen = Counter(group for layer in layers for group in sides(grouping, layer))
    names = [name for name, count in seen.items() if name is not None and count > 1]
    colours = dict(zip(names, COLOURS, strict=False))
    right = max(n.x for n in picture.nodes.values()) + 1.2
    bottom = max(n.y for n in picture.nodes.values()) + 0.6
    units = {g.name: g.units for g in grouping.groups}
    lines = {f'{n}: {units[n]} units': colour for n, colour in colours.items()}
    once = any(count == 1 for name, count in seen.items() if name is not None)
    lines |= {'a group that is seen once only': OTHER} if once else {}
    lines |= {'stays as it is': STAYS} if None in seen else {}
    legend = 0.38 * ((len(lines) + 1) // 2)
    figure = Figure(figsize=(0.72 * (right + 1.2), 0.85 * (bottom + 0.6 + legend)))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-1.2, right), ylim=(bottom + legend, -0.6))
    axes.axis('off')
    for start, end in picture.arrows:
        connect(axes, picture.nodes[start], picture.nodes[end])
    for node in picture.nodes.values():
        place(axes, node, grouping, colours)
    explain(axes, lines, bottom)
    metadata = {'Date': None, 'Creator': 'docs/draw_groups.py'}
    figure.savefig(IMAGES / picture.file, metadata=metadata)


def reach(node: Node) -> float:
    """Return how far a node goes to each side of its middle."""
    letters = len(node.text)
    return 0.1 + 0.04 * letters if node.layer is None else 0.3 + 0.043 * letters


def connect(axes, start: Node, end: Node) -> None:
    """Draw an arrow; one that would cross layers of its row bends above them."""
    first, last = (start.x + reach(start), start.y), (end.x - reach(end), end.y)
    style = dict(arrowstyle='-|>', color='#4a5568', lw=1, shrinkA=0, shrinkB=0)
    if start.x == end.x:
        first, last = (start.x, start.y + 0.14), (end.x, end.y - 0.14)
    elif start.y == end.y and end.x - start.x > 4:
        first, last = (start.x, start.y - 0.14), (end.x, end.y - 0.14)
        style['connectionstyle'] = f'arc3,rad={-0.9 / (end.x - start.x):.3f}'
    axes.annotate('', last, first, arrowprops=style)


def place(axes, node: Node, grouping: Grouping, colours: Mapping[str, str]) -> None:
    """Draw a layer with the colours of its two sides, or an op."""
    text = dict(ha='center', va='center', fontsize=8, color='#1a202c')
    if node.layer is None:
        white = dict(boxstyle='round,pad=0.15', fc='white', ec='#4a5568', lw=0.8)
        axes.text(node.x, node.y, node.text, bbox=white if node.text else None, **text)
        return
    left, top, width = node.x - reach(node), node.y - HEIGHT / 2, 2 * reach(node)
    frame = dict(fc='white', ec='#4a5568', lw=0.8)
    axes.add_patch(Rectangle((left, top), width, HEIGHT, **frame))
    both = zip(sides(grouping, node.layer), (left, left + width - EDGE), strict=True)
    for name, x in both:
        colour = STAYS if name is None else colours.get(name, OTHER)
        axes.add_patch(Rectangle((x, top), EDGE, HEIGHT, fc=colour, ec='none'))
    axes.text(node.x, node.y, node.text, **text)


def explain(axes, lines: Mapping[str, str], bottom: float) -> None:
    """Draw the legend below the picture, in two columns."""
    for number, (text, colour) in enumerate(lines.items()):
        x, y = -1 + 5.2 * (number % 2), bottom + 0.38 * (number // 2)
        axes.add_patch(Rectangle((x, y - 0.12), 0.3, 0.24, fc=colour, ec='none'))
        axes.text(x + 0.45, y, text, va='center', fontsize=8, color='#1a202c')


def main(pictures: Iterable[Picture]) -> None:
    """Find the groups of each model once, and draw the pictures."""
    # Texts as texts, and the same file each time.
    matplotlib.rcParams.update({'svg.fonttype': 'none', 'svg.hashsalt': 'mmgfp'})
    groupings: dict[str, Grouping] = {}
    for picture in pictures:
        if picture.config not in groupings:
            groupings[picture.config] = groups_of(picture.config)
        draw(picture, groupings[picture.config])


if __name__ == '__main__':
    main((RESNET, pyramid(), roi_head()))
