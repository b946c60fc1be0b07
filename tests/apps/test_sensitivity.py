"""Scans of sensitivity, on a network whose losses are worked out by hand."""

import json

import numpy as np
import pytest
import torch
from mmengine.config import Config
from support.small_configs import stages
from support.toys import ConvPair, Net, images, toy_loss
from torch import nn

from mmgfp.apps.sensitivity import (
    ratios_by_name,
    scale_to_target,
    scan,
    score_units,
    tolerable_shares,
)
from mmgfp.criteria.base import CRITERIA
from mmgfp.discovery.discover import discover
from mmgfp.engine.model_building import build_model
from mmgfp.selection.greedy import Limits
from mmgfp.selection.targets import Target
from mmgfp.units import UnitState
from mmgfp.utils.errors import ConfigError

SHARES = [0.25, 0.5, 0.75]


def run(net, x):
    return net.c(net.b(net.a(x).relu()).relu())


@pytest.fixture
def units():
    """Units of three 1x1 layers a, b, c: the output is the sum of b's biases, 10.

    The weights of b are zero, so that a does not matter. Groups: 4 outputs of a; of b.
    """
    layers = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 1, 1)
    net = Net(run, **dict(zip('abc', layers, strict=True)))
    x = torch.ones(2, 3, 4, 4)
    found = discover(net, lambda m: m(x).square().mean(), lambda m: m(x), 2)
    with torch.no_grad():
        net.b.weight.zero_()
        net.b.bias.copy_(torch.tensor([1.0, 2, 3, 4]))
        net.c.weight.fill_(1)
        net.c.bias.zero_()
    return UnitState(net, found.grouping, found.profiles)


class Meter:
    """The network's output as a metric; counts how often it is asked for."""

    def __init__(self, net):
        self.net, self.calls = net, 0

    @torch.no_grad()
    def __call__(self):
        self.calls += 1
        return 'sum', self.net(torch.ones(1, 3, 4, 4)).mean().item()


#: The lowest-scored unit of b has the bias 2, then come 1, 3 and 4.
SCORES = np.array([1.0, 1, 1, 1, 6, 5, 7, 8])
LOSSES = {0: {0.25: 0, 0.5: 0, 0.75: 0}, 1: {0.25: 2, 0.5: 3, 0.75: 6}}


def test_a_group_that_does_not_matter_gets_the_largest_share(units, tmp_path):
    before = {n: t.clone() for n, t in units.model.state_dict().items()}
    found = scan(units, SCORES, SHARES, Meter(units.model), tmp_path / 'scan.jsonl')
    assert (found.metric, found.full) == ('sum', 10.0)
    assert found.losses == LOSSES
    shares = tolerable_shares(found.losses, 2, 3.0)
    assert ratios_by_name(shares, units) == {'a': 0.75, 'b': 0.5}
    assert tolerable_shares(found.losses, 2, 0.5).tolist() == [0.75, 0.0]
    assert units.kept.all()  # and the model is as it was
    for name, tensor in units.model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_scan_goes_on_where_it_was(units, tmp_path, capsys):
    path = tmp_path / 'scan.jsonl'
    meter = Meter(units.model)
    first = scan(units, SCORES, SHARES, meter, path)
    assert meter.calls == 7  # six pairs, and the model as it is
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(''.join(lines[:4]) + lines[4][:20])  # killed while it wrote
    capsys.readouterr()
    again = scan(units, SCORES, SHARES, meter, path)
    assert again == first and meter.calls == 10
    assert '1 of 3: b without 1 of 4: 8.00 (-2.00)' in capsys.readouterr().out
    scan(units, SCORES, SHARES, meter, path)
    assert meter.calls == 10


def test_units_without_scores_stay(units, tmp_path):
    scores = SCORES.copy()
    scores[5:] = np.nan, np.inf, np.nan
    path = tmp_path / 'scan.jsonl'
    found = scan(units, scores, SHARES, Meter(units.model), path)
    assert found.losses[1] == {0.25: 1}  # unit 0 of b, the only one that is known


@pytest.mark.parametrize(
    ('shares', 'divisor', 'target', 'expected'),
    [
        # MACs of one pixel with a and b units: 3 a + a b + b, of 32 with all. Without k
        # of both 21, 12; without k of a alone 32 - 7 k; with 2 and 3 units 15.
        ([0.5, 0.5], 1, 0.7, [0.25, 0.25]),
        ([0.25, 0.25], 1, 0.5, [0.5, 0.5]),
        ([0.75, 0.0], 1, 0.6, [0.5, 0.0]),
        ([0.25, 0.125], 1, 0.5, [0.5, 0.25]),
        ([0.5, 0.5], 2, 0.7, [0.5, 0.5]),
    ],
)
def test_shares_are_scaled_until_the_target_is_met(
    units, shares, divisor, target, expected
):
    limits = Limits.of(units.sizes, units.widths, divisor=divisor)
    scaled = scale_to_target(np.array(shares), units, limits, Target('flops', target))
    assert scaled.tolist() == expected


@pytest.mark.parametrize('shares', [[0.75, 0.0], [0.0, 0.0]])
def test_targets_that_cannot_be_met_are_refused(units, shares):
    limits = Limits.of(units.sizes, units.widths)
    with pytest.raises(ConfigError, match='--target flops must be at least'):
        scale_to_target(np.array(shares), units, limits, Target('flops', 0.3))


class Batch:
    def loss(self, model):
        return toy_loss(model)


@pytest.mark.parametrize('name', ['fisher', 'taylor', 'l1', 'bn_scale', 'activation'])
def test_scoring_by_any_criterion_leaves_the_model_as_it_is(name):
    model = ConvPair().train()
    found = discover(model, toy_loss, lambda m: m(images(2)), 2)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    criterion = CRITERIA.build(name)
    scores = score_units(model, found, criterion, [Batch(), Batch()])
    assert scores.shape == (6,) and (scores > 0).all()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['retinanet', 'faster', 'classifier'])
def test_tool_writes_ratios_and_resumes(kind, run_tool, tmp_path):
    config = stages(tmp_path, kind)[1]
    torch.manual_seed(0)
    weights = build_model(Config.fromfile(config)).state_dict()
    torch.save({'state_dict': weights}, tmp_path / 'start.pth')
    work = tmp_path / 'work'
    command = ['sensitivity.py', config, tmp_path / 'start.pth', '--work-dir', work]
    # Weights are random: any loss is tolerated.
    command += ['--shares', 0.5, '--max-images', 3, '--tolerance', 100]
    command += ['--batches', 2, '--target', 'flops=0.7']
    command += ['--cfg-options', 'custom_hooks.0.divisor=4']
    done = run_tool(*command)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    ratios = json.loads((work / 'ratios.json').read_text())['ratios']
    assert ratios and all(0 <= ratio < 1 for ratio in ratios.values())
    assert any(ratios.values())
    lines = [json.loads(line) for line in (work / 'scan.jsonl').open()]
    assert {line['group'] for line in lines[1:]} == ratios.keys()
    table = (work / 'results.md').read_text()
    assert table.count('\n| ') == len(ratios)
    assert (work / 'sensitivity.svg').stat().st_size > 0

    options = [f'load_from={tmp_path}/start.pth', 'custom_hooks.0.divisor=4']
    options += [f'custom_hooks.0.ratios={work}/ratios.json']
    options += ['custom_hooks.0.scope=local']  # the target of the config is 0.7
    where = ('--work-dir', tmp_path / 'local', '--cfg-options')
    pruned = run_tool('train.py', config, *where, *options)
    assert pruned.returncode == 0, pruned.stdout[-2000:] + pruned.stderr[-2000:]
    assert (tmp_path / 'local/prune_flops70.pth').is_file()

    kept = (work / 'scan.jsonl').read_text().splitlines(keepends=True)[:-2]
    (work / 'scan.jsonl').write_text(''.join(kept))
    again = run_tool(*command)
    assert '1 of 2: ' in again.stdout and '2 of 2: ' in again.stdout
    assert (work / 'results.md').read_text() == table
    assert json.loads((work / 'ratios.json').read_text())['ratios'] == ratios

    other = run_tool(*command, 'custom_hooks.0.criterion=fisher')
    assert other.returncode == 2
    assert 'must be of a scan with the same settings (got one with' in other.stderr
