"""What processes that train together exchange: at the start, then at decisions."""

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

    MMEngine's own way asks for a GPU for each.

    Args:
        cfg: What a runner will be built from; changed in place.
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


def once_for_all(make: Callable[[], Any]) -> Any:
    """What ``make`` gives in the main process, in all of them.

    Raises:
        Exception: What ``make`` raised, in the main process; a `MMGFPError` with its
            words in the others, so that none waits in vain.
    """
    if get_world_size() == 1:
        return make()
    sent: list[Any] = [None, None]
    failure: Exception | None = None
    if is_main_process():
        try:
            with alone():
                sent[0] = make()
        except Exception as error:
            failure = error
            sent[1] = f'{type(error).__name__}: {error}'
    broadcast_object_list(sent)
    if failure is not None:
        raise failure
    if sent[1] is not None:
        raise MMGFPError(f'in the main process: {sent[1]}')
    return sent[0]


@contextmanager
def alone() -> Iterator[None]:
    """Let this process compute without the others, as if there were none.

    Losses that average over processes and SyncBN would wait for them.
    """
    kept = torch.distributed.is_initialized
    torch.distributed.is_initialized = lambda: False
    try:
        yield
    finally:
        torch.distributed.is_initialized = kept


def reduction() -> Reduce | None:
    """Sums tensors over processes; None where there is only one."""
    if get_world_size() == 1:
        return None

    def reduce(flat: Tensor) -> int:
        all_reduce(flat, op='sum')
        return get_world_size()

    return reduce


def any_of_all(flag: bool) -> bool:
    """Whether ``flag`` is set in any process."""
    if get_world_size() == 1:
        return flag
    device = 'cuda' if torch.distributed.get_backend() == 'nccl' else 'cpu'
    count = torch.tensor(float(flag), device=device)
    all_reduce(count, op='sum')
    return bool(count > 0)


def check_agreement(kept: np.ndarray) -> None:
    """Compare the structures of all processes by their hashes.

    Args:
        kept: Units that stay, (U,).

    Raises:
        StatisticsError: Processes decided differently.
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
