"""Which channels are coupled, read off the autograd graph of a real loss."""

from mmgfp.tracing.labels import NO_LABEL
from mmgfp.tracing.rules import RULES, register_rule
from mmgfp.tracing.tracer import Trace, trace_loss
from mmgfp.tracing.value import Context, LayerCall, Value

__all__ = [
    'NO_LABEL',
    'RULES',
    'Context',
    'LayerCall',
    'Trace',
    'Value',
    'register_rule',
    'trace_loss',
]
