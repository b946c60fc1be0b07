"""Sums of Fisher information between decisions, by numbers worked out by hand."""

import numpy as np
import pytest
import torch

from mmgfp.criteria.fisher import Fisher
from mmgfp.criteria.statistics import UnitStatistics

#: Units 0 and 1 are of group 0, which a and b read; unit 2 is group 1, which c reads.
UNITS = dict(a=torch.tensor([0, 1]), b=torch.tensor([1, -1, 0]), c=torch.tensor([2]))
GROUP_OF = np.array([0, 0, 1])


class Taken:
    """Stands for the taps of a model."""

    def __init__(self, gradients):
        self.gradients = gradients

    def take(self):
        return self.gradients

    def take_lost(self):
        return {}


class Watched(Fisher):
    """Gets mask gradients from a test."""

    def __init__(self):
        super().__init__()
        self.statistics = UnitStatistics(GROUP_OF)
        self.watcher.units, self.watcher._count = UNITS, len(GROUP_OF)

    def add(self, gradients):
        self.watcher.tap = Taken(gradients)
        self.update()


def gradients(**layers):
    return {n: torch.tensor(g) for n, g in layers.items()}


BATCH = gradients(
    a=[[1.0, 2.0], [0.0, -1.0]], b=[[1.0, 9.0, 2.0], [1.0, 9.0, 3.0]], c=[[2.0], [1.0]]
)
#: Unit 0: (1 + 2)² + (0 + 3)²; unit 1: (2 + 1)² + (-1 + 1)²; unit 2: 2² + 1².
SQUARES = [18, 9, 5]


def flat(criterion):
    return torch.cat([*criterion.state_dict().values()])


def with_others(*others):
    """A reduction over this process and others, in this process."""

    def reduce(flat_sums):
        for other in others:
            flat_sums += flat(other)
        return 1 + len(others)

    return reduce


def test_copies_are_summed_before_and_images_after_the_square():
    own = Watched()
    own.add(BATCH)
    own.add(BATCH)
    assert own.statistics.importance.tolist() == [2 * s for s in SQUARES]
    assert own.statistics.seen.tolist() == [2, 2]


def test_processes_that_share_a_batch_see_what_one_would():
    """Losses are means: that of half the images weighs each of them twice as much."""
    whole, first, second = Watched(), Watched(), Watched()
    whole.add(BATCH)
    first.add({n: 2 * g[:1] for n, g in BATCH.items()})
    second.add({n: 2 * g[1:] for n, g in BATCH.items()})
    collected = first.scores(with_others(second)).values
    assert collected.tolist() == whole.scores().values.tolist() == SQUARES


def test_accumulated_batches_weigh_like_one_large_batch():
    """Over k iterations the loss is divided by k, as by k times as many images."""
    whole, parts = Watched(), Watched()
    whole.add(BATCH)
    for n in range(2):  # a mean over 1 image, divided by 2: again half
        parts.add({name: g[n : n + 1] for name, g in BATCH.items()})
    assert parts.scores().values.tolist() == whole.scores().values.tolist()


def test_uneven_batches_add_up():
    """Two images here, one there: any number of rows goes."""
    first, second = Watched(), Watched()
    first.add(BATCH)
    second.add({n: g[:1] for n, g in BATCH.items()})
    collected = first.scores(with_others(second)).values
    assert collected.tolist() == [(18 + 9) / 4, (9 + 9) / 4, (5 + 4) / 4]


def test_group_seen_by_one_process_only_counts():
    first, second = Watched(), Watched()
    first.add({n: g for n, g in BATCH.items() if n != 'c'})
    assert np.isnan(first.scores().values).tolist() == [False, False, True]
    second.add(BATCH)
    collected = first.scores(with_others(second)).values
    assert collected.tolist() == [s / 4 for s in (36, 18, 5)]


def test_collecting_changes_nothing_here():
    first, second = Watched(), Watched()
    first.add(BATCH)
    second.add(BATCH)
    first.scores(with_others(second))
    assert first.statistics.importance.tolist() == SQUARES


def test_gathered_statistics_are_those_of_all_and_counted_once():
    first, second = Watched(), Watched()
    first.add(BATCH)
    second.add(BATCH)
    expected = first.scores(with_others(second))
    sum_of_both = flat(first) + flat(second)
    for own, keep in ((first, True), (second, False)):
        own.gather(lambda sums: sums.copy_(sum_of_both), keep)
    after = first.scores(with_others(second))
    assert after.values.tolist() == expected.values.tolist()
    assert not second.statistics.importance.any()


def test_gathering_without_others_keeps_what_there_is():
    own = Watched()
    own.add(BATCH)
    own.gather(None, True)
    assert own.statistics.importance.tolist() == SQUARES


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_bad_gradients_in_one_process_cost_its_iteration_alone(bad):
    first, second = Watched(), Watched()
    first.add(BATCH | gradients(c=[[bad], [1.0]]))
    second.add(BATCH)
    collected = first.scores(with_others(second))
    assert collected.values.tolist() == [s / 4 for s in SQUARES]
    assert collected.nonfinite == 1
