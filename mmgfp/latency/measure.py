"""Profiling of a model's latency, cut by cut, so that it can be interrupted."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mmgfp.groups import Grouping
from mmgfp.latency.check import Check
from mmgfp.latency.cuts import (
    ALIGNED,
    checking_cuts,
    fitting_cuts,
    kept_units,
    with_whole,
)
from mmgfp.latency.fit import Layer, fit_profile, merged
from mmgfp.latency.pieces import pieces_of, roi_counts
from mmgfp.latency.timers import LayerTimer
from mmgfp.selection.costs import CostTable, LayerProfile
from mmgfp.selection.latency import Latency
from mmgfp.selection.latency_profile import VERSION, LatencyProfile
from mmgfp.surgery.compact import compact
from mmgfp.surgery.structure import PruneStructure, shapes_of
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.io import atomic_write
from mmgfp.utils.layers import is_layer, output_dim
from mmgfp.utils.steps import advance_step, begin_step
from mmgfp.version import __version__

#: The share of MACs in layers that a runtime does not run, from which on it is refused.
UNSEEN = 0.01
#: How often the whole model is measured among the cuts, and among the checks.
WHOLE_FITTED = 5
WHOLE_CHECKED = 3


def processor(device: str = 'cpu') -> str:
    """Return the name of the processor or the GPU."""
    if device != 'cpu':
        return torch.cuda.get_device_name()
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [x.partition(':')[2].strip() for x in lines if x.startswith('model name')]
    flags = next((x.split() for x in lines if x.startswith('flags')), [])
    vector = next((f for f in ('avx512f', 'avx2', 'avx') if f in flags), '')
    name = models[0] if models else platform.processor() or platform.machine()
    return f'{name} {vector}'.strip()


class LatencyProfiler:
    """Measures a model at random widths, and goes on where it was interrupted.

    Args:
        model: The unpruned model; it is left as it is.
        grouping: Its groups.
        profiles: How often its layers use their weights for one image.
        timer: The runtime.
        shape: Size (C, H, W) of an image.
        path: The file of the profile.
        batch: Number of images.
        origin: Further entries of `LatencyProfile.origin`.
        notify: Called with a line of text after each cut.

    Raises:
        ConfigError: If the file holds another model's profile, or one of another
            machine.
    """

    def __init__(
        self,
        model: nn.Module,
        grouping: Grouping,
        profiles: Mapping[str, LayerProfile],
        timer: LayerTimer,
        shape: Sequence[int],
        path: str | Path,
        batch: int = 1,
        origin: Mapping[str, Any] | None = None,
        notify: Callable[[str], Any] = print,
    ) -> None:
        self.model, self.grouping, self.profiles = model, grouping, dict(profiles)
        self.timer, self.shape, self.batch = timer, tuple(shape), batch
        self.path, self.notify = Path(path), notify
        self.sizes = np.array([g.units for g in grouping.groups])
        self.widths = np.array(
            [next(m.width for m in g.members if m.is_output) for g in grouping.groups]
        )
        self.shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
        self.costs = CostTable(self.shapes, self.profiles, grouping.groups)
        self.raw: dict[str, Any] = {
            'version': VERSION,
            'origin': self._origin(origin or {}),
            'model': {n: list(self.shapes[n]) for n in self.profiles},
            'cuts': [],
            'checks': {},
            'fit': None,
        }
        if self.path.exists():
            self._go_on()

    def _origin(self, more: Mapping[str, Any]) -> dict[str, Any]:
        timer = self.timer
        return {
            'runtime': type(timer).name,
            'version': timer.version,
            'device': timer.device,
            'processor': processor(timer.device),
            'threads': timer.threads,
            'precision': 'float32',
            'batch': self.batch,
            'input_shape': list(self.shape),
            'rois': roi_counts(self.model),
            'mmgfp': __version__,
            **more,
        }

    def _go_on(self) -> None:
        """Take over what the file holds, if it is of the same model and machine."""
        remedy = 'name another file with --out, or delete this one'
        try:
            raw = json.loads(self.path.read_text())
            version, origin, model = raw['version'], raw['origin'], raw['model']
            cuts, checks = list(raw['cuts']), dict(raw['checks'])
        except (ValueError, KeyError, TypeError) as error:
            got = f'{type(error).__name__}: {error}'
            raise ConfigError(str(self.path), 'a profile', got, remedy) from None
        ours = {'version of the file': VERSION, **self.raw['origin']}
        theirs = {'version of the file': version, **origin}
        theirs.pop('not_measured', None)  # which only measuring tells
        ours |= {f'the shape of {name}': s for name, s in self.raw['model'].items()}
        theirs |= {f'the shape of {name}': s for name, s in model.items()}
        for name in {**ours, **theirs}:
            expected, got = repr(ours.get(name)), repr(theirs.get(name))
            if expected != got:
                raise ConfigError(f'{name} in {self.path}', expected, got, remedy)
        self.raw |= {'origin': origin, 'cuts': cuts, 'checks': checks}
        if cuts:
            self.notify(f'{self.path} holds {len(cuts)} cuts: going on there')

    def measure(self, cuts: int = 25, seed: int = 0) -> LatencyProfile:
        """Measure what is missing of the cuts, fit, and write the profile.

        Args:
            cuts: Number of cuts, one of which is the whole model.
            seed: Makes the cuts random.
        """
        rng = np.random.default_rng(seed)
        plan = fitting_cuts(self.sizes, self.widths, cuts, rng)[1:]
        self._measure_missing(plan, WHOLE_FITTED, self.raw['cuts'], 'cut')
        profile = self._fit()
        self.raw['fit'] = profile.to_dict()
        self._save()
        return profile

    def check(
        self,
        profile: LatencyProfile,
        cuts: int = 10,
        multiple: int = ALIGNED,
        seed: int = 1,
    ) -> list[Check]:
        """Predict and measure the whole model again, and cuts that were not fitted to.

        Args:
            profile: The profile.
            cuts: Number of cuts, of 20 to 70 % of the MACs.
            multiple: What their widths are multiples of.
            seed: Makes the cuts random.
        """
        costs = {'latency': Latency(profile)}
        table = CostTable(self.shapes, self.profiles, self.grouping.groups, costs)
        full = table.totals(np.zeros(len(self.sizes)))
        groups = (self.costs, self.sizes, self.widths)
        rng = np.random.default_rng([seed, multiple])
        plan = checking_cuts(*groups, cuts, multiple, rng)
        stored = self.raw['checks'].setdefault(str(multiple), [])
        self._measure_missing(plan, WHOLE_CHECKED, stored, 'check')
        measured = {
            tuple(cut['units']): sum(cut['times'].values()) for cut in merged(stored)
        }
        whole = full['latency'], measured[tuple(self.sizes.tolist())]
        checks = []
        for units in [self.sizes, *plan]:
            totals = table.totals(self.sizes - units)
            macs, predicted = totals.ratio('macs', full), totals['latency']
            time = measured[tuple(units.tolist())]
            checks.append(Check(macs, predicted, time, whole))
        return checks

    def _measure_missing(
        self, cuts: list[np.ndarray], whole: int, stored: list[Any], what: str
    ) -> None:
        """Measure the cuts that are not stored yet, and the whole model among them."""
        plan = with_whole(cuts, self.sizes, whole)
        left = Counter(tuple(cut['units']) for cut in stored)
        begin_step(f'measuring each {what}', len(plan))
        for i, units in enumerate(plan):
            key = tuple(units.tolist())
            is_whole = key == tuple(self.sizes.tolist())
            if left[key] > 0:  # measured before, or twice in the plan of a small model
                left[key] -= is_whole
                advance_step()
                continue
            stored.append(self._measure(units))
            left[key] += not is_whole
            self._save()
            label = f'{what} {i + 1} of {len(plan)}' + ', the whole model' * is_whole
            self._report(label, stored[-1])
            advance_step()

    def _report(self, what: str, cut: Mapping[str, Any]) -> None:
        self.notify(f'{what}: {sum(cut["times"].values()):.4g} ms')

    def _measure(self, units: np.ndarray) -> dict[str, Any]:
        """Return widths and times of all layers with so many units in each group."""
        groups = self.grouping.groups
        kept = kept_units(groups, units)
        structure = PruneStructure.of(groups, kept, shapes_of(self.model))
        small = compact(self.model, structure).eval()
        pieces = pieces_of(small, self.shape, self.batch)
        times: dict[str, float] = {}
        for piece in pieces:
            for name, value in self.timer.measure(piece).items():
                times[name] = times.get(name, 0.0) + value
        self._check_seen(times)
        parameters = dict(small.named_parameters())
        out = {n: self.profiles[n].out_dim for n in times if n in self.profiles}
        return {
            'units': units.tolist(),
            'times': times,
            'widths': {
                n: [parameters[n].shape[1 - d], parameters[n].shape[d]]
                for n, d in out.items()
            },
        }

    def _check_seen(self, times: Mapping[str, float]) -> None:
        """Note the layers that were not measured; refuse it if they are many.

        Raises:
            ConfigError: If they do more than a hundredth of the MACs.
        """
        macs = {
            n: p.macs_positions * float(np.prod(self.shapes[n]))
            for n, p in self.profiles.items()
        }
        unseen = [n for n, value in macs.items() if value > 0 and n not in times]
        share = sum(macs[n] for n in unseen) / max(sum(macs.values()), 1)
        if share > UNSEEN:
            raise ConfigError(
                'the model',
                'one whose layers all run in the measured graph',
                f'{", ".join(unseen[:3])}, in all {share:.1%} of the MACs, unseen',
                'its latency cannot be predicted; take flops or memory as the target',
            )
        self.raw['origin'].setdefault('not_measured', sorted(unseen))

    def _fit(self) -> LatencyProfile:
        layers = {
            name: Layer(
                kind_of(module), self.shapes[weight], self.profiles[weight].out_dim
            )
            for name, module in self.model.named_modules()
            for weight in [f'{name}.weight']
            if is_layer(module) and weight in self.profiles
        }
        layers = {f'{n}.weight': layer for n, layer in layers.items()}
        measured = self.raw['cuts'][0]['times']
        layers = {n: layer for n, layer in layers.items() if n in measured}
        return fit_profile(self.raw['origin'], layers, self.profiles, self.raw['cuts'])

    def _save(self) -> None:
        text = json.dumps(self.raw)
        atomic_write(self.path, lambda tmp: tmp.write_text(text))


def kind_of(module: Any) -> str:
    """Return the kind of a layer, whose members share how multiples matter.

    Examples:
        >>> kind_of(nn.Conv2d(8, 8, 3, groups=8)), kind_of(nn.Linear(2, 3))
        ('depthwise', 'linear')
    """
    if isinstance(module, nn.Linear):
        return 'linear'
    if output_dim(module):
        return 'transposed'
    if module.groups > 1:
        return 'depthwise' if module.weight.shape[1] == 1 else 'grouped'
    if max(module.kernel_size) == 1:
        return 'pointwise'
    return 'conv'
