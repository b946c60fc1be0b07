"""Pages, read as a browser would."""

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {'meta', 'link', 'img', 'br', 'hr', 'input', 'source', 'base', 'col', 'wbr'}


@dataclass
class Cell:
    """A cell of a table: its text, and the exact values of its numbers."""

    text: str = ''
    values: list = field(default_factory=list)


class Page(HTMLParser):
    """A page's tables by class, its text, and all that it refers to.

    Args:
        source: The page.

    Raises:
        AssertionError: If an element is not closed, or another one is.
    """

    def __init__(self, source):
        super().__init__()
        self.tables, self.text, self.references, self.tags = {}, '', [], []
        self._open, self._cell, self._hidden = [], None, 0
        self.feed(source)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag, attrs, closes=False):
        attrs = dict(attrs)
        self.tags.append(tag)
        if tag not in VOID and not closes:
            self._open.append(tag)
        for name in ('src', 'href', 'xlink:href', 'srcset', 'data', 'action'):
            self.references += [attrs[name]] if name in attrs else []
        if tag == 'table':
            self.tables.setdefault(attrs['class'], []).append([])
            self._rows = self.tables[attrs['class']][-1]
        elif tag == 'tr':
            self._rows.append([])
        elif tag in ('td', 'th'):
            self._cell = Cell()
            self._rows[-1].append(self._cell)
        elif tag == 'data':
            self._cell.values.append(float(attrs['value']))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs, closes=True)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag
        if tag in ('td', 'th'):
            self._cell.text = ' '.join(self._cell.text.split())
            self._cell = None

    def handle_data(self, data):
        if self._open and self._open[-1] in ('style', 'script'):
            self.references += [data] if 'url(' in data or '@import' in data else []
        self.text += data
        if self._cell is not None:
            self._cell.text += data

    def table(self, name, number=0):
        """The header of a table of a class as texts, and its rows by their first."""
        header, *rows = self.tables[name][number]
        return [c.text for c in header], {row[0].text: row[1:] for row in rows}
