"""Latency profiles made up by hand."""

import json

from mmgfp.selection.latency_profile import (
    VERSION,
    KindLatency,
    LatencyProfile,
    LayerLatency,
)


def made_up(shapes, profiles, origin=None, **kinds):
    """A profile in which each layer takes a microsecond for 1,000 MACs.

    A tenth of it stays however narrow the layer is.

    Args:
        shapes: Shapes of parameters by name.
        profiles: How often layers use their weights.
        origin: Where it comes from.
        **kinds: Kinds of layers; the first one is that of all.
    """
    kinds = kinds or {'conv': KindLatency()}
    layers = {}
    for name, layer in profiles.items():
        macs = layer.macs_positions
        for size in shapes[name]:
            macs *= size
        time = macs * 1e-6
        times = (0.1 * time, 0.0, 0.0, 0.9 * time)
        shape, positions = tuple(shapes[name]), layer.macs_positions
        layers[name] = LayerLatency(
            next(iter(kinds)), shape, layer.out_dim, positions, times
        )
    known = dict(runtime='onnxruntime', version='9.9', threads=1, device='cpu')
    known |= dict(input_shape=[3, 64, 64])
    return LatencyProfile(known | (origin or {}), kinds, layers)


def write(profile, path):
    """Write a profile as the tool does."""
    origin, fit = dict(profile.origin), profile.to_dict()
    path.write_text(json.dumps(dict(version=VERSION, origin=origin, fit=fit)))
    return str(path)
