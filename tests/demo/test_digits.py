"""The digits are real, repeatable, complete, and apart between the splits."""

import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest

from mmgfp.demo.digits import (
    DigitsDetection,
    DigitsSpec,
    draw_image,
    source_digits,
    write_digits,
)
from mmgfp.utils.errors import ConfigError

SMALL = DigitsSpec(num_train=4, num_val=3, size=64, max_side=32)


def files(root):
    return {p.relative_to(root): p.read_bytes() for p in root.rglob('*.*')}


def write_small(root):
    write_digits(root, SMALL)


def test_source_digits_are_disjoint_and_complete_and_split_by_the_seed():
    from sklearn.datasets import load_digits

    train, train_classes = source_digits('train', seed=0)
    val, val_classes = source_digits('val', seed=0)
    assert len(train) == 1437 and len(val) == 360
    assert train.min() == 0.0 and train.max() == 1.0
    together = np.concatenate([train, val]) * 16
    classes = np.concatenate([train_classes, val_classes])
    digits = load_digits()
    # Every source digit is in exactly one split: equal as sorted rows.
    mine = np.column_stack([together.reshape(-1, 64), classes])
    theirs = np.column_stack([digits.data, digits.target])
    assert (mine[np.lexsort(mine.T)] == theirs[np.lexsort(theirs.T)]).all()
    assert not np.array_equal(train_classes, source_digits('train', seed=1)[1])


def test_boxes_hug_the_ink():
    glyph = np.zeros((1, 8, 8))
    glyph[0, 2:6, 3:5] = 1.0  # twice as high as wide
    spec = DigitsSpec(size=128, min_side=64, max_side=64, max_digits=1)
    rng = np.random.default_rng(0)
    image, boxes, labels = draw_image(rng, glyph, np.array([7]), spec)
    assert image.shape == (128, 128, 3) and image.dtype == np.uint8
    assert labels == [7]
    [[x, y, width, height]] = boxes
    # Four by two source pixels, each enlarged by eight, and a soft edge.
    assert 32 <= height <= 40 and 16 <= width <= 24
    assert 0 <= x <= 128 - width and 0 <= y <= 128 - height


def test_equal_specs_write_equal_files(tmp_path):
    write_small(tmp_path / 'a')
    write_small(tmp_path / 'b')
    first = files(tmp_path / 'a')
    assert first == files(tmp_path / 'b')
    assert len(first) == 4 + 3 + 2 + 1  # images, annotations, the spec
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a', 'b']  # no drafts


def test_annotations_describe_images_of_digits_that_do_not_overlap(tmp_path):
    write_small(tmp_path)
    for split, count in (('train', 4), ('val', 3)):
        coco = json.loads((tmp_path / f'annotations/{split}.json').read_text())
        assert len(coco['images']) == count
        assert [c['name'] for c in coco['categories']] == list('0123456789')
        for entry in coco['images']:
            image = cv2.imread(str(tmp_path / 'images' / split / entry['file_name']))
            assert image.shape == (entry['height'], entry['width'], 3)
        assert {a['image_id'] for a in coco['annotations']} == set(range(count))
        hits = np.zeros((count, 64, 64), dtype=int)
        for annotation in coco['annotations']:
            x, y, width, height = annotation['bbox']
            assert annotation['area'] == width * height
            assert min(x, y) >= 0 and max(x + width, y + height) <= 64
            hits[annotation['image_id'], y : y + height, x : x + width] += 1
        assert (hits.max(axis=(1, 2)) == 1).all()


def test_processes_may_write_at_the_same_time(tmp_path):
    roots = [tmp_path / 'digits'] * 3
    with ProcessPoolExecutor(3) as pool:
        list(pool.map(write_small, roots))
    write_small(tmp_path / 'alone')
    assert files(tmp_path / 'digits') == files(tmp_path / 'alone')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['alone', 'digits']


def test_complete_data_is_not_drawn_again_nor_mixed_with_other_digits(tmp_path):
    write_small(tmp_path)
    before = (tmp_path / 'spec.json').stat().st_mtime_ns
    write_small(tmp_path)
    assert (tmp_path / 'spec.json').stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match=r"data_root .*'seed': 1.*delete"):
        write_digits(tmp_path, DigitsSpec(4, 3, size=64, max_side=32, seed=1))


def test_foreign_files_are_not_overwritten(tmp_path):
    Path(tmp_path, 'thesis.txt').write_text('mine')
    with pytest.raises(ConfigError, match='got other files'):
        write_small(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ['thesis.txt']


def test_missing_scikit_learn_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(ConfigError, match='pip install scikit-learn'):
        write_small(tmp_path / 'digits')


def test_dataset_draws_on_first_use(tmp_path):
    dataset = DigitsDetection(
        data_root=str(tmp_path / 'digits'),
        spec=dict(num_train=4, num_val=3, size=64, max_side=32),
        ann_file='annotations/val.json',
        data_prefix=dict(img='images/val/'),
        pipeline=[],
    )
    assert len(dataset) == 3
    item = dataset.get_data_info(0)
    assert Path(item['img_path']).is_file()
    assert item['instances'] and item['height'] == 64
    assert dataset.metainfo['classes'] == tuple('0123456789')
