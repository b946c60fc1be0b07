"""Times of several things that take turns in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import median, quantiles
from typing import Any
from unittest import mock

import torch

Times = dict[str, list[dict[str, float]]]


def take_turns(
    actions: Mapping[str, Callable[[], Any]],
    repeats: int,
    device: str,
    warmup: int = 1,
    before: Callable[[], Any] | None = None,
    twice: bool = False,
) -> Times:
    """Run all actions one after the other, `repeats` times over.

    Whatever else the machine does meets all of them; the order alternates, so that
    none always profits by what another has left in caches.

    Args:
        actions: What to run, by name.
        repeats: Timed rounds.
        device: Where the work is done; it is waited for.
        warmup: Rounds that do not count.
        before: Runs before each action, untimed.
        twice: Whether each action runs untimed first, where the one before has left
            caches full of kernels and memory for other shapes.

    Returns:
        By name, of each round the seconds of ``wall`` and of this process' ``cpu``.
    """
    times: Times = {name: [] for name in actions}
    for turn in range(warmup + repeats):
        for name in sorted(actions, key=[*actions].index, reverse=turn % 2 == 0):
            if before is not None:
                before()
            if twice:
                actions[name]()
            synchronize(device)
            with stopwatch(times[name] if turn >= warmup else [], device):
                actions[name]()
    return times


@contextmanager
def stopwatch(times: list[dict[str, float]], device: str) -> Iterator[None]:
    """Append the seconds that the body takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    synchronize(device)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    times.append({'wall': wall, 'cpu': cpu})


@contextmanager
def timed_calls(
    owner: Any, name: str, times: list[dict[str, float]], device: str
) -> Iterator[None]:
    """Append the seconds of each call of a module's function, by the name it goes by.

    Args:
        owner: The module that calls the function.
        name: What the function is called there.
        times: Is appended to.
        device: Where the work is done.
    """
    function = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        with stopwatch(times, device):
            return function(*args, **kwargs)

    with mock.patch.object(owner, name, timed):
        yield


def ratios(times: Times, name: str, base: str, clock: str) -> list[float]:
    """Of each round the time of ``name`` over that of ``base``."""
    pairs = zip(times[name], times[base], strict=True)
    return [own[clock] / other[clock] for own, other in pairs]


def spread(values: list[float]) -> dict[str, float]:
    """The median with the quartiles around it."""
    if len(values) < 2:
        return dict.fromkeys(('median', 'low', 'high'), values[0])
    low, _, high = quantiles(values, n=4, method='inclusive')
    return {'median': median(values), 'low': low, 'high': high}


def ratio_text(measured: dict[str, float]) -> str:
    """A ratio with the quartiles around it."""
    return (
        f'× {measured["median"]:.3f} ({measured["low"]:.3f} to {measured["high"]:.3f})'
    )


def synchronize(device: str) -> None:
    """Wait for a GPU."""
    if device != 'cpu':
        torch.cuda.synchronize(device)
