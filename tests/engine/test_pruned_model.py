"""The factory and the deployed folder: what users load and what is refused."""

import copy
import subprocess
import sys

import onnxruntime
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import load_checkpoint
from support.toy_runner import pruner_of

from mmgfp.discovery.comparing import difference
from mmgfp.engine.deploy import deploy, read_deployable
from mmgfp.utils.errors import StructureError


@pytest.fixture(scope='module')
def deployed(pruning_run):
    item = read_deployable(pruning_run.config, pruning_run.artifact)
    return deploy(pruning_run.config, item, pruning_run.folder / 'deployed', 'small')


def pruned_config(run, **changes):
    init_default_scope('mmdet')
    return dict(
        type='PrunedModel',
        architecture=run.config.model.to_dict(),
        structure=str(run.artifact),
        **changes,
    )


def test_factory_returns_the_original_class_with_true_attributes(pruning_run):
    model = MODELS.build(pruned_config(pruning_run))
    load_checkpoint(model, str(pruning_run.artifact), strict=True)
    assert type(model).__name__ == 'RetinaNet'
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            assert module.weight.shape[0] == module.out_channels
            assert module.weight.shape[1] * module.groups == module.in_channels
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.num_features == len(module.running_mean)


def test_compact_model_equals_the_masked_one(pruning_run):
    compact = MODELS.build(pruned_config(pruning_run))
    load_checkpoint(compact, str(pruning_run.artifact))
    masked = pruner_of(pruning_run.runner).model
    image = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        outputs = [m.eval()(image, mode='tensor') for m in (masked, compact)]
    assert difference(*outputs) < 1e-4


def test_pretrained_weights_are_not_looked_for(pruning_run):
    config = pruned_config(pruning_run)
    config['architecture']['backbone']['init_cfg'] = dict(
        type='Pretrained', checkpoint='/nowhere.pth'
    )
    MODELS.build(config).init_weights()  # would fail to open the file


def test_further_fields_are_merged_over_the_architecture(pruning_run):
    config = pruned_config(pruning_run, test_cfg=dict(max_per_img=7))
    test_cfg = MODELS.build(config).test_cfg
    assert test_cfg.max_per_img == 7
    assert test_cfg.nms_pre == pruning_run.config.model.test_cfg.nms_pre


def test_weights_of_other_widths_are_refused(pruning_run):
    original = MODELS.build(pruning_run.config.model)
    model = MODELS.build(pruned_config(pruning_run))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    words = r'checkpoint: .* must be of shape .* as model.structure says \(got \['
    with pytest.raises(StructureError, match=words):
        model.load_state_dict(original.state_dict())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_structure_of_another_architecture_is_refused(pruning_run):
    config = pruned_config(pruning_run, backbone=dict(base_channels=16))
    config['architecture']['neck']['in_channels'] = [16, 32, 64, 128]
    with pytest.raises(StructureError, match='must be of shape .* the architecture'):
        MODELS.build(config)


def test_deployed_folder_loads_in_a_fresh_process(deployed):
    code = f"""
import numpy as np
from mmdet.apis import inference_detector, init_detector
paths = {[str(deployed[k]) for k in ('config', 'weights')]}
model = init_detector(*paths, device='cpu')
result = inference_detector(model, np.full((64, 64, 3), 128, dtype=np.uint8))
print('boxes', result.pred_instances.bboxes.shape[1], model.dataset_meta['classes'][7])
"""
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code],
        capture_output=True,
        text=True,
        cwd=deployed['config'].parent.parent,
    )
    assert done.returncode == 0, done.stderr
    assert 'boxes 4 7' in done.stdout


def test_deployed_folder_may_move(deployed, tmp_path):
    folder = tmp_path / 'elsewhere'
    deployed['config'].parent.rename(folder)
    try:
        config = Config.fromfile(folder / deployed['config'].name)
        assert config.model.structure == f'{folder}/structure.json'
        model = MODELS.build(config.model)
        load_checkpoint(model, str(folder / 'small.pth'), strict=True)
        hooks = [hook['type'] for hook in config.custom_hooks]
        assert 'FisherPruningHook' not in hooks
        assert 'mmgfp' in config.custom_imports['imports']
    finally:
        folder.rename(deployed['config'].parent)


def test_deploy_refuses_what_does_not_belong_together(pruning_run, tmp_path):
    plain = tmp_path / 'plain.pth'
    torch.save({'state_dict': {}}, plain)
    with pytest.raises(StructureError, match='must be of a pruned model'):
        read_deployable(pruning_run.config, plain)
    wider = copy.deepcopy(pruning_run.config)
    wider.model.neck.out_channels = 32
    wider.model.bbox_head.in_channels = 32
    with pytest.raises(StructureError, match='must be of shape'):
        read_deployable(wider, pruning_run.artifact)
    checkpoint = torch.load(pruning_run.artifact, weights_only=True)
    name = next(iter(checkpoint['prune_structure']['tensors']))
    checkpoint['state_dict'][name] = checkpoint['state_dict'][name][:1]
    torch.save(checkpoint, plain)
    with pytest.raises(StructureError, match='must hold the weights of this'):
        read_deployable(pruning_run.config, plain)
    plain.write_bytes(pruning_run.artifact.read_bytes()[:5000])
    with pytest.raises(StructureError, match='write the file again if it is cut short'):
        read_deployable(pruning_run.config, plain)


def test_finetuned_training_checkpoint_is_deployed(pruning_run, tmp_path):
    """A runner's checkpoint holds no structure, but its config names it."""
    config = copy.deepcopy(pruning_run.config)
    config.model = pruned_config(pruning_run, backbone=dict(init_cfg=None))
    model = MODELS.build(config.model)
    tuned = tmp_path / 'epoch_1.pth'
    buffer = HistoryBuffer([1.0], [1])  # what weights_only loading refuses
    torch.save({'state_dict': model.state_dict(), 'message_hub': buffer}, tuned)
    item = read_deployable(config, tuned)
    paths = deploy(config, item, tmp_path / 'out', 'tuned')
    saved = torch.load(paths['weights'], weights_only=True)
    assert 'prune_structure' in saved
    assert all(
        torch.equal(t, saved['state_dict'][n]) for n, t in model.state_dict().items()
    )


def test_export_to_onnx_needs_nothing_of_mmgfp(pruning_run, tmp_path):
    model = MODELS.build(pruned_config(pruning_run))
    load_checkpoint(model, str(pruning_run.artifact))
    network = torch.nn.Sequential(model.backbone, model.neck).eval()
    image, path = torch.rand(1, 3, 64, 64), tmp_path / 'small.onnx'
    torch.onnx.export(network, (image,), path, dynamo=False)
    session = onnxruntime.InferenceSession(path)
    (name,) = [i.name for i in session.get_inputs()]
    outputs = session.run(None, {name: image.numpy()})
    with torch.no_grad():
        expected = network(image)
    assert difference([torch.from_numpy(o) for o in outputs], list(expected)) < 1e-4
