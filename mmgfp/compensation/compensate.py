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

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from mmgfp.compensation.layer_fit import LayerFit
from mmgfp.compensation.norms import move_norms
from mmgfp.compensation.options import CompensationConfig
from mmgfp.compensation.recording import Call, evaluating, run_until
from mmgfp.compensation.reports import Compensated, LayerReport
from mmgfp.compensation.sampling import held_out
from mmgfp.compensation.survey import Layer, Norm, Survey, survey
from mmgfp.compensation.teacher import Teacher
from mmgfp.groups import Grouping
from mmgfp.surgery.compact import compact
from mmgfp.surgery.structure import PruneStructure, shapes_of
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.trial_runs import all_parameters_require_grad, without_checkpointing

#: Called with how many layers are done, and of how many.
Progress = Callable[[int, int], None]


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
    gone = grouping.blocks_among(~kept)
    structure = PruneStructure.of(grouping.groups, kept, shapes_of(model), gone)
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
        return Compensated(small, tuple(run.run()), tuple(run.moved))


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
        self.moved: list[str] = []
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
        if self.config.one_pass and not layer.loses_inputs:
            return 'it reads no removed channel itself, and one_pass is set'
        return None

    def run(self) -> list[LayerReport]:
        """Refit, move statistics of norms, and report."""
        config, found = self.config, self.found
        layers = [x for x in found.layers if self.reports[x.weight].reason is None]
        self.done, self.total = 0, len(layers)
        self.progress(0, self.total)
        teacher = Teacher(self.model, self.calls, layers, config)
        if config.method == 'bn' or config.one_pass:
            self._refit_all(teacher, layers)
            self._move(found.norms)
        else:
            levels = {x.level for x in found.layers} | {x.level for x in found.norms}
            for level in sorted(levels):
                self._refit_all(teacher, [x for x in layers if x.level == level])
                self._move([norm for norm in found.norms if norm.level == level])
        others = [LayerReport(n, reason=r) for n, r in found.others.items()]
        return [*self.reports.values(), *others]

    def _refit_all(self, teacher: Teacher, layers: Sequence[Layer]) -> None:
        """Refit layers of which none reads what another one writes."""
        for part in self._parts(layers):
            self._refit(teacher, part)
            self.done += len(part)
            self.progress(self.done, self.total)

    def _parts(self, layers: Sequence[Layer]) -> Iterator[list[LayerFit]]:
        """Yield layers that share a pass, as their moments fit into memory together.

        One that takes several passes is alone.
        """
        part: list[LayerFit] = []
        for layer in layers:
            fit = LayerFit(layer, self.config)
            size = sum(f.nbytes for f in [*part, fit])
            if part and (size > self.config.memory / 3 or len(fit.blocks) > 1):
                yield part
                part = []
            part.append(fit)
            if len(fit.blocks) > 1:
                yield part
                part = []
        if part:
            yield part

    def _refit(self, teacher: Teacher, fits: Sequence[LayerFit]) -> None:
        """Refit layers, in one pass over the batches for each block of inputs."""
        layers = [fit.layer for fit in fits]
        for _ in fits[0].blocks:
            for fit in fits:
                fit.begin()
            for batch in range(len(self.calls)):
                self._add(teacher, batch, fits)
            for fit in fits:
                if fit.reason is None:
                    fit.solve()
        for fit in fits:
            matrix = fit.finish()
            if matrix is not None:
                self._shift(fit.layer, matrix)
            self.reports[fit.layer.weight] = fit.report
        teacher.forget(layers)

    def _add(self, teacher: Teacher, batch: int, fits: Sequence[LayerFit]) -> None:
        """Add a batch to the moments of some layers."""
        one_pass, held = self.config.one_pass, self.held_out[batch]
        by_weight = {fit.layer.weight: fit for fit in fits}
        layers = [fit.layer for fit in fits]
        targets = teacher.targets(batch, layers, with_inputs=one_pass)
        if one_pass:
            for weight, calls in targets.items():
                for target in calls:
                    assert target.x is not None
                    by_weight[weight].add(target.x, target, held)
            return
        missing = {weight: iter(calls) for weight, calls in targets.items()}
        modules = {x.weight: x.small for x in layers}
        counts = {x.weight: x.calls for x in layers}

        def seen(weight: str, x: Tensor, y: Tensor) -> None:
            by_weight[weight].add(x, next(missing[weight], None), held)

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

    def _move(self, norms: Sequence[Norm]) -> None:
        """Move statistics, but of norms that suit what refitted layers give."""
        if self.config.norms == 'none':
            return
        if self.config.norms == 'others':
            refitted = [
                x for x in self.found.layers if not self.reports[x.weight].reason
            ]
            fitting = {name for layer in refitted for name in layer.norms}
            norms = [norm for norm in norms if norm.name not in fitting]
        move_norms(self.model, self.small, self.calls, norms)
        self.moved += [norm.name for norm in norms]
