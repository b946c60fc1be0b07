"""A real browser without a window, where there is one."""

import shutil
import subprocess
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable')
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = (
    *('--headless=new', '--no-sandbox', '--disable-gpu', '--no-first-run'),
    *('--disable-background-networking', '--disable-component-update'),
    *('--enable-logging=stderr', '--hide-scrollbars', '--window-size=1200,2400'),
    '--host-resolver-rules=MAP * ~NOTFOUND',  # what it asks for on its own account
)


def dom_of(page, query, folder):
    """Serve a page with its folder; return what scripts make of it, and the console."""
    handler = partial(QuietHandler, directory=page.parent)
    with ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f'http://127.0.0.1:{server.server_port}/{page.name}?{query}'
        command = [BROWSER, *FLAGS, f'--user-data-dir={folder}/profile']
        command += ['--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1']
        command += ['--virtual-time-budget=10000', '--dump-dom', address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        server.shutdown()
    said = [line for line in done.stderr.splitlines() if ':CONSOLE' in line]
    return done.stdout, said


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves files and says nothing of it."""

    def log_message(self, *args):
        pass

    def send_error(self, *args):
        """Answer with an icon that has no bytes: browsers ask for one by themselves."""
        if self.path == '/favicon.ico':
            self.send_response(204)
            self.end_headers()
        else:
            super().send_error(*args)
