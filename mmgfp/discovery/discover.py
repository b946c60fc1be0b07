"""The facts about a model that pruning rests on: groups, rows, profiles."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from torch import nn

from mmgfp.discovery.blocks import with_blocks
from mmgfp.discovery.grouping import build_groups
from mmgfp.discovery.profile import profile_layers
from mmgfp.discovery.verified import verified_groups
from mmgfp.discovery.verify import find_disagreements
from mmgfp.groups import Grouping
from mmgfp.selection.costs import LayerProfile
from mmgfp.surgery.attributes import has_attribute_rule
from mmgfp.tracing import (
    RowUse,
    Trace,
    trace_loss,
    watch_buffers,
    watch_rows,
    watch_widths,
)
from mmgfp.tracing.batches import watch_entries
from mmgfp.tracing.graph import read_graph
from mmgfp.tracing.image_order import tell_images
from mmgfp.tracing.operands import judge_operands
from mmgfp.tracing.row_use import LayerCalls
from mmgfp.tracing.splits import Readings
from mmgfp.utils.errors import TraceError
from mmgfp.utils.steps import begin_step
from mmgfp.utils.trial_runs import (
    Forward,
    FrozenParameters,
    LossFunction,
    watch_outputs,
    whole_graph,
)

logger = logging.getLogger('mmgfp')

#: Why a group is frozen under ``coupled=False``.
SHARED = 'its channels are shared by several layers, and coupled=False'

#: Says which layers' inputs cannot be scored, and why; see `Criterion.unscorable`.
Unscorable = Callable[[nn.Module, Sequence[str], RowUse], Mapping[str, str]]


@dataclass(frozen=True)
class Discovery:
    """The facts about a model that pruning rests on.

    Attributes:
        grouping: The groups, verified.
        rows: Which layers read images and which RoIs.
        profiles: How often each layer uses its weight for one image, by the name of
            the weight.
    """

    grouping: Grouping
    rows: RowUse = field(repr=False)
    profiles: dict[str, LayerProfile] = field(repr=False)


@dataclass(frozen=True)
class ModelTrace:
    """A forward pass of the loss, followed through its graph.

    Attributes:
        trace: The labels of all channels, and which are equal or frozen.
        rows: Which layers read images and which RoIs.
    """

    trace: Trace
    rows: RowUse

    @property
    def weights(self) -> list[str]:
        """Names of the weights of all layers that were called."""
        return [call.weight for call in self.trace.calls]


def trace_model(
    model: nn.Module,
    loss: LossFunction,
    strict: bool = False,
    images: int | None = None,
) -> ModelTrace:
    """Run the loss once and follow all channels through its graph.

    Args:
        model: The module; it is left as it is.
        loss: Computes the training loss of the module it is given, a scalar, on a
            real batch.
        strict: Raise at an op without a rule.
        images: Number of images in that batch; by default, as many as the first layer
            reads rows.

    Raises:
        TraceError: If the loss has no graph, or an op has no rule under ``strict``.
    """
    frozen = FrozenParameters(model)
    with (
        whole_graph(model),
        watch_rows(model) as calls,
        watch_entries(model) as entries,
        watch_widths(model, has_attribute_rule) as widths,
        watch_buffers(model),
        watch_outputs(model) as outputs,
    ):
        value = loss(model)
        trace = trace_loss(model, value, strict, widths, outputs, frozen=frozen)
        nodes = {name: seen.nodes for name, seen in calls.items()}
        read = judge_operands(read_graph(value, outputs), model, nodes)

    def follow(first: Sequence[str]) -> Mapping[str, LayerCalls]:
        watched = watch_rows(model, first), watch_entries(model, follow=True)
        with whole_graph(model), watched[0] as followed, watched[1]:
            loss(model)
        return followed

    rows = tell_images(calls, entries, images, follow)
    ignored = read.aside | read.inside
    lost = {n: r for n, r in rows.lost.items() if n not in ignored}
    lost.update(read.reasons)
    called = rows.called - read.aside
    use = replace(rows, called=called, lost=lost, inside=read.inside, last=read.last)
    return ModelTrace(trace, use)


def trace_again(model: nn.Module, loss: LossFunction, readings: Readings) -> Trace:
    """Run the loss once more, and read splits of channels as ``readings`` say."""
    frozen = FrozenParameters(model)
    with (
        whole_graph(model),
        watch_widths(model, has_attribute_rule) as widths,
        watch_buffers(model),
        watch_outputs(model) as outputs,
    ):
        value = loss(model)
        return trace_loss(model, value, False, widths, outputs, readings, frozen)


def own_profiles(
    model: nn.Module, profiles: Mapping[str, LayerProfile]
) -> dict[str, LayerProfile]:
    """Return the profiles of the model's own parameters, by their first names."""
    owned = {n for n, _ in model.named_parameters()}
    return {n: p for n, p in profiles.items() if n in owned}


def discover(
    model: nn.Module,
    loss: LossFunction,
    forward: Forward,
    images: int,
    profiles: Mapping[str, LayerProfile] | None = None,
    keep: Sequence[str] = (),
    coupled: bool = True,
    strict: bool = False,
    unscorable: Unscorable = lambda model, weights, rows: {},
    blocks: bool = False,
) -> Discovery:
    """Find the coupled channels of a model and verify them.

    Args:
        model: The module; it is left as it is.
        loss: Computes the training loss of the module it is given, on a real batch.
        forward: Returns all outputs that the module it is given has at inference.
        images: Number of images in the batches of ``loss`` and ``forward``.
        profiles: How often layers use their weights, recorded if not given.
        keep: Names or patterns of layers that are to be left alone.
        coupled: Whether channels that several layers share may go.
        strict: Raise at an op without a rule, or where verification fails.
        unscorable: Says which layers' inputs the criterion cannot score.
        blocks: Whether to find residual blocks that may go as well.

    Raises:
        TraceError: If nothing can be pruned, or ``strict`` asks for an error.
        ConfigError: If a pattern of ``keep`` matches no layer.
    """
    begin_step('following channels through the loss')
    traced = trace_model(model, loss, strict, images)
    for op, layers in traced.trace.unknown_ops.items():
        logger.warning('op %s has no rule; it freezes %s', op, ', '.join(layers))
    unscored = unscorable(model, traced.weights, traced.rows)
    build = partial(build_groups, model, keep=keep, unscorable=unscored)
    shared = () if coupled else build(traced.trace).groups
    frozen = [(g, SHARED) for g in shared if not g.internal]
    verify = partial(find_disagreements, model, forward=forward, loss=loss)
    retrace = partial(trace_again, model, loss)
    grouping = verified_groups(verify, build, traced.trace, retrace, frozen, strict)
    _check_any(grouping)
    if blocks:
        begin_step('trying residual blocks')
        grouping = with_blocks(model, grouping, traced.rows, loss, forward, keep)
    profiles = profile_layers(model, forward, images) if profiles is None else profiles
    return Discovery(grouping, traced.rows, own_profiles(model, profiles))


def _check_any(grouping: Grouping) -> None:
    if not grouping.groups:
        reasons = dict.fromkeys(f.reason for f in grouping.frozen)
        raise TraceError(
            'model must have at least one group of channels that can be pruned '
            f'(got none); every layer is left alone because: {"; ".join(reasons)}'
        )
