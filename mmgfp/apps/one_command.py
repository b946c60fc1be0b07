"""From a trained model to a small one: what `tools/prune.py` runs, stage by stage.

Every stage runs another tool in a process of its own. A finished stage is not run
again, and one that was cut off is resumed, so that the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mmengine.config import Config

from mmgfp.apps.cli import REFUSED, check_checkpoint, load_config, reading_config
from mmgfp.apps.comparison import build, draw, measure, write_results
from mmgfp.apps.detections import draw_detections
from mmgfp.apps.exporting import check_export
from mmgfp.apps.input_shape import profiled_shape
from mmgfp.apps.kept_files import KeptFiles
from mmgfp.apps.pipeline import Candidate, Pipeline, has_begun
from mmgfp.apps.processes import Processes, working_alone
from mmgfp.apps.recipe_configs import RecipeConfigs
from mmgfp.apps.recipe_sources import (
    Sources,
    check_pruning,
    check_unpruned,
    needs_profile,
)
from mmgfp.apps.reporting import report_on
from mmgfp.apps.run_config import pruning_hook
from mmgfp.apps.stages import (
    deploy,
    finetune,
    input_shape,
    original,
    parse_options,
    prune,
    pruned_checkpoint,
)
from mmgfp.config import PruningConfig
from mmgfp.engine.demo_batch import image_channels
from mmgfp.report.gallery import Gallery
from mmgfp.selection.targets import parse_targets
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.io import check_folder


@dataclass(frozen=True)
class Configs:
    """The configs of a run.

    Attributes:
        prune: The one that prunes.
        finetune: The one that fine-tunes.
        shape: Size (C, H, W) of the image for which costs are counted.
        profile: A latency profile that is measured before pruning, if any.
        write: Writes those that are not the user's own, with the file that pruning has
            written in the latter; it is looked up for None.
    """

    prune: str
    finetune: str
    shape: Sequence[int]
    profile: Path | None = None
    write: Callable[[Path | None], None] = lambda pruned: None


def prune_and_train(args: argparse.Namespace, tools: Path) -> None:
    """Write the configs, then run all stages that have not finished.

    Args:
        args: The command line of `tools/prune.py`; ``cfg_options`` as a list of texts.
        tools: The folder of the tools.

    Raises:
        MMGFPError: If an argument is wrong, or a stage fails.
    """
    check_export(args)
    cfg = load_config(args.config, parse_options(args.cfg_options))
    if args.checkpoint is not None:
        check_checkpoint('checkpoint', args.checkpoint)
    if args.prune_config is None:
        check_unpruned(cfg, args.config)
        configs = planned_configs(args, cfg)
    else:
        configs = own_configs(args)
    check_folder(args.work_dir)
    with working_alone(args.work_dir) as processes:
        configs.write(None)
        if args.dry_run:
            sys.exit(show_coverage(args, tools, configs))
        _run(args, tools, configs, processes, cfg)


def own_configs(args: argparse.Namespace) -> Configs:
    """Return the configs that the user has.

    Raises:
        ConfigError: If one cannot be read, or does not say what costs are counted for.
    """
    load_config(args.finetune_config, parse_options(args.cfg_options))
    shape = input_shape(args.prune_config, args.cfg_options)
    return Configs(args.prune_config, args.finetune_config, shape)


def planned_configs(args: argparse.Namespace, cfg: Config) -> Configs:
    """Return the configs of pruning and fine-tuning, which are not written yet.

    Raises:
        ConfigError: If an option is not valid, or the data is missing.
    """
    shape, source = profiled_shape(args.input_shape, None, cfg, image_channels(cfg))
    print(f'costs are counted for an image of {tuple(shape)}, {source}')
    pruning = {
        name: getattr(args, name)
        for name in ('target', 'criterion', 'normalize', 'divisor', 'keep')
    }
    pruning |= {'input_shape': tuple(shape), 'latency_profile': args.latency_profile}
    pruning = {name: value for name, value in pruning.items() if value is not None}
    profile = None
    if needs_profile(pruning) and args.latency_profile is None:
        profile = (args.work_dir / 'latency.json').resolve()
        pruning['latency_profile'] = str(profile)
    check_pruning(pruning)
    given = (args.config, args.checkpoint, parse_options(args.cfg_options))
    with reading_config(cfg):
        recipe = RecipeConfigs(Sources(*given, args.work_dir, pruning, args.epochs))
        recipe.files()  # what cannot be read is refused before anything is written
        notes = recipe.notes
    for note in notes:
        print(note)
    paths = str(recipe.sources.prune), str(recipe.sources.finetune)
    return Configs(*paths, shape, profile, partial(_write, recipe))


def _write(recipe: RecipeConfigs, pruned: Path | None) -> None:
    """Write both configs, but for what their user has edited or nothing changed.

    Raises:
        ConfigError: If the work directory is of a command with other settings.
    """
    sources, work_dir = recipe.sources, recipe.sources.work_dir
    files, is_first = KeptFiles(work_dir / 'done' / 'configs.json'), pruned is None
    if pruned is None and (work_dir / 'done' / 'prune.json').is_file():
        pruned = Path(pruned_checkpoint(work_dir / 'prune', str(sources.prune)))
    for path, text, stage in recipe.files(pruned):
        remedy = f'run the command that began {work_dir}, or name another --work-dir'
        said = files.write(path, text, has_begun(work_dir, stage), remedy)
        if path == sources.prune:
            check_target(path, sources.pruning['target'])
        if said and is_first:
            print(said, flush=True)


def check_target(path: Path, asked: Any) -> None:
    """Refuse a target that is not the one of a pruning config as its user has it.

    Args:
        path: The config.
        asked: The target of the command.

    Raises:
        ConfigError: If they differ.
    """
    hook = pruning_hook(Config.fromfile(path))
    if hook is None:
        return  # which the run says
    targets = parse_targets(hook.get('target', PruningConfig().target))
    if targets != parse_targets(asked):
        got = ' '.join(f'{t.cost}={t.ratio:g}' for t in parse_targets(asked))
        says = ' '.join(f'{t.cost}={t.ratio:g}' for t in targets)
        expected = f'{says}, as you have it in {path}'
        remedy = 'give that one, or change it in this file, too'
        raise ConfigError('--target', expected, got, remedy)


def show_coverage(args: argparse.Namespace, tools: Path, configs: Configs) -> int:
    """Print the table of `tools/analyze.py`; return the exit status."""
    checkpoint = [args.checkpoint] if args.checkpoint else []
    command = [configs.prune, *checkpoint]
    if configs.profile is not None and not configs.profile.is_file():
        print('latency is measured when the run begins; the table does without')
        command.append('--no-latency')
    with TemporaryDirectory() as folder:
        file = Path(folder, 'analysis.json')
        command += ['--json', str(file)]
        command += ['--cfg-options', *args.cfg_options] if args.prune_config else []
        program = [sys.executable, str(tools / 'analyze.py')]
        status = subprocess.run([*program, *command], check=False).returncode
        if status:
            return status
        if 'refused' in json.loads(file.read_text()):
            return REFUSED
    print('nothing was pruned: the same command without --dry-run does it')
    return 0


def is_tested(cfg: Config) -> bool:
    """Return whether a config says how its model is tested; say so if it does not."""
    missing = [
        name
        for name in ('test_dataloader', 'test_cfg', 'test_evaluator')
        if cfg.get(name) is None
    ]
    if missing:
        print(f'the config has no {", ".join(missing)}: nothing is tested')
    return not missing


def _run(
    args: argparse.Namespace,
    tools: Path,
    configs: Configs,
    processes: Processes,
    cfg: Config,
) -> None:
    """Run all stages, measure, and write the results."""
    tested = is_tested(cfg)
    work_dir: Path = args.work_dir
    own = args.prune_config is not None
    # What is written holds the overrides; what the user wrote gets them on the way.
    everywhere = args.cfg_options if own else []
    pipeline = Pipeline(tools, work_dir, everywhere, processes=processes)
    overrides = () if own else tuple(args.cfg_options)
    baseline = original(pipeline, args.config, args.checkpoint, overrides)
    if configs.profile is not None:
        size = ('--input-shape', *map(str, configs.shape))
        out = ('--out', str(configs.profile))
        pipeline.run('profile', 'profile_latency', configs.prune, *out, *size)
    pruned = prune(pipeline, configs.prune, configs.finetune, baseline)
    configs.write(Path(pruned.checkpoint))
    tuned = finetune(pipeline, configs.finetune, pruned, baseline)
    deployed = deploy(pipeline, tuned, configs.shape, *_export_flags(args))
    candidates = [baseline, pruned, deployed]
    timing = (args.latency_rounds, args.batches)
    rows = measure(pipeline, candidates, configs.shape, *timing, tested=tested)
    draw(baseline, everywhere, pruned.checkpoint, work_dir / 'channels.png')
    names = (args.config, configs.prune, configs.finetune)
    write_results(pipeline, rows, configs.shape, names)
    files = ['results.md', 'results.json', 'channels.png', 'deploy/']
    files += report_on(work_dir, partial(_detections, candidates, everywhere, cfg))
    print(f'in {work_dir}: {", ".join(files)}')
    print(f'the model to use: {deployed.checkpoint}, with {deployed.config}')


def _export_flags(args: argparse.Namespace) -> list[str]:
    formats = ['--export', *args.export] if args.export else []
    return [*formats, *(['--nms'] if args.nms else [])]


def _detections(
    candidates: Sequence[Candidate], options: Sequence[str], shown: Config
) -> Gallery | None:
    """Draw what the candidates detect on images of a config, if they are detectors."""
    models = {c.name: build(c, options)[0] for c in candidates}
    return draw_detections(shown, models)
