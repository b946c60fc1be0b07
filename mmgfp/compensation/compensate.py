"""Making up for removed channels: what reads them is refitted to give what it gave.

When channels go, the layers that read them can take from others what they have lost.
Each is refitted by least squares, so that on real images it gives the outputs of the
original model: ThiNet (Luo et al., 2017, arXiv 1707.06342), channel pruning by
reconstruction (He et al., 2017, arXiv 1707.06168) and optimal brain compression
(Frantar et al., 2022, arXiv 2208.11580) do so. The error at each position is weighted
by the squared gradient of the loss there. As in K-FAC (Martens and Grosse, 2015, arXiv
1503.05671, section 3), inputs and gradients are taken as independent within an output:
the loss then rises by half of sum f |x W' - y|^2, in the sense in which the paper's
importance is half a squared gradient (arXiv 2108.00708, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mmgfp.compensation.norms import renew_norms
from mmgfp.compensation.options import CompensationConfig
from mmgfp.compensation.recording import Call, evaluating, run_until
from mmgfp.compensation.refit import Moments, refit
from mmgfp.compensation.sampling import Target, add_call, held_out
from mmgfp.compensation.survey import Layer, Norm, Survey, survey
from mmgfp.compensation.teacher import Teacher
from mmgfp.groups import Grouping
from mmgfp.surgery.compact import compact
from mmgfp.surgery.structure import PruneStructure, shapes_of
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.trial_runs import all_parameters_require_grad, without_checkpointing

#: Called with how many layers are done, and of how many.
Progress = Callable[[int, int], None]
UNPAIRED = 'it works on other rows in the compact model than in the original'


@dataclass(frozen=True)
class LayerReport:
    """The outcome for a layer that the removed channels reach.

    Attributes:
        layer: Name of the layer's weight.
        before: Error of its outputs on held-out images as cut, as a share of their
            energy, both weighted; None if it was not measured.
        after: Error with the weights that it has now.
        ridge: The ridge that was chosen; None if the weights are those of the cut.
        uniform: The share in which all positions count alike.
        reason: Why they are, else None.
    """

    layer: str
    before: float | None = None
    after: float | None = None
    ridge: float | None = None
    uniform: float | None = None
    reason: str | None = None


def refitting_text(layers: Sequence[LayerReport]) -> str:
    """Return how many layers were refitted, and how well on average, for people."""
    refitted = [layer for layer in layers if layer.reason is None]
    text = f'{len(refitted)} of {len(layers)} layers refitted'
    if refitted:
        before = np.mean([layer.before for layer in refitted])
        after = np.mean([layer.after for layer in refitted])
        text += f', held-out error {before:.4f} -> {after:.4f}'
    return text


@dataclass(frozen=True)
class Compensated:
    """A compact model, and how it was made up for what it lost.

    Attributes:
        model: The model, of the class of the original.
        layers: What became of each layer that the removed channels reach, in forward
            order.
        norms: Batch norms whose statistics were taken anew.
    """

    model: nn.Module
    layers: tuple[LayerReport, ...]
    norms: tuple[str, ...]

    @property
    def refitted(self) -> tuple[LayerReport, ...]:
        """The layers that have new weights."""
        return tuple(r for r in self.layers if r.reason is None)


def compensate(
    model: nn.Module,
    grouping: Grouping,
    kept: np.ndarray,
    calls: Sequence[Call],
    config: CompensationConfig | None = None,
    progress: Progress = lambda done, total: None,
) -> Compensated:
    """Return a compact model that is refitted to give what the original gives.

    Args:
        model: The original model; it is left as it is.
        grouping: Its groups.
        kept: Which units remain, (U,).
        calls: Run a model on one batch each, the same one every time. For
            ``'fisher'`` each returns the loss, a scalar; for other methods anything.
        config: The options; the defaults if None.
        progress: Called with how many layers are done, and of how many, as often as
            some are.

    Raises:
        ConfigError: If there are fewer than two batches, or ``kept`` is not of the
            groups.
    """
    config = config or CompensationConfig()
    _check(grouping, kept, calls)
    structure = PruneStructure.of(grouping.groups, kept, shapes_of(model))
    small = compact(model, structure)
    with (
        evaluating(model),
        evaluating(small),
        without_checkpointing(),
        all_parameters_require_grad(model),
    ):  # else frozen stages cut the graph
        found = survey(
            model,
            small,
            grouping,
            kept,
            structure,
            calls[0],
            config.method == 'fisher',
        )
        run = _Compensation(model, small, calls, found, config, progress)
        return Compensated(small, tuple(run.run()), tuple(run.renewed))


def _check(grouping: Grouping, kept: np.ndarray, calls: Sequence[Call]) -> None:
    if np.shape(kept) != (grouping.units,):
        raise ConfigError(
            'kept',
            f'one entry for each of {grouping.units} units',
            str(np.shape(kept)),
            'give it for the same grouping',
        )
    if len(calls) < 2:
        raise ConfigError(
            'calls',
            'two batches or more, as some are held out',
            str(len(calls)),
            'give smaller batches',
        )


class _Compensation:
    """One run of `compensate`, in eval mode."""

    def __init__(
        self,
        model: nn.Module,
        small: nn.Module,
        calls: Sequence[Call],
        found: Survey,
        config: CompensationConfig,
        progress: Progress,
    ) -> None:
        self.model, self.small, self.calls = model, small, calls
        self.found, self.config, self.progress = found, config, progress
        self.held_out = held_out(len(calls), config.held_out)
        self.renewed: list[str] = []
        for layer in found.layers if config.norms == 'none' else ():
            layer.norms = ()  # nothing would take a shift back
        self.reports = {
            layer.weight: LayerReport(layer.weight, reason=self._reason(layer))
            for layer in found.layers
        }

    def _reason(self, layer: Layer) -> str | None:
        if layer.reason is not None:
            return layer.reason
        if self.config.method == 'bn':
            return "the method is 'bn'"
        inputs = layer.system.inputs
        if inputs > self.config.max_inputs:
            return f'it has {inputs} inputs, more than max_inputs'
        if self.config.one_pass and not layer.loses_inputs:
            return 'it reads no removed channel itself, and one_pass is set'
        return None

    def run(self) -> list[LayerReport]:
        """Refit, take norms anew, and report."""
        config, found = self.config, self.found
        layers = [x for x in found.layers if self.reports[x.weight].reason is None]
        self.done, self.total = 0, len(layers)
        self.progress(0, self.total)
        teacher = Teacher(self.model, self.calls, layers, config)
        if config.method == 'bn' or config.one_pass:
            self._refit_all(teacher, layers)
            self._renew(found.norms)
        else:
            levels = {x.level for x in found.layers} | {x.level for x in found.norms}
            for level in sorted(levels):
                self._refit_all(teacher, [x for x in layers if x.level == level])
                self._renew([norm for norm in found.norms if norm.level == level])
        others = [LayerReport(n, reason=r) for n, r in found.others.items()]
        return [*self.reports.values(), *others]

    def _refit_all(self, teacher: Teacher, layers: Sequence[Layer]) -> None:
        """Refit layers of which none reads what another one writes."""
        for part in self._parts(layers):
            self._refit(teacher, part)
            self.done += len(part)
            self.progress(self.done, self.total)

    def _parts(self, layers: Sequence[Layer]) -> Iterator[list[Layer]]:
        """Yield layers that share a pass, as their moments fit into memory together."""
        part: list[Layer] = []
        size = 0
        for layer in layers:
            own = sum(m.nbytes for m in self._moments_of(layer, 'meta')) * 2
            if part and size + own > self.config.memory:
                yield part
                part, size = [], 0
            part.append(layer)
            size += own
        if part:
            yield part

    def _moments_of(self, layer: Layer, device: torch.device | str) -> list[Moments]:
        """Return empty moments for each way to weigh positions."""
        system = layer.system
        sizes = (system.groups, system.inputs, system.outputs, device)
        return [Moments(*sizes) for _ in self.config.shares[0]]

    def _refit(self, teacher: Teacher, layers: Sequence[Layer]) -> None:
        """Refit layers in one pass over the batches."""
        moments = {
            x.weight: [self._moments_of(x, x.system.matrix().device) for _ in range(2)]
            for x in layers
        }
        for batch in range(len(self.calls)):
            self._add(teacher, batch, layers, moments)
        for layer in layers:
            if self.reports[layer.weight].reason is not None:  # its rows did not fit
                continue
            system = layer.system
            fit, held = moments[layer.weight]
            options = (self.config.ridges, self.config.shares, system.free_bias)
            result = refit(fit, held, system.matrix(), *options)
            if result.weight is not None:
                system.write(result.weight)
                self._shift(layer, result.weight)
            self.reports[layer.weight] = LayerReport(
                layer.weight,
                result.before,
                result.after,
                result.ridge,
                result.shares[-1] if result.shares else None,
                result.reason,
            )
        teacher.forget(layers)

    def _add(
        self,
        teacher: Teacher,
        batch: int,
        layers: Sequence[Layer],
        moments: Mapping[str, Sequence[Sequence[Moments]]],
    ) -> None:
        """Add a batch to the moments of some layers."""
        one_pass = self.config.one_pass
        targets = teacher.targets(batch, layers, with_inputs=one_pass)
        missing = {weight: iter(calls) for weight, calls in targets.items()}

        def add(weight: str, x: Tensor, target: Target | None) -> None:
            system = systems[weight]
            if target is None or target.count != system.count(x):
                self.reports[weight] = LayerReport(weight, reason=UNPAIRED)
            else:
                sums = moments[weight][self.held_out[batch]]
                add_call(sums, system, x, target)

        systems = {x.weight: x.system for x in layers}
        if one_pass:
            for weight, calls in targets.items():
                for target in calls:
                    assert target.x is not None
                    add(weight, target.x, target)
            return
        modules = {x.weight: x.small for x in layers}
        counts = {x.weight: x.calls for x in layers}

        def seen(weight: str, x: Tensor, y: Tensor) -> None:
            add(weight, x, next(missing[weight], None))

        run_until(self.small, self.calls[batch], modules, counts, seen)

    @torch.no_grad()
    def _shift(self, layer: Layer, weight: Tensor) -> None:
        """Let the norms that read a layer add the bias that it was fitted with.

        They subtract running means from y = x W + b, so from x W those means without b.
        """
        modules = {norm.name: norm.small for norm in self.found.norms}
        for name in layer.norms:
            modules[name].running_mean -= (
                weight[:, -1].flatten().to(modules[name].weight)
            )

    def _renew(self, norms: Sequence[Norm]) -> None:
        """Take statistics anew, but for norms that suit what refitted layers give."""
        if self.config.norms == 'none':
            return
        if self.config.norms == 'others':
            refitted = [
                x for x in self.found.layers if not self.reports[x.weight].reason
            ]
            fitting = {name for layer in refitted for name in layer.norms}
            norms = [norm for norm in norms if norm.name not in fitting]
        renew_norms(self.small, self.calls, norms)
        self.renewed += [norm.name for norm in norms]
