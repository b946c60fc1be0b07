"""The quantities that files about models hold, with their names for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmgfp.selection.costs import COSTS
from mmgfp.utils.errors import ConfigError

#: Keys of milliseconds in reports, with the words of tables. Of a model with RoIs,
#: PyTorch runs the whole network and the exported graph what comes before them.
RUNTIMES = {'latency_ms': 'PyTorch', 'onnxruntime_ms': 'onnxruntime'}
#: The same by the processor time of this process, which other work on the machine
#: disturbs less: it counts all threads, and none of the time that they wait.
PROCESSOR = {'latency_cpu_ms': 'latency_ms', 'onnxruntime_cpu_ms': 'onnxruntime_ms'}
#: The time that a latency profile predicts.
PREDICTED = 'predicted_latency_ms'


@dataclass(frozen=True)
class Quantity:
    """A quantity of a model, such as its MACs.

    Attributes:
        key: Its name in files.
        label: Its name for people.
        unit: Its unit, after division by ``scale``.
        scale: Divisor from the value in files to ``unit``.
    """

    key: str
    label: str
    unit: str = ''
    scale: float = 1.0

    def text(self, value: float) -> str:
        """Return a value in the unit, with four digits and without it.

        Examples:
            >>> Quantity('macs', 'MACs', 'G', 1e9).text(98821248.0)
            '0.09882'
        """
        return f'{value / self.scale:.4g}'


def quantities_of(row: Mapping[str, Any]) -> dict[Quantity, float]:
    """Return the costs and times of a row of a summary, in the order of tables.

    Args:
        row: Values by their names in `COSTS`, and milliseconds under the keys of
            `RUNTIMES` and `PROCESSOR`, or a dict of them by batch size.

    Examples:
        >>> found = quantities_of({'params': 2e6, 'latency_ms': {'1': 3.5, '8': 20.0}})
        >>> [quantity.label for quantity in found]
        ['params', 'CPU latency, PyTorch', 'CPU latency, PyTorch, batch 8']
    """
    found: dict[Quantity, float] = {}
    profile = row.get('latency_profile')
    for key in COSTS.names():
        if key in row:
            cost = COSTS[key]
            predicts = f'predicted {cost.label}, {profile}'
            label = predicts if cost.from_profile and profile else cost.label
            found[Quantity(key, label, cost.unit, cost.scale)] = float(row[key])
    words = {key: f'CPU latency, {name}' for key, name in RUNTIMES.items()}
    words |= {k: f'processor time, {RUNTIMES[key]}' for k, key in PROCESSOR.items()}
    words[PREDICTED] = f'predicted latency, {profile}'
    for key, label in words.items():
        for batch, value in _by_batch(row.get(key, {})).items():
            of_batch = '' if batch == '1' else f', batch {batch}'
            found[Quantity(key, label + of_batch, 'ms')] = float(value)
    return found


def _by_batch(value: Any) -> Mapping[str, float]:
    return value if isinstance(value, Mapping) else {'1': value}


def ratio_key(key: str) -> str:
    """Return the key of ratios beside that of milliseconds.

    Examples:
        >>> ratio_key('latency_cpu_ms')
        'latency_cpu_ratio'
    """
    return f'{key.removesuffix("_ms")}_ratio'


def main_metric(
    metrics: Mapping[str, float], name: str | None = None
) -> tuple[str, float]:
    """Pick the headline of a test: COCO's mAP or top-1 accuracy, both in percent.

    No metrics at all, as COCO's evaluation returns for a model that detects nothing,
    count as an mAP of 0.

    Args:
        metrics: All metrics of the test.
        name: The metric to pick instead.

    Returns:
        Its name for people and its value; those of COCO in percent.

    Raises:
        ConfigError: If there is no metric ``name``.

    Examples:
        >>> main_metric({'coco/bbox_mAP': 0.375, 'coco/bbox_mAP_50': 0.5})
        ('mAP', 37.5)
        >>> main_metric({'coco/bbox_mAP': 0.375, 'coco/bbox_mAP_50': 0.5},
        ...             'coco/bbox_mAP_50')
        ('bbox_mAP_50', 50.0)
    """
    if name is None:
        known = ('coco/bbox_mAP', 'accuracy/top1')
        first = 'coco/bbox_mAP' if not metrics else next(iter(metrics))
        name = next((key for key in known if key in metrics), first)
    if name not in metrics and (metrics or not name.startswith('coco/')):
        known_names = ', '.join(metrics) or 'none'
        raise ConfigError('metric', f'one of {known_names}', name, 'name one of them')
    value = metrics.get(name, 0.0)
    if name.startswith('coco/'):
        return {'coco/bbox_mAP': 'mAP'}.get(name, name[5:]), value * 100
    return {'accuracy/top1': 'top-1'}.get(name, name), value
