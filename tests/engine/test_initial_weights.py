"""What a compact model starts from: kept channels of original weights, or new ones."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from support.configs import small_prune_config
from support.cut_models import cut_model, pruned_entry, unlike_each_other
from support.runs import Cut, assert_same_end, ended, plain_classifier, train
from torch import nn

from mmgfp.engine.deploy import read_deployable
from mmgfp.engine.model_building import build_model, init_weights
from mmgfp.utils.errors import ConfigError, StructureError


@pytest.fixture(scope='module', params=['classifier', 'detector'])
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == 'classifier':
        return cut_model(plain_classifier(folder), folder, 16, unlike_each_other)
    return cut_model(small_prune_config(folder), folder, 64, unlike_each_other)


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tiny')
    return cut_model(plain_classifier(folder), folder, 16, unlike_each_other)


def initialised(case, init, seed=0, **options):
    init_default_scope(case.scope)
    torch.manual_seed(seed)
    model = MODELS.build(pruned_entry(case, init, **options))
    init_weights(model)
    return model


def cut_by_hand(case):
    """Kept entries of the original weights, by NumPy."""
    weights = {name: tensor.numpy() for name, tensor in case.full.items()}
    for name, dims in case.structure.kept.items():
        for dim, kept in dims.items():
            weights[name] = np.take(weights[name], kept, dim)
    return weights


def test_original_weights_are_cut_to_their_kept_channels(case):
    state, expected = initialised(case, 'original').state_dict(), cut_by_hand(case)
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert np.array_equal(tensor.numpy(), expected[name]), name


def test_scratch_has_the_widths_and_none_of_the_weights(case):
    weights = dict(initialised(case, 'scratch').named_parameters())
    again = dict(initialised(case, 'scratch').named_parameters())
    other = dict(initialised(case, 'scratch', seed=1).named_parameters())
    expected = cut_by_hand(case)
    for name, tensor in weights.items():
        assert tensor.shape == expected[name].shape, name
        assert torch.equal(tensor, again[name]), name
        if tensor.dim() > 1:  # norms and biases begin with constants
            assert not np.isclose(tensor.detach().numpy(), expected[name]).all()
            assert not torch.equal(tensor, other[name]), name


def test_scratch_has_the_scale_of_the_small_layers(case):
    """torch draws from ±1/√fan_in; ResNet's init has a deviation of √(2/fan_out)."""
    init_default_scope(case.scope)
    torch.manual_seed(0)
    model = MODELS.build(pruned_entry(case, 'scratch'))
    shrunk = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and module.weight.numel() > 500:
            largest = module.weight.abs().max().item() * math.sqrt(
                module.weight[0].numel()
            )
            assert 0.95 < largest <= 1.0001, name
            kept = case.structure.kept.get(f'{name}.weight', {})
            shrunk += 1 in kept
    assert shrunk > 5
    init_weights(model)
    conv = model.backbone.layer4[1].conv1
    deviation = math.sqrt(2 / (conv.out_channels * 9))
    assert conv.weight.std().item() == pytest.approx(deviation, rel=0.1)


def test_files_that_do_not_fit_are_refused(tiny, tmp_path):
    small = tmp_path / 'small.pth'
    torch.save({'state_dict': initialised(tiny, 'scratch').state_dict()}, small)
    with pytest.raises(StructureError, match=r'of shape .* in .*small.pth \(got .*or'):
        initialised(tiny, 'original', original=str(small))
    weights = dict(tiny.full)
    name, _ = weights.popitem()
    torch.save({'state_dict': weights}, small)
    with pytest.raises(StructureError, match=f'none for {name} and 0 others'):
        initialised(tiny, 'original', original=str(small))


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (dict(init='rewound'), 'model.init must be one of pruned, original, scratch'),
        (dict(init='original', original=None), "given with init='original' and with"),
        (dict(init='scratch', original='a.pth'), "with no other .got 'a.pth' with in"),
        (dict(init='pruned', original='a.pth'), "with no other .got 'a.pth' with in"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tiny, options, words):
    with pytest.raises(ConfigError, match=words):
        MODELS.build(pruned_entry(tiny, **options))


def run_of(case, folder, init):
    config = plain_classifier(folder)
    config.model = pruned_entry(case, init)
    return config


@pytest.mark.parametrize('init', ['original', 'scratch'])
def test_load_from_may_not_overwrite_initial_weights(tiny, tmp_path, init):
    config = run_of(tiny, tmp_path, init)
    config.load_from = tiny.files['full.pth']
    with pytest.raises(ConfigError, match=f"None with model.init='{init}', whose"):
        Runner.from_cfg(config).train()


@pytest.mark.parametrize('init', ['original', 'scratch'])
def test_run_is_resumed_and_deployed(tiny, tmp_path, init):
    whole, cut = (run_of(tiny, tmp_path / name, init) for name in ('whole', 'cut'))
    assert train(whole) == [0]
    assert train(cut, cut=Cut('backward', 6)) == [-9]
    assert train(cut, resume=True) == [0]
    assert_same_end(cut, whole)
    (checkpoint,) = Path(whole.work_dir).glob('iter_14.pth')
    Path(tiny.files['full.pth']).rename(tmp_path / 'gone')  # not needed any more
    try:
        item = read_deployable(whole, checkpoint)
        tested = MODELS.build(whole.model)
        tested.load_state_dict(torch.load(checkpoint, weights_only=False)['state_dict'])
    finally:
        (tmp_path / 'gone').rename(tiny.files['full.pth'])
    for model in (item.model, tested):
        for name, tensor in ended(whole)['weights'].items():
            assert torch.equal(model.state_dict()[name], tensor), name
    assert type(item.original) is type(build_model(tiny.config))
