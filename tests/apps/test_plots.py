"""A picture of the channels that layers keep."""

import cv2

from mmgfp.apps.plots import plot_channels


def test_picture_is_written(tmp_path):
    path = tmp_path / 'channels.png'
    plot_channels({'stem': (3, 8), 'fc': (10, 10)}, path)
    image = cv2.imread(str(path))
    assert image is not None and image.shape[1] > image.shape[0] > 300
    assert [p.name for p in tmp_path.iterdir()] == ['channels.png']
