import pytest
import torch

from dinov2_eq.tools.gradient_shares import by_layer, cosines_with_others


def test_parameters_of_a_layer_make_one_vector():
    gradient = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([5.0]), torch.tensor([6.0])]
    vectors = by_layer(gradient, [1, 0, 1])
    assert {layer: vector.tolist() for layer, vector in vectors.items()} == {0: [5.0], 1: [1.0, 2.0, 3.0, 4.0, 6.0]}


def test_cosines_worked_out_by_hand():
    gradients = {
        "task": {0: torch.tensor([1.0, 0.0]), 1: torch.tensor([0.0, 2.0])},
        "first": {0: torch.tensor([3.0, 0.0]), 1: torch.tensor([1.0, 0.0])},
        "second": {0: torch.tensor([0.0, 1.0]), 1: torch.tensor([0.0, -1.0])},
    }
    weights = {"task": 10.0, "first": 1.0, "second": 3.0}
    # The others of the task: (3, 0) + 3 (0, 1) in layer 0, (1, 0) + 3 (0, -1) in layer 1.
    expected = {0: 0.5**0.5, 1: -3 / 10**0.5}
    assert cosines_with_others("task", gradients, weights) == pytest.approx(expected)


def test_a_single_term_has_nothing_to_agree_with():
    assert cosines_with_others("task", {"task": {0: torch.tensor([1.0])}}, {"task": 1.0}) == {0: 0.0}
