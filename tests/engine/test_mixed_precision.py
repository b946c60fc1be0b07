"""Half precision and loss scaling: the statistics are nearly those of fp32."""

import copy

import numpy as np
import pytest
import torch
from mmengine.optim import ApexOptimWrapper, OptimWrapperDict
from scipy.stats import spearmanr
from support.configs import slim_retinanet
from support.pruning import importance_of, prepared
from support.toy_runner import Call, CpuAmpOptimWrapper, pruner_of, toy_runner
from support.toys import ConvPair, images, square_loss

from mmgfp.engine.runner_access import loss_scale
from mmgfp.utils.errors import ConfigError


@pytest.fixture(scope='module')
def detector():
    """A RetinaNet with its pruner, and its importance in fp32."""
    model, calls = slim_retinanet()
    pruner = prepared(model, calls.loss, calls.forward)
    return model, calls, pruner, importance(model, calls, pruner)


def importance(model, calls, pruner, dtype=None, factor=1.0, **scaler):
    """What three iterations add up without moving the weights, (U,).

    They run in MMEngine's wrapper as a training step does, with the loss times
    ``factor``.
    """
    model.train()
    state = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    wrapper = CpuAmpOptimWrapper(dtype, scaler, optimizer=optimizer)
    pruner.criterion.clear()
    for seed in range(3):
        torch.manual_seed(seed)
        data = copy.deepcopy(calls.data)
        data['inputs'] += 0.3 * torch.randn_like(data['inputs'])
        scale = loss_scale(wrapper)
        with wrapper.optim_context(model):
            losses = model(**data, mode='loss')
        wrapper.update_params(model.parse_losses(losses)[0] * factor)
        pruner.step(scale)
    model.load_state_dict(state)
    return importance_of(pruner)


def agreement(pruner, expected, found):
    """Rank correlation over all units, the least one in a group, and the relative
    error that 95 % of the units stay under."""
    group_of, live = pruner.units.grouping.group_of, expected > 0
    assert live.mean() > 0.9 and (found[~live] == 0).all()
    error = np.abs(found / np.where(live, expected, 1) - 1)[live]
    within = [
        spearmanr(expected[group_of == g], found[group_of == g]).statistic
        for g in np.unique(group_of)
    ]
    return spearmanr(expected, found).statistic, min(within), np.quantile(error, 0.95)


def test_bfloat16_ranks_like_fp32(detector):
    found = importance(*detector[:3], torch.bfloat16)
    every, group, _ = agreement(*detector[2:], found)
    assert every > 0.999 and group > 0.9
    assert (found != detector[3]).mean() > 0.9  # it was half precision


def test_float16_with_a_scaler_ranks_like_fp32(detector):
    found = importance(*detector[:3], torch.float16, init_scale=65536.0)
    every, group, error = agreement(*detector[2:], found)
    assert every > 0.999 and group > 0.95 and error < 0.1
    assert (found != detector[3]).mean() > 0.9


def test_the_scaler_keeps_small_gradients(detector):
    """A loss of a millionth has gradients that float16 cannot hold."""
    expected, factor = detector[3], 1e-6
    scale = 65536.0 * 2**10
    scaled = importance(*detector[:3], torch.float16, factor, init_scale=scale)
    every, _, error = agreement(detector[2], expected, scaled / factor**2)
    assert every > 0.999 and error < 0.1
    plain = importance(*detector[:3], torch.float16, factor)
    assert (plain[expected > 0] == 0).mean() > 0.5


@pytest.mark.parametrize('growth', [1000, 1])
def test_scaling_by_65536_changes_no_statistics(detector, growth):
    """Nor does a scale that doubles at every step."""
    scaler = dict(init_scale=65536.0, growth_interval=growth)
    found = importance(*detector[:3], **scaler)
    assert found == pytest.approx(detector[3], rel=1e-6)


def decisions(folder, **options):
    """Remaining units and the scale of the loss, by iteration."""
    kept, scales = [], []
    notes = Call(
        before_train_iter=lambda r: scales.append(loss_scale(r.optim_wrapper)),
        after_train_iter=lambda r: kept.append(pruner_of(r).units.kept.tolist()),
    )
    hook = dict(interval=4, units_per_step=3, target=dict(flops=0.2))
    runner = toy_runner(folder, iters=12, hook=hook, hooks=[notes], **options)
    runner.train()
    return kept, scales, runner


def test_scaler_changes_no_decision_of_a_run(tmp_path):
    """It starts at 65536 and doubles at every second step, within intervals."""
    plain, ones, _ = decisions(tmp_path / 'plain')
    scaler = dict(init_scale=65536.0, growth_interval=2)
    optim = dict(type='CpuAmpOptimWrapper', scaler=scaler)
    scaled, scales, _ = decisions(tmp_path / 'scaled', optim=optim)
    assert set(ones) == {1.0}
    assert scales == [65536.0 * 2 ** (n // 2) for n in range(12)]
    assert scaled == plain
    assert [sum(a) for a in plain[3::4]] == [len(plain[0]) - n for n in (3, 6, 9)]


def test_backoff_drops_overflowed_steps_and_goes_on(tmp_path, caplog):
    """The scale is too large for float32: the scaler halves it until it fits."""
    steps = dict(optimizer=dict(type='SGD', lr=1e-6), scaler=dict(init_scale=2.0**122))
    optim = dict(type='CpuAmpOptimWrapper', **steps)
    model = dict(type='ToyDetector', double=False, factor=2.0**8)
    with caplog.at_level('WARNING', 'mmgfp'):
        kept, scales, runner = decisions(tmp_path, optim=optim, model=model)
    assert scales[:5] == [2.0**n for n in (122, 121, 120, 119, 119)]
    assert pruner_of(runner).criterion.state_dict()['nonfinite'].tolist() == [3, 0]
    assert sum(kept[-1]) == len(kept[-1]) - 9  # at each of three decisions
    assert 'gradients were not finite in 3 iterations so far' in caplog.text
    assert 'got no gradient' not in caplog.text


def test_backward_inside_autocast_still_sums_in_fp32():
    """The contraction of 64 x 64 positions would lose its digits in bfloat16."""
    torch.manual_seed(0)
    model = ConvPair()

    def loss(model):
        return square_loss(model(images(2, 64)))

    pruner, found = prepared(model, loss), []
    for inside in (False, True):
        with torch.autocast('cpu', torch.bfloat16):
            value = loss(model)
        with torch.autocast('cpu', torch.bfloat16, enabled=inside):
            value.backward()
        found.append(pruner.criterion.tap.take())
    for name, gradient in found[1].items():
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, found[0][name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('kind', [ApexOptimWrapper, OptimWrapperDict])
def test_wrappers_that_hide_the_scale_are_refused(kind):
    wrapper = object.__new__(kind)  # their constructors want Apex, or optimizers
    words = (
        rf'optim_wrapper.type must be one that shows by what it scales the loss \(got '
        rf'{kind.__name__}\); use OptimWrapper, or AmpOptimWrapper for mixed precision'
    )
    with pytest.raises(ConfigError, match=words):
        loss_scale(wrapper)
