"""Prune a model of your own in plain PyTorch: a minute on one CPU core.

A small residual network learns scikit-learn's handwritten digits, is pruned to half of
its multiply-adds and fine-tuned. Run it whole, or cell by cell (`# %%`) in an editor
that knows such scripts. Needed: mmgfp, scikit-learn.
"""

# %% Data: 1,797 images of 8x8, every fifth for testing
import os

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mmgfp import GroupFisherPruner

torch.manual_seed(0)
EPOCHS = int(os.environ.get('MMGFP_EPOCHS', 15))
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
labels = torch.tensor(digits.target)
is_test = torch.arange(len(labels)) % 5 == 0
training = TensorDataset(images[~is_test], labels[~is_test])
batches = DataLoader(training, batch_size=64, shuffle=True, drop_last=True)


# %% A model with a residual sum: its two operands must lose the same channels
class Net(nn.Module):
    """One residual block between a convolution and a classifier."""

    def __init__(self, width=32):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        """Return logits (N, 10) of images (N, 1, 8, 8)."""
        x = self.stem(x)
        return self.head((x + self.body(x)).relu().mean((2, 3)))


def epoch(model, optimizer, after=lambda: False):
    """Train on all images once; `after` ends it early by returning True."""
    model.train()
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if after():
            return


@torch.no_grad()
def accuracy(model):
    """Return the share of test images that are told right."""
    model.eval()
    return (model(images[is_test]).argmax(1) == labels[is_test]).float().mean().item()


# %% Train it as you do
model = Net()
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
for _ in range(EPOCHS):
    epoch(model, optimizer)
print(f'trained: {accuracy(model):.1%}')

# %% Find the coupled channels, by a real loss on a real batch
pruner = GroupFisherPruner(
    model, interval=2, target=dict(flops=0.5), units_per_step=2, divisor=4
)
model.train()
x, y = next(iter(batches))
grouping = pruner.prepare(
    loss=lambda m: nn.functional.cross_entropy(m(x), y),
    forward=lambda m: m(x),
    images=len(x),
)
for group in pruner.units.grouping.groups:
    print(f'{group.name}: {group.units} units')


# %% Train on, at a tenth of the rate, until the target is reached
def prune():
    """Let the pruner see an iteration; return whether the target is reached."""
    pruner.step()
    return pruner.done


optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)
while not pruner.done:
    epoch(model, optimizer, after=prune)
small = pruner.compact()  # an ordinary module with fewer channels
macs = pruner.units.totals.ratio('macs', pruner.units.full)
print(f'pruned to {macs:.1%} of the MACs: {accuracy(small):.1%}')

# %% Fine-tune the result
optimizer = torch.optim.Adam(small.parameters(), lr=1e-3)
for _ in range(EPOCHS):
    epoch(small, optimizer)
print(f'fine-tuned: {accuracy(small):.1%}')
