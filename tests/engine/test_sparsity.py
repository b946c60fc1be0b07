"""Zeros in runs of MMEngine's runner: averages, precision, resuming, processes."""

import copy
import json
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.registry import (
    HOOKS,
    MODEL_WRAPPERS,
    MODELS,
    TRANSFORMS,
    init_default_scope,
)
from mmengine.runner import Runner
from support.configs import FASTER, MASK, slim, small_prune_config
from support.roundtrip import pruned_model
from support.runs import (
    Cut,
    artifacts,
    assert_equal,
    assert_same_end,
    buffers,
    ended,
    logged,
    plain_classifier,
    steady_classifier,
    train,
)
from support.toy_runner import Call, toy_loader, toy_runner

from mmgfp import SparsityHook
from mmgfp.engine.checkpoints import newest_checkpoint
from mmgfp.sparsity.masks import follows_pattern
from mmgfp.sparsity.n_of_m import SRSTE
from mmgfp.surgery.structure import PruneStructure
from mmgfp.utils.errors import ConfigError

KINDS = {
    'magnitude': dict(sparsity=0.8, end=6, interval=2),
    'movement': dict(kind='movement', sparsity=0.5, end=6, interval=3),
    'sr_ste': dict(kind='nm', interval=2),
    'fixed': dict(kind='nm', sr_ste=False, begin=2),
}


def quick(*kinds):
    """All kinds, of which only these run among the quick tests."""
    slow = pytest.mark.slow
    return [pytest.param(k, marks=() if k in kinds else slow) for k in KINDS]


def sparse(runner):
    """What holds zeros in a runner that has trained."""
    return next(h for h in runner.hooks if isinstance(h, SparsityHook)).sparsifier


def toy(folder, kind, **options):
    hook = dict(type='SparsityHook', **KINDS[kind])
    hooks = options.pop('hooks', [])
    return toy_runner(folder, custom_hooks=[hook, *hooks], **options)


def assert_sparse(state, sparsifier):
    """Compare zeros of a state dict with the masks, and with the pattern."""
    for name, mask in sparsifier.masks.items():
        weight, mask = state[name].cpu(), mask.cpu()  # a runner may be on a GPU
        assert not weight[~mask].any() and weight[mask].any()
        if sparsifier.config.kind == 'nm':
            assert follows_pattern(weight, 2, 4)


# -- one process --------------------------------------------------------------

EMA = dict(type='EMAHook', momentum=0.3)
SCALER = dict(init_scale=2.0**118, growth_interval=5)  # overflows now and then
AMP = dict(
    optim=dict(type='CpuAmpOptimWrapper', scaler=SCALER),
    model=dict(type='ToyDetector', double=False, factor=2.0**8),
)
WAYS = {
    'plain': dict(),
    'average': dict(hooks=[EMA]),
    'late average': dict(hooks=[EMA | dict(begin_iter=7)]),
    'accumulation': dict(optim=dict(accumulative_counts=3), hooks=[EMA]),
    'clipping': dict(optim=dict(clip_grad=dict(max_norm=0.1))),
    'scaler': dict(**AMP, hooks=[EMA]),
    'half': dict(optim=dict(type='CpuAmpOptimWrapper', dtype=torch.bfloat16)),
    'adam': dict(optim=dict(optimizer=dict(type='AdamW', lr=0.01, weight_decay=0.1))),
}


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('kind', KINDS)
def test_model_average_and_checkpoint_have_the_same_zeros(kind, way, tmp_path):
    """While the average is validated, and in the files that the run leaves."""
    validated = []

    def validate(runner):
        validated.append(copy.deepcopy(runner.model.state_dict()))
        if sparse(runner).begun:
            assert_sparse(validated[-1], sparse(runner))

    options = copy.deepcopy(WAYS[way])
    saving = dict(type='CheckpointHook', by_epoch=False, interval=4)
    options['hooks'] = [
        *options.get('hooks', []),
        saving,
        Call(before_val_iter=validate),
    ]
    runner = toy(
        tmp_path,
        kind,
        iters=12,
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=12, val_interval=5),
        val_cfg=dict(type='ValLoop'),
        val_dataloader=toy_loader(4, count=4),
        val_evaluator=dict(type='NoMetric'),
        **options,
    )
    first = copy.deepcopy(runner.model.state_dict())
    runner.train()
    sparsifier = sparse(runner)
    assert len(validated) == 3
    models = [runner.model]
    models += [h.ema_model.module for h in runner.hooks if isinstance(h, EMAHook)]
    checkpoint = torch.load(newest_checkpoint(runner.work_dir), weights_only=False)
    states = [m.state_dict() for m in models] + [checkpoint['state_dict']]
    for state in states:
        assert state.keys() == first.keys()
        assert_sparse(state, sparsifier)
        assert not torch.equal(state['net.stem.weight'], first['net.stem.weight'])
    report = json.loads((Path(runner.work_dir) / 'sparsity.json').read_text())
    assert report == sparsifier.report() == checkpoint['meta']['sparsity']
    share = dict(magnitude=0.2).get(kind, 0.5)
    assert report['kept'] == round(share * report['weights'])


def test_weights_go_as_scheduled(tmp_path):
    """80 % on a cubic curve over 6 iterations, every other one a decision."""
    shares = []

    def note(runner):
        shares.append(sparse(runner).report()['kept'])

    runner = toy(tmp_path, 'magnitude', hooks=[Call(after_train_iter=note)])
    runner.train()
    curve = [0.2 + 0.8 * (1 - k / 3) ** 3 for k in (0, 1, 2, 3)]
    counts = [round(2343 * share) for share in curve]
    assert shares == [counts[min((t + 1) // 2, 3)] for t in range(8)]
    # Three are few, which is of use before the run rather than after it.
    (log,) = Path(runner.work_dir).glob('*/*.log')
    (warned,) = [x for x in log.read_text().splitlines() if 'weights go' in x]
    words = 'WARNING - weights go in 3 decisions, as interval=2 fits so few into'
    assert f'{words} iterations 0 to 6: lower it' in warned


def test_times_in_epochs(tmp_path):
    """Four iterations each: from the end of the first to that of the second one."""
    shares = []
    times = dict(by_epoch=True, begin=1, end=2, interval=2, schedule='linear')
    runner = toy_runner(
        tmp_path,
        train_dataloader=toy_loader(2),
        train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=3),
        custom_hooks=[
            dict(type='SparsityHook', **times),
            Call(after_train_iter=lambda r: shares.append(sparse(r).report()['kept'])),
        ],
    )
    runner.train()
    assert shares == 5 * [2343] + 2 * [round(0.6 * 2343)] + 5 * [round(0.2 * 2343)]


def test_what_stays_dense_is_in_the_log(tmp_path):
    runner = toy(tmp_path, 'sr_ste')
    runner.train()
    (log,) = Path(runner.work_dir).glob('*/*.log')
    text = log.read_text()
    assert text.count('net.stem stays dense: 3 input channels, no multiple of 4') == 1
    assert '132 of 264 weights stay (50.00%)' in text
    assert 'net.stage1: 50.00% of the weights stay' in text


@pytest.mark.parametrize('kind', KINDS)
def test_what_a_model_freezes_when_it_trains_stays_as_it_is(kind, tmp_path):
    """Many backbones freeze their stages in `train`, not when they are built."""
    runner = toy(tmp_path, kind)
    frozen, train = runner.model.net.stage1, runner.model.train

    def train_but_one(mode=True):
        train(mode)
        frozen.weight.requires_grad_(False)

    runner.model.train = train_but_one
    before = frozen.weight.clone()
    runner.train()
    assert torch.equal(frozen.weight, before)
    assert sparse(runner).left_out['net.stage1'].startswith('frozen')


def test_layers_that_lose_all_are_in_the_log_once(tmp_path):
    runner = toy(tmp_path, 'magnitude')
    runner.model.net.stage2.weight.data *= 1e-3
    runner.train()
    (log,) = Path(runner.work_dir).glob('*/*.log')
    words = "WARNING - no weight of net.stage2 is left; keep it, or take scope='local'"
    assert log.read_text().count(words) == 1


def test_run_that_ends_too_early_says_so(tmp_path):
    stop = Call(after_train_iter=lambda r: setattr(r.train_loop, 'stop_training', True))
    runner = toy(tmp_path, 'magnitude', hooks=[stop])
    runner.train()
    (log,) = Path(runner.work_dir).glob('*/*.log')
    words = 'the run ended before weights were down to 20.00%: 100.00% of them stay'
    assert words in log.read_text()


def test_test_run_goes_without(tmp_path):
    loader = toy_loader(4, count=4)
    options = dict(test_cfg=dict(type='TestLoop'), test_dataloader=loader)
    runner = toy(tmp_path, 'sr_ste', **options, test_evaluator=dict(type='NoMetric'))
    assert runner.test() == {'images': 4}
    assert sparse(runner) is None


# -- refused ------------------------------------------------------------------


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (dict(cfg=dict(compile=True)), 'compile must be off with a SparsityHook'),
        (
            dict(hooks=[dict(type='SparsityHook')]),
            'custom_hooks must be with one',
        ),
        (
            dict(hooks=[dict(type='ChannelPruningHook', divisor=4)]),
            r'divisor must be a multiple of 8 beside a SparsityHook \(got 4\)',
        ),
        (dict(iters=5), 'end must be within the 5 iterations that the run has'),
    ],
)
def test_runs_that_cannot_work_are_refused(options, words, tmp_path):
    with pytest.raises(ConfigError, match=words) as caught:
        toy(tmp_path, 'magnitude', **options).train()
    assert '\n' not in str(caught.value)


def test_unknown_and_wrong_options_are_refused():
    for options, words in (
        (dict(sparsty=0.8), "sparsity.sparsty must be .* did you mean 'sparsity'"),
        (dict(kind='nm', n=4), r'n must be less than m, 4 \(got 4\)'),
    ):
        with pytest.raises(ConfigError, match=words):
            HOOKS.build(dict(type='SparsityHook', **options))


def test_epochs_in_a_run_by_iterations_are_refused(tmp_path):
    hook = dict(type='SparsityHook', by_epoch=True, end=1)
    with pytest.raises(ConfigError, match='by_epoch must be False in a run by itera'):
        toy_runner(tmp_path, custom_hooks=[hook]).train()


@MODEL_WRAPPERS.register_module(force=True)
class SplitsParameters(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def train_step(self, *args):
        return self.module.train_step(*args)


def test_wrappers_that_split_parameters_are_refused(tmp_path):
    runner = toy(tmp_path, 'magnitude')
    runner.model = SplitsParameters(runner.model)
    words = r'MMDistributedDataParallel beside a SparsityHook \(got SplitsParameters\)'
    with pytest.raises(ConfigError, match=words):
        runner.train()


# -- resuming -----------------------------------------------------------------


def classifier(folder, kind, average=True):
    """Fourteen iterations with dropout, validation and checkpoints at every other."""
    config = plain_classifier(folder)
    hook = dict(type='SparsityHook', **KINDS[kind])
    config.custom_hooks = [hook, *([EMA] if average else [])]
    return config


@pytest.mark.parametrize('kind', quick('magnitude', 'sr_ste'))
def test_killed_run_ends_like_the_whole_one(kind, tmp_path):
    """Once before weights are down to their share, once after."""
    whole, config = (classifier(tmp_path / name, kind) for name in ('whole', 'cut'))
    assert train(whole) == [0]
    assert train(config, cut=Cut('backward', 5)) == [-9]
    assert train(config, resume=True, cut=Cut('stepped', 11)) == [-9]
    assert train(config, resume=True) == [0]
    assert_same_end(config, whole)
    last = [
        torch.load(newest_checkpoint(c.work_dir), weights_only=False)
        for c in (whole, config)
    ]
    for key in ('sparsity', 'state_dict', 'ema_state_dict'):
        assert_equal(last[0][key], last[1][key])
    reports = [
        (Path(c.work_dir) / 'sparsity.json').read_text() for c in (whole, config)
    ]
    assert reports[0] == reports[1]


@pytest.mark.slow
def test_checkpoint_of_another_run_is_refused(tmp_path):
    other = plain_classifier(tmp_path / 'plain')
    assert train(other) == [0]
    config = classifier(tmp_path, 'magnitude')
    config.update(resume=True, load_from=str(newest_checkpoint(other.work_dir)))
    words = (
        r'checkpoint must be one of a run with a SparsityHook \(got one without its '
        r'state\); to begin with these weights, name them in load_from'
    )
    with pytest.raises(ConfigError, match=words):
        Runner.from_cfg(config).train()


def test_other_options_are_refused_when_resuming(tmp_path):
    config = classifier(tmp_path, 'magnitude')
    assert train(config, cut=Cut('backward', 5)) == [-9]
    config.custom_hooks[0].sparsity = 0.9
    assert train(config, resume=True) == [2]
    error = logged(config).splitlines()[-1]
    assert error.startswith('error: sparsity must be 0.8 (got 0.9); resume with the ')


# -- processes ----------------------------------------------------------------


@pytest.mark.parametrize('kind', quick('sr_ste'))
def test_two_processes_have_the_same_zeros(kind, tmp_path):
    """With dropout and other images in each, killed and resumed."""
    whole, config = (classifier(tmp_path / name, kind) for name in ('whole', 'cut'))
    assert train(whole, processes=2) == [0, 0]
    assert train(config, cut=Cut('decided', 5), processes=2) == [-9, -9]
    assert train(config, resume=True, processes=2) == [0, 0]
    assert_same_end(config, whole)
    one, two = (ended(config, rank)['weights'] for rank in range(2))
    parameters = one.keys() - buffers(one)
    assert_equal(*({n: w[n] for n in parameters} for w in (one, two)))
    report = json.loads((Path(config.work_dir) / 'sparsity.json').read_text())
    for name, layer in report['layers'].items():
        assert int((one[f'{name}.weight'] != 0).sum()) <= layer['kept']


def choose_otherwise_in_rank_1(runner, rank):
    if rank == 1:
        choose = SRSTE.choose
        SRSTE.choose = lambda self, density: {
            name: ~mask for name, mask in choose(self, density).items()
        }


def test_processes_that_disagree_stop(tmp_path):
    config = classifier(tmp_path, 'sr_ste')
    assert train(config, change=choose_otherwise_in_rank_1, processes=2) == [2, 2]
    words = 'error: structure must be the same in all processes (got hashes '
    assert logged(config).splitlines()[-1].startswith(words)


# -- with channel pruning -----------------------------------------------------


def pruned_then_sparse(folder, kind='sr_ste'):
    """Channels go in the first iterations, then weights of the compact model."""
    config = steady_classifier(folder, 4)
    config.model.backbone.update(base_channels=16, stem_channels=16)
    config.model.head.in_channels = 128
    config.custom_hooks[0].update(
        target=dict(flops=0.6), divisor=8, interval=2, schedule='one_shot'
    )
    del config.custom_hooks[0]['units_per_step']
    config.custom_hooks.append(dict(type='SparsityHook', **KINDS[kind]))
    config.custom_hooks.append(EMA)
    config.train_cfg.max_iters = 12
    return config


def test_channels_then_weights_in_one_run(tmp_path):
    whole, config = (pruned_then_sparse(tmp_path / name) for name in ('whole', 'cut'))
    assert train(whole) == [0]
    assert train(config, cut=Cut('backward', 7)) == [-9]
    assert train(config, resume=True) == [0]
    assert_same_end(config, whole)
    (artifact,) = artifacts(config)
    structure = PruneStructure.from_dict(torch.load(artifact)['prune_structure'])
    checkpoint = torch.load(newest_checkpoint(config.work_dir), weights_only=False)
    assert PruneStructure.from_dict(checkpoint['prune_structure']) == structure
    init_default_scope('mmpretrain')
    model = pruned_model(config.model, artifact)
    model.load_state_dict(checkpoint['state_dict'])
    report = checkpoint['meta']['sparsity']
    assert report['density'] == 0.5 and len(report['layers']) > 15
    weights = dict(model.named_parameters())
    assert all(follows_pattern(weights[f'{n}.weight'], 2, 4) for n in report['layers'])
    assert 'the run goes on, for weights of the compact model' in logged(config)


def test_weights_wait_for_channels(tmp_path):
    config = pruned_then_sparse(tmp_path, 'magnitude')
    config.custom_hooks[0].schedule = dict(type='one_shot', iterations=50)
    assert train(config) == [0]
    words = 'no weights were set to zero: the run ended before channels were pruned'
    assert words in logged(config)


@pytest.mark.slow
def test_fine_tuning_a_pruned_model(run_tool, tmp_path):
    """Prune, then fine-tune with zeros: the ordinary way."""
    first = pruned_then_sparse(tmp_path / 'prune')
    del first.custom_hooks[1:]
    assert train(first) == [0]
    (artifact,) = artifacts(first)
    second = pruned_then_sparse(tmp_path / 'tune')
    del second.custom_hooks[0]
    second.model = dict(
        type='mmgfp.PrunedModel', architecture=first.model, structure=str(artifact)
    )
    second.load_from = str(artifact)
    assert train(second) == [0]
    checkpoint = torch.load(newest_checkpoint(second.work_dir), weights_only=False)
    report = checkpoint['meta']['sparsity']
    for name in report['layers']:
        assert follows_pattern(checkpoint['state_dict'][f'{name}.weight'], 2, 4)
    out = deployed(run_tool, second, tmp_path)
    assert json.loads((out / 'summary.json').read_text())['sparsity'] == report
    names = [h.type for h in Config.fromfile(out / 'small.py').custom_hooks]
    assert names == ['EMAHook']
    assert_equal(torch.load(out / 'small.pth')['state_dict'], checkpoint['state_dict'])


def deployed(run_tool, config, folder):
    """The folder that tools/deploy_pruned.py writes for a run."""
    config.dump(folder / 'config.py')
    checkpoint, out = newest_checkpoint(config.work_dir), folder / 'out'
    command = [folder / 'config.py', checkpoint, '--out', out, '--name', 'small']
    command += ['--rounds', 0, '--input-shape', 3, 16, 16]
    done = run_tool('deploy_pruned.py', *command)
    assert done.returncode == 0, done.stderr
    assert '50.00% of the weights that could go are left' in done.stdout
    return out


# -- real models --------------------------------------------------------------


@TRANSFORMS.register_module(force=True)
class BoxesAsMasks:
    """Takes the box of each object for its mask."""

    def __call__(self, results):
        import numpy as np
        from mmdet.structures.mask import BitmapMasks

        boxes = results['gt_bboxes'].tensor.int().tolist()
        masks = np.zeros((len(boxes), *results['img_shape']), dtype=np.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
            mask[top:bottom, left:right] = 1
        results['gt_masks'] = BitmapMasks(masks, *results['img_shape'])
        return results


def detector(folder, name, kind):
    """Twelve iterations of a small detector on the demo's digits."""
    config = small_prune_config(folder)
    if name is not None:
        config.model = slim(name).model
        config.model.roi_head.bbox_head.num_classes = 10
        if 'mask_head' in config.model.roi_head:
            config.model.roi_head.mask_head.num_classes = 10
            pipeline = config.train_dataloader.dataset.pipeline
            pipeline.insert(-1, dict(type='BoxesAsMasks'))
        config.model.backbone.init_cfg = None
    hook = dict(type='SparsityHook', **KINDS[kind])
    if 'sparsity' in hook:  # heads of random weights would lose all to the backbone
        hook['scope'] = 'local'
    config.custom_hooks = [hook, EMA]
    return config


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', [None, FASTER, MASK])
def test_detectors_train_sparse_and_reload(name, kind, tmp_path):
    config = detector(tmp_path, name, kind)
    runner = Runner.from_cfg(copy.deepcopy(config))
    runner.train()
    assert_reloads(config, runner)


def assert_reloads(config, runner):
    sparsifier = sparse(runner)
    checkpoint = torch.load(newest_checkpoint(runner.work_dir), weights_only=False)
    model = MODELS.build(copy.deepcopy(config.model))
    model.load_state_dict(checkpoint['state_dict'], strict=True)
    assert_sparse(model.state_dict(), sparsifier)
    assert checkpoint['meta']['sparsity'] == sparsifier.report()
    assert len(sparsifier.weights) > 20
