"""Runs that are killed, asked to end or out of disk, and what resuming makes of them."""

import random

import pytest
from conftest import small_prune_config
from runs import ITERATION, SAVING, Cut, assert_same_end, tiny_classifier, train


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """A run of the classifier that nothing interrupted."""
    config = tiny_classifier(tmp_path_factory.mktemp('whole'))
    assert train(config) == [0]
    return config


@pytest.mark.parametrize(
    'cuts',
    [
        [Cut('decided', 6), Cut('saving', 8), Cut('noting', 12)],
    ],
)
def test_killed_run_ends_like_the_whole_one(whole, cuts, tmp_path):
    config = tiny_classifier(tmp_path)
    for number, cut in enumerate(cuts):
        assert train(config, resume=number > 0, cut=cut) == [-9]
    assert train(config, resume=True) == [0]
    assert_same_end(config, whole)
