"""Lines that the libraries print although they concern no user of mmgfp."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mmengine.logging

#: MMDetection of the OneDL line says so whenever it is imported: at the level of
#: debugging, which `print_log` disregards where it has no logger.
ONEDL = 'Could not import OneDL'


@contextmanager
def without_onedl_notice() -> Iterator[None]:
    """Leave out one line that importing MMDetection prints; all others are printed."""
    print_log = mmengine.logging.print_log

    def quieter(msg: Any, *args: Any, **kwargs: Any) -> None:
        if not str(msg).startswith(ONEDL):
            print_log(msg, *args, **kwargs)

    mmengine.logging.print_log = quieter
    try:
        yield
    finally:
        mmengine.logging.print_log = print_log
