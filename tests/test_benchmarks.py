"""The benchmarks run on a toy and say what they should; times are not judged."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from mmengine.config import Config
from support.small_configs import stages
from support.toys import ConvPair, ResidualPair, TinyDetector, images, square_loss
from torch import nn

from benchmarks import __main__ as command
from benchmarks import decision, latency, other_pruners, schedule, shipping
from benchmarks.discovering import unverified
from benchmarks.models import SUBJECTS, initialize, sgd, train_step
from benchmarks.traffic import bytes_moved, peak_bytes
from mmgfp.apps.analysis import costs_of
from mmgfp.checkpoint import discovery_to_dict
from mmgfp.discovery.discover import discover
from mmgfp.discovery.profile import profile_layers
from mmgfp.engine.demo_batch import demo_calls
from mmgfp.engine.model_building import build_model
from mmgfp.pruner import GroupFisherPruner
from mmgfp.runtimes import timing
from mmgfp.runtimes.timing import ratios, spread, take_turns
from mmgfp.selection.greedy import select_units


class Modal(TinyDetector):
    """A toy that takes a mode, as models of OpenMMLab do."""

    def forward(self, x, mode='tensor'):
        return super().forward(x)


class ToyCalls:
    """What `BatchCalls` is for a detector."""

    images = 2
    size = (3, 8, 8)

    def __init__(self, dtype=torch.float32):
        self.batch = images().to(dtype)

    def loss(self, model):
        return square_loss(model(self.batch))

    def forward(self, model):
        return model(self.batch)

    def profile(self, model, size=None):
        return profile_layers(model, self.forward, self.images)


class ToySubject:
    name = label = 'toy'
    shipped = (3, 16, 16)

    def build(self, device):
        torch.manual_seed(0)
        return Modal(), ToyCalls()


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """The toy has too few channels to get anywhere in steps of eight."""
    monkeypatch.setitem(schedule.RUNS, 'live, divisor 8', (True, {'divisor': 2}))
    for name in [n for n in shipping.VARIANTS if not n.endswith(' 1')]:
        monkeypatch.setitem(shipping.VARIANTS, name, {'divisor': 2})


@pytest.fixture
def toy_parts(monkeypatch):
    """All parts measure the toy."""
    monkeypatch.setitem(command.SUBJECTS, 'toy', ToySubject())
    for name, part in command.PARTS.items():
        own = dataclasses.replace(part, subjects=('toy',))
        monkeypatch.setitem(command.PARTS, name, own)


def run_toy(tmp_path, *options):
    """The results and the page of a run on the toy."""
    files = {kind: tmp_path / kind for kind in ('json', 'page')}
    paths = [part for kind, path in files.items() for part in (f'--{kind}', str(path))]
    command.main(['--models', 'toy', *options, *paths])
    return json.loads(files['json'].read_text()), files['page'].read_text()


def test_command_writes_json_and_tables(tmp_path, toy_parts, capsys):
    results, page = run_toy(tmp_path, '--repeats', '2')
    assert results['machine']['device'] == 'cpu'
    assert list(results) == ['machine', *command.PARTS]
    rows = [1, 1, 1, 5, 11, 5, 1]  # of step, discovery, ...
    tables = page.strip().split('\n\n')
    assert [table.count('| toy') for table in tables] == rows
    widths = [{line.count('|') for line in table.splitlines()} for table in tables]
    assert [len(found) for found in widths] == [1] * 7  # no cell too few
    assert page.strip() == capsys.readouterr().out.strip()


def test_steps(tmp_path, toy_parts):
    results, _ = run_toy(tmp_path, '--repeats', '3', '--only', 'step,discovery')
    step = results['step']['toy']
    assert [len(times) for times in step['times'].values()] == [3, 3, 3]
    assert step['bytes_moved']['pruning'] > step['bytes_moved']['plain'] > 0
    assert step['peak_bytes']['pruning'] >= step['peak_bytes']['plain'] > 0
    found = results['discovery']['toy']
    assert found['units'] == step['units'] > 0
    assert {'loss', 'trace', 'groups', 'all'} == set(found['seconds'])


def test_unknown_names_are_refused(capsys):
    with pytest.raises(SystemExit):
        command.parse_args(['--only', 'step,speed'])
    expected = ', '.join(command.PARTS)
    assert f"must be some of {expected} (got ['speed'])" in capsys.readouterr().err


def test_parts_have_models_of_their_own(capsys):
    assert command.parse_args([]).only == list(command.PARTS)
    args = command.parse_args(['--models', 'faster-rcnn,retinanet-r18'])
    assert args.only == ['step', 'discovery', 'decision', 'shipping', 'growth']
    with pytest.raises(SystemExit):
        command.parse_args(['--only', 'latency', '--models', 'faster-rcnn'])
    assert 'no part that is asked for measures' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.parse_args(['--help'])
    assert 'retinanet-384, retinanet-512' in capsys.readouterr().out
    for part in command.PARTS.values():
        assert {*part.subjects} <= {*SUBJECTS}


def test_branches_begin_with_a_scale():
    """Weights are given their first values; a norm at zero is no first value."""
    model = ResidualPair()
    nn.init.zeros_(model.bn2.weight)
    model.init_weights = lambda: nn.init.ones_(model.stem.weight)
    initialize(model)
    assert (model.bn2.weight == 0.2).all() and (model.bn1.weight == 1).all()
    assert (model.stem.weight == 1).all()
    assert not model.bn2.bias.any()  # a bias may be zero


def test_unverified_groups_are_those_of_discover():
    model, calls = ToySubject().build('cpu')
    found = unverified(model, calls)
    verified = discover(model, calls.loss, calls.forward, calls.images)
    assert repr(discovery_to_dict(found)) == repr(discovery_to_dict(verified))


def test_decisions_all_begin_alike():
    """Selections are those of unpruned groups, one unit each masked; none adds up."""
    model, calls = ToySubject().build('cpu')
    found = decision.measure_decision(model, calls, 1, 'cpu')
    assert found['picked']['one'] == 1
    assert 1 <= found['picked']['ten'] <= 10
    assert found['units'] - found['groups'] > found['picked']['auto'] >= 1
    rounds = {name: len(times) for name, times in found['times'].items()}
    assert rounds == dict.fromkeys(decision.PACES, decision.ROUNDS)
    for name in decision.PACES:
        whole, part = (found[key][name]['median'] for key in ('seconds', 'selection'))
        assert whole > part > 0
    assert found['ratio']['one'] == dict.fromkeys(('median', 'low', 'high'), 1.0)
    columns = decision.table({'toy': found})
    assert [len(row) for row in columns] == [7, 7]
    assert not any(m._forward_pre_hooks for m in model.modules())


def schedule_runs(dtype, **options):
    """A run with masks and one that is cut, in turns, both to the end."""
    torch.manual_seed(0)
    model, calls = Modal().to(dtype), ToyCalls(dtype)
    found = unverified(model, calls)
    runs = {
        name: schedule.Run(copy.deepcopy(model), calls, found, live, **options)
        for name, live in (('masks', False), ('live', True))
    }
    take_turns({n: r.step for n, r in runs.items()}, 40, 'cpu', warmup=0)
    return runs['masks'], runs['live'], calls


def test_masks_and_live_compaction_end_alike():
    masks, live, calls = schedule_runs(torch.float64, iterations=40, interval=2)
    assert masks.pruner.done and live.pruner.done
    assert masks.pruner.units.structure() == live.pruner.units.structure()
    alike, decisions = schedule.compare(live.kept, masks.kept), len(masks.kept)
    expected = {'same_decisions': decisions, 'decisions': decisions, 'share': 1.0}
    assert alike == expected and decisions > 10
    sizes = [sum(p.numel() for p in r.pruner.model.parameters()) for r in (masks, live)]
    compact = masks.pruner.compact()
    assert sizes[0] > sizes[1] == sum(p.numel() for p in compact.parameters())
    losses = [calls.loss(r.pruner.model).item() for r in (masks, live)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_schedule_counts_time_by_quarters(monkeypatch):
    """Masks take 4 s an iteration; a cut run 4, 3, 2, 1 s by quarter."""
    masks = [{'wall': 4.0}] * 40
    live = [{'wall': float(seconds)} for seconds in (4, 3, 2, 1) for _ in range(10)]
    found = schedule._ratios({'masks': masks, 'live': live}, 'live')
    assert found['all'] == 100 / 160
    assert [q['median'] for q in found['quarters']] == [1, 0.75, 0.5, 0.25]


def test_runs_are_compared_by_units():
    """Both lose unit 0; then one loses 1 and 2, the other 2 and 3."""

    def kept(*gone):
        return ~np.isin(np.arange(5), gone)

    one, other = [[kept(0), kept(0, *more)] for more in ((1, 2), (2, 3))]
    found = schedule.compare(one, other)
    assert found == {'same_decisions': 1, 'decisions': 2, 'share': 2 / 4}


def test_schedule_to_the_target():
    model, calls = ToySubject().build('cpu')
    runs = schedule.measure_schedule(model, calls, 1, 'cpu')['runs']
    assert list(runs) == [*schedule.RUNS, schedule.AUTO, schedule.COUNTED]
    for name in ('masks', 'live'):  # the toy has too few channels for a divisor
        assert runs[name]['iterations'] == schedule.ITERATIONS
        assert runs[name]['reached'] and runs[name]['macs'] <= 0.5
    assert runs['live']['alike']['same_decisions'] > 10
    assert 'alike' not in runs['live, divisor 8']
    assert runs['masks']['ratio']['all'] == 1
    assert runs[schedule.AUTO]['iterations'] % schedule.SHORT == 0
    assert runs[schedule.AUTO]['reached']


def test_one_unit_at_a_time_is_counted_as_it_would_be_picked():
    """One decision to the target takes what single ones on its statistics take."""
    model, calls = ToySubject().build('cpu')
    found = unverified(model, calls)
    pace = dict(iterations=schedule.SHORT, interval=schedule.SHORT)
    once = schedule.Run(copy.deepcopy(model), calls, found, False, **pace)
    pruner = GroupFisherPruner(model, interval=schedule.SHORT, target=schedule.TARGET)
    pruner.attach(found)
    train = train_step(model, calls.loss, sgd(model, schedule.LR))
    once.step()
    train()
    pruner.step()
    once.step()
    train()
    pruner.criterion.update()
    values, single = pruner.criterion.statistics.importance.copy(), 0
    while not pruner.config.targets[0].reached(pruner.units.totals, pruner.units.full):
        unit = select_units(
            values,
            pruner.units.grouping.group_of,
            pruner.units.kept,
            pruner.units.costs,
            pruner.limits,
            'memory',
            lambda now: False,
            count=1,
        )
        assert len(unit) == 1
        pruner.units.kept[unit] = False
        single += 1
    assert once.removed == single > 1
    assert (once.pruner.units.kept == pruner.units.kept).all()


def test_a_run_that_does_not_get_there_is_given_up(monkeypatch):
    monkeypatch.setattr(schedule, 'MOST', 4)
    model, calls = ToySubject().build('cpu')
    run = schedule.Run(model, calls, unverified(model, calls), False, interval=2)
    times = run.until_done('cpu')
    assert len(times) == 2 and run.removed == 2
    cells = schedule._cells(schedule._facts(run, times))
    assert cells[0].startswith('4, given up at ')


def test_latency_of_all_variants():
    model, calls = ToySubject().build('cpu')
    found = latency.measure_latency(model, calls, 2, 'cpu')
    shares, variants = ['50%', '25%'], list(latency.VARIANTS)
    *reached, missed = ([f'{v}, {share}' for share in shares] for v in variants)
    assert list(found['points']) == [latency.ORIGINAL, *sum(reached, [])]
    assert found['missed'] == missed  # no toy has eight channels to spare
    rows = {row[1]: row[2:] for row in latency.table({'toy': found})}
    assert rows['-M, divisor 8, 25%'] == ['not reached', '', '', '']
    for name, point in found['points'].items():
        most = float(name[-3:-1]) / 100 if name != latency.ORIGINAL else 1
        assert 0 < point['macs'] <= most and 0 < point['memory'] <= 1
        assert set(point['ratio']) == {'1', '8'}
    assert [len(t['-M, 50%']) for t in found['times'].values()] == [8, 2]
    original = found['points'][latency.ORIGINAL]
    assert original['ratio']['1']['median'] == original['macs'] == 1


def test_exported_models_run_in_all_runtimes():
    model, calls = ToySubject().build('cpu')
    found = shipping.measure_shipping(model, calls, 2, 'cpu', (3, 16, 16))
    assert list(found['points']) == [shipping.ORIGINAL, *shipping.VARIANTS]
    for name, point in found['points'].items():
        assert list(point['ratio']) == list(shipping.RUNTIMES)
        assert point['macs'] == 1 if name == shipping.ORIGINAL else point['macs'] <= 0.5
    point = {'macs': 0.5, 'memory': 0.75, 'ratio': {}}
    for runtime, ratio in zip(shipping.RUNTIMES, (0.5, 0.8, 0.25), strict=True):
        clocks = {'wall': {'median': ratio}, 'cpu': {'median': 2 * ratio}}
        point['ratio'][runtime] = clocks
    _, row = shipping.table({'toy': {'points': {'-M': point}}})
    cells = ['2.00 × (1.00 ×)', '1.25 × (0.62 ×)', '4.00 × (2.00 ×)']
    assert row == ['toy', '-M', '50.0%', '75.0%', '', *cells]


def test_correlations_by_hand():
    """Latency is a straight line of MACs, and falls where memory rises."""
    points = [
        {'macs': m, 'memory': y, 'ratio': {'1': {'median': t}}}
        for m, y, t in [(1.0, 1.0, 1.0), (0.5, 2.0, 0.7), (0.0, 3.0, 0.4)]
    ]
    found = latency.correlations(points, '1')
    assert found == pytest.approx({'macs': 1.0, 'memory': -1.0})
    points[1]['macs'] = 0.0
    # Deviations of MACs: 2/3, -1/3, -1/3; of latency: 0.3, 0, -0.3.
    by_hand = 0.3 / np.sqrt(6 / 9 * 0.18)
    assert latency.correlations(points, '1')['macs'] == pytest.approx(by_hand)


def test_actions_take_turns_in_changing_order():
    calls = []
    actions = {name: (lambda name=name: calls.append(name)) for name in 'ab'}
    times = take_turns(actions, 3, 'cpu', warmup=1)
    assert ''.join(calls) == 'baabbaab'
    assert [len(times[name]) for name in 'ab'] == [3, 3]


def test_what_runs_before_actions_is_not_timed(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(timing.time, 'perf_counter', lambda: clock[0])

    def work(seconds):
        clock[0] += seconds

    actions = {'a': lambda: work(2.0), 'b': lambda: work(3.0)}
    times = take_turns(actions, 2, 'cpu', before=lambda: work(100.0))
    walls = {name: [t['wall'] for t in found] for name, found in times.items()}
    assert walls == {'a': [2.0, 2.0], 'b': [3.0, 3.0]}


def test_ratios_are_of_rounds():
    times = {
        'a': [{'wall': 3.0}, {'wall': 10.0}, {'wall': 4.0}],
        'b': [{'wall': 2.0}, {'wall': 10.0}, {'wall': 2.0}],
    }
    found = ratios(times, 'a', 'b', 'wall')
    assert found == [1.5, 1.0, 2.0]
    assert spread(found) == {'median': 1.5, 'low': 1.25, 'high': 1.75}


def test_bytes_moved_by_hand():
    x = torch.ones(1000)  # 4000 bytes
    assert bytes_moved(lambda: x + x) == 3 * 4000
    assert bytes_moved(lambda: x.view(10, 100).t()) == 0
    assert bytes_moved(lambda: x.mul_(2)) == 2 * 4000


def test_peak_by_hand():
    """Two tensors of 4000 bytes live at once, and a model of none."""

    def work():
        for _ in range(3):
            a = torch.ones(1000)
            b = torch.ones(1000)
            del a, b

    assert peak_bytes(work, nn.Identity(), 'cpu') == 8000


def test_tensors_of_an_earlier_profile_do_not_lower_the_peak():
    kept = []
    peak_bytes(lambda: kept.append(torch.ones(5000)), nn.Identity(), 'cpu')

    def work():
        kept.clear()
        torch.ones(1000)

    assert peak_bytes(work, nn.Identity(), 'cpu') == 4000


def test_models_count_with_gradients_and_momentum():
    model = ConvPair()
    weights = sum(p.nbytes for p in model.parameters())
    buffers = sum(b.nbytes for b in model.buffers())
    assert peak_bytes(lambda: None, model, 'cpu') == 3 * weights + buffers
    frozen = copy.deepcopy(model).requires_grad_(False)
    assert peak_bytes(lambda: None, frozen, 'cpu') == weights + buffers


@pytest.mark.slow
@pytest.mark.parametrize('way', other_pruners.WAYS)
def test_another_tool_prunes_in_the_same_training(way, tmp_path, monkeypatch):
    pytest.importorskip('torch_pruning', reason='needs requirements/other-tools.txt')
    paths = stages(tmp_path, 'classifier')
    names = ('baseline', 'prune', 'finetune')
    fields = ''.join(f'{n} = {str(p)!r}\n' for n, p in zip(names, paths, strict=True))
    comparison = tmp_path / 'comparison.py'
    still = dict(optim_wrapper=dict(optimizer=dict(lr=0.0)))
    comparison.write_text(f"{fields}variants = [dict(name='M', finetune={still})]\n")
    torch.manual_seed(0)
    model = build_model(Config.fromfile(paths[0]))
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'net.pth')
    words = f'{comparison} {tmp_path}/net.pth --share 0.6 --decisions 3 --every 2'
    argv = ['x', *words.split(), '--way', way, '--work-dir', str(tmp_path / 'work')]
    monkeypatch.setattr('sys.argv', argv)
    kept, prune = [], other_pruners.prune

    def remembered(*args):
        small = prune(*args)
        kept.append((small, copy.deepcopy(small.state_dict())))
        return small

    monkeypatch.setattr(other_pruners, 'prune', remembered)
    other_pruners.main()
    # Fine-tuning begins with the weights that were left; here it is at a rate of zero.
    [(small, weights)] = kept
    for name, parameter in small.named_parameters():
        assert torch.equal(parameter, weights[name])
    result = json.loads((tmp_path / 'work/result.json').read_text())
    shape = (3, 64, 64)
    calls = demo_calls(Config.fromfile(paths[0]), model)
    before = costs_of(model, calls.profile(model, shape))
    assert 0 < result['macs'] <= 0.6 * before['macs']
    assert result['way'] == way and 0 <= result['top-1'] <= 100
