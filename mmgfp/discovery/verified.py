"""The loop that verifies groups: what fails is read otherwise, or frozen."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from mmgfp.discovery.readings import ReadingTrials
from mmgfp.discovery.verify import Disagreement
from mmgfp.groups import ChannelGroup, Grouping
from mmgfp.tracing import Trace
from mmgfp.tracing.splits import Readings
from mmgfp.utils.errors import TraceError

logger = logging.getLogger('mmgfp')

#: Why a group is frozen that failed verification; the difference follows.
DISAGREES = 'masked and compact disagree'


def verified_groups(
    verify: Callable[[Grouping], Sequence[Disagreement]],
    build: Callable[..., Grouping],
    trace: Trace,
    retrace: Callable[[Readings], Trace],
    frozen: list[tuple[ChannelGroup, str]],
    strict: bool,
) -> Grouping:
    """Return the groups that pass verification; the others are ``frozen``."""
    trials = ReadingTrials()
    # A frozen group may leave others in a new shape, so all are verified again.
    while failures := verify(grouping := build(trace, frozen_groups=frozen)):
        if readings := trials.next_readings(trace, [f.group for f in failures]):
            trace = retrace(readings)
            continue
        failures = [_with_notes(f, trace) for f in failures]
        _report(failures, strict)
        frozen = [*frozen, *((f.group, f'{DISAGREES}: {f.reason}') for f in failures)]
    return grouping


def _with_notes(failure: Disagreement, trace: Trace) -> Disagreement:
    """Add to the reason what tracing has noted on the channels."""
    notes = trace.table.notes_on((m.name, m.dim) for m in failure.group.members)
    return replace(failure, reason='; '.join([failure.reason, *notes]))


def _report(failures: Sequence[Disagreement], strict: bool) -> None:
    for failure in failures:
        members = ', '.join(f'{m.name}[{m.dim}]' for m in failure.group.members)
        logger.warning(
            'group %s is left alone, since %s (%s); %s; its members: %s',
            failure.group.name,
            DISAGREES,
            failure.reason,
            'where code counts these channels in an attribute, register_attributes '
            'lets it follow (docs/op-rules.md)',
            members,
        )
    if strict:
        names = ', '.join(f.group.name for f in failures)
        raise TraceError(
            f'groups {names} must have equal outputs in the masked and the compact '
            f'model (got {failures[0].reason}); name these layers in keep, or leave '
            'strict off to freeze them'
        )
