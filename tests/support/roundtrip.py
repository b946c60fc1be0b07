"""A model's way through pruning without a runner: trace, prune, train, reload."""

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from mmengine.logging import MessageHub
from mmengine.registry import MODELS
from torch import nn

from mmgfp.apps.analysis import coverage
from mmgfp.discovery.comparing import difference
from mmgfp.discovery.discover import trace_model
from mmgfp.discovery.grouping import build_groups
from mmgfp.discovery.unit_sets import random_units
from mmgfp.discovery.verify import disagreement, masked_and_compact
from mmgfp.engine.batch_calls import BatchCalls
from mmgfp.engine.demo_batch import demo_batch
from mmgfp.engine.model_building import build_model
from mmgfp.groups import Grouping
from mmgfp.surgery.structure import PruneStructure, shapes_of
from support.toys import parameters_in, reasons_of


@dataclass
class Traced:
    """A model and what was found in it."""

    cfg: object
    model: nn.Module
    calls: BatchCalls
    grouping: Grouping

    @property
    def macs(self):
        """Share of MACs in layers that can shrink."""
        profiles = self.calls.profile(self.model)
        return coverage(self.model, self.grouping, profiles)['macs']

    def units(self, layer):
        """Units of the group in which ``layer`` makes channels."""
        (units,) = [g.units for g in self.grouping.groups if layer in g.layers('out')]
        return units

    def reason(self, layer):
        """Why ``layer`` keeps output channels."""
        return reasons_of(self.grouping)[layer]


def traced(cfg, size, strict=True):
    """Build and trace the config's model on images of ``size`` x ``size``."""
    torch.manual_seed(0)
    MessageHub.get_current_instance().update_info('iter', 1)  # as in a run
    model = build_model(cfg)
    calls = BatchCalls(model, demo_batch(cfg, 2, (size, size)))
    trace = trace_model(model, calls.loss, strict).trace
    return Traced(cfg, model, calls, build_groups(model, trace))


def assert_prunes(found, tmp_path):
    """30 % go: masked equals compact, in loss too; it trains; a config rebuilds it."""
    model, calls, groups = found.model, found.calls, found.grouping.groups
    kept = random_units(groups, 0.3, np.random.default_rng(0))
    assert disagreement(model, groups, kept, calls.forward) is None

    masked, small = masked_and_compact(model, groups, kept)
    assert parameters_in(small) < 0.9 * parameters_in(model)
    losses = [seeded_loss(calls, m) for m in (masked, small)]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-4)
    losses[1].backward()
    nn.utils.clip_grad_norm_(small.parameters(), 1.0)  # SSD300 has no norms
    torch.optim.SGD(small.parameters(), 1e-4).step()
    assert seeded_loss(calls, small).isfinite()

    file = tmp_path / 'structure.json'
    PruneStructure.of(groups, kept, shapes_of(model)).save(file)
    rebuilt = pruned_model(found.cfg.model, file)
    assert type(rebuilt) is type(model)
    rebuilt.load_state_dict(small.state_dict())
    with torch.no_grad():
        outputs = [calls.forward(m.eval()) for m in (small, rebuilt)]
    assert difference(*outputs) == 0


def pruned_model(architecture, file, **changes):
    """What a config with the structure in ``file`` builds."""
    config = dict(type='PrunedModel', architecture=architecture, structure=str(file))
    return MODELS.build(config | changes)


def seeded_loss(calls, model):
    """The loss on the same samples, and on the same proposals, at each call."""
    torch.manual_seed(0)
    return calls.steady_loss(model.train())


def without_boxes(calls, *images):
    """The same batch with nothing annotated in some images."""
    fewer = copy.copy(calls)
    fewer.data = copy.deepcopy(calls.data)
    for n in images:
        sample = fewer.data['data_samples'][n]
        sample.gt_instances = sample.gt_instances[torch.zeros(0, dtype=torch.long)]
    return fewer
