"""Label algebra on vectors small enough to follow by eye."""

import torch

from mmgfp.tracing.labels import NO_LABEL, LabelTable, relax, varying


def table(*sizes):
    """A table with vectors named a, b, ... of these sizes, and the vectors."""
    labels = LabelTable()
    return labels, [labels.vector(n, 0, s) for n, s in zip('abc', sizes, strict=False)]


def sets(labels):
    """The connected sets of labels, as sorted lists."""
    components = labels.components().tolist()
    found = {}
    for label, component in enumerate(components):
        found.setdefault(component, []).append(label)
    return sorted(found.values())


def test_vectors_are_handed_out_once():
    labels, (a, b) = table(2, 3)
    assert a.tolist() == [0, 1]
    assert b.tolist() == [2, 3, 4]
    assert labels.vector('a', 0, 2) is a
    assert labels.size == 5


def test_owners_in_order_without_unlabelled():
    labels, (a, b, _) = table(2, 3, 1)
    assert labels.owners(torch.tensor([4, NO_LABEL, 0, 1])) == ['a', 'b']
    assert labels.owners(b) == ['b']


def test_nothing_is_connected_at_first():
    labels, _ = table(2, 1)
    assert sets(labels) == [[0], [1], [2]]


def test_equate_pairs_elements():
    labels, (a, b) = table(3, 3)
    labels.equate(a, b)
    assert sets(labels) == [[0, 3], [1, 4], [2, 5]]


def test_equate_is_transitive():
    labels, (a, b, c) = table(2, 2, 2)
    labels.equate(a, b)
    labels.equate(b, c)
    assert sets(labels) == [[0, 2, 4], [1, 3, 5]]


def test_equate_broadcasts():
    labels, (a, b) = table(2, 2)
    labels.equate(a.reshape(2, 1), b.reshape(1, 2))
    assert sets(labels) == [[0, 1, 2, 3]]


def test_unlabelled_elements_constrain_nothing():
    labels, (a, b) = table(2, 2)
    labels.equate(a, torch.tensor([NO_LABEL, int(b[0])]))
    assert sets(labels) == [[0], [1, 2], [3]]


def test_merge_equates_along_one_dimension():
    labels, (a,) = table(6)
    first = labels.merge(a.reshape(2, 3), 1)
    assert first.tolist() == [[0], [3]]
    assert sets(labels) == [[0, 1, 2], [3, 4, 5]]


def test_merge_looks_past_unlabelled_elements():
    labels, _ = table(3)
    plane = torch.tensor([[NO_LABEL, 0, 1], [NO_LABEL, NO_LABEL, 2]])
    assert labels.merge(plane, 1).tolist() == [[0], [2]]
    assert sets(labels) == [[0, 1], [2]]


def test_merge_of_unlabelled_elements_has_no_label():
    labels, _ = table(1)
    assert labels.merge(torch.full((1, 2), NO_LABEL), 1).tolist() == [[NO_LABEL]]


def test_reasons_reach_the_whole_set_once_each():
    labels, (a, b) = table(2, 2)
    labels.equate(a, b)
    labels.freeze(b[:1], 'why')
    labels.freeze(a[:1], 'why')
    labels.freeze(a[:1], 'also')
    labels.freeze(torch.tensor([NO_LABEL]), 'nothing')
    components = labels.components()
    assert labels.frozen(components) == {components[0]: ['why', 'also']}


def test_produced_and_consumed_are_marked_apart():
    labels, (a, b) = table(2, 2)
    labels.produce(a)
    labels.consume(b[1:])
    assert labels.produced().tolist() == [True, True, False, False]
    assert labels.consumed().tolist() == [False, False, False, True]


def test_varying_dimensions():
    assert varying(torch.zeros(1, 3, 1, 2)) == {1, 3}


def test_relax_cuts_only_equal_slices():
    plane = torch.tensor([[0, 0, 0], [1, 1, 1]])
    assert relax(plane).tolist() == [[0], [1]]
    uneven = torch.tensor([[0, 0], [0, 1]])
    assert relax(uneven).tolist() == uneven.tolist()
    assert relax(torch.zeros(2, 2, dtype=torch.int64)).tolist() == [[0]]
