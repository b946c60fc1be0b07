"""Least squares from moments, against `lstsq` and by hand."""

import pytest
import torch

from mmgfp.compensation.refit import NO_GAIN, NO_ROWS, NOT_FINITE, Moments, refit

LITTLE = (1e-13,)


def problem(rows=200, inputs=5, outputs=3, groups=1, seed=0, noise=0.1):
    """Inputs, outputs and weights of positions, and the layer that nearly fits."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.double)

    x, weight = draw(groups, rows, inputs), draw(groups, inputs, outputs)
    y = x @ weight + noise * draw(groups, rows, outputs)
    return x, y, draw(groups, rows).square(), weight


def moments_of(x, y, f):
    moments = Moments(*x.shape[::2], y.shape[2])
    for part in range(3):  # in pieces, as batches come
        moments.add(x[:, part::3], y[:, part::3], f[:, part::3])
    return moments


def weighted_lstsq(x, y, f):
    root = f.sqrt()[..., None]
    return torch.linalg.lstsq(root * x, root * y).solution


@pytest.mark.parametrize('groups', [1, 4])
def test_without_ridge_it_is_weighted_lstsq_over_all_images(groups):
    x, y, f, _ = problem(groups=groups)
    parts = [
        moments_of(*(t[:, part] for t in (x, y, f)))
        for part in (slice(0, 150), slice(150, None))
    ]
    result = refit(*([p] for p in parts), torch.zeros(groups, 5, 3), LITTLE)
    torch.testing.assert_close(result.weight, weighted_lstsq(x, y, f))
    assert result.before == 1 and result.after < 0.05 and result.reason is None


def test_ridge_holds_on_to_the_old_weights():
    """(A + r I) (W' - W) = B - A W with r the ridge times the mean of A's diagonal."""
    x, y, f, weight = problem()
    old = weight + 0.5
    sums = moments_of(x, y, f)
    near = refit([sums], [sums], old, (1e4,))
    torch.testing.assert_close(near.weight, old, rtol=0, atol=1e-3)
    ridge = 0.5 * sums.xx[0].trace() / 5
    both = 2 * sums.xx[0], 2 * sums.xy[0]  # held-out images count as well
    left = both[0] + 2 * ridge * torch.eye(5)
    moved = torch.linalg.solve(left, both[1] - both[0] @ old[0])
    torch.testing.assert_close(
        refit([sums], [sums], old, (0.5,)).weight[0], old[0] + moved
    )


def test_a_free_bias_takes_up_a_shift_without_ridge():
    x, y, f, weight = problem(noise=0)
    ones = torch.ones(1, 200, 1, dtype=torch.double)
    x, shift = torch.cat([x, ones], 2), torch.tensor([7.0, -3.0, 100.0])
    sums = moments_of(x, y + shift, f)
    old = torch.cat([weight, torch.zeros(1, 1, 3)], 1)
    # With the best shift, the old weights are right, and stay however small the ridge.
    assert refit([sums], [sums], old, (1e-5, 1.0), free_bias=True).reason == NO_GAIN
    result = refit([sums], [sums], 0 * old, (1e-9,), free_bias=True)
    torch.testing.assert_close(result.weight[0, -1], shift.double(), rtol=1e-5, atol=0)


def test_the_ridge_is_the_one_that_suits_held_out_images():
    x, y, f, weight = problem(rows=8, inputs=6, noise=1.0)
    fit, held = moments_of(x, y, f), moments_of(*problem(500, 6, seed=0, noise=0.0)[:3])
    held.xy, held.yy = held.xx @ weight, (weight * (held.xx @ weight)).sum(1)
    ridges, old = (0.03, 0.3, 1.0), weight + 0.3
    errors = [refit([fit], [held], old, (r,)).after for r in ridges]
    best = refit([fit], [held], old, ridges)
    assert best.after == min(errors) and best.ridge == ridges[errors.index(best.after)]
    assert len(set(errors)) == 3


def test_old_weights_stay_where_none_is_better():
    x, y, f, weight = problem(noise=2.0)
    fit, held = moments_of(x, y, f), moments_of(x, x @ weight, f)
    result = refit([fit], [held], weight)
    assert result.weight is None and result.reason == NO_GAIN
    assert result.before == result.after == pytest.approx(0, abs=1e-12)


def test_what_has_no_solution_stays():
    """A dead input keeps its weights, a dead group all of them; NaN stops it all."""
    x, y, f, weight = problem(groups=2)
    x[0, :, 1] = 0
    x[0, :, 3] = x[0, :, 2]
    x[1], y[1] = 0, 0
    old, sums = weight + 0.5, moments_of(x, y, f)
    result = refit([sums], [sums], old, (1e-6,))
    assert torch.equal(result.weight[1], old[1])
    assert torch.equal(result.weight[0, 1], old[0, 1])
    assert result.weight.isfinite().all() and result.after < result.before
    nothing = Moments(2, 5, 3)
    assert refit([nothing], [nothing], old).reason == NO_ROWS
    sums.add(x[:, :1] * float('nan'), y[:, :1], f[:, :1])
    assert refit([sums], [sums], old).reason == NOT_FINITE


def test_outputs_count_as_they_matter():
    """New weights of an output that does not matter are no gain."""
    x, y, f, weight = problem(noise=0)
    sums, old = moments_of(x, y, f), weight.clone()
    old[..., 0] += 1.0
    assert refit([sums], [sums], old).after < 1e-4 * refit([sums], [sums], old).before
    sums.importance[:, 0] = 0
    assert refit([sums], [sums], old).reason == NO_GAIN
