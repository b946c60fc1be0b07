"""Which weights stay, against numbers worked out by hand and by brute force."""

import itertools

import pytest
import torch
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from mmgfp.sparsity.masks import follows_pattern, keep_largest, keep_n_of_m
from mmgfp.utils.errors import StatisticsError


@pytest.mark.parametrize(
    ('count', 'first', 'second'),
    [
        (0, [0, 0, 0], [[0, 0], [0, 0]]),
        (1, [0, 0, 0], [[0, 1], [0, 0]]),
        (2, [1, 0, 0], [[0, 1], [0, 0]]),  # of three that are equal, the first one
        (4, [1, 0, 1], [[0, 1], [1, 0]]),
        (5, [1, 1, 1], [[0, 1], [1, 0]]),
        (7, [1, 1, 1], [[1, 1], [1, 1]]),
    ],
)
def test_the_largest_of_all_tensors_stay_and_ties_go_by_order(count, first, second):
    scores = [torch.tensor([2.0, 1, 2]), torch.tensor([[-3.0, 9], [2, 0]])]
    masks = keep_largest(scores, count)
    assert [m.int().tolist() for m in masks] == [first, second]
    assert all(m.dtype == torch.bool for m in masks)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_counts_are_exact_in_any_precision(dtype):
    scores = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    for count in range(36):
        (mask,) = keep_largest([scores], count)
        assert mask.sum() == count
        if 0 < count < 35:
            assert scores[mask].min() >= scores[~mask].max()


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_scores_that_are_not_finite_are_refused(value):
    words = r'weights and their scores must be finite .*\(got NaN or infinity\); lower'
    with pytest.raises(StatisticsError, match=words):
        keep_largest([torch.tensor([1.0, value])], 1)


def best_by_brute_force(weight, n, m):
    """The sum of absolute weights that the best mask keeps, group by group."""
    total = 0.0
    for output in weight.abs():  # (C_in, ...)
        for position in output.reshape(len(output), -1).T:  # (C_in,)
            for group in position.split(m):
                sums = itertools.combinations(group.tolist(), n)
                total += max(map(sum, sums))
    return total


@pytest.mark.parametrize(('n', 'm'), [(2, 4), (1, 4), (3, 4), (1, 2), (2, 8)])
@pytest.mark.parametrize('shape', [(3, 8), (4, 8, 3), (4, 16, 3, 3), (2, 8, 1, 2, 2)])
def test_groups_keep_their_largest_weights(shape, n, m):
    weight = torch.randn(shape, dtype=torch.float64)
    mask = keep_n_of_m(weight, n, m)
    assert mask.shape == weight.shape and mask.is_contiguous()
    groups = mask.movedim(1, -1).reshape(-1, m)
    assert (groups.sum(1) == n).all()
    assert follows_pattern(weight * mask, n, m)
    best = best_by_brute_force(weight, n, m)
    assert (weight * mask).abs().sum().item() == pytest.approx(best)


def test_equal_weights_stay_by_order():
    weight = torch.tensor([[0.0, 0, 0, 0, 1, -1, 1, 2], [5, 5, 5, 5, 0, 1, 0, 0]])
    expected = [[1, 1, 0, 0, 1, 0, 0, 1], [1, 1, 0, 0, 1, 1, 0, 0]]
    assert keep_n_of_m(weight, 2, 4).int().tolist() == expected


@pytest.mark.parametrize(
    ('weight', 'follows'),
    [
        ([[1.0, 1, 0, 0, 0, 0, 0, 1]], True),
        ([[1.0, 1, 0, 1, 0, 0, 0, 0]], False),
        ([[0.0, 0, 1, 1, 1, 1, 0, 0]], True),  # four in a row, but in two groups
        ([[0.0, 0, 0, 0, 0, 0]], False),
        ([0.0, 0, 0, 0], False),
    ],
)
def test_pattern(weight, follows):
    assert follows_pattern(torch.tensor(weight), 2, 4) == follows


def test_groups_of_a_convolution_lie_along_its_inputs():
    weight = torch.ones(1, 4, 2, 2)
    weight[:, 2:] = 0  # two of four inputs at each position
    assert follows_pattern(weight, 2, 4)
    assert not follows_pattern(weight.movedim(1, 3).contiguous(), 2, 4)


def test_torch_compresses_what_stays_without_a_loss():
    """Its own conversion, which drops what exceeds two of four."""
    weight = torch.randn(32, 64).half()
    assert not torch.equal(compressed_and_back(weight), weight)
    sparse = weight * keep_n_of_m(weight, 2, 4)
    assert torch.equal(compressed_and_back(sparse), sparse)


def compressed_and_back(weight):
    return sparse_semi_structured_to_dense_cutlass(
        *sparse_semi_structured_from_dense_cutlass(weight)
    )
