"""The pages of the documentation: their links, headings and blocks of code."""

import re
from dataclasses import dataclass

from support.tooling import ROOT

#: Pages that are read in the repository, and most of them on the site, too.
PAGES = sorted(
    [*ROOT.glob('*.md'), *ROOT.glob('docs/*.md'), *ROOT.glob('docs/decisions/*.md')]
)
FENCED = re.compile(r'^( *)```([^\n]*)\n(.*?)^ *```$', re.M | re.S)


@dataclass(frozen=True)
class Page:
    """The text of a page, taken apart.

    Attributes:
        text: The whole text.
    """

    text: str

    def blocks(self, language='python'):
        """Return the blocks of code in a language, without their indentation."""
        return [
            re.sub(f'^{indent}', '', code, flags=re.M)
            for indent, kind, code in FENCED.findall(self.text)
            if kind == language
        ]

    def block(self, word):
        """Return the only Python block in which ``word`` occurs."""
        (code,) = [b for b in self.blocks() if word in b]
        return code

    def links(self):
        """Return targets of links and images that are no addresses of the web."""
        text = re.sub(r'`[^`]*`', '', FENCED.sub('', self.text))
        targets = re.findall(r'\]\(\s*([^)\s]+)', text)
        return [t for t in targets if not re.match(r'[a-z]+:', t)]

    def anchors(self):
        """Return what forges and the site call the headings."""
        headings = re.findall(r'^#+ (.+)$', FENCED.sub('', self.text), re.M)
        words = [re.sub(r'[^\w\- ]', '', h.lower()).strip() for h in headings]
        return {w.replace(' ', '-') for w in words}


def read(name):
    """Return a page by its path in the repository."""
    return Page((ROOT / name).read_text())
