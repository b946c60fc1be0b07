"""What the README shows is run."""

import torch
from mmengine.config import Config
from support.pages import read
from torch import nn

block = read('README.md').block


def test_plain_pytorch_example_prunes_to_its_target():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )
    loader = [(torch.rand(4, 3, 8, 8), torch.randint(5, (4,))) for _ in range(200)]
    images, labels = loader[0]
    scope = dict(
        model=model,
        loader=loader,
        images=images,
        labels=labels,
        criterion=nn.CrossEntropyLoss(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
    )
    exec(block('pruner.prepare('), scope)
    pruner, small = scope['pruner'], scope['small']
    assert pruner.done
    assert pruner.units.totals['macs'] <= 0.5 * pruner.units.full['macs']
    assert type(small) is nn.Sequential
    kept = small[0].out_channels, small[3].out_channels
    assert sum(kept) < 32
    assert small[3].in_channels == kept[0] and small[6].in_features == kept[1]
    assert small(images).shape == (4, 5)


def test_config_examples_read_as_written(tmp_path):
    prune, tune = tmp_path / 'my_prune.py', tmp_path / 'my_finetune.py'
    prune.write_text(block('FisherPruningHook'))
    tune.write_text(block("type='PrunedModel'"))
    config = Config.fromfile(prune)
    assert config.model.type == 'RetinaNet'
    assert config.model.backbone.frozen_stages == -1
    tuned = Config.fromfile(tune).model
    assert tuned.architecture.type == 'RetinaNet'
    assert tuned.structure.endswith('my_prune_flops50.pth')
