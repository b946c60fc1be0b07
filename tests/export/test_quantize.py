"""Files in 8-bit integers: how small, how near the float's, what stays in float."""

import re
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from mmengine.config import Config
from onnx import numpy_helper
from support.configs import FASTER, slim
from support.plain_onnx import write_plain_onnx
from support.small_configs import config_of
from support.tooling import load_tool

from mmgfp.engine.deploy import Trained
from mmgfp.engine.model_building import build_model
from mmgfp.export.calibration import CalibrationImages
from mmgfp.export.files import export_files
from mmgfp.export.graphs import end_to_end_graph, raw_graph
from mmgfp.export.options import ExportOptions
from mmgfp.export.quantize import (
    float_nodes,
    onnx_nodes,
    quantize_onnx,
    quantize_openvino,
)
from mmgfp.runtimes import open_model
from mmgfp.utils.errors import ConfigError

WRITERS = {'onnxruntime': quantize_onnx, 'openvino': quantize_openvino}


class Net(torch.nn.Module):
    """Two convolutions and a predictor, which takes most weights of all."""

    outputs = ('scores',)

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(3, 32, 3)
        self.second = torch.nn.Conv2d(32, 64, 3)
        self.predictor = torch.nn.Conv2d(64, 4, 1)

    def forward(self, image):
        return self.predictor(self.second(self.first(image).relu()).relu())


@pytest.fixture
def net(tmp_path):
    torch.manual_seed(0)
    file = tmp_path / 'net.onnx'
    write_plain_onnx(Net().eval(), torch.rand(1, 3, 16, 16), file)
    model = onnx.load(file)
    onnx.helper.set_model_props(model, {'mmgfp': '{"outputs": "raw"}'})
    onnx.save(model, file)
    rng = np.random.default_rng(0)
    return file, list(rng.normal(size=(6, 1, 3, 16, 16)).astype(np.float32))


def relative_error(file, other, images):
    """Root of the squared error over that of the outputs' own deviation."""
    one, two = (
        np.stack([next(iter(open_model(f).run({'image': x}).values())) for x in images])
        for f in (file, other)
    )
    return float(np.sqrt(((one - two) ** 2).mean()) / one.std())


@pytest.mark.parametrize('runtime', list(WRITERS))
def test_small_and_near(runtime, net, tmp_path):
    file, images = net
    suffix = {'onnxruntime': 'onnx', 'openvino': 'xml'}[runtime]
    out = tmp_path / f'int8.{suffix}'
    WRITERS[runtime](file, out, images)
    weights = out if suffix == 'onnx' else out.with_suffix('.bin')
    assert weights.stat().st_size < file.stat().st_size / 2
    # 8 bits of noise in each of two layers and their inputs; and not the float itself.
    assert 1e-4 < relative_error(file, out, images) < 0.03
    assert open_model(out).metadata['mmgfp'] == '{"outputs": "raw"}'


def test_weights_have_a_scale_per_channel_but_the_predictor_stays(net, tmp_path):
    file, images = net
    out = tmp_path / 'int8.onnx'
    quantize_onnx(file, out, images, method='minmax')
    graph = onnx.load(out).graph
    values = {v.name: numpy_helper.to_array(v) for v in graph.initializer}
    bytes_ = [v.shape for v in values.values() if v.dtype == np.int8]
    # Weights, and beside each the zero points of its channels.
    assert sorted(bytes_) == [(32,), (32, 3, 3, 3), (64,), (64, 32, 3, 3)]
    assert (4, 64, 1, 1) in [v.shape for v in values.values() if v.dtype == np.float32]
    (second,) = (v for v in values.values() if v.shape == (64, 32, 3, 3))
    assert (np.abs(second.astype(int)).reshape(64, -1).max(1) >= 127).all()
    quantize_onnx(file, out, images, exclude=())
    types = [v.data_type for v in onnx.load(out).graph.initializer if len(v.dims) == 4]
    assert set(types) == {onnx.TensorProto.INT8}


@pytest.mark.parametrize('runtime', list(WRITERS))
def test_an_empty_set_is_refused(runtime, net, tmp_path):
    with pytest.raises(ConfigError, match='calibration set must be at least one') as e:
        WRITERS[runtime](net[0], tmp_path / 'int8.onnx', [])
    assert '\n' not in str(e.value)
    with pytest.raises(ConfigError, match='layers before its predictors'):
        names = [node.name for node in onnx.load(net[0]).graph.node]
        WRITERS[runtime](net[0], tmp_path / 'int8.xml', net[1], [*names, *_ov(net[0])])


def _ov(file):
    import openvino

    return [o.get_friendly_name() for o in openvino.Core().read_model(file).get_ops()]


@pytest.mark.parametrize('graph', [raw_graph, end_to_end_graph])
def test_predictors_of_two_stages_stay(graph, tmp_path):
    """The RPN's as well, although what they give says where RoIs are."""
    file = tmp_path / 'faster.onnx'
    write_plain_onnx(graph(build_model(slim(FASTER))), torch.rand(1, 3, 64, 64), file)
    nodes = onnx_nodes(onnx.load(file).graph)
    stays = set(float_nodes(nodes))
    predictors = {
        n.name.split('/')[-2] for n in nodes if n.weighted and n.name in stays
    }
    rpn = {'rpn_cls', 'rpn_reg'}
    boxes = {'fc_cls', 'fc_reg'} if graph is end_to_end_graph else set()
    # Levels share the RPN's, whose further calls are numbered.
    assert {re.sub(r'_\d+$', '', name) for name in predictors} == rpn | boxes
    kinds = {node.kind for node in nodes if node.name not in stays}
    assert not kinds & {'TopK', 'NonMaxSuppression', 'Exp', 'Softmax'}


@pytest.mark.parametrize('kind', ['retinanet', 'classifier'])
def test_calibration_on_the_data_of_a_config(kind, tmp_path):
    config = config_of(tmp_path, kind)
    model = build_model(config).eval()
    images = CalibrationImages(config, model, 5, (64, 64))
    assert len(images) == 5
    assert images.indices == [0, 4, 8, 11, 15]
    assert {image.shape for image in images} == {(1, 3, 64, 64)}
    assert len({image.tobytes() for image in images}) == 5
    file, out = tmp_path / 'float.onnx', tmp_path / 'int8.onnx'
    write_plain_onnx(end_to_end_graph(model), torch.rand(1, 3, 64, 64), file)
    quantize_onnx(file, out, images)
    outputs = open_model(out).run({'image': images[0]})
    assert all(np.isfinite(value).all() for value in outputs.values())
    with pytest.raises(ConfigError, match='calibration set must be at least one image'):
        CalibrationImages(config, model, 0, (64, 64))
    bare = Config({k: v for k, v in config.items() if 'dataloader' not in k})
    with pytest.raises(ConfigError, match='must be data of the config'):
        CalibrationImages(bare, model, 5, (64, 64))


def test_the_tool_writes_8_bits_and_tests_both(tmp_path, monkeypatch, capsys):
    config = config_of(tmp_path, 'classifier')
    config.train_cfg = dict(by_epoch=True, max_epochs=1)
    config.dump(tmp_path / 'small.py')
    torch.manual_seed(0)
    state = build_model(config).state_dict()
    torch.save({'state_dict': state, 'meta': {}}, tmp_path / 'small.pth')
    command = ['export.py', tmp_path / 'small.py', tmp_path / 'small.pth']
    command += ['--out', tmp_path / 'out', '--input-shape', 3, 64, 64, '--int8']
    argv = [*map(str, command), '--calib', '4', '--nms', '--eval']
    monkeypatch.setattr(sys, 'argv', [*argv, '--dynamic', 'batch'])
    load_tool('export').main()
    said = capsys.readouterr().out
    float_, int8 = (tmp_path / 'out' / n for n in ('model.onnx', 'model_int8.onnx'))
    assert re.search(r'int8.onnx \(0.\d+ MB\): 8 bits, calibrated on 4 images', said)
    assert re.search(r'file +┃ size \(MB\) ┃ top-1', said)
    for path in (float_, int8):
        size = f'{path.stat().st_size / 1e6:.2f}'
        assert re.search(rf'{path.name} +│ +{size} │ +\d', said)
    assert int8.stat().st_size < float_.stat().st_size / 2
    assert open_model(int8).metadata == open_model(float_).metadata
    for extra, words in {
        '--fp16': '--fp16 must be left out with --int8',
        '--preprocess': '--preprocess must be left out with --int8',
    }.items():
        monkeypatch.setattr(sys, 'argv', [*argv, extra])
        with pytest.raises(ConfigError, match=words):
            load_tool('export').main()


def test_8_bits_without_the_data_of_the_config(tmp_path):
    """Nothing is left where the data are missing; images of the user's will do."""
    config = config_of(tmp_path, 'retinanet')
    trained = Trained(build_model(config).eval(), None, {})
    root = Path(config.train_dataloader.dataset.data_root)
    picture = next(root.rglob('val/*.png'))
    config.train_dataloader.dataset.update(type='CocoDataset', data_root='/nowhere')
    del config.train_dataloader.dataset['spec']
    options = ExportOptions(calibrate=5)
    given = config, trained, (3, 64, 64), tmp_path / 'out', 'model', ['onnx'], options
    with pytest.raises(ConfigError, match='put or link it there, pass --cfg-options'):
        export_files(*given)
    assert not (tmp_path / 'out').exists()
    files = export_files(*given, [picture, picture.parent])
    assert [file.path.name for file in files] == ['model.onnx', 'model_int8.onnx']
    assert 'calibrated on 5 images' in str(files[1])  # the picture and the four of val
