"""Bytes that a piece of work reads and writes, and holds at most."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class BytesMoved(TorchDispatchMode):
    """Counts the bytes of all tensors that ops read and write; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, op: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = op(*args, **(kwargs or {}))
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        written = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        storages = {x.untyped_storage().data_ptr() for x in read}
        fresh = [x for x in written if x.untyped_storage().data_ptr() not in storages]
        in_place = op._schema.is_mutable
        if fresh or in_place or not written:  # anything but a view
            self.total += sum(x.nbytes for x in [*read, *(fresh or written)])
        return result


def bytes_moved(work: Callable[[], Any]) -> int:
    """Bytes read and written by all ops of ``work``, backward included."""
    with BytesMoved() as count:
        work()
    return count.total


def peak_bytes(work: Callable[[], Any], model: nn.Module, device: str) -> int:
    """Most bytes of tensors at any time of ``work``, with those of the model.

    Args:
        work: A step of training, run before, so that buffers of optimizers are there.
        model: The model; its gradients and one momentum buffer each count, too.
        device: Where it is.
    """
    if device != 'cpu':
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device)
    with TemporaryDirectory() as folder:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            work()
        path = Path(folder) / 'trace.json'
        seen.export_chrome_trace(str(path))
        events = json.loads(path.read_text())['traceEvents']
    blocks = [e for e in events if e.get('name') == '[memory]']
    blocks.sort(key=lambda event: event['ts'])
    held: dict[int, int] = {}
    level = peak = 0
    for block in (event['args'] for event in blocks):
        if block['Bytes'] > 0:
            held[block['Addr']] = block['Bytes']
            level += block['Bytes']
            peak = max(peak, level)
        else:  # what an earlier profile saw allocated was never added
            level -= held.pop(block['Addr'], 0)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    weights = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    return weights + 2 * trained + peak
