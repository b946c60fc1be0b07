"""Telling rows to images where a batch has a known number of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from mmgfp.tracing.batches import ORDERS, Entries, order_of
from mmgfp.tracing.row_use import UNTOLD, LayerCalls, RowUse, judge_rows
from mmgfp.tracing.row_values import Lost, Rows

#: Runs the loss again while the model's arguments are followed through the graph.
Follow = Callable[[Sequence[str]], Mapping[str, LayerCalls]]


def tell_images(
    calls: Mapping[str, LayerCalls],
    entries: Entries,
    images: int | None,
    follow: Follow,
) -> RowUse:
    """Return what the layers read, by the number of images that there are.

    Where the first layer reads one row for each image, nothing is to be done. Else its
    rows are followed from the arguments of the model, if one of them shows the images.

    Args:
        calls: Calls of the layers.
        entries: Calls of the model.
        images: Number of images; None for the number of rows of the first layer.
        follow: Runs the loss again, with the names of the layers that read images.
    """
    share = None if images is None else entries.share(images)
    parts = share != images
    rows = _with_entry(judge_rows(calls, share), calls, entries, parts)
    first = next((n for n, c in calls.items() if c.sources), None)
    if share is None or first is None:
        return rows
    counts = {len(r) for r in calls[first].sources if isinstance(r, Rows)}
    if counts == {share}:
        return rows
    found = f'{first} reads {max(counts, default=0)} rows for {share} images'
    if entries.sizes and set(entries.sizes) == {share}:
        sources = [n for n, c in calls.items() if c.sources]
        try:
            followed = follow(sources)
        except Exception as error:  # the loss may insist on inputs without gradients
            name = type(error).__name__
            return _all_lost(rows, f'{found}, and following them raises {name}')
        judged = _with_entry(judge_rows(followed, share), calls, entries, parts)
        ordered = _in_order(judged, followed, sources)
        if ordered is not None:
            return replace(ordered, called=rows.called, first=rows.first)
    return _all_lost(rows, f'{found}, in an order that is not known')


def _all_lost(rows: RowUse, reason: str) -> RowUse:
    return replace(
        rows,
        images=frozenset(),
        rois=frozenset(),
        lost=dict.fromkeys(rows.called, f'{UNTOLD}: {reason}'),
    )


def _with_entry(
    rows: RowUse,
    calls: Mapping[str, LayerCalls],
    entries: Entries,
    parts: bool,
) -> RowUse:
    """Note which module's calls bring further images."""
    name, count = '', len(entries.sizes)
    if not count:  # the loss calls parts of the model, the first of which must do
        name = next((n for n, c in calls.items() if c.sources), '')
        count = len(calls[name].sources) if name in calls else 0
    if not count:
        return rows
    names = frozenset([name])
    if count == 1 or parts:
        return replace(rows, entry=names)
    return replace(rows, reentry=names)


def _in_order(
    rows: RowUse, calls: Mapping[str, LayerCalls], sources: Sequence[str]
) -> RowUse | None:
    """Note the order of the rows of the layers that read images; None if unknown."""
    orders: dict[str, set[str]] = {order: set() for order in ORDERS}
    for name in sources:
        seen = calls[name].sources if name in calls else []
        if any(isinstance(r, Lost) or r is None for r in seen):
            return None
        known = [r for r in seen if isinstance(r, Rows)]
        if all(r.index is None for r in known):
            continue
        order = order_of(known)
        if order is None:
            return None
        orders[order].add(name)
    repeated, cycled, parted = (frozenset(orders[order]) for order in ORDERS)
    return replace(rows, repeated=repeated, cycled=cycled, parted=parted)
