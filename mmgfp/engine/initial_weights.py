"""The weights that a compact model starts from, and guards of those it may load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import MessageHub, print_log
from torch import nn

from mmgfp.surgery.fit import check_shapes
from mmgfp.surgery.structure import PruneStructure
from mmgfp.utils.errors import ConfigError, StructureError

#: MMEngine's modules have this attribute while they initialise their weights.
INITIALISING = '_params_init_info'


def weights_lacking(model: nn.Module, weights: Mapping[str, Any]) -> list[str]:
    """Return the parameters that keep the values they have when weights are loaded.

    MMEngine loads what fits and goes on: they would be as they were initialised.

    Args:
        model: The model, which loads them without ``strict``.
        weights: What a checkpoint holds, by name.

    Examples:
        >>> weights_lacking(nn.Linear(2, 1), {'module.weight': torch.ones(1, 2)})
        ['bias']
        >>> weights_lacking(nn.Linear(2, 1), {'weight': torch.ones(3, 2)})
        ['weight', 'bias']
    """
    shapes = {
        name.removeprefix('module.'): getattr(tensor, 'shape', None)
        for name, tensor in weights.items()
    }
    parameters = model.named_parameters()
    return [name for name, p in parameters if shapes.get(name) != p.shape]


class WidthGuard:
    """Refuse weights of other widths whenever a model loads weights.

    Args:
        structure: The structure that the model was shrunk to.
    """

    def __init__(self, structure: PruneStructure) -> None:
        self.structure = structure
        self.shapes = {name: structure.shape(name) for name in structure.kept}

    def __call__(
        self, module: nn.Module, state_dict: dict, prefix: str, *args: Any
    ) -> None:
        """Check the weights that are about to be loaded.

        Raises:
            StructureError: If a tensor has another shape than the structure says, or is
                in a module that is gone.
        """
        remedy = 'give the checkpoint that was saved with this structure'
        for name in state_dict if self.structure.identities else ():
            if self.structure.is_gone(name.removeprefix(prefix)):
                expected = 'without a module that model.structure says is gone'
                raise StructureError('checkpoint', expected, name, remedy)
        check_shapes(
            {n: state_dict.get(prefix + n) for n in self.shapes},
            self.shapes,
            'as model.structure says',
            remedy,
        )


class Rewinding:
    """Cut weights of the unpruned model while a compact one is initialised with them.

    Args:
        structure: The structure that the model was shrunk to.
        source: The checkpoint that they come from.
    """

    def __init__(self, structure: PruneStructure, source: str) -> None:
        self.structure = structure
        self.source = source

    def __call__(
        self, module: nn.Module, state_dict: dict, prefix: str, *args: Any
    ) -> None:
        """Replace full tensors by their kept entries in ``state_dict``.

        Raises:
            StructureError: If a tensor is missing or not of the unpruned model.
        """
        if not hasattr(module, INITIALISING):
            return
        own = {n: list(t.shape) for n, t in module.state_dict().items()}
        remedy = 'name a checkpoint of the unpruned model in model.original'
        missing = [name for name in own if prefix + name not in state_dict]
        if missing:
            expected = f'with the weights of {len(own)} tensors'
            got = f'none for {missing[0]} and {len(missing) - 1} others'
            raise StructureError(self.source, expected, got, remedy)
        shapes = own | {n: s for n, s in self.structure.sizes.items() if n in own}
        weights = {name: state_dict[prefix + name] for name in own}
        check_shapes(weights, shapes, f'in {self.source}', remedy)
        for name in [n for n in state_dict if n.startswith(prefix)]:
            if self.structure.is_gone(name.removeprefix(prefix)):
                del state_dict[name]
        for name, kept in self.structure.kept.items():
            for dim, index in kept.items() if name in own else ():
                weight = state_dict[prefix + name]
                entries = torch.tensor(index, device=weight.device)
                state_dict[prefix + name] = weight.index_select(dim, entries)


class RunStart:
    """Refuse to overwrite the initial weights of a run by its ``load_from``.

    Args:
        init: What the model was initialised with.
    """

    def __init__(self, init: str) -> None:
        self.init = init

    def __call__(self, module: nn.Module, *args: Any) -> None:
        """Check that the weights about to be loaded are those to resume from.

        Raises:
            ConfigError: If the run in progress loads weights without resuming.
        """
        is_initialised = getattr(module, 'is_init', False)
        if hasattr(module, INITIALISING) or not is_initialised:
            return  # these are the initial weights; or a test, with weights of its own
        text = MessageHub.get_current_instance().runtime_info.get('cfg')
        run = Config.fromstring(text, '.py') if text else Config()
        if run.get('load_from') and not run.get('resume'):
            raise ConfigError(
                'load_from',
                f'None with model.init={self.init!r}, whose weights it would overwrite',
                repr(run.load_from),
                "drop one of them: init='pruned' starts from load_from",
            )


def rewind(model: Any, structure: PruneStructure, source: str) -> None:
    """Have a compact model initialised with kept entries of a full one's weights.

    Args:
        model: The compact model.
        structure: The structure that it was shrunk to.
        source: A checkpoint of the unpruned model.
    """
    given = model.init_cfg or []
    given = [given] if isinstance(given, dict) else list(given)
    # MMEngine loads such weights last, after all that other modules initialise.
    model.init_cfg = [*given, dict(type='Pretrained', checkpoint=source)]
    model.register_load_state_dict_pre_hook(Rewinding(structure, source))


def reset_parameters(model: nn.Module) -> None:
    """Draw the weights of all layers anew, as their constructors do.

    Layers that were built wide and then cut have weights of the scale of wide ones:
    torch draws them by the number of inputs. What the config's ``init_cfg`` says comes
    later, when the runner initialises the model; it reads the small widths by itself.
    """
    for module in model.modules():
        # Attention has no public name for it.
        names = ('reset_parameters', '_reset_parameters')
        reset = next((getattr(module, n) for n in names if hasattr(module, n)), None)
        if reset is not None:
            reset()


def forget_pretrained(model: nn.Module) -> None:
    """Keep ``init_weights`` from looking for weights of the original widths."""
    for name, module in model.named_modules():
        init_cfg = getattr(module, 'init_cfg', None)
        entries = init_cfg if isinstance(init_cfg, list) else [init_cfg]
        if any(isinstance(e, dict) and e.get('type') == 'Pretrained' for e in entries):
            print_log(f'{name} of the pruned model ignores its pretrained weights')
            module.init_cfg = None
