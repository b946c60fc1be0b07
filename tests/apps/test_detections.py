"""Detections side by side: the right boxes in pictures that a page has room for."""

import base64
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData
from support.html import Page
from support.small_configs import config_of
from support.tooling import load_tool

from mmgfp.apps.detections import _draw, draw_checkpoints, draw_detections
from mmgfp.engine.model_building import build_model
from mmgfp.report.gallery import encode
from mmgfp.utils.errors import ConfigError


def picture_of(address):
    """Decode the address of a JPEG."""
    kind, _, data = address.partition(',')
    assert kind == 'data:image/jpeg;base64'
    return cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), -1)


def drawn(found, tmp_path):
    """Draw what a model finds in a grey image of 100x100."""
    from mmdet.structures import DetDataSample

    path = tmp_path / 'image.png'
    cv2.imwrite(str(path), np.full((100, 100, 3), 128, np.uint8))
    sample = DetDataSample(metainfo={'img_path': str(path)})
    if found is not None:
        boxes, scores = torch.tensor(found[0]), torch.tensor(found[1])
        labels = torch.zeros(len(boxes), dtype=torch.long)
        sample.pred_instances = InstanceData(bboxes=boxes, scores=scores, labels=labels)
    model = SimpleNamespace(test_step=lambda batch: batch['data_samples'])
    data = {'inputs': torch.zeros(3, 9, 9), 'data_samples': sample}
    return _draw(model, data, {'classes': ('cell',), 'palette': [(255, 0, 0)]})


def test_boxes_of_enough_score_are_drawn_where_they_are(tmp_path):
    boxes = [[20.0, 40.0, 80.0, 90.0], [5.0, 5.0, 95.0, 20.0]]
    picture = drawn((boxes, [0.9, 0.2]), tmp_path)
    assert picture.shape == (100, 100, 3)
    red, green, _ = picture[65, 80].astype(
        int
    )  # on its right edge, in the palette's red
    assert red > green + 50
    assert (picture[65, 50] == 128).all() and (picture[12, 95] == 128).all()


def test_models_without_boxes_are_refused(tmp_path):
    with pytest.raises(ConfigError, match='what is drawn must be of a detector'):
        drawn(None, tmp_path)


def test_classifiers_have_no_pictures(tmp_path):
    config = config_of(tmp_path, 'classifier')
    model = build_model(config)
    assert draw_detections(config, {'original': model}) is None
    weights = tmp_path / 'net.pth'
    torch.save({'state_dict': model.state_dict()}, weights)
    with pytest.raises(ConfigError, match='--config must be that of a detector .got'):
        draw_checkpoints(config, [str(weights)], 1)


def test_pictures_shrink_until_they_fit():
    noise = np.random.default_rng(0).integers(0, 256, (600, 300, 3), dtype=np.uint8)
    rows = [[noise, noise]] * 2
    ((large, _), _) = encode(rows, 10**7)
    assert picture_of(large).shape == (480, 240, 3)
    smaller = encode(rows, 300_000)
    assert sum(len(address) for row in smaller for address in row) <= 300_000
    assert 160 <= picture_of(smaller[0][0]).shape[0] < 480
    assert encode(rows, 1000) is None
    ((same,),) = encode([[noise[:50, :40]]], 10**7)
    assert picture_of(same).shape == (50, 40, 3)  # never made larger


def test_the_tool_shows_each_checkpoint(pruning_run, monkeypatch, tmp_path, capsys):
    work, out = pruning_run.artifact.parent, tmp_path / 'report.html'
    (trained,) = work.glob('iter_*.pth')
    (config,) = work.glob('*.py')
    files = ('--checkpoints', trained, pruning_run.artifact)
    argv = ['report', work, '--out', out, '--config', config, '--images', '2', *files]
    monkeypatch.setattr(sys, 'argv', [*map(str, argv)])
    load_tool('report').main()
    assert f'wrote {out}' in capsys.readouterr().out
    read = Page(out.read_text())
    header, rows = read.table('detections')
    assert header == ['image', trained.stem, pruning_run.artifact.stem]
    images = Path(pruning_run.folder, 'digits/images/val')
    assert len(rows) == 2 and {*rows} <= {path.name for path in images.iterdir()}
    addresses = [r for r in read.references if not r.startswith('#')]
    assert len(addresses) == 4
    assert {picture_of(address).shape for address in addresses} == {(64, 64, 3)}
