"""Prune a classifier of MMPretrain by one command: minutes on two CPU cores.

A small ResNet learns scikit-learn's handwritten digits by an ordinary config, in which
nothing is about pruning; `mmgfp prune` does the rest, and leaves its own configs to be
read and edited. Run it in the repository, whole or cell by cell (`# %%`). Needed: mmgfp
with MMPretrain, scikit-learn.
"""

# %% Data: 1,797 images of 8x8 as files, `{train,test}/<class>/<n>.png`
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
from mmengine.config import Config
from sklearn.datasets import load_digits

import mmgfp

ROOT = Path(mmgfp.__file__).parent.parent
WORK = Path(os.environ.get('MMGFP_WORK', 'work_dirs/examples/classifier')).absolute()
EPOCHS = int(os.environ.get('MMGFP_EPOCHS', 15))

digits = load_digits()
for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
    split = 'train' if number % 5 else 'test'
    path = WORK / f'digits/{split}/{label}/{number}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), (image * 255 / 16).astype('uint8'))


# %% The config that trains the classifier
def loader(split):
    """The loader of one part of the data."""
    dataset = dict(
        type='CustomDataset',
        data_root=str(WORK / 'digits'),
        data_prefix=split,
        pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')],
    )
    sampler = dict(type='DefaultSampler', shuffle=split == 'train')
    return dict(batch_size=64, num_workers=0, dataset=dataset, sampler=sampler)


testing = dict(dataloader=loader('test'), evaluator=dict(type='Accuracy'), cfg=dict())
config = Config(
    dict(
        default_scope='mmpretrain',
        randomness=dict(seed=0),
        model=dict(
            type='ImageClassifier',
            backbone=dict(
                type='ResNet_CIFAR', depth=18, stem_channels=16, base_channels=16
            ),
            neck=dict(type='GlobalAveragePooling'),
            head=dict(type='LinearClsHead', num_classes=10, in_channels=128),
        ),
        data_preprocessor=dict(num_classes=10, mean=[127.5] * 3, std=[64.0] * 3),
        train_dataloader=loader('train'),
        train_cfg=dict(by_epoch=True, max_epochs=EPOCHS, val_interval=EPOCHS),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.05, momentum=0.9)),
        param_scheduler=dict(type='CosineAnnealingLR', T_max=EPOCHS, by_epoch=True),
        **{f'val_{key}': value for key, value in testing.items()},
        **{f'test_{key}': value for key, value in testing.items()},
    )
)
config.dump(WORK / 'resnet_digits.py')

# %% Train (no weights are named), prune, fine-tune, test, deploy
folder = WORK / 'small'
command = [
    *(sys.executable, str(ROOT / 'tools/prune.py'), str(WORK / 'resnet_digits.py')),
    *('--target', 'flops=0.5', '--input-shape', '3', '8', '8', '--divisor', '4'),
    *('--latency-rounds', '0', '--work-dir', str(folder)),
]
subprocess.run(command, check=True)

# %% What it cost and brought
for row in json.loads((folder / 'results.json').read_text())['rows']:
    accuracy = row['metrics']['accuracy/top1']
    print(f'{row["model"]}: {row["macs"] / 1e6:.2f} M MACs, accuracy {accuracy:.1f}%')
print(f'the configs and a report are in {folder}, the model in {folder / "deploy"}')
