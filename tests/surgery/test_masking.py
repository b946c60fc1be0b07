"""Masks: zeroed input columns stay at zero while everything else trains."""

import copy

import numpy as np
import pytest
import torch
from mmengine.runner.checkpoint import load_state_dict
from support.pruning import prepared
from support.toys import TOYS, ConvPair, TinyDetector, Transposed, toy_loss
from torch import nn

from mmgfp.discovery.unit_sets import random_units
from mmgfp.surgery.masking import ColumnMask
from mmgfp.utils.errors import ConfigError

OPTIMIZERS = {
    'sgd': lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    'nesterov': lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    'adamw': lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
}


def drop_random_units(pruner):
    rng = np.random.default_rng(0)
    pruner.units.kept = random_units(pruner.units.grouping.groups, 0.4, rng)
    pruner.units.masks[0].update(pruner.units.kept)


def drop(pruner, *units):
    pruner.units.kept[list(units)] = False
    pruner.units.masks[0].update(pruner.units.kept)


def first_of(pruner, group):
    """The number of the first unit of a group."""
    names = [g.name for g in pruner.units.grouping.groups]
    return int(np.flatnonzero(pruner.units.group_of == names.index(group))[0])


def columns(pruner, of=lambda p: p):
    """What reads pruned units, of the parameters or of what belongs to them."""
    start, found = 0, []
    for group in pruner.units.grouping.groups:
        gone = ~pruner.units.kept[start : start + group.units]
        start += group.units
        for member in group.members:
            if member.role == 'in':
                tensor = of(pruner.model.get_parameter(member.name))
                index = torch.from_numpy(member.index[gone].reshape(-1))
                found.append(tensor.index_select(member.dim, index).flatten())
    return torch.cat(found)


def test_columns_of_every_consumer_by_hand():
    pruner = prepared(TinyDetector().double())
    before = {n: p.clone() for n, p in pruner.model.named_parameters()}
    drop(pruner, first_of(pruner, 'fpn1') + 2)  # channel 2 of fpn1 and fpn2
    for name, parameter in pruner.model.named_parameters():
        expected = before[name]
        if name in ('cls_tower.weight', 'reg_tower.weight'):
            expected[:, 2] = 0
        assert torch.equal(parameter, expected), name


def test_transposed_conv_holds_its_inputs_in_dimension_0():
    pruner = prepared(Transposed().double())
    drop(pruner, 1)  # the second output of stem
    weight = pruner.model.up.weight
    assert [i for i in range(5) if not weight[i].any()] == [1]


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
@pytest.mark.parametrize('toy', TOYS)
def test_zeroed_columns_stay_zero(toy, optimizer):
    torch.manual_seed(0)
    pruner = prepared(toy().double())
    optimizer = OPTIMIZERS[optimizer](pruner.model.parameters())
    for iteration in range(5):
        optimizer.zero_grad()
        toy_loss(pruner.model).backward()
        optimizer.step()
        pruner.step()
        if iteration == 1:  # momentum has been gathered
            drop_random_units(pruner)
        if iteration > 1:
            assert columns(pruner).numel() > 0
            assert not columns(pruner).any()
    assert not columns(pruner, lambda p: p.grad).any()


@pytest.mark.parametrize('toy', TOYS)
def test_gradient_norm_is_that_of_the_compact_model(toy):
    """Clipping by norm sees only what is left."""
    torch.manual_seed(0)
    pruner = prepared(toy().double())
    drop_random_units(pruner)
    norms = []
    for model in (pruner.model, pruner.compact()):
        toy_loss(model).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1e-3).item())
    assert norms[0] == pytest.approx(norms[1], rel=1e-9)
    assert norms[0] > 0


def test_frozen_weights_are_masked_too():
    model = ConvPair().double()
    model.conv2.weight.requires_grad_(False)
    pruner = prepared(model)
    drop_random_units(pruner)
    assert columns(pruner).numel() > 0
    assert not columns(pruner).any()


def test_removed_mask_lets_columns_train_again():
    torch.manual_seed(0)
    pruner = prepared(ConvPair().double())
    drop_random_units(pruner)
    pruner.units.masks[0].remove()
    toy_loss(pruner.model).backward()
    assert columns(pruner, lambda p: p.grad).all()
    nn.init.ones_(pruner.model.conv2.weight)
    pruner.units.masks[0].apply()
    assert columns(pruner).all()


def test_update_replaces_the_mask():
    torch.manual_seed(0)
    pruner = prepared(ConvPair().double())
    drop_random_units(pruner)
    pruner.units.kept[:] = True
    drop(pruner, 0)
    toy_loss(pruner.model).backward()
    gradient = pruner.model.conv2.weight.grad
    assert [i for i in range(6) if not gradient[:, i].any()] == [0]


def test_update_touches_only_what_changed():
    pruner = prepared(TinyDetector().double())
    first, parameters = first_of(pruner, 'fpn1'), pruner.model.named_parameters()
    drop(pruner, first)
    hooks = {n: p._post_accumulate_grad_hooks for n, p in parameters}
    with torch.no_grad():
        pruner.model.cls_tower.weight[:, 0] = 1
    drop(pruner, first + 2)
    weight = pruner.model.cls_tower.weight
    # what went earlier is left to `apply`
    assert [i for i in range(3) if not weight[:, i].any()] == [2]
    pruner.units.masks[0].apply()
    assert [i for i in range(3) if not weight[:, i].any()] == [0, 2]
    toy_loss(pruner.model).backward()
    assert [i for i in range(3) if not weight.grad[:, i].any()] == [0, 2]
    masked = [n for n, h in hooks.items() if h]
    assert masked == ['cls_tower.weight', 'reg_tower.weight']
    assert all(len(hooks[n]) == 1 for n in masked)


@pytest.mark.parametrize(
    'load',
    [
        lambda model, state: model.load_state_dict(state),
        lambda model, state: nn.ModuleDict(dict(x=model)).load_state_dict(
            {f'x.{n}': t for n, t in state.items()}
        ),
        lambda model, state: [
            m.load_state_dict(
                {k[len(n) + 1 :]: t for k, t in state.items() if k.startswith(f'{n}.')}
            )
            for n, m in model.named_children()
        ],
        lambda model, state: load_state_dict(model, state),
    ],
    ids=['model', 'wrapper', 'parts', 'mmengine'],
)
def test_loaded_weights_are_masked_at_once(load):
    pruner = prepared(TinyDetector().double())
    other = TinyDetector().double().state_dict()
    copied = copy.deepcopy(pruner.model)
    pruner.track_copy(copied)
    drop_random_units(pruner)
    pruner.units.masks[1].update(pruner.units.kept)
    for model in (pruner.model, copied):
        load(model, other)
    assert not columns(pruner).any()
    state = pruner.model.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in copied.state_dict().items())
    twin = copy.deepcopy(pruner.model)  # no copy is masked that isn't tracked
    pruner.close()
    for model in (pruner.model, twin):
        load(model, other)
        state = model.state_dict()
        assert all(torch.equal(t, state[n]) for n, t in other.items())


def test_parameters_that_are_replaced_in_loading_are_refused():
    pruner = prepared(ConvPair().double())
    state = ConvPair().double().state_dict()
    with pytest.raises(ConfigError, match='load_state_dict must .*; load without as'):
        pruner.model.load_state_dict(state, assign=True)


def test_full_mask_touches_nothing():
    model = ConvPair()
    before = {n: p.clone() for n, p in model.named_parameters()}
    pruner = prepared(ConvPair().double())
    mask = ColumnMask(model, pruner.units.grouping.groups)
    mask.update(pruner.units.kept)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not any(p._backward_hooks for p in model.parameters())
