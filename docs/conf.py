"""How Sphinx builds a site from these pages (``make docs``)."""

from os.path import relpath
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

from mmgfp import __version__

project = 'mmgfp'
copyright = 'the authors of mmgfp'
release = version = __version__
html_title = f'mmgfp {release}'
html_theme = 'furo'

extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon']
exclude_patterns = ['_build']
# Links name headings as forges do: `limits.md#rows`.
myst_heading_anchors = 4

# Single backticks in docstrings name an object, and link to it if it has a page.
default_role = 'py:obj'
autodoc_member_order = 'bysource'
autodoc_typehints = 'description'
autodoc_typehints_description_target = 'documented_params'
napoleon_numpy_docstring = False
napoleon_use_ivar = True


def link_outside(app: Sphinx, doctree: nodes.document) -> None:
    """Offer pages outside of this folder, such as ``../README.md``, as files.

    On a forge these links lead to the file itself. MyST does so for other files, but
    takes whatever ends in ``.md`` for a page of the site.
    """
    for link in list(doctree.findall(addnodes.pending_xref)):
        if link.get('refdomain') != 'doc':
            continue
        page = Path(app.srcdir, link['reftarget'] + '.md')
        if page.is_file() and Path(app.srcdir) not in page.parents:
            names = {
                'refdoc': link['refdoc'],
                'reftarget': f'/{relpath(page, app.srcdir)}',
            }
            link.replace_self(addnodes.download_reference('', '', *link, **names))


def setup(app: Sphinx) -> None:
    """Register `link_outside` before Sphinx collects the files that are linked."""
    app.connect('doctree-read', link_outside, priority=100)
