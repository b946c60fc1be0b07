"""Deployment of a pruned model to a folder that is complete in itself."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor, nn

from mmgfp.engine.artifact import save_artifact, weight_shapes
from mmgfp.engine.model_building import build_model
from mmgfp.engine.registry import TRAINING_HOOKS, is_named
from mmgfp.surgery.compact import compact
from mmgfp.surgery.fit import check_fits
from mmgfp.surgery.structure import STRUCTURE_KEY, PruneStructure, shapes_of
from mmgfp.utils.errors import ConfigError, StructureError
from mmgfp.utils.io import atomic_write, load_weights_only

#: Largest image side in a checkpoint that is taken seriously.
MAX_SIDE = 8192
#: Bytes of a name; file systems allow 255, of which suffixes take some.
MAX_NAME = 200
#: The structure of the model in a folder.
STRUCTURE_FILE = 'structure.json'
REMEDY = 'give the config and the checkpoint of one and the same run'


@dataclass(frozen=True)
class Deployable:
    """A config, a checkpoint and a structure that belong together.

    Attributes:
        architecture: The model's config before pruning.
        structure: The structure that the model was cut down to.
        original: The unpruned model, with weights of its own initialisation.
        model: The compact model with the checkpoint's weights, in eval mode.
        meta: The checkpoint's ``meta``.
    """

    architecture: dict[str, Any]
    structure: PruneStructure
    original: nn.Module
    model: nn.Module
    meta: dict[str, Any]


@dataclass(frozen=True)
class Trained:
    """A model with the weights of a checkpoint, pruned or not.

    Attributes:
        model: The model in eval mode.
        structure: The structure that it was cut down to, None if it is not pruned.
        meta: The checkpoint's ``meta``.
    """

    model: nn.Module
    structure: PruneStructure | None
    meta: dict[str, Any]

    @property
    def original(self) -> nn.Module:
        """The model, as only the number of channels of an image is read of it."""
        return self.model


def read_deployable(cfg: Config, checkpoint: str | Path) -> Deployable:
    """Check that a config and a checkpoint fit, and build the compact model.

    Args:
        cfg: A config of the original model, or of a `PrunedModel`.
        checkpoint: The file that a pruning run saved at its target, or a checkpoint of
            fine-tuning.

    Raises:
        StructureError: If the files are damaged or do not belong together.
    """
    checkpoint = Path(checkpoint)
    raw = load_training_checkpoint(checkpoint)
    architecture, structure = _architecture_of(cfg, raw, checkpoint)
    if structure is None:
        raise StructureError(
            f'{checkpoint} must be of a pruned model (got one that says nothing of '
            'removed channels, and a config without PrunedModel); give a checkpoint '
            'that pruning saved at its target, such as *_flops50.pth, or the config of '
            'the fine-tuning run'
        )
    return _compact_from(cfg, raw, checkpoint, architecture, structure)


def read_trained(cfg: Config, checkpoint: str | Path) -> Trained:
    """Build a config's model, pruned or not, with the weights of a checkpoint.

    Args:
        cfg: A config of the original model, or of a `PrunedModel`.
        checkpoint: A checkpoint of training, or one that `read_deployable` takes.

    Raises:
        StructureError: If the files are damaged or do not belong together.
    """
    checkpoint = Path(checkpoint)
    raw = load_training_checkpoint(checkpoint)
    architecture, structure = _architecture_of(cfg, raw, checkpoint)
    if structure is not None:
        item = _compact_from(cfg, raw, checkpoint, architecture, structure)
        return Trained(item.model, item.structure, item.meta)
    model = build_model(cfg)
    load_strictly(model, raw['state_dict'], checkpoint)
    model.eval()
    return Trained(model, None, meta_of(raw))


def _architecture_of(
    cfg: Config, raw: dict[str, Any], checkpoint: Path
) -> tuple[dict[str, Any], PruneStructure | None]:
    """Return the model's config before pruning, and the structure if it is pruned."""
    architecture = copy.deepcopy(cfg.model.to_dict())
    saved = raw.get(STRUCTURE_KEY)
    structure = PruneStructure.from_dict(saved, str(checkpoint)) if saved else None
    if is_named(architecture.get('type'), 'PrunedModel'):
        named = PruneStructure.load(architecture['structure'])
        if structure is not None and structure != named:
            raise StructureError(
                f'the structure in {checkpoint}',
                f'that of model.structure={architecture["structure"]}',
                'another one',
                REMEDY,
            )
        structure = named
        architecture = architecture['architecture']
    return architecture, structure


def _compact_from(
    cfg: Config,
    raw: dict[str, Any],
    checkpoint: Path,
    architecture: dict[str, Any],
    structure: PruneStructure,
) -> Deployable:
    original = build_model(Config({**cfg.to_dict(), 'model': architecture}))
    check_fits(structure, original, str(checkpoint))
    model = compact(original, structure)
    load_strictly(model, raw['state_dict'], checkpoint)
    for built in (original, model):
        # Not chained: eval() returns nothing where distillation overrides train().
        built.eval()
    return Deployable(architecture, structure, original, model, meta_of(raw))


def load_training_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of mmgfp or of MMEngine's runner without running its code.

    Raises:
        StructureError: If the file is missing, cut short, or has no weights.
    """
    checkpoint = load_weights_only(path)
    state = checkpoint.get('state_dict')
    if not isinstance(state, dict) or not all(
        isinstance(t, Tensor) for t in state.values()
    ):
        raise StructureError(
            str(path), "a checkpoint with 'state_dict'", str(list(checkpoint)), REMEDY
        )
    return checkpoint


def recorded_shape(
    meta: dict[str, Any], source: str = 'the checkpoint'
) -> Sequence[int] | None:
    """Return the image size that a file's ``meta`` names, None if it names none.

    Raises:
        ConfigError: If it is not (C, H, W), or so large that it would fill the memory.

    Examples:
        >>> recorded_shape({'input_shape': [3, 800, 1280]})
        [3, 800, 1280]
    """
    shape = meta.get('input_shape')
    if shape is None:
        return None
    has_three = isinstance(shape, list | tuple) and len(shape) == 3
    if not has_three or not all(type(s) is int and 1 <= s <= MAX_SIDE for s in shape):
        raise ConfigError(
            f'meta.input_shape of {source}',
            f'(C, H, W), each at most {MAX_SIDE}',
            repr(shape)[:60],
            'name the size with --input-shape',
        )
    return shape


def structure_shape(path: str | Path) -> Sequence[int] | None:
    """Return the image size that the file of a structure names, None if none.

    Args:
        path: A ``.json`` file or a checkpoint that holds a structure.

    Raises:
        ConfigError: If it is no size, or a very large one.
    """
    path = Path(path)
    is_json = path.suffix == '.json'
    meta = json.loads(path.read_text()) if is_json else meta_of(load_weights_only(path))
    return recorded_shape(meta, str(path))


def meta_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the ``meta`` of a checkpoint; an empty one if it has no valid one."""
    meta = checkpoint.get('meta')
    return meta if isinstance(meta, dict) else {}


def write_config(cfg: Config, item: Deployable, structure: str, path: Path) -> None:
    """Write a config that loads the compact model from beside itself.

    Args:
        cfg: The config of training; datasets, pipelines and evaluators are kept.
        item: The model to deploy.
        structure: Name of the structure file in the config's folder.
        path: The file to write.
    """
    out = copy.deepcopy(cfg)
    out.model = {
        'type': 'PrunedModel',
        'architecture': item.architecture,
        'structure': f'{{{{ fileDirname }}}}/{structure}',
        'backbone': {'init_cfg': None},
    }
    imports = list(out.get('custom_imports', {}).get('imports', []))
    out.custom_imports = {
        'imports': list(dict.fromkeys([*imports, 'mmgfp'])),
        'allow_failed_imports': False,
    }
    hooks = out.get('custom_hooks') or []
    out.custom_hooks = [
        h for h in hooks if not is_named(h.get('type'), *TRAINING_HOOKS)
    ]
    out.load_from, out.resume = None, False
    text = out.pretty_text
    atomic_write(path, lambda tmp: tmp.write_text(text))


def check_destination(out: Path, name: str, option: str = '--out') -> None:
    """Check that files called ``name`` can be written into ``out``; write nothing.

    Args:
        out: The folder.
        name: Name of the files without suffix.
        option: The option that gave the folder, for errors.

    Raises:
        ConfigError: If ``out`` is a file, or has another model, whose structure would
            be replaced, or ``name`` leads out of it.
    """
    is_name = name not in ('', '.', '..') and name == Path(name).name
    if not is_name or '\0' in name or len(name.encode()) > MAX_NAME:
        raise ConfigError(
            '--name', 'a file name', repr(name)[:80], f'name the folder with {option}'
        )
    # Where it does not exist yet, the first folder above that does has to be one.
    above = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not above.is_dir():
        raise ConfigError(option, 'a folder', f'the file {above}', 'name another one')
    if not os.access(above, os.W_OK):
        got = f'{above}, where you may not write'
        raise ConfigError(option, 'a folder to write to', got, 'name another one')
    configs = {path.stem for path in out.glob('*.py')} - {name}
    others = [path.name for path in out.glob('*.pth') if path.stem in configs]
    if (out / STRUCTURE_FILE).is_file() and others:
        expected = f'new, or of a model called {name}, as {STRUCTURE_FILE} is of one'
        raise ConfigError(
            option, expected, f'{out}, of {others[0]}', 'name another one'
        )


def deploy(cfg: Config, item: Deployable, out: Path, name: str) -> dict[str, Path]:
    """Write weights, config and structure into ``out``.

    The structure's file names the image size of the model's ``meta``, if there is one.

    Raises:
        ConfigError: If ``out`` is a file, or has another model, whose structure would
            be replaced, or ``name`` leads out of it.
    """
    check_destination(out, name)
    paths = {
        'weights': out / f'{name}.pth',
        'structure': out / STRUCTURE_FILE,
        'config': out / f'{name}.py',
    }
    meta = {**item.meta, **weight_shapes(shapes_of(item.original))}
    save_artifact(paths['weights'], item.model, item.structure, meta)
    shape = recorded_shape(item.meta)
    size = {} if shape is None else {'input_shape': list(shape)}
    text = json.dumps({**item.structure.to_dict(), **size})
    atomic_write(paths['structure'], lambda tmp: tmp.write_text(text))
    write_config(cfg, item, paths['structure'].name, paths['config'])
    return paths


def load_strictly(model: nn.Module, state: dict[str, Tensor], source: Path) -> None:
    """Load weights that must all be there and finite.

    Raises:
        StructureError: If they are not, or of another model.
    """
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = shorten(str(error), 300, placeholder=' ...')
        raise StructureError(
            f'{source} must hold the weights of this structure (got {reason}); {REMEDY}'
        ) from None
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise StructureError(
                f'{source}: {name}', 'finite', 'NaN or infinity', REMEDY
            )
