"""Training runs in processes of their own, which tests may kill or let meet.

Processes are forked off one that has imported the libraries, so that each starts fast.
"""

import multiprocessing
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from mmengine.runner.loops import _InfiniteDataloaderIterator

from support import toy_runner  # noqa: F401 - registers what runs use
from support.tooling import load_tool

FORKS = multiprocessing.get_context('forkserver')
LIBRARIES = ['mmgfp.engine.hooks.pruning', 'mmgfp.demo.digits', 'mmdet.models']
FORKS.set_forkserver_preload([*LIBRARIES, 'mmpretrain.models'])

#: Whether MMEngine goes on at a later batch without loading, and drawing flips for,
#: those before it; 0.10.7 does not.
SKIPS = hasattr(_InfiniteDataloaderIterator, 'skip_iter')


@DATASETS.register_module(force=True)
class Dots(torch.utils.data.Dataset):
    """Noise (3, 16, 16) with a label, flipped at random where it is loaded."""

    def __init__(self, length=12, flip=SKIPS):
        self.length, self.flip = length, flip

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        from mmpretrain.structures import DataSample

        image = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(i))
        if self.flip and np.random.random() < 0.5:
            image = image.flip(2)
        return dict(inputs=image, data_samples=DataSample().set_gt_label(i % 3))


def tiny_classifier(folder):
    """A pruning run of a ResNet-18 whose head has dropout, with validation."""
    collate = dict(type='default_collate')
    data = dict(num_workers=0, dataset=dict(type='Dots'), collate_fn=collate)
    steady = dict(type='DefaultSampler', shuffle=False)
    config = dict(
        default_scope='mmpretrain',
        work_dir=str(folder / 'work'),
        randomness=dict(seed=0),
        model=dict(
            type='ImageClassifier',
            data_preprocessor=dict(num_classes=3),
            backbone=dict(type='ResNet', depth=18, base_channels=4, stem_channels=4),
            neck=dict(type='GlobalAveragePooling'),
            head=dict(
                type='StackedLinearClsHead',
                num_classes=3,
                in_channels=32,
                mid_channels=[16],
                dropout_rate=0.5,
            ),
        ),
        train_dataloader=dict(
            **data, batch_size=4, sampler=dict(type='InfiniteSampler', shuffle=True)
        ),
        val_dataloader=dict(**data, batch_size=4, sampler=steady),
        val_evaluator=dict(type='Accuracy', topk=1),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=14, val_interval=4),
        val_cfg=dict(type='ValLoop'),
        optim_wrapper=dict(
            optimizer=dict(type='SGD', lr=0.02, momentum=0.9, weight_decay=1e-4)
        ),
        default_hooks=dict(
            checkpoint=dict(
                type='CheckpointHook',
                by_epoch=False,
                interval=2,
                max_keep_ckpts=1,
                save_best='auto',
            ),
            logger=dict(type='LoggerHook', interval=100),
        ),
        log_processor=dict(by_epoch=False),
        custom_hooks=[
            dict(
                type='FisherPruningHook',
                interval=3,
                units_per_step=25,
                divisor=1,
                target=[dict(flops=0.8), dict(flops=0.3)],
            )
        ],
    )
    return Config(config, cfg_text='# by a test', filename='tiny.py')


def recovering_classifier(folder):
    """The same run of one stage, in which pruned units come back; with an average."""
    config = one_stage(tiny_classifier(folder))
    config.custom_hooks[0].update(
        recover=True, interval=2, units_per_step=6, target=dict(flops=0.3)
    )
    config.custom_hooks.append(dict(type='EMAHook', momentum=0.3))
    return config


def one_stage(config):
    """Let the classifier have one stage of 16 channels."""
    config.model.backbone.update(
        num_stages=1, strides=(1,), dilations=(1,), out_indices=(0,)
    )
    config.model.backbone.update(stem_channels=16, base_channels=16)
    config.model.head.in_channels = 16
    return config


def plain_classifier(folder):
    """The same run without pruning."""
    config = tiny_classifier(folder)
    config.custom_hooks = [dict(type='ExactResumeHook', agree_interval=3)]
    return config


@dataclass(frozen=True)
class Cut:
    """Where a run is killed.

    Attributes:
        place: One of `PLACES`.
        iteration: In which iteration, from 1; at the places that write a file, that of
            the file's name.
    """

    place: str
    iteration: int


#: Within an iteration, in the order in which they come.
ITERATION = ('loaded', 'backward', 'stepped', 'decided', 'end')
#: While a training checkpoint is written, and while its name is noted.
SAVING = ('saving', 'noting')
#: There, while the first artifact is written, or by a polite request in an iteration.
PLACES = (*ITERATION, *SAVING, 'artifact', 'asked')


class _Killer(Hook):
    """Ends the process at a cut, as a lack of power would."""

    def __init__(self, cut):
        self.cut = cut

    def before_train_iter(self, runner, *args, **kwargs):
        if runner.iter + 1 != self.cut.iteration:
            return
        if self.cut.place == 'loaded':
            die()
        elif self.cut.place == 'backward':
            first = next(p for p in runner.model.parameters() if p.requires_grad)
            first.register_hook(lambda grad: die())
        elif self.cut.place == 'asked':
            os.kill(os.getpid(), signal.SIGTERM)

    def after_train_iter(self, runner, *args, **kwargs):
        if runner.iter + 1 == self.cut.iteration and self.cut.place in ITERATION[2:]:
            die()


def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)


def _arrange(runner, cut):
    if cut.place in (*ITERATION, 'asked'):
        order = {'stepped': 'VERY_HIGH', 'decided': 'NORMAL'}
        runner.register_hook(_Killer(cut), order.get(cut.place, 'LOWEST'))
    elif cut.place == 'saving':
        name = f'iter_{cut.iteration}.pth'
        Path.write_bytes = lambda path, data: _half(path, data, name)
    elif cut.place == 'noting':
        import mmengine.hooks.checkpoint_hook as module

        def opened(path, mode):
            file = open(path, mode)  # noqa: SIM115 - empties it
            return die() if runner.iter + 1 == cut.iteration else file

        module.open = opened
    else:
        save = torch.save

        def saved(data, file):
            at_it = 'flops' in getattr(file, 'name', '')
            return _half(file, b'PK' * 500, 'flops') if at_it else save(data, file)

        torch.save = saved


def _half(path, data, name):
    with open(path, 'wb') as file:
        file.write(data if name not in path.name else data[: len(data) // 2])
    if name in path.name:
        die()


def _train(config, resume, cut, change, rank, processes, port):
    """Train as tools/train.py does, then write ``end_<rank>.pth``."""
    torch.set_num_threads(1)
    folder = Path(config.work_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f'log_{rank}.txt').open('a') as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if processes > 1:
        os.environ |= {
            'RANK': str(rank),
            'LOCAL_RANK': str(rank),
            'WORLD_SIZE': str(processes),
            'MASTER_ADDR': '127.0.0.1',
            'MASTER_PORT': str(port),
        }
        config.launcher = 'pytorch'
    tool = load_tool('train')

    def main():
        tool.apply_resume(config, 'auto' if resume else None)
        tool.use_cpus(config)
        runner = Runner.from_cfg(config)
        if cut is not None:
            _arrange(runner, cut)
        if change is not None:
            change(runner, rank)
        runner.train()
        torch.save(_end(runner), folder / f'end_{rank}.pth')

    tool.run_cli(main)


def _end(runner):
    module = getattr(runner.model, 'module', runner.model)
    pruners = [h.pruner for h in runner.hooks if hasattr(h, 'pruner')]
    return {
        'iteration': runner.iter,
        'weights': module.state_dict(),
        'optimizer': runner.optim_wrapper.state_dict(),
        'kept': pruners[0].units.kept.tolist() if pruners else None,
    }


def train(config, resume=False, cut=None, change=None, processes=1, limit=240):
    """Run a config to its end, or to where it is cut.

    Args:
        config: What to run.
        resume: Whether as with ``--resume``.
        cut: Where to kill it.
        change: Called with the runner and the rank before training; a function of a
            module.
        processes: How many train together.
        limit: Seconds, after which all are killed.

    Returns:
        list: The exit codes.
    """
    port = 20000 + (os.getpid() * 7 + time.time_ns() // 1000) % 20000
    arguments = (config, resume, cut, change)
    jobs = [
        FORKS.Process(target=_train, args=(*arguments, rank, processes, port))
        for rank in range(processes)
    ]
    for job in jobs:
        job.start()
    end = time.monotonic() + limit
    for job in jobs:
        job.join(max(0.0, end - time.monotonic()))
        if job.is_alive():
            job.kill()
            job.join()
    return [job.exitcode for job in jobs]


def logged(config, rank=0):
    """What a run has printed."""
    return (Path(config.work_dir) / f'log_{rank}.txt').read_text()


def ended(config, rank=0):
    """What a finished run leaves."""
    return torch.load(Path(config.work_dir) / f'end_{rank}.pth', weights_only=True)


def assert_same_end(config, other):
    """Compare two finished runs bit by bit: weights, optimizer, masks and artifacts."""
    end = ended(config)
    assert_equal(end, ended(other))
    one, two = (
        {p.name: torch.load(p, weights_only=True) for p in artifacts(c)}
        for c in (config, other)
    )
    assert one.keys() == two.keys() and bool(one) == (end['kept'] is not None)
    for name in one:
        assert one[name]['prune_structure'] == two[name]['prune_structure']
        assert_equal(one[name]['state_dict'], two[name]['state_dict'])


def artifacts(config):
    """Compact models that a run has saved."""
    return sorted(Path(config.work_dir).glob('*_flops*.pth'))


def assert_equal(one, two):
    """Compare nested containers of tensors and plain values bit by bit."""
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_equal(one[key], two[key])
    elif isinstance(one, list):
        assert len(one) == len(two)
        for first, second in zip(one, two, strict=True):
            assert_equal(first, second)
    elif isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)
    else:
        assert one == two


def steady_classifier(folder, batch):
    """Without dropout and flips, BN in eval; images in order."""
    config = tiny_classifier(folder)
    config.custom_hooks[0].update(interval=5, units_per_step=6)
    config.model.backbone.norm_eval = True
    config.model.head.dropout_rate = 0.0
    loader = config.train_dataloader
    loader.update(batch_size=batch, dataset=dict(type='Dots', flip=False))
    loader.sampler.shuffle = False
    config.train_cfg.max_iters = 20
    config.update(val_cfg=None, val_dataloader=None, val_evaluator=None)
    config.default_hooks.checkpoint.save_best = None
    return config


def assert_ranks_agree(config):
    one, two = (ended(config, rank) for rank in range(2))
    assert one['kept'] == two['kept'] and not all(one['kept'] or [False])
    parameters = one['weights'].keys() - buffers(one['weights'])
    assert_equal(*({n: e['weights'][n] for n in parameters} for e in (one, two)))
    assert_equal(one['optimizer'], two['optimizer'])


def buffers(names):
    """Running statistics of BN are each process' own, as in plain training."""
    ends = ('running_mean', 'running_var', 'num_batches_tracked')
    return {n for n in names if n.endswith(ends)}
