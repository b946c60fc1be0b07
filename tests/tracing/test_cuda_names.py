"""The graphs that CUDA's autograd builds, on a machine without a GPU.

Under torch's fake tensors a forward pass on ``cuda`` builds the graph of a GPU, whose
nodes have CUDA's names. Fake tensors have no values and no backward here: what is
tested is that every op has its rule and that the groups are those of the CPU. The
losses of whole detectors and the numerical verification need values; for those see
tests/test_devices.py, whose tensors have values but the CPU's names.
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from support import toys
from support.configs import classifier, slim_retinanet
from support.toys import Net, conv, images, square_loss, widths
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F

from mmgfp.discovery.grouping import build_groups
from mmgfp.engine.model_building import build_model
from mmgfp.tracing import LABEL_RULES, trace_loss
from mmgfp.tracing.graph import read_graph
from mmgfp.tracing.value import op_name

aten = torch.ops.aten
pytestmark = pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason='this torch knows no CUDA'
)


@contextmanager
def fake_cuda():
    """Let tensors be made on a GPU that is not there."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device('cuda'):
        yield


@pytest.fixture(autouse=True)
def addresses(monkeypatch):
    """Fake tensors have no addresses, by which buffers are known: those of storages."""
    where = lambda t: t.untyped_storage()._cdata + t.storage_offset()  # noqa: E731
    monkeypatch.setattr(FakeTensor, 'data_ptr', where)


def moved(model):
    """Put fake tensors on the GPU in the places of a model's own."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(torch.empty(p.shape))
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = torch.empty(b.shape, dtype=b.dtype)
    return model


def ops_of(tensor):
    """Names of the ops in the graph of ``tensor``, but for its leaves."""
    nodes = read_graph(tensor).nodes
    return {op_name(n) for n in nodes if not hasattr(n, 'variable')}


def groups_of(model, loss):
    trace = trace_loss(model, loss, strict=True)
    groups = build_groups(model, trace).groups
    return [(g.name, g.units, widths(g)) for g in groups]


class Affine(nn.Module):
    """A norm with affine parameters that calls one op by its own name."""

    def __init__(self, op, channels=6):
        super().__init__()
        self.op = op
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer('running_mean', torch.zeros(channels))
        self.register_buffer('running_var', torch.ones(channels))

    def forward(self, x):
        tensors = self.weight, self.bias, self.running_mean, self.running_var
        return self.op(x, *tensors, True, 0.1, 1e-5)[0]


def between(run, **parts):
    """A function of what a convolution makes, read by another convolution."""
    return lambda: Net(
        lambda n, x: n.b(run(n, n.a(x))), a=conv(3, 6), b=conv(6, 4), **parts
    )


def attend(op, dtype, *options):
    """Attention in which a head is a channel of a convolution, (N, C, H, W)."""

    def run(n, x):
        q = x.to(dtype)
        return op(q, q, q, *options)[0].to(x)

    return between(run)


@pytest.mark.parametrize('toy', toys.TOYS)
def test_groups_of_toys_are_those_of_the_cpu(toy):
    net = toy()
    expected = groups_of(net, square_loss(net(images())))
    with fake_cuda():
        net = toy()
        loss = square_loss(net(torch.empty(2, 3, 8, 8)))
    has_norm = any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    assert ('CudnnBatchNorm' in ops_of(loss)) == has_norm
    assert groups_of(net, loss) == expected


def rms(n, x):
    x = F.rms_norm(x.permute(0, 2, 3, 1), (6,), n.scale)
    return x.permute(0, 3, 1, 2)


#: Ops that CUDA has under a name of its own, and the units that are left.
CUDA_OPS = {
    'CudnnBatchNorm': (
        lambda: between(lambda n, x: n.n(x), n=nn.BatchNorm2d(6))(),
        [6],
    ),
    'MiopenBatchNorm': (
        lambda: between(lambda n, x: n.n(x), n=Affine(aten.miopen_batch_norm))(),
        [6],
    ),
    'FusedRmsNorm': (lambda: between(rms, scale=nn.Parameter(torch.ones(6)))(), []),
    'NativeDropout': (between(lambda n, x: F.dropout(x)), [6]),
    'ThnnFusedLstmCell': (
        lambda: between(
            lambda n, x: n.cell(x.mean((2, 3)))[0][..., None, None],
            cell=nn.LSTMCell(6, 6),
        )(),
        [],
    ),
    'ScaledDotProductFlashAttention': (
        attend(aten._scaled_dot_product_flash_attention, torch.float16),
        [6],
    ),
    'ScaledDotProductEfficientAttention': (
        attend(aten._scaled_dot_product_efficient_attention, torch.float32, None, True),
        [6],
    ),
    'ScaledDotProductCudnnAttention': (
        attend(aten._scaled_dot_product_cudnn_attention, torch.float16, None, True),
        [6],
    ),
    'ScaledDotProductFusedAttentionOverrideable': (
        attend(aten._scaled_dot_product_fused_attention_overrideable, torch.float16),
        [6],
    ),
}


@pytest.mark.parametrize('op', CUDA_OPS)
def test_an_op_that_only_cuda_has(op):
    build, units = CUDA_OPS[op]
    with fake_cuda():
        net = build()
        loss = net(torch.empty(2, 3, 8, 8)).square().mean()
    assert op in ops_of(loss)
    groups = groups_of(net, loss)
    assert [count for _, count, _ in groups] == units
    for _, _, tensors in groups:
        # Affine parameters and running statistics go along.
        named = dict([*net.named_parameters(), *net.named_buffers()])
        wide = {n for n, t in named.items() if n[:2] in ('a.', 'n.') and t.dim()}
        assert {n for n, _ in tensors} == wide | {'b.weight'}


def rnn(n, x):
    x = x.mean(3).permute(2, 0, 1)  # (L, N, C)
    state, weights = torch.zeros(1, 2, 6), [*n.rnn.parameters()]
    sizes = (2, 6, 0, 1, False, 0.0, True, False, [], None)
    y = aten._cudnn_rnn(x, weights, 4, None, state, state, *sizes)[0]
    return y.permute(1, 2, 0)[..., None]


def test_recurrent_layers_of_cudnn_stay_with_the_reason():
    net = between(rnn, rnn=nn.LSTM(6, 6))()
    with fake_cuda():
        loss = moved(net)(torch.empty(2, 3, 8, 8)).square().mean()
    assert 'CudnnRnn' in ops_of(loss)
    grouping = build_groups(net, trace_loss(net, loss, strict=True))
    assert not grouping.groups
    (reason,) = [f.reason for f in grouping.frozen if f.layer == 'a']
    assert 'a recurrent layer, CudnnRnn' in reason


NETWORKS = {
    'RetinaNet': lambda: slim_retinanet()[0],
    'ResNet': lambda: classify(64, type='ResNet', depth=18, base_channels=8),
    'MobileNetV2': lambda: classify(1280, type='MobileNetV2', widen_factor=0.25),
}


def classify(channels, **backbone):
    return build_model(classifier(backbone, channels))


def outputs_of(model, x):
    """The sum of squares of all raw outputs."""
    outputs = model._forward(x) if hasattr(model, 'bbox_head') else model(x)
    flat = [t for part in outputs for t in (part if isinstance(part, list) else [part])]
    return sum(t.square().mean() for t in flat)


@pytest.mark.parametrize('name', NETWORKS)
def test_groups_of_networks_are_those_of_the_cpu(name):
    model = NETWORKS[name]()
    expected = groups_of(model, outputs_of(model, torch.rand(2, 3, 64, 64)))
    with fake_cuda():
        loss = outputs_of(moved(model), torch.empty(2, 3, 64, 64))
    assert 'CudnnBatchNorm' in ops_of(loss)
    assert ops_of(loss) <= set(LABEL_RULES)
    assert expected and groups_of(model, loss) == expected
