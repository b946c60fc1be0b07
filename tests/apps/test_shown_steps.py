"""Steps of long work are shown in terminals, and nowhere else."""

import io
import sys

import pytest
import torch
from support.toys import TinyDetector, square_loss

from mmgfp.apps.shown_steps import shown_steps
from mmgfp.discovery.discover import discover
from mmgfp.utils.steps import advance_step, begin_step, told_to


class Screen(io.StringIO):
    """A stream that is a terminal, or is not."""

    def __init__(self, is_terminal):
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self):
        return self.is_terminal


@pytest.mark.parametrize('is_terminal', [True, False])
def test_terminals_show_steps(is_terminal, monkeypatch):
    screen = Screen(is_terminal)
    monkeypatch.setenv('TERM', 'xterm')
    monkeypatch.setenv('COLUMNS', '120')
    for name in ('NO_COLOR', 'FORCE_COLOR', 'TTY_COMPATIBLE', 'TTY_INTERACTIVE'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, 'stderr', screen)
    with shown_steps() as steps:
        begin_step('measuring [each] cut', 7)
        advance_step()
        steps._progress.refresh()
        steps.say('a line that stays')
    text = screen.getvalue()
    assert 'a line that stays' in text
    assert ('measuring [each] cut' in text) == ('1/7' in text) == is_terminal
    begin_step('after the end')
    assert 'after the end' not in screen.getvalue()


class Notes:
    """A listener that remembers."""

    def __init__(self):
        self.steps = []

    def begin(self, line, total=None):
        self.steps.append([line, total, 0])

    def advance(self):
        self.steps[-1][2] += 1


def test_the_innermost_listener_is_told():
    outer, inner = Notes(), Notes()
    with told_to(outer):
        begin_step('one')
        with told_to(inner):
            begin_step('two', 3)
            advance_step()
        advance_step()
    assert outer.steps == [['one', None, 1]] and inner.steps == [['two', 3, 1]]


def test_discovery_says_what_it_is_at():
    torch.manual_seed(0)
    model, notes = TinyDetector().double(), Notes()
    images = torch.randn(2, 3, 16, 16, dtype=torch.double)
    with told_to(notes):
        found = discover(
            model, lambda m: square_loss(m(images)), lambda m: m(images), 2
        )
    follow, verify = notes.steps
    assert follow == ['following channels through the loss', None, 0]
    count = len(found.grouping.groups)
    assert verify[0] == f'verifying {count} groups by masked and compact models'
    assert verify[2] >= 4  # one model of each set of units, at least
