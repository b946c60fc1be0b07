"""Trees of arguments and outputs."""

import torch
from mmengine.structures import InstanceData

from mmgfp.utils.tree import tree_tensors


def test_tensors_of_data_elements_are_found():
    scores = InstanceData(scores=torch.ones(2), labels=torch.ones(2, dtype=torch.int))
    assert [t.tolist() for t in tree_tensors([{'a': scores}, 'b'])] == [[1, 1]]
