"""Every op rule: conv, op, conv; what is coupled, and that masked equals compact.

A new rule needs one line here: a `case` if channels pass through the op, else a line
in `FROZEN`.
"""

import re
from dataclasses import dataclass, field
from functools import partial

import mmcv.ops
import numpy as np
import pytest
import torch
import torchvision
from support.toys import Net, conv, grouped, images, parameters_in, widths
from torch import nn
from torch.autograd import Function
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mmgfp.discovery.comparing import difference
from mmgfp.discovery.unit_sets import random_units
from mmgfp.discovery.verify import disagreement, masked_and_compact
from mmgfp.tracing import LABEL_RULES, ROW_RULES, register_elementwise
from mmgfp.tracing.value import op_name

aten = torch.ops.aten
FIRST = torch.tensor([0])


@dataclass(frozen=True)
class Case:
    """An op between two layers.

    Attributes:
        op: The op whose rule is tested; it must appear in the graph.
        run: From the net and the output of its conv ``a`` to the input of its head.
        units: Units that the channels of ``a`` make up.
        entries: What one unit takes of ``a``'s outputs and of the head's inputs.
        also: Further (tensor, dimension) that the unit takes one entry of.
        parts: Layers and parameters that ``run`` uses.
        widths: Entries that the unit takes of each of ``also``, if not one.
    """

    op: str
    run: object
    units: int = 6
    entries: tuple[int, int] = (1, 1)
    also: tuple = ()
    parts: dict = field(default_factory=dict)
    widths: tuple = ()

    def net(self):
        """The network, with a head for what ``run`` returns."""
        torch.manual_seed(0)
        parts = {'a': conv(3, 6), 'b': conv(3, 6)}
        parts |= {name: make() for name, make in self.parts.items()}
        net = Net(lambda net, x: self.run(net, net.a(x)), **parts)
        with torch.no_grad():
            shape = net.eval()(images()).shape
        net.head = head(shape)
        net.run = lambda net, x: net.head(self.run(net, net.a(x)))
        return net.train()


def head(shape):
    """A layer that reads channels from dimension 1 of a tensor of ``shape``."""
    if len(shape) == 2:
        return nn.Linear(shape[1], 4)
    return [nn.Conv1d, nn.Conv2d, nn.Conv3d][len(shape) - 3](shape[1], 4, 1)


def plain(op, run, **options):
    return Case(op, lambda net, y: run(y), **options)


def joined(op, run):
    """An op of two activations, whose channels become coupled."""
    also = (('b.weight', 0), ('b.bias', 0))
    return Case(op, lambda net, y: run(y, net.b(images().to(y)) + 2), also=also)


def norm(op, run, make, buffers=True):
    names = ['weight', 'bias'] + ['running_mean', 'running_var'] * buffers
    also = tuple((f'norm.{n}', 0) for n in names)
    return Case(op, lambda net, y: run(net.norm, y), also=also, parts={'norm': make})


def other_precision(y):
    return y.to(torch.float32 if y.dtype == torch.float64 else torch.float64)


def assigned(y):
    out = y.new_zeros(3, y.shape[1], 8, 8)
    out[torch.tensor([2, 0])] = y
    return out


def rois(y):
    return torch.tensor([[0.0, 0, 0, 4, 4], [1.0, 2, 2, 8, 8], [0.0, 1, 1, 5, 5]]).to(y)


def grid(y):
    return F.affine_grid(torch.eye(2, 3).repeat(2, 1, 1), [2, 1, 4, 4], False).to(y)


def stand_in(name, forward):
    """An op under the name of one that runs on GPUs only."""
    return type(name, (Function,), {'forward': staticmethod(forward)}).apply


def gpu_batch_norm(name):
    def forward(ctx, x, weight, bias, mean, var):
        if not name.startswith('Sync'):  # which save other things
            ctx._saved_running_mean, ctx._saved_running_var = mean, var
        return F.batch_norm(x, mean, var, weight, bias)

    def run(n, y):
        op = stand_in(name, forward)
        return op(y, n.weight, n.bias, n.running_mean, n.running_var)

    return norm(name, run, lambda: nn.BatchNorm2d(6))


gpu_roi_pool = stand_in(
    'RoIPoolFunction', lambda ctx, y, rois: torchvision.ops.roi_pool(y, rois, 2)
)


FUSED_ATTENTION = (
    'ScaledDotProductFlashAttentionForCpu',
    'ScaledDotProductFlashAttention',
    'ScaledDotProductEfficientAttention',
    'ScaledDotProductCudnnAttention',
    'ScaledDotProductFusedAttentionOverrideable',
)


def fused_attention(op, *operands):
    attend = F.scaled_dot_product_attention
    return stand_in(op, lambda ctx, *operands: attend(*operands))(*operands)


def pixel_attention(op, y):
    return fused_attention(op, *[y.permute(0, 2, 3, 1)] * 3)  # (N, H, W, C)


def attention_to_ones(y):
    return F.scaled_dot_product_attention(y, torch.ones_like(y), y)


def multi_scale(y):
    name = 'MultiScaleDeformableAttnFunction'
    return stand_in(name, lambda ctx, y, z: y * z)(y, y)


def shared_keys(y, z):
    """Attention in which two heads of queries share those of keys and values."""

    def forward(ctx, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return stand_in(FUSED_ATTENTION[1], forward)(y, z, z)


def gpu_attention(op):
    return joined(op, lambda y, z: fused_attention(op, y, z, y))


def flat_alias(y):
    length = y[0].numel()
    return aten._reshape_alias(y, [2, length], [length, 1])


def channel_shuffle(y):
    n, _, h, w = y.shape
    return y.view(n, 2, -1, h, w).transpose(1, 2).reshape(n, -1, h, w)


def halves_swapped(y):
    first, second = y.chunk(2, 1)
    return torch.cat([second, first], 1)


def halves_sliced(y):
    half = y.shape[1] // 2
    return torch.cat([y[:, half:], y[:, :half]], 1)


def upsampled(y, mode='nearest'):
    return F.interpolate(y, scale_factor=2, mode=mode)


def deformed(net, y, parts=1, *masks):
    return net.dcn(y, y.new_full((2, 18 * parts, 8, 8), 0.3), *masks)


#: Four channels of eight make a unit, of which the head reads one.
QUARTETS = dict(units=2, entries=(4, 1), parts={'a': lambda: conv(3, 8)})


def transposed(groups, outputs):
    return nn.ConvTranspose2d(6, outputs, 4, 2, 1, groups=groups)


gpu_grid_sample = stand_in(
    'CudnnGridSampler', lambda ctx, y, g: F.grid_sample(y, g, align_corners=False)
)


class FusedRmsNorm(Function):
    """Over the last dimension."""

    @staticmethod
    def forward(ctx, y):
        ctx._saved_normalized_shape = y.shape[-1:]
        return F.rms_norm(y, y.shape[-1:])


gpu_rms_norm = FusedRmsNorm.apply


def pairs(y):
    return torch.stack([y, y + 1], -1)


def quantised(y):
    return torch.fake_quantize_per_tensor_affine(y, 0.05, 0, -128, 127)


def fractional(y, pool=F.fractional_max_pool3d):
    torch.manual_seed(0)
    samples = torch.full((2, y.shape[1], y.dim() - 2), 0.4).to(y)
    return pool(y, 2, output_size=3, _random_samples=samples)


def channels_last(y):
    return y.contiguous(memory_format=torch.channels_last)


UNARY = (
    'Asinh', 'Atan', 'Ceil', 'Cosh', 'Deg2Rad', 'Erfc', 'Exp2', 'Floor', 'Frac', 'I0',
    'Rad2Deg', 'Round', 'Sgn', 'Sign', 'Sinc', 'Sinh', 'Trunc',
)  # fmt: skip
UNARY_WITHIN_ONE = [
    ('Acos', torch.acos), ('Asin', torch.asin), ('Atanh', torch.atanh),
    ('Erfinv', torch.erfinv), ('Logit', lambda y: (y.abs() / 2 + 0.1).logit()),
]  # fmt: skip
BINARY = ('Copysign', 'Fmax', 'Fmin', 'Hypot', 'Logaddexp', 'Logaddexp2')

CASES = [
    # Element by element.
    plain('Relu', lambda y: y.relu()),
    plain('Sigmoid', lambda y: y.sigmoid()),
    plain('Tanh', lambda y: y.tanh()),
    plain('Silu', F.silu),
    plain('Mish', F.mish),
    plain('Gelu', F.gelu),
    plain('Elu', F.elu),
    plain('Celu', F.celu),
    plain('LeakyRelu', F.leaky_relu),
    plain('Hardtanh', F.hardtanh),
    plain('Hardswish', F.hardswish),
    plain('Hardsigmoid', F.hardsigmoid),
    plain('Softplus', F.softplus),
    plain('LogSigmoid', F.logsigmoid),
    plain('Clamp', lambda y: y.clamp(-1, 1)),
    plain('ClampMin', lambda y: y.clamp_min(0)),
    plain('ClampMax', lambda y: y.clamp_max(0)),
    plain('Exp', lambda y: y.exp()),
    plain('Expm1', lambda y: y.expm1()),
    plain('Log', lambda y: (y.abs() + 1).log()),
    plain('Log1P', lambda y: y.abs().log1p()),
    plain('Sqrt', lambda y: (y.abs() + 1).sqrt()),
    plain('Rsqrt', lambda y: (y.abs() + 1).rsqrt()),
    plain('Reciprocal', lambda y: (y.abs() + 1).reciprocal()),
    plain('Neg', lambda y: -y),
    plain('Abs', lambda y: y.abs()),
    plain('Sin', lambda y: y.sin()),
    plain('Cos', lambda y: y.cos()),
    plain('Tan', lambda y: y.tanh().tan()),
    plain('Erf', lambda y: y.erf()),
    plain('Pow', lambda y: y**2),
    plain('Rsub', lambda y: torch.rsub(y, 1)),
    plain('Threshold', lambda y: F.threshold(y, 0.1, 0.5)),
    plain('RreluWithNoise', lambda y: torch.rrelu(y, 0.2, 0.2, training=True)),
    plain('Clone', lambda y: y.clone()),
    plain('ToCopy', lambda y: other_precision(y).to(y.dtype)),
    plain('Alias', aten.alias),
    plain('NativeDropout', lambda y: torch.native_dropout(y, 0.0, True)[0]),
    plain('MaskedFill', lambda y: y.masked_fill(y > 0, 0.5)),
    plain('NanToNum', lambda y: y.nan_to_num()),
    plain('Fill', lambda y: torch.fill(y, 1.0)),
    plain('Expand', lambda y: y[:, :, :1].expand(-1, -1, 8, -1)),
    *(plain(op, getattr(torch, op.lower())) for op in UNARY),
    *(plain(op, lambda y, f=f: f(y.tanh() * 0.9)) for op, f in UNARY_WITHIN_ONE),
    *(joined(op, getattr(torch, op.lower())) for op in BINARY),
    plain('Acosh', lambda y: (y.abs() + 2).acosh()),
    plain('Log10', lambda y: (y.abs() + 2).log10()),
    plain('Log2', lambda y: (y.abs() + 2).log2()),
    plain('Digamma', lambda y: (y.abs() + 2).digamma()),
    plain('Lgamma', lambda y: (y.abs() + 2).lgamma()),
    plain('Hardshrink', F.hardshrink),
    plain('Softshrink', lambda y: F.softshrink(y, 0.1)),
    plain('Angle', lambda y: y.angle()),
    plain('Polar', lambda y: torch.polar(y.abs(), y).real),
    plain('ViewAsReal', lambda y: torch.polar(y.abs(), y).imag),
    plain('ViewAsComplex', lambda y: torch.view_as_complex(pairs(y)).abs()),
    plain('FakeQuantizePerTensorAffineCachemask', quantised),
    joined('Xlogy', lambda y, z: torch.xlogy(y, z.abs() + 1)),
    joined('Add', lambda y, z: y + z),
    joined('Sub', lambda y, z: y - z),
    joined('Mul', lambda y, z: y * z),
    joined('Div', lambda y, z: y / (z.abs() + 1)),
    joined('Maximum', torch.maximum),
    joined('Minimum', torch.minimum),
    joined('Where', lambda y, z: torch.where(y > 0, y, z)),
    joined('Lerp', lambda y, z: torch.lerp(y, z, 0.3)),
    joined('Addcmul', lambda y, z: torch.addcmul(y, y, z)),
    joined('Addcdiv', lambda y, z: torch.addcdiv(y, y, z.abs() + 1)),
    joined('Atan2', torch.atan2),
    joined('Fmod', lambda y, z: torch.fmod(y, z.abs() + 1)),
    joined('Remainder', lambda y, z: torch.remainder(y, z.abs() + 1)),
    Case(
        'PreluKernel',
        lambda net, y: net.prelu(y),
        also=(('prelu.weight', 0),),
        parts={'prelu': lambda: nn.PReLU(6)},
    ),
    # Norms.
    norm('NativeBatchNorm', lambda n, y: n(y), lambda: nn.BatchNorm2d(6)),
    gpu_batch_norm('CudnnBatchNorm'),
    gpu_batch_norm('MiopenBatchNorm'),
    gpu_batch_norm('SyncBatchNorm'),
    gpu_batch_norm('SyncBatchNormFunction'),
    norm('NativeGroupNorm', lambda n, y: n(y), lambda: nn.GroupNorm(6, 6), False),
    # Positions are resampled.
    plain('MaxPool2DWithIndices', lambda y: F.max_pool2d(y, 2)),
    plain('AvgPool2D', lambda y: F.avg_pool2d(y, 2)),
    plain('AdaptiveAvgPool2D', lambda y: F.adaptive_avg_pool2d(y, 3)),
    plain('AdaptiveMaxPool2D', lambda y: F.adaptive_max_pool2d(y, 3)),
    plain('MaxPool3DWithIndices', lambda y: F.max_pool3d(y.unsqueeze(2), (1, 2, 2))),
    plain('AvgPool3D', lambda y: F.avg_pool3d(y.unsqueeze(2), (1, 2, 2))),
    plain('AdaptiveAvgPool3D', lambda y: F.adaptive_avg_pool3d(y.unsqueeze(2), 3)),
    plain('UpsampleNearest1D', lambda y: upsampled(y[..., 0])),
    plain('UpsampleNearest2D', upsampled),
    plain('UpsampleNearest3D', lambda y: upsampled(y.unsqueeze(2))),
    plain('UpsampleNearestExact2D', lambda y: upsampled(y, 'nearest-exact')),
    plain('UpsampleLinear1D', lambda y: upsampled(y[..., 0], 'linear')),
    plain('UpsampleBilinear2D', lambda y: upsampled(y, 'bilinear')),
    plain('UpsampleBicubic2D', lambda y: upsampled(y, 'bicubic')),
    plain('UpsampleTrilinear3D', lambda y: upsampled(y.unsqueeze(2), 'trilinear')),
    plain('ReflectionPad2D', lambda y: F.pad(y, (1, 1, 1, 1), mode='reflect')),
    plain('ReplicationPad2D', lambda y: F.pad(y, (1, 1, 1, 1), mode='replicate')),
    plain('AdaptiveMaxPool3D', lambda y: F.adaptive_max_pool3d(volume(y), 2)),
    plain('FractionalMaxPool2D', lambda y: fractional(y, F.fractional_max_pool2d)),
    plain('FractionalMaxPool3D', lambda y: fractional(volume(y))),
    plain('MaxUnpool2D', lambda y: unpooled(y, 2)),
    plain('MaxUnpool3D', lambda y: unpooled(volume(y), 3)),
    *(
        plain(f'{mode}Pad1D', lambda y, m=m: F.pad(y[..., 0], (1, 1), m))
        for mode, m in (('Reflection', 'reflect'), ('Replication', 'replicate'))
    ),
    *(
        plain(f'{mode}Pad3D', lambda y, m=m: F.pad(volume(y), (1,) * 6, m))
        for mode, m in (('Reflection', 'reflect'), ('Replication', 'replicate'))
    ),
    *(
        plain(
            f'Upsample{mode.capitalize()}2DAa',
            lambda y, mode=mode: F.interpolate(y, size=4, mode=mode, antialias=True),
        )
        for mode in ('bilinear', 'bicubic')
    ),
    plain(
        'UpsampleNearestExact1D',
        lambda y: F.interpolate(y[..., 0], scale_factor=2, mode='nearest-exact'),
    ),
    plain(
        'UpsampleNearestExact3D',
        lambda y: F.interpolate(volume(y), size=4, mode='nearest-exact'),
    ),
    plain(
        'GridSampler3D',
        lambda y: F.grid_sample(volume(y), cube_grid(y), align_corners=False),
    ),
    plain('CudnnGridSampler', lambda y: gpu_grid_sample(y, grid(y))),
    plain('GridSampler2D', lambda y: F.grid_sample(y, grid(y), align_corners=False)),
    plain('RoIAlignFunction', lambda y: mmcv.ops.roi_align(y, rois(y), 2)),
    plain('RoIPoolFunction', lambda y: gpu_roi_pool(y, rois(y))),
    plain('ROIAlignFunction', lambda y: torchvision.ops.roi_align(y, rois(y), 2)),
    plain('ROIPoolFunction', lambda y: torchvision.ops.roi_pool(y, rois(y), 2)),
    # Positions are reduced, or mixed with one another.
    plain('Sum', lambda y: y.sum((2, 3))),
    plain('Mean', lambda y: y.mean((-2, -1), keepdim=True)),
    plain('Amax', lambda y: y.amax((2, 3))),
    plain('Amin', lambda y: y.amin((2, 3))),
    plain('Max', lambda y: y.max(2)[0]),
    plain('Min', lambda y: y.min(-1)[0]),
    plain('Std', lambda y: y.std((2, 3))),
    plain('Var', lambda y: y.var((2, 3))),
    plain('LinalgVectorNorm', lambda y: y.norm(dim=2)),
    plain('Norm', lambda y: aten.norm(y, 2, [2, 3], False)),
    plain('Logsumexp', lambda y: y.logsumexp((2, 3))),
    plain('Prod', lambda y: y.prod(3)),
    plain('VarMean', lambda y: torch.add(*torch.var_mean(y, (2, 3)))),
    plain('StdMean', lambda y: torch.add(*torch.std_mean(y, (2, 3)))),
    plain('Nansum', lambda y: y.nanmean((2, 3))),
    plain('Median', lambda y: y.flatten(2).median(2)[0]),
    plain('Nanmedian', lambda y: y.nanmedian(3)[0]),
    plain('Kthvalue', lambda y: y.kthvalue(2, 2)[0]),
    plain('Mode', lambda y: y.round(decimals=1).mode(3)[0]),
    plain('FftR2C', lambda y: torch.fft.rfft2(y).abs()),
    plain('FftC2R', lambda y: torch.fft.irfft2(torch.fft.rfft2(y))),
    plain('FftC2C', lambda y: torch.fft.ifft(torch.fft.fft(y, dim=3), dim=3).abs()),
    plain('FusedRmsNorm', lambda y: gpu_rms_norm(y)),
    plain('Softmax', lambda y: y.flatten(2).softmax(-1)),
    plain('LogSoftmax', lambda y: y.log_softmax(2)),
    plain('SafeSoftmax', lambda y: aten._safe_softmax(y, 2)),
    plain('Cumsum', lambda y: y.cumsum(3)),
    plain('NativeLayerNorm', lambda y: F.layer_norm(y, y.shape[2:])),
    # Elements are moved.
    plain('View', lambda y: y.view(len(y), -1), entries=(1, 64)),
    plain('View', channel_shuffle, units=3, entries=(2, 2)),
    plain('UnsafeView', lambda y: aten._unsafe_view(y, [2, -1, 64])),
    plain('ReshapeAlias', flat_alias, entries=(1, 64)),
    plain('Permute', lambda y: y.permute(0, 1, 3, 2)),
    plain('Transpose', lambda y: y.transpose(1, 3).transpose(-1, 1)),
    plain('T', lambda y: y.mean((2, 3)).t().t()),
    plain('Unsqueeze', lambda y: y.unsqueeze(-1)),
    plain('Squeeze', lambda y: y[..., :1].squeeze(-1)),
    plain('Slice', lambda y: y[:, :, 1:-2:2]),
    plain('Select', lambda y: y[..., -1]),
    plain('Split', halves_swapped, units=3, entries=(2, 2)),
    plain('Split', lambda y: y.split(4, 3)[1]),
    plain('SplitWithSizes', lambda y: y.split([5, 3], 2)[1]),
    plain('Unbind', lambda y: torch.add(*y[:, :, :2].unbind(2))),
    plain('Flip', lambda y: y.flip(2)),
    plain('Rot90', lambda y: y.rot90(1, (2, 3))),
    plain('Tril', lambda y: y.tril()),
    plain('Triu', lambda y: y.triu()),
    plain('Diagonal', lambda y: y.diagonal(dim1=2, dim2=3)),
    plain('Unfold', lambda y: y.unfold(2, 3, 2)),
    plain('AsStrided', lambda y: F.adaptive_avg_pool2d(channels_last(y), 1)),
    Case('Glu', lambda net, y: F.glu(y, 1), units=3, entries=(2, 1)),
    plain('Glu', lambda y: F.glu(y, 2)),
    Case(
        'ChannelShuffle',
        lambda net, y: F.channel_shuffle(y, 2),
        units=3,
        entries=(2, 2),
    ),
    plain('Convolution', lambda y: depthwise(y)),
    *(
        Case(
            'Convolution',
            lambda net, y: net.up(y),
            units=units,
            entries=(6 // units, outputs // units),
            also=(('up.weight', 0), ('up.bias', 0)),
            parts={'up': lambda g=units, o=outputs: transposed(g, o)},
            widths=(6 // units, outputs // units),
        )
        for units, outputs in ((6, 6), (6, 12), (3, 6), (2, 4))
    ),
    plain('IndexSelect', lambda y: y.index_select(3, torch.tensor([5, 0, 0]))),
    plain('Repeat', lambda y: y.repeat(1, 2, 1, 1), entries=(1, 2)),
    plain('ConstantPadNd', lambda y: F.pad(y, (1, 0, 0, 2))),
    plain('Index', lambda y: y[torch.tensor([1, 0, 1])]),
    plain('Index', lambda y: y[:, :, torch.tensor([1, 0]), torch.tensor([2, 2])]),
    plain('IndexPut', lambda y: y.clone().index_put_((torch.tensor(0),), y[1])),
    plain('IndexPut', assigned),
    plain('IndexPutImpl', lambda y: aten._index_put_impl(y.clone(), [FIRST], y[1:])),
    plain('Cat', lambda y: torch.cat([y, y.relu()], 1), entries=(1, 2)),
    plain('Cat', lambda y: torch.cat([y, y.relu()], 0)),
    joined('Stack', lambda y, z: torch.stack([y, z], 2)),
    plain('PixelShuffle', lambda y: F.pixel_shuffle(y, 2), **QUARTETS),
    # Positions.
    plain('Gather', lambda y: y.gather(3, torch.zeros_like(y[..., :3]).long())),
    plain('Roll', lambda y: y.roll(1, 2)),
    plain('CopyBackwards', lambda y: torch.zeros_like(y).copy_(y)),
    plain('CopySlices', lambda y: framed(y)),
    plain('Topk', lambda y: y.topk(3, 3)[0]),
    plain('Sort', lambda y: y.sort(2)[0]),
    plain('Cummax', lambda y: y.cummax(2)[0]),
    plain('Cummin', lambda y: y.cummin(2)[0]),
    plain('Cumprod', lambda y: y.cumprod(3)),
    plain('Im2Col', lambda y: F.unfold(y, 2), entries=(1, 4)),
    plain('PixelUnshuffle', lambda y: F.pixel_unshuffle(y, 2), entries=(1, 4)),
    plain('Col2Im', lambda y: F.fold(y.flatten(2), (16, 16), 2, stride=2), **QUARTETS),
    plain('Slice', halves_sliced, units=3, entries=(2, 2)),
    # Products of activations.
    plain('Bmm', lambda y: torch.bmm(y.flatten(2), torch.ones(2, 64, 3).to(y))),
    plain('Baddbmm', lambda y: y.new_ones(1, 1, 3).baddbmm(*factors(y))),
    plain('Bmm', lambda y: torch.bmm(heads(y), heads(y).mT).unflatten(0, (2, -1))),
    joined(FUSED_ATTENTION[0], lambda y, z: F.scaled_dot_product_attention(y, z, y)),
    *(gpu_attention(op) for op in FUSED_ATTENTION[1:]),
    # Layers.
    plain('Convolution', lambda y: y),
    Case(
        'DeformConv2dFunction',
        deformed,
        parts={'dcn': lambda: mmcv.ops.DeformConv2d(6, 5, 3, padding=1)},
    ),
    Case(
        'ModulatedDeformConv2dFunction',
        lambda net, y: deformed(net, y, 1, y.new_full((2, 9, 8, 8), 0.5)),
        parts={'dcn': lambda: mmcv.ops.ModulatedDeformConv2d(6, 5, 3, padding=1)},
    ),
    Case(
        'DeformConv2dFunction',
        lambda net, y: deformed(net, y, 2),
        units=3,
        entries=(2, 2),
        parts={'dcn': lambda: mmcv.ops.DeformConv2d(6, 5, 3, 1, 1, deform_groups=2)},
    ),
    plain('Addmm', lambda y: y.mean((2, 3))),
    Case(
        'Mm',
        lambda net, y: net.fc(y.mean((2, 3))),
        parts={'fc': lambda: nn.Linear(6, 5, bias=False)},
    ),
]


#: Ops that leave no channel of ``a`` prunable, and what the reason says beside the op.
FROZEN = [
    (
        'CheckpointFunction',
        'use_reentrant=False',
        lambda y: checkpoint(torch.relu, y, use_reentrant=True),
    ),
    ('Softmax', 'normalised together', lambda y: y.softmax(1)),
    ('LogSoftmax', 'normalised together', lambda y: y.log_softmax(-3)),
    ('Cumsum', 'normalised together', lambda y: y.cumsum(1)),
    ('NativeLayerNorm', 'normalised together', lambda y: channels_last_norm(y)),
    ('Mean', 'reduced', lambda y: y * y.mean(1, keepdim=True)),
    ('Sum', 'reduced', lambda y: y * y.sum()),
    ('Max', 'reduced', lambda y: y.max(1, keepdim=True)[0]),
    ('LinalgVectorNorm', 'reduced', lambda y: y / y.norm(dim=1, keepdim=True)),
    ('Slice', 'single channel', lambda y: y[:, :1]),
    ('Select', 'single channel', lambda y: y[:, 2].unsqueeze(1)),
    ('Unbind', 'single channel', lambda y: torch.stack(y.unbind(1), -1)),
    ('MaxPool2DWithIndices', 'positions', lambda y: F.max_pool2d(y.transpose(1, 2), 1)),
    ('Convolution', 'positions', lambda y: y.permute(0, 2, 1, 3)),
    ('Convolution', 'fixed weight', lambda y: F.conv2d(y, torch.ones(5, 6, 1, 1))),
    ('AsStrided', 'strides', lambda y: y.as_strided(y.shape, y.stride())),
    ('Rot90', 'moved along', lambda y: y.rot90(2, (1, 2))),
    ('Diagonal', 'diagonal', lambda y: y.diagonal(dim1=1, dim2=2).mT[..., None]),
    ('Unfold', 'windows', lambda y: y.unfold(1, 2, 2).flatten(3)),
    ('FlashAttention', 'an activation', lambda y: whole('FlashAttention', y)),
    ('EfficientAttention', 'activation', lambda y: whole('EfficientAttention', y)),
    *(
        (op, 'recurrent', lambda y, op=op: whole(op, y))
        for op in (
            'CudnnRnn',
            'MiopenRnn',
            'MkldnnRnnLayer',
            'ThnnFusedLstmCell',
            'ThnnFusedGruCell',
        )
    ),
    ('Add', 'fixed width', lambda y: y + constant(6, 1, 1)),
    ('Stack', 'fixed width', lambda y: torch.stack([y, constant(2, 6, 8, 8)], 2)),
    ('IndexPut', 'overwritten', lambda y: overwritten(y)),
    ('Gather', 'picked', lambda y: y.gather(1, torch.zeros_like(y).long())),
    ('Roll', 'shifted', lambda y: y.roll(1, 1)),
    ('Sort', 'ordered', lambda y: y.sort(1)[0]),
    ('CopySlices', 'overwritten', lambda y: channel_overwritten(y)),
    ('Scatter', 'data decides', lambda y: y.scatter(3, first(y), y)),
    ('ScatterAdd', 'data decides', lambda y: y.scatter_add(3, first(y), y)),
    (
        'ScatterReduce',
        'data decides',
        lambda y: y.scatter_reduce(3, first(y), y, 'amax'),
    ),
    ('IndexAdd', 'data decides', lambda y: y.index_add(0, torch.tensor([0, 0]), y)),
    ('MaskedSelect', 'data decides', lambda y: y.masked_select(y == y).view(y.shape)),
    ('Bmm', 'an activation', lambda y: torch.bmm(y.flatten(2).mT, y.flatten(2))),
    ('Mv', 'an activation', lambda y: y * (rows(y) @ y[0, :, 0, 0]).sum()),
    ('Dot', 'an activation', lambda y: y * torch.dot(y.flatten(), y.flatten())),
    ('Cdist', 'an activation', lambda y: distances(y, 'donot_use_mm')),
    ('EuclideanDist', 'an activation', lambda y: distances(y, 'use_mm')),
    ('MultiScaleDeformableAttnFunction', 'an activation', lambda y: multi_scale(y)),
    ('Bmm', 'fixed width', lambda y: torch.bmm(heads(y), y.new_ones(12, 8, 8))),
    (
        'Baddbmm',
        'an activation',
        lambda y: y.new_ones(12, 8, 8).baddbmm(heads(y), heads(y)),
    ),
    *((op, 'an activation', partial(pixel_attention, op)) for op in FUSED_ATTENTION),
    (FUSED_ATTENTION[0], 'fixed width', lambda y: attention_to_ones(y)),
    (FUSED_ATTENTION[1], 'fixed width', lambda y: shared_keys(y, y[:, :3])),
]


def whole(op, y):
    """An op that stands in for one which reads a tensor in its own way."""
    return stand_in(op, lambda ctx, y: y * 1)(y)


def first(y):
    """Indices that pick the first element along any dimension."""
    return torch.zeros_like(y).long()


def factors(y):
    return y.flatten(2), y.new_ones(2, 64, 3)


def rows(y):
    return y.permute(0, 2, 3, 1).reshape(-1, y.shape[1])


def heads(y):
    return y.flatten(0, 1)  # (N C, H, W)


def as_offsets(net, y):
    offsets = torch.cat([y] * 3, 1)
    return mmcv.ops.deform_conv2d(images().to(y), offsets, net.b.weight, 1, 1)


def distances(y, mode):
    points = y.flatten(2).mT  # (N, HW, C)
    return torch.cdist(points, points, compute_mode=f'{mode}_for_euclid_dist')


def unpooled(y, dims):
    pool, unpool = [(F.max_pool2d, F.max_unpool2d), (F.max_pool3d, F.max_unpool3d)][
        dims - 2
    ]
    return unpool(*pool(y, 2, return_indices=True), 2)


def volume(y):
    return y.unsqueeze(2).expand(-1, -1, 8, -1, -1)  # (N, C, 8, H, W)


def cube_grid(y):
    return torch.zeros(2, 3, 3, 3, 3).to(y)


def depthwise(y):
    return F.conv2d(y, y.new_ones(y.shape[1], 1, 3, 3), groups=y.shape[1])


def framed(y):
    out = y.new_zeros(2, y.shape[1], 10, 10)
    out[:, :, 1:9, 1:9] = y
    return out


def channel_overwritten(y):
    y = y.clone()
    y[:, :1] = 1.0
    return y


def channels_last_norm(y):
    return F.layer_norm(y.permute(0, 2, 3, 1), (6,)).permute(0, 3, 1, 2)


def constant(*shape):
    """A tensor in the graph that belongs to no module."""
    return torch.ones(shape, requires_grad=True) * 2


def overwritten(y):
    y = y.clone()
    y[torch.tensor([0])] = torch.ones(1, 6, 8, 8)
    return y


def ops_in(tensor):
    """Names of all ops in the autograd graph of ``tensor``."""
    seen, stack = set(), [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [n for n, _ in node.next_functions]
    return {op_name(n) for n in seen}


@pytest.mark.parametrize('case', CASES, ids=lambda c: c.op)
def test_channels_pass(case):
    net, x = case.net(), images()
    assert case.op in ops_in(net(x))
    grouping = grouped(net)
    first = next(g for g in grouping.groups if g.name == 'a')
    made, read = case.entries
    reader = next(m.name for m in first.members if m.role == 'in')
    expected = {('a.weight', 0): made, ('a.bias', 0): made, (reader, 1): read}
    assert first.units == case.units
    also = case.widths or (1,) * len(case.also)
    assert widths(first) == expected | dict(zip(case.also, also, strict=True))

    kept = random_units(grouping.groups, 0.3, np.random.default_rng(0))
    assert disagreement(net, grouping.groups, kept, lambda net: net(x)) is None


@pytest.mark.parametrize('case', CASES, ids=lambda c: c.op)
def test_masks_do_something(case):
    net, x = case.net().eval(), images()
    grouping = grouped(net)
    kept = random_units(grouping.groups, 0.3, np.random.default_rng(0))
    masked, small = masked_and_compact(net, grouping.groups, kept)
    with torch.no_grad():
        assert difference(net(x), masked(x)) > 1e-4
    assert parameters_in(small) < parameters_in(net)


FROZEN_CASES = [
    *((words, plain(op, run)) for op, words, run in FROZEN),
    ('as offsets', Case('DeformConv2dFunction', as_offsets)),
]


@pytest.mark.parametrize(
    ('words', 'case'), FROZEN_CASES, ids=[case.op for _, case in FROZEN_CASES]
)
def test_channels_freeze(words, case):
    net = case.net()
    assert case.op in ops_in(net(images()))
    grouping = grouped(net)
    assert 'a' not in [g.name for g in grouping.groups]
    (frozen,) = [f for f in grouping.frozen if f.layer == 'a']
    assert words in frozen.reason and frozen.reason.endswith(f' {case.op}')
    assert frozen.channels == 6


@pytest.mark.parametrize('kind', [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_stay_with_what_they_read(kind):
    parts = {'rnn': lambda: kind(6, 6, batch_first=True)}
    net = Case('', lambda net, y: recur(net.rnn, y), parts=parts).net()
    grouping = grouped(net)
    assert not grouping.groups
    (reason,) = [f.reason for f in grouping.frozen if f.layer == 'a']
    assert re.search('read or made by (the|a) recurrent layer', reason)


def recur(rnn, y):
    return rnn(y.mean(3).transpose(1, 2))[0].transpose(1, 2)


def test_an_elementwise_function_of_ones_own_takes_one_line():
    class Twice(Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    net = Case('Twice', lambda net, y: Twice.apply(y)).net()
    assert not grouped(net).groups
    register_elementwise('Twice')
    try:
        assert [g.units for g in grouped(net).groups] == [6]
    finally:
        del LABEL_RULES['Twice']


def test_every_rule_is_tested():
    tested = {c.op for c in CASES} | {op for op, _, _ in FROZEN}
    assert set(LABEL_RULES) - tested == set(), 'add a line to CASES or FROZEN above'


@pytest.mark.parametrize(('rules', 'op'), [(LABEL_RULES, 'Relu'), (ROW_RULES, 'Flip')])
def test_a_second_rule_for_an_op_is_refused(rules, op):
    kind, name = ('label', 'elementwise') if op == 'Relu' else ('row', 'pick')
    with pytest.raises(KeyError, match=f'op {op!r} has the {kind} rule {name} already'):
        rules.register(op)(lambda ctx, operands: None)
    assert rules[op].__name__ == name
