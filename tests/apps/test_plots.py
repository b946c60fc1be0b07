"""Widths by layer, and a picture of them."""

import cv2

from mmgfp import PruneStructure
from mmgfp.apps.plots import layer_widths, plot_channels

SHAPES = {'stem.weight': [8, 3, 3, 3], 'fc.weight': [10, 8]}


def test_widths_count_output_channels():
    kept = {'stem.weight': {0: [0, 2, 5]}, 'fc.weight': {1: [0, 2, 5]}}
    structure = PruneStructure(sizes=SHAPES, kept=kept)
    vectors = {'stem.bias': [8], 'bn.weight': [8]}
    widths = {'stem': (3, 8), 'fc': (10, 10)}
    assert layer_widths(structure, SHAPES | vectors) == widths


def test_picture_is_written(tmp_path):
    path = tmp_path / 'channels.png'
    plot_channels({'stem': (3, 8), 'fc': (10, 10)}, path)
    image = cv2.imread(str(path))
    assert image is not None and image.shape[1] > image.shape[0] > 300
    assert [p.name for p in tmp_path.iterdir()] == ['channels.png']
