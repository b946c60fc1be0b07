"""Statistics of batch norms after a cut, by hand."""

import copy

import numpy as np
import torch
from support.toys import conv, grouped, images, square_loss
from torch import nn

from mmgfp.compensation.compensate import compensate
from mmgfp.compensation.norms import statistics
from mmgfp.compensation.options import CompensationConfig


def net():
    torch.manual_seed(0)
    layers = conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 5, bias=False)
    net = nn.Sequential(*layers, nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 1))
    for i, x in enumerate(batches() * 3):  # the statistics that training leaves
        net((i + 1) * x)
    return net.double()


def batches():
    return [images(8, seed=seed) for seed in range(4)]


def run(model, **options):
    grouping = grouped(model.float())
    kept = np.arange(grouping.units) != 1  # of the first group
    calls = [lambda m, x=x: square_loss(m(x.double())) for x in batches()]
    model.double()
    return compensate(model, grouping, kept, calls, CompensationConfig(**options))


def test_statistics_move_as_far_as_what_is_read():
    """By hand: what the norm reads in both models, each batch counting alike."""
    model = net()
    model[4].eval()
    model[4].weight.requires_grad_(False)  # a frozen norm
    model[4].momentum = 0.3
    before = copy.deepcopy(model.state_dict())
    for options in (
        dict(method='bn'),
        dict(norms='all'),
        dict(norms='all', method='least_squares', one_pass=True),
        dict(method='least_squares', ridges=(1e9,)),  # so that no layer is refitted
    ):
        result = run(model, **options)
        small = result.model
        assert result.norms == ('4',)
        # What the first norm reads has not changed.
        kept = [0, 2, 3]
        assert torch.equal(small[1].running_mean, before['1.running_mean'][kept])
        (old_mean, old_var), (mean, var) = read_by_norm(model), read_by_norm(small)
        ratio = (var + 1e-5) / (old_var + 1e-5)
        moved = mean - ratio.sqrt() * (old_mean - before['4.running_mean'])
        torch.testing.assert_close(small[4].running_mean, moved)
        torch.testing.assert_close(
            small[4].running_var, ratio * before['4.running_var']
        )
        assert small[4].momentum == 0.3 and not small[4].weight.requires_grad
    assert model[1].training and not model[4].training
    state = model.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in before.items())
    reasons = {r.reason for r in run(model, method='bn').layers}
    assert reasons == {"the method is 'bn'"}


def read_by_norm(model):
    """Return mean and variance of what the second norm reads, means over batches."""
    model = copy.deepcopy(model).eval()
    read = [model[:4](x.double()).detach() for x in batches()]
    mean = torch.stack([y.mean((0, 2, 3)) for y in read]).mean(0)
    return mean, torch.stack([y.var((0, 2, 3), correction=0) for y in read]).mean(0)


def test_a_norm_behind_a_norm_reads_what_that_one_gives_then():
    """All move in one pass: the second by what the first one, moved already, gives."""
    torch.manual_seed(0)
    parts = conv(3, 4), nn.ReLU(), conv(4, 5), nn.BatchNorm2d(5), conv(5, 4)
    model = nn.Sequential(*parts, nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)).double()
    for x in batches():
        model(x.double())
    model.eval()
    small = run(model, method='bn').model
    for each in (model, small):
        each.requires_grad_(False)

    def parts(old, new):
        means = old.mean((0, 2, 3)), new.mean((0, 2, 3))
        return [*means, *(y.var((0, 2, 3), correction=0) for y in (old, new))]

    def moved(norm, parts):
        old_mean, mean, old_var, var = parts
        ratio = (var + norm.eps) / (old_var + norm.eps)
        shift = ratio.sqrt() * (old_mean - norm.running_mean)
        return mean - shift, ratio * norm.running_var

    read = []
    for x in [x.double() for x in batches()]:
        mean, var = moved(model[3], parts(model[:3](x), small[:3](x)))
        y = nn.functional.batch_norm(
            small[:3](x), mean, var, model[3].weight, model[3].bias
        )
        read.append(parts(model[:5](x), small[4](y)))
    averages = [torch.stack(values).mean(0) for values in zip(*read, strict=True)]
    mean, var = moved(model[5], averages)
    torch.testing.assert_close(small[5].running_mean, mean)
    torch.testing.assert_close(small[5].running_var, var)


def test_statistics_of_other_data_stay_apart_from_those_at_hand():
    """Nothing moves where nothing changed, though the images are others."""
    model = net().eval()
    model[4].running_mean.add_(3)
    model[4].running_var.mul_(7)
    with torch.no_grad():
        model[3].weight[:, 1] = 0  # what reads the removed channel reads nothing of it
    small = run(model, method='bn').model
    torch.testing.assert_close(small[4].running_mean, model[4].running_mean)
    torch.testing.assert_close(small[4].running_var, model[4].running_var)


def test_norms_may_stay():
    model = net()
    result = run(model, norms='none')
    assert result.norms == () and result.refitted
    assert torch.equal(result.model[4].running_var, model[4].running_var)


def test_modes_of_norms_are_those_of_the_original():
    model = net()
    model[4].eval()
    small = run(model).model
    assert [m.training for m in small.modules()] == [
        m.training for m in model.modules()
    ]


def test_a_shift_is_free_and_the_norm_takes_it_back():
    """A layer without bias that a norm follows is fitted up to a constant."""
    model = net().eval()
    x = [x.double() for x in batches()]
    y = torch.cat([model[:4](x).detach() for x in x]).movedim(1, -1).flatten(0, 2)
    for norms in ('all', 'others'):
        options = dict(method='least_squares', ridges=(1e-12,), norms=norms)
        small = run(model, **options).model
        read = torch.cat([small[:3](x).detach() for x in x])
        rows = nn.functional.unfold(read, 3, padding=1).movedim(1, -1).flatten(0, 1)
        rows = torch.cat([rows, torch.ones(len(rows), 1)], 1).double()
        expected = torch.linalg.lstsq(rows, y).solution
        torch.testing.assert_close(small[3].weight.flatten(1).T, expected[:-1])
    # What the norm makes of the outputs is what it would make of those with the shift.
    mean = model[4].running_mean - expected[-1]
    torch.testing.assert_close(small[4].running_mean, mean)
    assert torch.equal(small[4].running_var, model[4].running_var)
    assert torch.equal(small[4].num_batches_tracked, model[4].num_batches_tracked)


def test_no_shift_where_something_else_reads_the_outputs():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.mid = conv(3, 4), conv(4, 4, bias=False)
            self.norm, self.head = nn.BatchNorm2d(4), conv(4, 2)

        def forward(self, x):
            y = self.mid(self.stem(x).relu())
            return self.head(self.norm(y).relu() + y)

    torch.manual_seed(0)
    model = Branch().double().eval()
    result = run(model)
    assert result.layers[0].layer == 'mid.weight' and result.norms == ('norm',)


def test_statistics_of_half_precision_are_taken_in_single():
    x = torch.tensor([[-300.0, 1.0], [300.0, 1.0009765625]]).half()
    mean, var = statistics(x)
    assert var[0] == 90000  # more than half precision holds
    assert mean[1] == 1.00048828125  # between two of its numbers
