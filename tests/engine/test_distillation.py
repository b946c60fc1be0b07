"""A teacher beside a run: what it adds to the loss, and what it leaves alone."""

import copy
from pathlib import Path

import pytest
import torch
from mmengine.hub import get_config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from support.configs import CASCADE, FASTER, slim, small_prune_config
from support.cut_models import cut_model, pruned_entry
from support.pruning import hooks_on
from support.runs import (
    Cut,
    assert_equal,
    assert_same_end,
    ended,
    plain_classifier,
    steady_classifier,
    tiny_classifier,
    train,
)
from support.small_configs import detection
from support.toy_runner import Call as CallAt
from support.toy_runner import hook_of
from torch import nn

from mmgfp import DistillationHook
from mmgfp.engine.artifact import save_artifact
from mmgfp.engine.deploy import deploy, read_deployable
from mmgfp.engine.distillation.outputs import Call, subject_of
from mmgfp.engine.model_building import build_model, init_weights
from mmgfp.utils.errors import ConfigError, StructureError

DETECTOR_TERMS = {'cls', 'bbox', 'feat'}
TWO_STAGE_TERMS = {'rpn_cls', 'rpn_bbox', 'roi_cls', 'roi_bbox', 'feat'}
TERMS = dict(classifier={'cls'}, retinanet=DETECTOR_TERMS, faster=TWO_STAGE_TERMS)


QUICK_AND_SLOW = ['retinanet', pytest.param('classifier', marks=pytest.mark.slow)]


def training(kind, folder):
    """A short training of an unpruned model."""
    if kind == 'classifier':
        return plain_classifier(folder)
    if kind == 'retinanet':
        config = small_prune_config(folder)
        config.custom_hooks = [dict(type='ExactResumeHook')]
        config.default_hooks.checkpoint.interval = 2
        config.train_cfg.max_iters = 6
        return config
    config = detection(folder, FASTER)
    config.train_cfg.update(max_epochs=1, val_interval=5)
    config.visualizer.name = str(folder)
    config.work_dir = str(folder / 'work')
    return config


@pytest.fixture(scope='module', params=['classifier', 'retinanet', 'faster'])
def kind(request):
    return request.param


@pytest.fixture(scope='module')
def cases(tmp_path_factory):
    """Unpruned models by kind, made once."""
    made = {}

    def case(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            size = 16 if kind == 'classifier' else 64
            made[kind] = cut_model(training(kind, folder), folder, size)
        return made[kind]

    return case


def fine_tuning(case, folder, **hook):
    """The case's training with what is left of its model, and its teacher."""
    config = copy.deepcopy(case.config)
    config.model = pruned_entry(case)
    config.work_dir = str(folder / 'work')
    if 'visualizer' in config:
        config.visualizer.name = str(folder)
    teacher = dict(type='DistillationHook', checkpoint=case.files['full.pth'], **hook)
    config.custom_hooks = [*(config.get('custom_hooks') or []), teacher]
    return config


def distillation_of(runner):
    return next(h for h in runner.hooks if isinstance(h, DistillationHook))


def logged(runner, name):
    return runner.message_hub.get_scalar(f'train/{name}').data[0]


# -- a run ---------------------------------------------------------------------


@pytest.fixture(scope='module')
def run(cases, kind, tmp_path_factory):
    """A finished fine-tuning, with hooks on the model while it trained."""
    config = fine_tuning(cases(kind), tmp_path_factory.mktemp(f'{kind}_run'))
    runner = Runner.from_cfg(config)
    counts = []
    runner.register_hook(
        CallAt(after_train_iter=lambda r: counts.append(hooks_on(r.model)))
    )
    runner.train()
    return runner, counts


def test_terms_are_in_the_log_and_in_the_loss(run, kind):
    runner, _ = run
    names = [n.partition('/')[2] for n in runner.message_hub.log_scalars]
    terms = {n for n in names if n.startswith('loss_distill_')}
    assert terms == {f'loss_distill_{name}' for name in TERMS[kind]}
    for name in terms:
        values = logged(runner, name)
        assert (values > 0).all() and (values < 100).all(), name
    if kind == 'classifier':
        return  # whose own loss has the name of the sum
    parts = [n for n in names if 'loss' in n and n != 'loss']
    total = sum(logged(runner, n) for n in parts)
    assert total == pytest.approx(logged(runner, 'loss'), rel=1e-4)


def test_teacher_is_left_as_it_was(run, cases, kind):
    runner, _ = run
    teacher = distillation_of(runner).teacher
    assert_equal(dict(teacher.state_dict()), dict(cases(kind).full))
    for parameter in teacher.parameters():
        assert parameter.grad is None and not parameter.requires_grad
    training = [n for n, m in teacher.named_modules() if m.training]
    heads = dict(classifier=[], retinanet=['bbox_head'], faster=['rpn_head'])
    assert training == heads[kind]


def test_model_and_its_checkpoints_have_the_keys_they_had(run, cases, kind):
    runner, counts = run
    init_default_scope(cases(kind).scope)
    model = MODELS.build(pruned_entry(cases(kind)))
    assert type(runner.model) is type(model)
    assert runner.model.state_dict().keys() == model.state_dict().keys()
    last = sorted(Path(runner.work_dir).glob('*_*.pth'))[-1]
    checkpoint = torch.load(last, weights_only=False)
    assert checkpoint['state_dict'].keys() == model.state_dict().keys()
    adapters = checkpoint['distillation']
    if kind == 'classifier':
        assert adapters is None
    else:
        widths = {tuple(pair) for pair in adapters['widths']}
        neck = cases(kind).config.model.neck.out_channels
        assert all(ours < theirs == neck for ours, theirs in widths)
        assert len(adapters['weights']) == 2 * len(adapters['widths'])
    # Only what belongs to the hook is watched, and no longer than the run.
    assert min(counts) > hooks_on(runner.model) == hooks_on(model)


def test_first_loss_of_a_classifier_by_hand(cases, tmp_path):
    """T² Σ p_t (log p_t - log p_s) with T = 2, a mean over images, times 0.5."""
    case = cases('classifier')
    options = dict(temperature=2.0, weights=dict(cls=0.5))
    config = fine_tuning(case, tmp_path, **options)
    config.train_cfg.update(max_iters=1, val_interval=9)
    runner, seen = Runner.from_cfg(config), []

    def watch(runner):
        head = runner.model.head
        head.register_forward_hook(lambda m, args, output: seen.append(output.detach()))
        runner.model.backbone.register_forward_pre_hook(
            lambda m, args: seen.append(args[0])
        )

    runner.register_hook(CallAt(before_train_iter=watch))
    runner.train()
    images, ours = seen[:2]
    with torch.no_grad():
        theirs = case.model.eval()(images, mode='tensor')
    log_p, log_q = ((x / 2).log_softmax(1) for x in (theirs, ours))
    expected = 0.5 * 4 * (log_p.exp() * (log_p - log_q)).sum(1).mean().item()
    value = logged(runner, 'loss_distill_cls')[0]
    assert value == pytest.approx(expected, rel=1e-5) and value > 1e-4


def test_deployed_config_knows_nothing_of_the_teacher(run, kind, tmp_path):
    runner, _ = run
    last = sorted(Path(runner.work_dir).glob('*_*.pth'))[-1]
    paths = deploy(runner.cfg, read_deployable(runner.cfg, last), tmp_path, 'small')
    text = paths['config'].read_text()
    assert 'DistillationHook' not in text and 'full.pth' not in text


# -- beside other things ---------------------------------------------------------


def interrupted(config, cut):
    assert train(config, cut=cut) == [-9]
    assert train(config, resume=True) == [0]
    return config


@pytest.mark.parametrize('kind', QUICK_AND_SLOW)
def test_resumed_run_ends_like_the_whole_one(cases, kind, tmp_path):
    """With dropout in the one, with adapters in the other."""
    whole, cut = (fine_tuning(cases(kind), tmp_path / n) for n in ('whole', 'cut'))
    assert train(whole) == [0]
    assert_same_end(interrupted(cut, Cut('backward', 4)), whole)
    states = [
        torch.load(sorted(Path(c.work_dir).glob('iter_*.pth'))[-1], weights_only=False)
        for c in (whole, cut)
    ]
    assert_equal(*(state['distillation'] for state in states))
    if kind == 'retinanet':
        optimizer = ended(whole)['optimizer']['state']
        assert sum(len(s) > 0 for s in optimizer.values()) == len(optimizer)


@pytest.mark.parametrize(
    'changes',
    [
        dict(type='CpuAmpOptimWrapper', dtype=torch.bfloat16),
        dict(accumulative_counts=2, clip_grad=dict(max_norm=10.0)),
        dict(),
    ],
    ids=['bf16', 'accumulated', 'averaged'],
)
def test_training_options(cases, tmp_path, changes):
    config = fine_tuning(cases('retinanet'), tmp_path)
    config.optim_wrapper.update(changes)
    config.train_cfg.max_iters = 4
    if not changes:
        config.custom_hooks.append(dict(type='EMAHook'))
    runner = Runner.from_cfg(config)
    runner.train()
    for name in DETECTOR_TERMS:
        assert (logged(runner, f'loss_distill_{name}') < 100).all()
    assert all(p.isfinite().all() for p in runner.model.parameters())


@pytest.mark.parametrize('kind', QUICK_AND_SLOW)
def test_processes_train_the_same_adapters(cases, kind, tmp_path):
    config = fine_tuning(cases(kind), tmp_path)
    config.train_cfg.max_iters = 4
    assert train(config, processes=2) == [0, 0]
    optimizers = [ended(config, rank)['optimizer'] for rank in range(2)]
    assert_equal(*optimizers)
    if kind == 'retinanet':
        parameters = [p for g in optimizers[0]['param_groups'] for p in g['params']]
        assert len(optimizers[0]['state']) == len(parameters)


# -- beside pruning ----------------------------------------------------------------


def pruning_with(folder, checkpoint, **hook):
    """A pruning run without dropout or batch statistics, with a teacher."""
    config = steady_classifier(folder, batch=4)
    config.custom_hooks[0].update(hook)
    if checkpoint is not None:
        teacher = dict(type='DistillationHook', checkpoint=str(checkpoint))
        config.custom_hooks.append(teacher)
    return config


def importance_at_first(config, weights):
    """Importance of all units after one iteration from ``weights``."""
    config.train_cfg.max_iters = 1
    config.load_from = str(weights)
    runner, seen = Runner.from_cfg(config), []
    look = CallAt(
        after_train_iter=lambda r: seen.append(
            hook_of(r).pruner.criterion.statistics.importance.copy()
        )
    )
    runner.register_hook(look)
    runner.train()
    groups = hook_of(runner).pruner.units.grouping.groups
    return [g.name for g in groups], torch.from_numpy(seen[0])


def test_importance_is_that_of_the_whole_loss(tmp_path):
    """A teacher with the same weights adds no gradient, another one does."""
    config = steady_classifier(tmp_path, batch=4)
    init_default_scope(config.default_scope)
    files = [tmp_path / 'same.pth', tmp_path / 'other.pth']
    for seed, file in enumerate(files):
        torch.manual_seed(seed)
        model = MODELS.build(config.model)
        torch.save({'state_dict': model.state_dict()}, file)
    (groups, alone), (same_groups, same), (other_groups, other) = (
        importance_at_first(pruning_with(tmp_path / str(n), teacher), files[0])
        for n, teacher in enumerate((None, *files))
    )
    assert groups == same_groups == other_groups  # discovery sees the task alone
    torch.testing.assert_close(same, alone, rtol=1e-4, atol=1e-9)
    changed = (other - alone).abs() > 0.005 * alone
    assert changed[alone > 0].double().mean() > 0.5


@pytest.mark.parametrize(
    'options', [{}, dict(compact_interval=3), dict(compensate=dict(images=8))]
)
def test_pruning_with_a_teacher(tmp_path, cases, options, caplog):
    case = cases('classifier')
    config = tiny_classifier(tmp_path)
    config.custom_hooks[0].update(target=dict(flops=0.75), **options)
    config.custom_hooks.append(
        dict(type='DistillationHook', checkpoint=case.files['full.pth'])
    )
    config.load_from = case.files['full.pth']
    runner = Runner.from_cfg(config)
    runner.train()
    assert hook_of(runner).pruner.done
    assert Path(runner.work_dir, 'tiny_flops75.pth').is_file()
    assert (logged(runner, 'loss_distill_cls') >= 0).all()
    assert logged(runner, 'loss_distill_cls')[-1] > 0


@pytest.mark.slow
def test_pruning_with_a_teacher_is_resumed(tmp_path, cases):
    def config(name):
        made = tiny_classifier(tmp_path / name)
        file = cases('classifier').files['full.pth']
        made.custom_hooks.append(dict(type='DistillationHook', checkpoint=file))
        return made

    whole, cut = config('whole'), config('cut')
    assert train(whole) == [0]
    assert_same_end(interrupted(cut, Cut('backward', 8)), whole)


def test_features_are_not_compared_while_pruning(tmp_path, cases):
    case = cases('retinanet')
    config = small_prune_config(tmp_path)
    config.train_cfg.max_iters = 3
    hook = dict(type='DistillationHook', checkpoint=case.files['full.pth'])
    config.custom_hooks.append(hook)
    runner = Runner.from_cfg(config)
    runner.train()
    names = {n for n in runner.message_hub.log_scalars if 'distill' in n}
    assert names == {'train/loss_distill_cls', 'train/loss_distill_bbox'}
    config = small_prune_config(tmp_path / 'asked')
    config.custom_hooks.append(dict(hook, weights=dict(feat=2.0)))
    with pytest.raises(ConfigError, match='weights.feat must be 0 beside a pruning'):
        Runner.from_cfg(config).train()


# -- refusals ----------------------------------------------------------------------


def wider_head(config):
    config.model.head.num_classes = 7


def other_head(config):
    config.model.head = dict(type='LinearClsHead', num_classes=3, in_channels=32)


def other_images(config):
    config.model.data_preprocessor = dict(mean=[1.0] * 3, std=[2.0] * 3)


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (wider_head, r"num_classes of the teacher's head must be as in the model, 3"),
        (other_head, r"the teacher's head must be as in the model, Stacked"),
        (other_images, r'data_preprocessor.mean of the teacher must be as in the'),
    ],
)
def test_teachers_that_do_not_fit_are_refused(cases, tmp_path, change, words):
    other = copy.deepcopy(cases('classifier').config)
    change(other)
    init_default_scope(other.default_scope)
    file = tmp_path / 'teacher.pth'
    torch.save({'state_dict': MODELS.build(other.model).state_dict()}, file)
    config = fine_tuning(cases('classifier'), tmp_path)
    teacher = dict(model=other.model.to_dict())
    config.custom_hooks[-1].update(checkpoint=str(file), teacher=teacher)
    with pytest.raises(ConfigError, match=words):
        Runner.from_cfg(config).train()


def test_pruned_weights_are_no_teacher(cases, tmp_path):
    case = cases('classifier')
    init_default_scope(case.scope)
    model = MODELS.build(pruned_entry(case))
    save_artifact(tmp_path / 'small.pth', model, case.structure, {})
    config = fine_tuning(case, tmp_path)
    config.custom_hooks[-1].checkpoint = str(tmp_path / 'small.pth')
    with pytest.raises(StructureError, match='must hold the weights of this structure'):
        Runner.from_cfg(config).train()


def test_compiling_is_refused(cases, tmp_path):
    config = fine_tuning(cases('classifier'), tmp_path)
    config.compile = True
    with pytest.raises(ConfigError, match='compile must be off with a Distillation'):
        Runner.from_cfg(config).train()


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (dict(checkpoint=3), 'checkpoint must be a file'),
        (dict(teacher=3), 'teacher must be a config or its file'),
        (dict(temperature=0), 'temperature must be a number above 0'),
        (
            dict(weights=dict(logits=1)),
            'weights.logits must be one of its options: cls',
        ),
        (dict(weights=dict(cls=-1)), 'weights.cls must be a number of at least 0'),
        (dict(weights=dict(cls=0, bbox=0, feat=0)), 'weights must be above 0 for some'),
    ],
)
def test_options_are_checked(options, words):
    with pytest.raises(ConfigError, match=words):
        DistillationHook(**{'checkpoint': 'a.pth', **options})


class OtherHead(nn.Module):
    """A head whose outputs nothing is known about."""

    num_classes = 3


@pytest.mark.parametrize('part', ['bbox_head', 'rpn_head', 'head'])
def test_heads_whose_outputs_are_unknown_are_refused(part):
    models = [nn.Module(), nn.Module()]
    for model in models:
        setattr(model, part, OtherHead())
    with pytest.raises(ConfigError, match=f'{part} of the model must be one of .*Head'):
        subject_of(*models, 4.0)


def test_features_alone_need_no_known_head():
    models = [nn.Module(), nn.Module()]
    for model in models:
        model.bbox_head = OtherHead()
    assert subject_of(*models, 4.0, outputs=False).watched[0] == 'neck'
    with pytest.raises(ConfigError, match='model must be a classifier of MMPretrain'):
        subject_of(nn.Module(), nn.Module(), 4.0)


HEADS = [
    'fcos/fcos_r50-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x_coco.py',
    'gfl/gfl_r50_fpn_1x_coco.py',
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in (
            'atss/atss_r50_fpn_1x_coco.py',
            'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
            'fsaf/fsaf_r50_fpn_1x_coco.py',
            'ssd/ssd300_coco.py',
            'rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
            'yolox/yolox_tiny_8xb8-300e_coco.py',
        )
    ),
]


@pytest.mark.parametrize('name', HEADS)
def test_every_head_is_at_no_distance_from_itself(name):
    """And at some from one whose weights are a little larger."""
    model = build_model(get_config(f'mmdet::{name}'))
    init_weights(model)
    teacher = copy.deepcopy(model)
    for built in (model, teacher):
        built.eval()  # so that norms are alike
    subject = subject_of(model, teacher, 4.0)
    model.bbox_head.training = True
    size = 300 if 'ssd' in name else 64
    inputs = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = model.extract_feat(inputs)
        calls = {'bbox_head': Call(features, model.bbox_head(features))}
        same = subject.compare(inputs, calls)
        for parameter in teacher.bbox_head.parameters():
            parameter.mul_(1.2)
        other = subject.compare(inputs, calls).terms
    assert same.terms.keys() == {'cls', 'bbox'} and not subject.left_out
    for ours, theirs in zip(features, same.features, strict=True):
        assert torch.equal(ours, theirs)
    for term, value in same.terms.items():
        assert abs(value) < 1e-4 and other[term] > 5 * abs(value), term


def test_predictions_of_several_box_heads_are_left_out_with_the_reason():
    model = build_model(slim(CASCADE))
    subject = subject_of(model, copy.deepcopy(model), 4.0)
    assert 'CascadeRoIHead for RoIs are not compared' in subject.left_out[0]
