"""The page in a real browser: nothing to complain about, no request, a picture."""

import re
import subprocess
from urllib.parse import urlsplit

import cv2
import pytest
from support.browser import BROWSER, FLAGS, NAMES

BAD = '<!DOCTYPE html><img src="http://127.0.0.1:9/x.png"><script>nothing()</script>'

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason=f'needs one of {", ".join(NAMES)}'),
]


def opened(page, folder):
    """Open a page; return what the console says, asked hosts, and a picture."""
    log, picture = folder / 'net.json', folder / 'picture.png'
    files = (f'--user-data-dir={folder}/profile', f'--log-net-log={log}')
    command = [BROWSER, *FLAGS, *files, f'--screenshot={picture}', page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    said = [line for line in done.stderr.splitlines() if ':CONSOLE' in line]
    urls = re.findall(r'"url":"([^"]+)"', log.read_text())
    hosts = {urlsplit(url).hostname for url in urls if not url.startswith('file:')}
    return said, hosts, cv2.imread(str(picture))


def test_the_page_in_a_browser(pruning_run, tmp_path):
    empty, bad = tmp_path / 'empty.html', tmp_path / 'bad.html'
    empty.write_text('<!DOCTYPE html><title>empty</title>')
    bad.write_text(BAD)
    _, of_itself, blank = opened(empty, tmp_path)
    said, hosts, _ = opened(bad, tmp_path)
    assert any('nothing is not defined' in line for line in said)
    assert '127.0.0.1' in hosts - of_itself  # so this test would see it

    report = pruning_run.artifact.parent / 'report.html'
    said, hosts, picture = opened(report, tmp_path)
    assert said == []
    # The browser reports to its maker at times of its own.
    assert {host for host in hosts - of_itself if 'google' not in host} == set()
    assert picture.shape == blank.shape and picture.std() > blank.std() + 10


def test_the_policy_stops_what_would_be_asked_for(pruning_run, tmp_path):
    """Even where a name in a run found a way into the page."""
    report = (pruning_run.artifact.parent / 'report.html').read_text()
    page = tmp_path / 'page.html'
    page.write_text(report.replace('</body>', f'{BAD}</body>'))
    said, hosts, _ = opened(page, tmp_path)
    assert len(said) == 2 and all('Content Security Policy' in line for line in said)
    assert '127.0.0.1' not in hosts
