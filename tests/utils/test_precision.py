"""Double precision where a model's code asks for single precision by name."""

import pytest
import torch
from torch import nn

from mmgfp.utils.precision import InDouble

DOUBLE = torch.float64


@pytest.mark.parametrize(
    'make',
    [
        lambda x: torch.arange(3, dtype=torch.float32),
        lambda x: torch.zeros(3),
        lambda x: torch.tensor([0.1, 0.2]),
        lambda x: x.float(),
        lambda x: x.to(torch.float32),
        lambda x: x.type(torch.float16),
        lambda x: (x > 0).float(),
        lambda x: x.new_ones(2, dtype=torch.float32),
        lambda x: torch.stack([x, torch.ones(3)]),
        lambda x: torch.max(x, 0)[0],
    ],
)
def test_everything_made_is_double(make):
    with InDouble():
        assert make(torch.randn(3, dtype=DOUBLE)).dtype == DOUBLE


def test_no_digit_is_lost():
    x = torch.tensor([1 / 3], dtype=DOUBLE)
    with InDouble():
        assert torch.equal(x.float() * torch.ones(1, dtype=torch.float32), x)


def test_whole_numbers_and_truths_stay():
    with InDouble():
        assert torch.arange(3).dtype == torch.int64
        assert (torch.zeros(3) > 0).dtype == torch.bool


def test_older_tensors_can_be_mixed_and_written_to():
    old, x = torch.zeros(3), torch.full((3,), 0.5, dtype=DOUBLE)
    with InDouble():
        assert (nn.functional.linear(old + 1, x[None])).item() == 1.5
        old[:2] = x[:2]
        old.add_(x)
    assert old.dtype == torch.float32
    assert old.tolist() == [1, 1, 0.5]


def test_nothing_stays_afterwards():
    with InDouble():
        pass
    assert torch.zeros(1).dtype == torch.float32


class Positions(nn.Module):
    """A layer on positions in single precision, as transformers encode them."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x):
        positions = torch.arange(4, dtype=torch.float32) / 10
        return self.linear(x + self.linear.weight.new_zeros(4)), self.linear(positions)


def test_models_that_name_single_precision_run_in_double():
    model = Positions().double()
    with pytest.raises(RuntimeError, match='dtype'):
        model(torch.ones(1, 4))
    with InDouble():
        assert {y.dtype for y in model(torch.ones(1, 4))} == {DOUBLE}
