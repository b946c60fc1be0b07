"""MMEngine's runner around a toy detector: seconds, where a real one takes minutes."""

import itertools
from contextlib import contextmanager
from pathlib import Path

import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import (
    DATASETS,
    HOOKS,
    METRICS,
    MODELS,
    OPTIM_WRAPPERS,
    init_default_scope,
)
from mmengine.runner import Runner
from torch.utils.data import Dataset

from mmgfp import ChannelPruningHook
from support.toys import TinyDetector, square_loss

_RUNS = itertools.count()  # names must differ


@MODELS.register_module(force=True)
class ToyDetector(BaseModel):
    """`toys.TinyDetector` with the interface of OpenMMLab's models.

    Args:
        frozen_norm: Whether batch norm stays in eval mode.
        double: Whether to compute in double precision.
        factor: What the loss is multiplied with.
    """

    def __init__(self, frozen_norm=True, double=True, factor=1.0):
        super().__init__()
        self.net = TinyDetector()
        self.frozen_norm = frozen_norm
        self.factor = factor
        if double:
            self.double()

    def train(self, mode=True):
        super().train(mode)
        self.net.bn.train(mode and not self.frozen_norm)
        return self

    def forward(self, inputs, data_samples=None, mode='tensor'):
        outputs = self.net(inputs.to(self.net.stem.weight.dtype))
        if mode == 'loss':
            return {'loss': square_loss(outputs) * self.factor}
        return outputs if mode == 'tensor' else list(outputs[0])


@DATASETS.register_module(force=True)
class ToyImages(Dataset):
    """Random images (3, 16, 16), always the same."""

    def __init__(self, count=8):
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(count, 3, 16, 16, generator=generator)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {'inputs': self.images[index]}


@METRICS.register_module(force=True)
class NoMetric(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.append(len(data_samples))

    def compute_metrics(self, results):
        return {'images': sum(results)}


@HOOKS.register_module(force=True)
class Call(Hook):
    """Calls functions at points of a run, after all other hooks.

    Args:
        points: A function of the runner by the name of the point.
    """

    priority = 'LOWEST'

    def __init__(self, **points):
        self.points = points

    def _call(self, point, runner):
        if point in self.points:
            self.points[point](runner)

    def before_train_iter(self, runner, *args, **kwargs):
        self._call('before_train_iter', runner)

    def after_train_iter(self, runner, *args, **kwargs):
        self._call('after_train_iter', runner)

    def before_val_iter(self, runner, *args, **kwargs):
        self._call('before_val_iter', runner)


@OPTIM_WRAPPERS.register_module(force=True)
class CpuAmpOptimWrapper(AmpOptimWrapper):
    """The real wrapper without its demand for a GPU, which its constructor makes.

    Args:
        dtype: What to compute in.
        scaler: Arguments of the gradient scaler.
        kwargs: Arguments of `OptimWrapper`.
    """

    def __init__(self, dtype=None, scaler=None, **kwargs):
        OptimWrapper.__init__(self, **kwargs)
        self._scale_update_param = None
        self.loss_scaler = torch.amp.GradScaler('cpu', **(scaler or {'enabled': False}))
        self.cast_dtype = dtype

    @contextmanager
    def optim_context(self, model):
        enabled = self.cast_dtype is not None
        with (
            OptimWrapper.optim_context(self, model),
            torch.autocast('cpu', self.cast_dtype, enabled=enabled),
        ):
            yield


def toy_loader(batch, sampler='DefaultSampler', count=8):
    """A loader of ``count`` images in order."""
    return dict(
        batch_size=batch,
        num_workers=0,
        dataset=dict(type='ToyImages', count=count),
        sampler=dict(type=sampler, shuffle=False),
        collate_fn=dict(type='default_collate'),
    )


def toy_runner(folder, iters=8, batch=2, hooks=(), optim=None, hook=None, **config):
    """A runner that prunes a `ToyDetector`.

    Args:
        folder: Where its work directory goes.
        iters: Iterations at most.
        batch: Images of a batch.
        hooks: Further hooks, built or as configs.
        optim: Entries of the optimizer wrapper.
        hook: Arguments of the pruning hook.
        config: Further arguments of the runner.
    """
    init_default_scope('mmengine')
    torch.manual_seed(0)
    # The toy is narrower than what the default aligns.
    pruning = dict(
        type='FisherPruningHook', interval=2, target=dict(flops=0.5), divisor=1
    )
    sgd = dict(type='SGD', lr=0.05, momentum=0.9)
    wrapper = dict(type='OptimWrapper', optimizer=sgd)
    arguments = dict(
        model=dict(type='ToyDetector'),
        work_dir=str(Path(folder) / 'work'),
        train_dataloader=toy_loader(batch, 'InfiniteSampler'),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=iters, val_interval=iters),
        optim_wrapper=wrapper | (optim or {}),
        default_hooks=dict(
            logger=None, checkpoint=None, timer=dict(type='IterTimerHook')
        ),
        custom_hooks=[pruning | (hook or {}), *hooks],
        randomness=dict(seed=0),
        experiment_name=f'toy_{next(_RUNS)}',
        default_scope='mmengine',
    )
    return Runner(**(arguments | config))


def pruner_of(runner):
    """The pruner of a runner that has trained."""
    return hook_of(runner).pruner


def hook_of(runner):
    return next(h for h in runner.hooks if isinstance(h, ChannelPruningHook))
