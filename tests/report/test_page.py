"""The page: its numbers are those of the files, and it needs nothing else."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.html import Page
from support.tooling import ROOT

from mmgfp.groups import FrozenLayer
from mmgfp.report import page
from mmgfp.report.history import History
from mmgfp.report.run import CostTable, Row, Run, read_runs
from mmgfp.report.snapshot import Cost, GroupFacts, Quantity, Snapshot
from mmgfp.selection.narrow import NarrowGroups
from mmgfp.surgery.structure import PruneStructure
from mmgfp.utils.errors import ConfigError

MACS = Quantity('macs', 'MACs', 'G', 1e9)


@pytest.fixture(scope='module')
def report(pruning_run):
    """The page that the hook wrote, and the file of the pruned model."""
    text = (pruning_run.artifact.parent / 'report.html').read_text()
    return Page(text), torch.load(pruning_run.artifact, weights_only=True)


def test_costs_are_those_of_the_file(report):
    read, checkpoint = report
    header, rows = read.table('costs')
    assert header == ['model', 'iteration', 'MACs (G)', 'memory (M)', 'params (M)']
    iteration, *cells = rows['flops50']
    assert iteration.values == [checkpoint['meta']['iter']]
    scales = {'macs': 1e9, 'memory': 1e6, 'params': 1e6}
    assert list(checkpoint['meta']['costs']) == list(scales)
    before = rows['original'][1:]
    for cell, full, (key, cost) in zip(
        cells, before, checkpoint['meta']['costs'].items(), strict=True
    ):
        assert cell.values == [cost['remaining'], cost['ratio']]
        shown = f'{cost["remaining"] / scales[key]:.4g} ({100 * cost["ratio"]:.1f}%)'
        assert cell.text == shown
        assert full.values == [cost['remaining'] / cost['ratio']]


def test_channels_are_those_of_the_structure(report):
    read, checkpoint = report
    structure = PruneStructure.from_dict(checkpoint['prune_structure'])
    header, rows = read.table('channels')
    assert header == ['layer', 'original', 'flops50']
    weights = {
        name.removesuffix('.weight'): tensor
        for name, tensor in checkpoint['state_dict'].items()
        if name.endswith('.weight') and tensor.dim() > 1
    }
    assert list(rows) == list(weights)
    for layer, (before, after) in rows.items():
        left = len(weights[layer])
        assert int(after.text) == left
        full = structure.sizes.get(f'{layer}.weight', [left])
        assert int(before.text) == full[0]
    assert any(before.text != after.text for before, after in rows.values())


def test_groups_and_reasons_are_those_of_the_file(report):
    read, checkpoint = report
    meta = checkpoint['meta']
    _, rows = read.table('groups')
    assert list(rows) == [group['name'] for group in meta['groups']]
    for group in meta['groups']:
        cells = rows[group['name']]
        assert [int(cell.text) for cell in cells[:2]] == [
            group['units'],
            group['remaining'],
        ]
        assert [v for cell in cells[2:5] for v in cell.values] == group['importance']
        named = {name for cell in cells[5:] for name in cell.text.split(', ') if name}
        assert named == {name.rpartition('.')[0] for name, _, _ in group['members']}
    _, rows = read.table('frozen')
    assert {n: [c.text for c in cells] for n, cells in rows.items()} == {
        layer['layer']: [str(layer['channels']), layer['reason']]
        for layer in meta['frozen']
    }
    assert rows and f'{len(meta["groups"])} groups' in ' '.join(read.text.split())


def test_nothing_leaves_the_page(report, pruning_run):
    read, _ = report
    assert read.tags.count('svg') == 2 and 'script' not in read.tags
    assert all(reference.startswith('#') for reference in read.references)
    assert read.references  # markers of lines
    assert not {'link', 'iframe', 'object', 'image', 'img'} & {*read.tags}
    path = pruning_run.artifact.parent / 'report.html'
    assert path.stat().st_size < page.MOST_BYTES
    assert page.render(read_runs([path.parent])) == page.render(
        read_runs([path.parent])
    )


def group_of(number, members=1):
    parts = tuple((f'layer{number}.{i}.weight', 0, 'out') for i in range(members))
    return GroupFacts(f'layer{number}', 8, 4, parts, None)


def run_named(name, **parts):
    cost = Cost(MACS, 2.5e9, 0.5)
    widths = {'backbone.a': (4, 8), 'head': (3, 3)}
    facts = ((3, 8, 8), (cost,), widths, 'fisher', (group_of(0),), ())
    shot = Snapshot(Path(f'{name}.pth'), 'flops50', 7, *facts)
    logged = History({'loss': {1: 2.0, 7: 3.0}, 'pruning/macs_ratio': {5: 0.5}})
    whole = Run(name, Path(name), (shot,), logged, History(), ())
    return replace(whole, **parts)


TIME = Quantity('onnxruntime_ms', 'CPU latency, onnxruntime', 'ms')


def table_of(metric=None, pruned=2.5e9, is_timed=False):
    """Costs of the model of `run_named` and of the original, as a tool wrote them."""
    times = {TIME: 4.0} if is_timed else {}
    rows = [Row('original', {MACS: 5e9, **times}, {}, metric and 50.0)]
    rows.append(Row('pruned', {MACS: pruned, **times}, {}, metric and 40.0))
    return CostTable(Path('x/summary.json'), tuple(rows), metric)


def text_of(*tables, **parts):
    read = Page(page.render([run_named('x', tables=tables, **parts)]))
    return read, ' '.join(read.text.split())


def test_costs_are_shown_once():
    for tables in ((), (table_of('top-1', pruned=2.6e9),)):
        read, _ = text_of(*tables)
        assert [*read.table('costs')[1]] == ['original', 'flops50']
    read, text = text_of(table_of('top-1'))
    assert 'costs' not in read.tables and 'x.pth (iteration 7)' in text
    _, rows = read.table('measured')
    assert [c.text for c in rows['pruned']] == ['40.0', '2.5 (50.0%)']
    # What a run predicts has another name in the file of what was deployed.
    (shot,) = run_named('x').snapshots
    name = 'predicted latency, x86'
    predicted = Cost(Quantity('latency', name, 'ms'), 1.5, 0.25)
    shot = replace(shot, costs=(*shot.costs, predicted))
    read, _ = text_of(table_of('top-1'), snapshots=(shot,))
    header, rows = read.table('costs')
    assert header == ['model', 'iteration', f'{name} (ms)']
    assert [c.text for c in rows['original']] == ['', '6']
    assert [c.text for c in rows['flops50']] == ['7', '1.5 (25.0%)']
    table = table_of('top-1')
    values = {Quantity('predicted_latency_ms', name, 'ms'): 1.5}
    deployed = CostTable(table.source, (table.rows[0], Row('pruned', values)))
    read, _ = text_of(table, deployed, snapshots=(shot,))
    assert 'costs' not in read.tables
    # With several targets, all of them or none.
    (first,) = run_named('x').snapshots
    other = replace(first, label='flops30', costs=(Cost(MACS, 1.5e9, 0.3),))
    read, _ = text_of(table_of('top-1'), snapshots=(first, other))
    assert [*read.table('costs')[1]] == ['original', 'flops50', 'flops30']


def test_tables_of_another_image_say_so():
    for shape, said in ((None, False), ((3, 8, 8), False), ((3, 16, 8), True)):
        _, text = text_of(replace(table_of(), input_shape=shape))
        assert (', for one image of 3 × 16 × 8' in text) is said


@pytest.mark.parametrize(
    ('table', 'said'),
    [
        (table_of('top-1'), 'Nothing here was timed: '),
        (table_of(is_timed=True), 'Nothing here was tested: '),
        (table_of(), 'Nothing here was timed or tested: '),
        (table_of('top-1', is_timed=True), 'Times are medians'),
    ],
)
def test_only_what_was_measured_is_explained(table, said):
    """And nothing of RoIs or detections where there are none."""
    read, text = text_of(table)
    assert said in text
    assert ('Times are' in text) == any(TIME in row.values for row in table.rows)
    assert text.count('Nothing here was') == (said != 'Times are medians')
    assert not re.search('Detections|detector|RoI', text)
    (shot,) = run_named('x').snapshots
    two_stage = replace(shot, widths={**shot.widths, 'roi_head.fc': (4, 8)})
    _, text = text_of(table, snapshots=(two_stage,))
    assert ('runs up to its RoIs' in text) == ('Times are' in text)


def test_several_runs_are_side_by_side():
    slow = Quantity('latency_ms', 'CPU latency, PyTorch', 'ms')
    rows = (Row('a', {MACS: 5e9, slow: 8.0}, {}, 50.0), Row('b', {slow: 6.0}, {}, None))
    timed = CostTable(Path('two/results.json'), rows, 'mAP')
    runs = [run_named('one'), run_named('two', tables=(timed,))]
    read = Page(page.render(runs))
    (header, *rows) = read.tables['compared'][0]
    assert [c.text for c in header] == ['run', 'model', 'iteration', 'MACs (G)']
    shown = ['flops50', '7', '2.5 (50.0%)']
    assert [[c.text for c in row] for row in rows] == [['one', *shown], ['two', *shown]]
    assert read.tags.count('svg') == 5  # one more than each run has
    header, rows = read.table('measured')
    assert header == ['model', 'mAP', 'MACs (G)', 'CPU latency, PyTorch (ms)']
    assert [c.text for c in rows['a']] == ['50.0', '5', '8']
    assert [c.text for c in rows['b']] == ['–', '–', '6 (75.0%)']
    assert 'not known' in read.text and 'Every layer may lose channels.' in read.text


def test_what_the_divisor_keeps_is_said_with_the_remedy():
    (shot,) = run_named('x').snapshots
    names = ('layer0', 'layer1', '<b>', 'layer3', 'layer4', 'layer5')
    shot = replace(shot, narrow=NarrowGroups(8, names))
    text = Page(page.render([run_named('x', snapshots=(shot,))])).text
    assert '6 groups are too narrow to lose channels under divisor=8' in text
    assert '<b>, layer3 and 2 more; a smaller divisor' in text
    assert 'Every layer may lose channels.' not in text
    # The same below a table of layers that stay.
    shot = replace(shot, frozen=(FrozenLayer('fc', 'an output', 3),))
    read = Page(page.render([run_named('x', snapshots=(shot,))]))
    assert [*read.table('frozen')[1]] == ['fc'] and 'divisor=8' in read.text


def test_a_block_that_is_gone_has_its_rows():
    (first,) = run_named('x').snapshots
    widths = {'backbone.a': (0, 8), 'head': (3, 3)}
    second = replace(first, label='flops30', widths=widths)
    read = Page(page.render([run_named('x', snapshots=(first, second))]))
    _, rows = read.table('channels')
    assert [c.text for c in rows['backbone.a']] == ['8', '4', '0 (removed)']
    assert read.tags.count('svg') == 2


def test_several_targets_are_in_one_chart_and_table():
    (first,) = run_named('x').snapshots
    widths = {'backbone.a': (2, 8), 'head': (3, 3)}
    second = replace(first, label='flops30', iteration=9, widths=widths)
    read = Page(page.render([run_named('x', snapshots=(first, second))]))
    header, rows = read.table('channels')
    assert header == ['layer', 'original', 'flops50', 'flops30']
    assert [c.text for c in rows['backbone.a']] == ['8', '4', '2']
    assert list(read.table('costs')[1]) == ['original', 'flops50', 'flops30']
    assert read.tags.count('svg') == 2
    other = replace(second, widths={'head': (3, 3)})
    read = Page(page.render([run_named('x', snapshots=(first, other))]))
    assert 'of several originals' in read.text and 'channels' not in read.tables


def test_what_is_not_there_is_said():
    nothing = run_named('x', snapshots=(), history=History())
    read = Page(page.render([nothing]))
    text = ' '.join(read.text.split())
    for sentence in (
        'No file here names costs.',
        'Nothing here was timed or tested',
        'those of older versions of mmgfp lack them',
        'No costs were logged over iterations',
        'No pruned model was saved here',
        'No file here names the groups',
        'No file here names the layers that keep channels',
    ):
        assert sentence in text
    tools = set(re.findall(r'tools/\w+\.py', text))
    assert tools and all((ROOT / tool).is_file() for tool in tools)
    assert 'svg' not in read.tags
    several = page.render([nothing, nothing])
    assert 'None of the pruned models names its costs.' in several
    assert 'Fewer than two of the runs' in several


def test_names_are_no_markup():
    shot = run_named('x').snapshots[0]
    evil = '<script>alert("1")</script> $x^2$'
    shot = replace(shot, label=evil, widths={evil: (1, 2)}, criterion=evil)
    read = Page(page.render([run_named(evil, snapshots=(shot,))]))
    assert 'script' not in read.tags and evil in read.text


def test_a_large_page_goes_without_members_and_a_larger_one_is_refused(monkeypatch):
    shot = run_named('x').snapshots[0]
    large = replace(shot, groups=(group_of(0, 9999), group_of(1, 30000)))
    text = page.render([run_named('x', snapshots=(large,))])
    assert len(text) < page.MOST_BYTES and 'Members of groups are left out' in text
    assert [c.text for c in Page(text).tables['groups'][0][0]][-1] == 'highest'
    monkeypatch.setattr(page, 'MOST_BYTES', 3000)
    with pytest.raises(ConfigError, match=r'fit into 3 kB \(got 1 of them, \d+ kB\)'):
        page.render([run_named('x')])


@pytest.mark.parametrize('package', ['jinja2', 'matplotlib'])
def test_a_package_that_is_missing_is_named(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"package {package} .* 'mmgfp\[report\]'"):
        page.render([run_named('x')])


def test_the_page_says_what_was_logged_last(pruning_run):
    """The chart's points are those of the scalars."""
    (path,) = Path(pruning_run.config.work_dir).glob('*/vis_data/scalars.json')
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    (run,) = read_runs([pruning_run.artifact.parent])
    for cost in ('macs', 'memory', 'params'):
        key = f'pruning/{cost}_ratio'
        logged = {row['step']: row[key] for row in rows if key in row}
        assert run.history.shares[cost] == logged
        meta = torch.load(pruning_run.artifact, weights_only=True)['meta']
        assert logged[meta['iter']] == meta['costs'][cost]['ratio']
    assert run.history.loss == {r['step']: r['loss'] for r in rows if 'loss' in r}
