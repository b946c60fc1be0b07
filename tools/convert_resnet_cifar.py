"""Convert weights of akamaster's CIFAR-10 ResNets for configs/cifar10."""

from __future__ import annotations

import argparse
from pathlib import Path

from mmgfp.apps.cli import check_checkpoint, run_cli
from mmgfp.utils.io import load_weights_only, save_checkpoint


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('source', help='a .th file of its pretrained_models')
    parser.add_argument('out', type=Path, help='the checkpoint to write')
    return parser.parse_args()


def main() -> None:
    """Run from the command line."""
    args = parse_args()
    check_checkpoint('source', args.source)
    from mmgfp.demo.resnet_cifar import convert_akamaster

    weights = load_weights_only(args.source)
    converted = convert_akamaster(weights.get('state_dict', weights))
    save_checkpoint({'state_dict': converted, 'meta': {}}, args.out)


if __name__ == '__main__':
    run_cli(main)
