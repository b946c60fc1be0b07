"""Exchanges between processes that train together: at the start, then at decisions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import (
    all_gather_object,
    all_reduce,
    broadcast_object_list,
    get_world_size,
    is_main_process,
)
from torch import Tensor

from mmgfp.criteria.statistics import Reduce
from mmgfp.utils.errors import MMGFPError, StatisticsError


def use_cpus(cfg: Config) -> None:
    """Let the processes of a launcher train on CPUs where there is no accelerator.

    MMEngine on its own wants a GPU for each process.

    Args:
        cfg: The config that a runner will be built from; changed in place.
    """
    if cfg.get('launcher') != 'pytorch' or get_device() != 'cpu':
        return
    torch.distributed.init_process_group('gloo')
    default = {
        'broadcast_buffers': False,
        'find_unused_parameters': cfg.get('find_unused_parameters', False),
    }
    wrapper = cfg.get('model_wrapper_cfg') or default
    cfg.model_wrapper_cfg = {**wrapper, 'device_ids': None}


def broadcast_result(compute: Callable[[], Any]) -> Any:
    """Compute something in the main process and return it in all of them.

    Args:
        compute: Called in the main process only, which works as if it were alone then.

    Raises:
        Exception: If ``compute`` raised, its error in the main process; in the others a
            `MMGFPError` with the same words, so that none waits in vain.

    Examples:
        >>> broadcast_result(lambda: 6 * 7)
        42
    """
    if get_world_size() == 1:
        return compute()
    result_and_failure: list[Any] = [None, None]
    error: Exception | None = None
    if is_main_process():
        try:
            with without_other_processes():
                result_and_failure[0] = compute()
        except Exception as raised:
            error = raised
            result_and_failure[1] = f'{type(error).__name__}: {error}'
    # A process that raised before this call would leave the others waiting in it.
    broadcast_object_list(result_and_failure)
    result, failure = result_and_failure
    if error is not None:
        raise error
    if failure is not None:
        raise MMGFPError(f'in the main process: {failure}')
    return result


@contextmanager
def without_other_processes() -> Iterator[None]:
    """Let this process compute as if it were the only one.

    Losses that average over processes and SyncBN would wait for the others.
    """
    # Everything that asks for the number of processes asks this function first.
    is_initialized = torch.distributed.is_initialized
    torch.distributed.is_initialized = lambda: False
    try:
        yield
    finally:
        torch.distributed.is_initialized = is_initialized


def sum_over_processes() -> Reduce | None:
    """Return a function that sums a tensor over processes, None for a single one."""
    if get_world_size() == 1:
        return None

    def reduce(flat: Tensor) -> int:
        all_reduce(flat, op='sum')
        return get_world_size()

    return reduce


def any_of_all(flag: bool) -> bool:
    """Return whether ``flag`` is set in any process."""
    if get_world_size() == 1:
        return flag
    # NCCL cannot send what is on a CPU.
    device = 'cuda' if torch.distributed.get_backend() == 'nccl' else 'cpu'
    count = torch.tensor(float(flag), device=device)
    all_reduce(count, op='sum')
    return bool(count > 0)


def check_agreement(kept: np.ndarray) -> None:
    """Compare what all processes have pruned, by hashes.

    Args:
        kept: Units that are not pruned, (U,).

    Raises:
        StatisticsError: If processes decided differently.
    """
    if get_world_size() == 1:
        return
    digest = hashlib.sha256(np.packbits(kept).tobytes()).hexdigest()[:16]
    hashes = all_gather_object(digest)
    if len(set(hashes)) > 1:
        raise StatisticsError(
            'structure',
            'the same in all processes',
            f'hashes {", ".join(hashes)}',
            'resume from the last checkpoint; report it if it happens again',
        )
