"""Runs that are killed, asked to end or out of disk, and how resuming goes on."""

import errno
import random
import resource
from pathlib import Path

import pytest
import torch
from mmengine.runner import Runner
from support.configs import small_prune_config
from support.runs import (
    ITERATION,
    SAVING,
    Cut,
    artifacts,
    assert_same_end,
    logged,
    plain_classifier,
    recovering_classifier,
    tiny_classifier,
    train,
)
from support.toy_runner import hook_of

from mmgfp.engine.checkpoints import newest_checkpoint
from mmgfp.utils.errors import ConfigError, SavingError
from mmgfp.utils.io import save_checkpoint

KILLED, ASKED = -9, 143


@pytest.fixture(scope='module')
def whole(request, tmp_path_factory):
    """A run that nothing interrupted."""
    make = getattr(request, 'param', tiny_classifier)
    config = make(tmp_path_factory.mktemp('whole'))
    assert train(config) == [0]
    return config


def interrupted(config, cuts, code=KILLED):
    """The config after runs that were cut, one after the other, and one that ended."""
    for number, cut in enumerate(cuts):
        assert train(config, resume=number > 0, cut=cut) == [code]
    assert train(config, resume=True) == [0]
    return config


# -- killed -------------------------------------------------------------------


KINDS = [(tiny_classifier, tiny_classifier), (plain_classifier, plain_classifier)]


@pytest.mark.parametrize(('make', 'whole'), KINDS, indirect=['whole'])
def test_killed_run_ends_like_the_whole_one(make, whole, tmp_path):
    """Once within an iteration, once while a checkpoint is written."""
    cuts = [Cut('backward', 6), Cut('saving', 10)]
    assert_same_end(interrupted(make(tmp_path), cuts), whole)


def ten_points():
    draw = random.Random(0)
    points = [Cut(draw.choice(ITERATION), draw.randint(1, 14)) for _ in range(7)]
    points += [Cut(place, 2 * draw.randint(1, 7)) for place in SAVING]
    return [*points, Cut('artifact', 0)]


@pytest.mark.slow
@pytest.mark.parametrize('cut', ten_points(), ids=lambda c: f'{c.place}-{c.iteration}')
def test_run_killed_at_a_random_point_ends_like_the_whole_one(cut, whole, tmp_path):
    assert_same_end(interrupted(tiny_classifier(tmp_path), [cut]), whole)


@pytest.mark.slow
@pytest.mark.parametrize('whole', [recovering_classifier], indirect=True)
def test_killed_run_in_which_units_come_back_ends_like_the_whole_one(whole, tmp_path):
    """Once between a decision and the end of its iteration, once while saving."""
    cuts = [Cut('decided', 6), Cut('saving', 10)]
    assert_same_end(interrupted(recovering_classifier(tmp_path), cuts), whole)
    log = logged(whole)
    returns = [line for line in log.splitlines() if 'came back' in line]
    assert len(returns) > 1


@pytest.mark.slow
def test_killed_detector_ends_like_the_whole_one(tmp_path):
    def config(name):
        steps = dict(interval=3, units_per_step=30)
        made = small_prune_config(tmp_path / name, **steps)
        made.default_hooks.checkpoint.update(interval=2, max_keep_ckpts=1)
        return made

    whole = config('whole')
    assert train(whole) == [0]
    cuts = [Cut('stepped', 4), Cut('saving', 8), Cut('noting', 10)]
    assert_same_end(interrupted(config('cut'), cuts), whole)


@pytest.mark.slow
def test_run_by_epochs_goes_on_with_the_next_epoch(tmp_path):
    def config(name):
        made = tiny_classifier(tmp_path / name)
        made.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=5, val_interval=2)
        made.train_dataloader.sampler = dict(type='DefaultSampler', shuffle=True)
        made.default_hooks.checkpoint.update(by_epoch=True, interval=1)
        return made

    whole = config('whole')
    assert train(whole) == [0]
    cuts = [Cut('loaded', 8), Cut('backward', 11)]  # 3 iterations are an epoch
    assert_same_end(interrupted(config('cut'), cuts), whole)


@pytest.mark.slow
def test_run_killed_after_its_last_checkpoint_still_leaves_its_artifact(
    whole, tmp_path
):
    config = interrupted(tiny_classifier(tmp_path), [Cut('end', 14)])
    assert_same_end(config, whole)
    assert artifacts(config)[0].name.endswith('unfinished.pth')


# -- asked to end --------------------------------------------------------------


def test_run_that_is_asked_to_end_saves_and_ends(whole, tmp_path):
    config = tiny_classifier(tmp_path)
    config.default_hooks.checkpoint.interval = 100
    assert train(config, cut=Cut('asked', 5)) == [ASKED]
    saved = Path(config.work_dir) / 'iter_5.pth'
    assert newest_checkpoint(config.work_dir) == saved
    words = f'asked to end (SIGTERM): saved {saved}; go on with --resume'
    assert words in logged(config)
    assert train(config, resume=True) == [0]
    assert_same_end(config, whole)


def test_accumulated_gradients_are_not_cut_apart(tmp_path):
    config = tiny_classifier(tmp_path)
    config.optim_wrapper.accumulative_counts = 4
    assert train(config, cut=Cut('asked', 5)) == [ASKED]
    assert newest_checkpoint(config.work_dir).name == 'iter_8.pth'


# -- what is resumed ------------------------------------------------------------


def test_note_that_a_kill_left_empty_does_not_hide_the_checkpoints(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    note = tmp_path / 'last_checkpoint'
    note.write_text(str(tmp_path / 'iter_2.pth'))
    assert newest_checkpoint(tmp_path) == tmp_path / 'iter_2.pth'  # missing: is said
    (tmp_path / 'iter_2.pth').touch()
    (tmp_path / 'iter_4.pth').touch()
    assert newest_checkpoint(tmp_path) == tmp_path / 'iter_2.pth'
    note.write_text('')
    (tmp_path / '.iter_6.pth.x').touch()
    assert newest_checkpoint(tmp_path) == tmp_path / 'iter_4.pth'


def test_checkpoint_without_a_state_of_pruning_is_refused(whole, tmp_path):
    config = tiny_classifier(tmp_path)
    path = newest_checkpoint(whole.work_dir)
    checkpoint = torch.load(path, weights_only=False)
    del checkpoint['pruner']
    torch.save(checkpoint, tmp_path / 'plain.pth')
    config.update(resume=True, load_from=str(tmp_path / 'plain.pth'))
    words = (
        r'checkpoint must be one of a pruning run \(got one without its state\); '
        'to prune these weights, name them in load_from and do not resume'
    )
    with pytest.raises(ConfigError, match=words):
        Runner.from_cfg(config).train()


# -- disk full -------------------------------------------------------------------


@pytest.fixture
def small_disk():
    """No file of this process can grow over 20 MB, for as long as the test runs."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_file_that_does_not_fit_leaves_the_previous_one(tmp_path, small_disk):
    path = tmp_path / 'model.pth'
    save_checkpoint({'weights': torch.ones(3)}, path)
    words = (
        r'model.pth must be written whole \(got .+\); what was there before is '
        r'untouched; make room and run it again, with --resume if it is a training$'
    )
    with pytest.raises(SavingError, match=words) as caught:
        save_checkpoint({'weights': torch.ones(8_000_000)}, path)
    assert '\n' not in str(caught.value)
    assert torch.load(path)['weights'].tolist() == [1, 1, 1]
    assert [p.name for p in tmp_path.iterdir()] == ['model.pth']


def fill_disk(runner, rank):
    """From the checkpoint of iteration 4 on, none can be written whole."""
    write = Path.write_bytes

    def half(path, data):
        write(path, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, 'No space left on device', str(path))

    def arm(*args, **kwargs):
        if runner.iter + 1 == 4:
            Path.write_bytes = half

    hook = hook_of(runner)
    prune = hook.after_train_iter
    hook.after_train_iter = lambda *a, **k: (arm(), prune(*a, **k))


def test_run_whose_disk_is_full_says_so_and_can_be_resumed(whole, tmp_path):
    config = tiny_classifier(tmp_path)
    assert train(config, change=fill_disk) == [2]
    error = logged(config).splitlines()[-1]
    assert error.startswith(f'error: {config.work_dir}/iter_4.pth must be written ')
    assert 'got No space left on device); what was there before is untouched' in error
    saved = {p.name for p in Path(config.work_dir).iterdir() if 'iter' in p.name}
    assert saved == {'iter_2.pth'}
    assert train(config, resume=True) == [0]
    assert_same_end(config, whole)
