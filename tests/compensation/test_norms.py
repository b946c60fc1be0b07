"""Statistics of batch norms after a cut, by hand."""

import numpy as np
import torch
from support.toys import conv, grouped, images, square_loss
from torch import nn

from mmgfp.compensation.compensate import compensate
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


def test_statistics_are_the_average_of_all_batches():
    model = net()
    model[4].eval()
    model[4].weight.requires_grad_(False)  # a frozen norm
    model[4].momentum = 0.3
    before = model.state_dict()
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
        small.eval()
        read = [small[:4](x.double()).detach() for x in batches()]
        mean = torch.stack([y.mean((0, 2, 3)) for y in read]).mean(0)
        var = torch.stack([y.var((0, 2, 3)) for y in read]).mean(0)
        torch.testing.assert_close(small[4].running_mean, mean)
        torch.testing.assert_close(small[4].running_var, var)
        assert small[4].momentum == 0.3 and not small[4].weight.requires_grad
    assert model[1].training and not model[4].training
    reasons = {r.reason for r in run(model, method='bn').layers}
    assert reasons == {"the method is 'bn'"}


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
