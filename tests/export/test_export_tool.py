"""Models out to files, each checked in its runtime; a wrong one is not written."""

import json
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
from mmengine.config import Config
from support.exporting import assert_detections, predictions
from support.small_configs import config_of
from support.tooling import ROOT

from mmgfp.engine.deploy import Trained, read_trained
from mmgfp.engine.model_building import build_model, init_weights
from mmgfp.export import files
from mmgfp.export.check import ExportError
from mmgfp.export.files import check_formats, export_files
from mmgfp.export.matching import Detections, Limits, Tolerance, match
from mmgfp.export.onnx_file import check_folded, drop_identities, write_onnx
from mmgfp.export.options import ExportOptions
from mmgfp.export.preprocess import WithPreprocessing, preprocessing_of
from mmgfp.runtimes import open_model
from mmgfp.utils.errors import ConfigError, StructureError

SHAPE = (3, 64, 64)
NAMES = [f'class{i}' for i in range(10)]
EVERY = ('onnx', 'openvino', 'torchscript')


def spread_weights(model):
    """Give scores and boxes that differ, and batch norms that do something."""
    torch.manual_seed(0)
    init_weights(model)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if 'running_mean' in name:
            tensor.data.normal_(0, 0.1)
        elif 'running_var' in name:
            tensor.data.uniform_(0.5, 1.5)
        elif hasattr(model, 'roi_head'):
            # No more than this, so that proposals do not tie.
            if name.endswith('weight') and ('_reg' in name or '_cls' in name):
                tensor.data.normal_(0, 0.3 if 'fc_cls' in name else 0.1)
        elif name.endswith('weight') and tensor.dim() > 1:
            torch.nn.init.kaiming_normal_(tensor)
            if '_reg.' in name:
                tensor.data.mul_(0.1)
    return model.eval()


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Configs and models by kind, made once."""
    known = {}

    def get(kind):
        if kind not in known:
            folder = tmp_path_factory.mktemp(kind)
            cfg = config_of(folder, kind)
            cfg.dump(folder / 'config.py')
            cfg = Config.fromfile(folder / 'config.py')
            meta = dict(dataset_meta=dict(classes=NAMES))
            known[kind] = cfg, Trained(spread_weights(build_model(cfg)), None, meta)
        return known[kind]

    return get


def export(made, out, formats=('onnx',), images=(), **options):
    cfg, model = made
    options = ExportOptions(**options)
    return export_files(cfg, model, SHAPE, out, 'model', formats, options, images)


@pytest.mark.parametrize('kind', ['retinanet', 'faster', 'mask', 'classifier'])
def test_every_format_does_what_the_model_does(kind, trained, tmp_path):
    written = export(trained(kind), tmp_path / 'out', EVERY, nms=True)
    names = ['model.bin', 'model.onnx', 'model.pt', 'model.xml']
    assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == names
    for file in written:
        report = file.report
        assert report.images == 4 and file.images == 'of the test dataset'
        assert report.score <= 1e-5
        if kind != 'classifier':
            assert report.detections > 100 and report.box <= 1e-3
            assert report.borderline <= 0.1 * report.detections
        session = open_model(file.path)
        about = json.loads(session.metadata['mmgfp'])
        assert about['outputs'] == 'end-to-end' and not about['preprocess']
        task = {'mask': 'instance', 'classifier': 'classification'}
        assert about['task'] == task.get(kind, 'detection')
        assert about['classes'] == NAMES
        assert about['input_size'] == [64, 64] and about['structure'] is None
        assert session.inputs == {'image': (1, *SHAPE)}
    graph = onnx.load(tmp_path / 'out/model.onnx').graph
    ops = {node.op_type for node in graph.node}
    assert not ops & {'BatchNormalization', 'Dropout', 'Identity'}


@pytest.mark.parametrize('kind', ['faster', 'classifier'])
def test_raw_outputs_of_any_number_of_images(kind, trained, tmp_path):
    (file,) = export(trained(kind), tmp_path, dynamic=('batch',))
    session = open_model(file.path)
    assert session.inputs == {'image': (None, *SHAPE)}
    found = session.run({'image': np.zeros((3, *SHAPE), np.float32)})
    assert all(len(value) == 3 for value in found.values())
    assert json.loads(session.metadata['mmgfp'])['outputs'] == 'raw'


@pytest.mark.parametrize('kind', ['retinanet', 'faster'])
def test_detections_of_any_number_of_images(kind, trained, tmp_path):
    made = trained(kind)
    (file,) = export(made, tmp_path, nms=True, dynamic=('batch',))
    session = open_model(file.path)
    assert session.inputs == {'image': (None, *SHAPE)}
    torch.manual_seed(1)
    images = torch.randn(2, *SHAPE)
    for batch in (images[:1], images):
        found = session.run({'image': batch.numpy()})
        outputs = found['dets'], found['labels']
        predicted = predictions(made[1].model, batch)
        assert_detections(outputs, predicted, strays=1)


def test_half_precision_is_stored(trained, tmp_path):
    full = export(trained('retinanet'), tmp_path / 'full', nms=True)
    half = export(trained('retinanet'), tmp_path / 'half', nms=True, fp16=True)
    sizes = [files[0].path.stat().st_size for files in (full, half)]
    assert sizes[1] < 0.7 * sizes[0]
    assert 1e-5 < half[0].report.score <= 1e-2


def test_a_file_that_prepares_images_detects_in_their_pixels(trained, tmp_path):
    rng = np.random.default_rng(0)
    image = cv2.resize(rng.integers(0, 256, (6, 9, 3), np.uint8), (150, 100))
    cv2.imwrite(str(tmp_path / 'image.png'), image)
    made = trained('retinanet')
    images = [tmp_path / 'image.png']
    pre = export(made, tmp_path / 'pre', images=images, nms=True, preprocess=True)
    assert pre[0].report.levels <= 1 and pre[0].images == 'given by --images'
    plain = export(made, tmp_path / 'plain', nms=True)
    found = open_model(pre[0].path).run({'image': image[None]})
    # The same by hand: 150 x 100 becomes 64 x 43, with 21 rows of padding.
    small = cv2.resize(image, (64, 43)).astype(np.float32)[..., ::-1]
    about = json.loads(open_model(plain[0].path).metadata['mmgfp'])
    small = (small - np.float32(about['mean'])) / np.float32(about['std'])
    feed = np.pad(small, ((0, 21), (0, 0), (0, 0))).transpose(2, 0, 1)[None]
    same = open_model(plain[0].path).run({'image': np.ascontiguousarray(feed)})
    scale = np.array([150 / 64, 100 / 43] * 2)
    # Rounding of pixels moves boxes a little; the best are where they were.
    best = found['dets'][0, :3]
    there = same['dets'][0, :, :4] * scale
    for box in best[:, :4]:
        assert np.abs(there - box).max(1).min() < 1


@pytest.mark.parametrize('keep', [True, False])
@pytest.mark.parametrize('size', [(40, 150), (128, 128), (31, 17)])
def test_images_are_resized_as_cv2_does(size, keep, trained, tmp_path):
    cfg, model = trained('retinanet')
    pipeline = [dict(type='Resize', scale=(64, 64), keep_ratio=keep)]
    prep = preprocessing_of(cfg, model.model, SHAPE, pipeline)
    graph = torch.nn.Identity()
    graph.outputs = ('out',)
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    graph = WithPreprocessing(graph, prep)
    image = torch.from_numpy(image)[None]
    found, step = graph.prepare(image)
    # Traced with an image of another size.
    path = tmp_path / 'prepare.onnx'
    options = ExportOptions(preprocess=True)
    write_onnx(path, graph, torch.zeros(1, 50, 60, 3, dtype=torch.uint8), options, {})
    same = open_model(path).run({'image': image.numpy()})['out']
    assert np.abs(same - found.numpy()).max() < 1e-5
    image = image[0].numpy()
    height, width = prep.scaled_size(*size)
    assert step.tolist() == pytest.approx([size[1] / width, size[0] / height])
    wanted = cv2.resize(image, (width, height)).astype(np.float32)[..., ::-1]
    levels = found[0].permute(1, 2, 0).numpy() * 64 + 127.5  # the demo's std and mean
    assert np.abs(levels[:height, :width] - wanted).max() < 1.01
    assert (found[0, :, height:] == 0).all() and (found[0, :, :, width:] == 0).all()


@pytest.mark.parametrize(('kind', 'nms'), [('retinanet', True), ('classifier', False)])
def test_a_wrong_graph_is_refused_and_leaves_no_file(
    kind, nms, trained, tmp_path, monkeypatch
):
    name = 'end_to_end_graph' if nms else 'raw_graph'
    right = getattr(files, name)

    def corrupted(model, *args):
        weight = next(p for n, p in model.named_parameters() if 'conv1.weight' in n)
        weight.data *= 1.5
        return right(model, *args)

    monkeypatch.setattr(files, name, corrupted)
    with pytest.raises(ExportError, match='it was not written') as error:
        export(trained(kind), tmp_path / 'out', ('onnx',), nms=nms)
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'out').exists()


def test_without_data_the_image_is_made_up_and_it_is_said(trained, tmp_path):
    cfg, model = trained('retinanet')
    cfg = Config({**cfg.to_dict(), 'test_dataloader': None, 'val_dataloader': None})
    cfg.test_dataloader = dict(dataset=dict(type='CocoDataset', ann_file='nowhere'))
    (file,) = export((cfg, model), tmp_path, nms=True)
    assert file.images.startswith('made up, as the test dataset cannot be read')


def test_what_cannot_be_exported_is_refused(trained, tmp_path):
    made = trained('faster')
    (tmp_path / 'empty').mkdir()
    for options, words in [
        (dict(images=[tmp_path / 'empty']), 'must be a folder with images'),
        (dict(images=[tmp_path / 'none.png']), 'must be files or folders'),
        (dict(nms=True, dynamic=('size',)), 'must be left out with --nms'),
        (dict(nms=True, dynamic=('batch',), dynamo=True, opset=18), 'fixes the number'),
    ]:
        with pytest.raises(ConfigError, match=words):
            export(made, tmp_path / 'out', **options)
    with pytest.raises(ConfigError, match='torchscript'):
        check_formats(['torchscript'], ExportOptions(fp16=True))
    with pytest.raises(ConfigError, match='must be one of onnx, openvino, torchscript'):
        check_formats(['tensorrt'], ExportOptions())
    with pytest.raises(ConfigError, match='multiples of pad_size_divisor=32'):
        preprocessing_of(made[0], made[1].model, (3, 64, 70), [])
    with pytest.raises(ConfigError, match='must be batch or size'):
        ExportOptions(dynamic=('width',))
    assert not (tmp_path / 'out').exists()


def detections(*rows):
    rows = np.array(rows, dtype=float).reshape(-1, 6)
    return Detections(rows[:, :4], rows[:, 4], rows[:, 5].astype(int))


def test_detections_are_matched_one_to_one():
    limits, tolerance = Limits(0.05, 0.5, 100), Tolerance()
    box = (0, 0, 10, 10)
    first = detections((*box, 0.9, 0), (20, 20, 30, 30, 0.8, 1))
    moved = detections((20, 20.05, 30, 30, 0.8005, 1), (*box, 0.9, 0))
    result = match(first, moved, limits, tolerance)
    assert result.pairs == ((0, 1), (1, 0)) and not result.missing + result.extra
    assert (result.box, result.score) == pytest.approx((0.05, 0.0005))
    for other in [(*box, 0.9, 1), (*box, 0.902, 0), (20, 0, 30, 10, 0.9, 0)]:
        result = match(detections((*box, 0.9, 0)), detections(other), limits, tolerance)
        assert (result.missing, result.extra) == ((0,), (0,))
    # Rounding decides: at the threshold, and which of two equals NMS keeps.
    low = match(detections((*box, 0.0505, 0)), detections(), limits, tolerance)
    assert (low.missing, low.borderline) == ((), 1)
    shifted = detections((2, 0, 12, 10, 0.9, 0))  # overlaps by 2/3
    tie = match(detections((*box, 0.9, 0)), shifted, limits, tolerance)
    assert (tie.missing, tie.extra, tie.borderline) == ((), (), 2)
    full = match(first, detections((*box, 0.9, 0)), Limits(0, 0.5, 2), tolerance)
    assert full.borderline == 1  # the last of a full list


def test_training_in_a_graph_is_found():
    make = onnx.helper.make_node
    value = onnx.helper.make_tensor_value_info
    one = onnx.TensorProto.FLOAT
    nodes = [
        make('Conv', ['x', 'w'], ['a']),
        make('Identity', ['a'], ['b']),
        make('Relu', ['b'], ['c']),
        make('Identity', ['c'], ['y']),
    ]
    ends = [value('x', one, [1, 1, 2, 2])], [value('y', one, [1, 1, 2, 2])]
    graph = onnx.helper.make_graph(nodes, 'g', *ends)
    drop_identities(graph)
    assert [(n.op_type, n.input[0], n.output[0]) for n in graph.node] == [
        ('Conv', 'x', 'a'),
        ('Relu', 'a', 'y'),
    ]
    check_folded(graph)
    graph.node.insert(1, make('BatchNormalization', ['a', *'sbmv'], ['z'], name='bn'))
    with pytest.raises(ConfigError, match='BatchNormalization bn'):
        check_folded(graph)


#: Runs the example where the libraries that made the file cannot be imported.
BLOCKED = """
import runpy, sys
for name in 'torch torchvision mmdet mmcv mmengine mmpretrain mmgfp'.split():
    sys.modules[name] = None
runpy.run_path(SCRIPT, run_name='__main__')
"""


@pytest.mark.parametrize('preprocess', [False, True])
def test_the_example_needs_no_torch(preprocess, trained, tmp_path):
    cfg, model = trained('retinanet')
    (file,) = export((cfg, model), tmp_path, nms=True, preprocess=preprocess)
    image = next(Path(cfg.test_dataloader.dataset.data_root).rglob('val/00000.png'))
    code = BLOCKED.replace('SCRIPT', repr(str(ROOT / 'examples/detect_onnx.py')))
    session = open_model(file.path)
    pixels = cv2.imread(str(image))
    feed = pixels[None]
    kind = np.uint8 if preprocess else np.float32
    if not preprocess:  # images of digits are as large as the input
        feed = (pixels[..., ::-1].transpose(2, 0, 1)[None] - 127.5) / 64
    found = session.run({'image': np.ascontiguousarray(feed, kind)})
    least = float(np.median(found['dets'][0, :, 4]))
    command = [sys.executable, '-I', '-c', code, file.path, image, f'{least}']
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    dets = found['dets'][0][found['dets'][0, :, 4] >= least]
    assert len(lines) == len(dets) > 5
    numbers = np.array([line[-5:] for line in lines], dtype=float)
    assert np.abs(numbers[:, 0] - dets[:, 4]).max() < 2e-3
    assert np.abs(numbers[:, 1:] - dets[:, :4]).max() < 0.1


@pytest.mark.parametrize(
    ('block', 'args', 'words'),
    [
        ('', [], 'the following arguments are required: model, image'),
        ('', ['no.onnx', 'no.png'], 'error: .*no.onnx'),
        ('onnxruntime', ['no.onnx', 'no.png'], 'pip install numpy pillow onnxruntime'),
    ],
)
def test_the_example_says_in_one_line_what_is_missing(block, args, words, tmp_path):
    code = BLOCKED.replace('mmgfp', f'mmgfp {block}')  # before paths that may hold it
    code = code.replace('SCRIPT', repr(str(ROOT / 'examples/detect_onnx.py')))
    command = [sys.executable, '-I', '-c', code]
    done = subprocess.run([*command, *args], capture_output=True, text=True)
    assert done.returncode in (1, 2)
    assert re.search(words, done.stderr.splitlines()[-1])
    assert 'Traceback' not in done.stderr


def error_line(done):
    assert done.returncode == 2, done.stderr
    (line,) = [x for x in done.stderr.splitlines() if x.startswith('error: ')]
    return line


def test_the_tools_export_a_pruned_model(run_tool, pruning_run, tmp_path):
    config = tmp_path / 'config.py'
    pruning_run.config.dump(config)
    options = ['--cfg-options', 'model.test_cfg.score_thr=0.0']
    command = [config, pruning_run.artifact, '--out', tmp_path / 'out', '--rounds', 0]
    done = run_tool('deploy_pruned.py', *command, '--export', 'onnx', '--nms', *options)
    assert done.returncode == 0, done.stderr
    out, stem = tmp_path / 'out', pruning_run.artifact.stem
    summary = json.loads((out / 'summary.json').read_text())
    assert 'detections matched' in summary['exported'][f'{stem}.onnx']
    about = json.loads(open_model(out / f'{stem}.onnx').metadata['mmgfp'])
    assert len(about['structure']) == 16 and len(about['classes']) == 10
    # The folder can be exported, too, and says the same.
    folder = [out / f'{stem}.py', out / f'{stem}.pth', '--out', tmp_path / 'again']
    done = run_tool('export.py', *folder, '--nms', '--format', 'torchscript')
    assert done.returncode == 0, done.stderr
    assert 'the input is (3, 64, 64), as the checkpoint says' in done.stdout
    again = json.loads(open_model(tmp_path / 'again/model.pt').metadata['mmgfp'])
    assert again == about
    done = run_tool('export.py', *folder, '--format', 'engine')
    assert 'must be one of onnx, openvino, torchscript (got engine)' in error_line(done)
    done = run_tool('export.py', *folder[:2], '--out', config)
    assert 'must be a folder (got the file' in error_line(done)


def test_a_checkpoint_of_another_model_is_refused(trained, tmp_path):
    cfg, model = trained('retinanet')
    path = tmp_path / 'weights.pth'
    state = model.model.state_dict()
    torch.save({'state_dict': state, 'meta': {}}, path)
    assert read_trained(cfg, path).structure is None
    state['backbone.conv1.weight'] = torch.zeros(1)
    torch.save({'state_dict': state, 'meta': {}}, path)
    with pytest.raises(StructureError, match='must hold the weights'):
        read_trained(cfg, path)
