"""The parts of a forward pass compute what their formulas say."""

import math

import pytest
import torch

from services.worker.runner.linear import Linear, PackedLinear, PlainLinear
from services.worker.runner.norm import rms_norm
from services.worker.runner.rope import RotaryTable, rotate_
from services.worker.runner.rotary_frequencies import rotary_frequencies


@pytest.mark.parametrize("kind", [PackedLinear, PlainLinear])
@pytest.mark.parametrize("num_rows", [1, 2, 7, 33])
def test_a_linear_layer_is_a_product_and_keeps_its_own_weight(
    kind: type[PackedLinear] | type[PlainLinear], num_rows: int
) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    weight = torch.randn((96, 40), generator=generator)
    bias = torch.randn(96, generator=generator)
    rows = torch.randn((num_rows, 40), generator=generator)
    expected = (rows.double() @ weight.double().T).float()
    linear: Linear = kind(weight)
    with_bias: Linear = kind(weight, bias)
    weight.zero_()
    torch.testing.assert_close(linear(rows), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(with_bias(rows), expected + bias, atol=1e-5, rtol=1e-5)


def test_rotation_turns_neighbours_by_the_angle_of_the_position() -> None:
    heads = torch.tensor([[[1.0, 0.0, 0.0, 1.0]], [[1.0, 2.0, 3.0, 4.0]]])
    table = RotaryTable(8, rotary_frequencies(head_dim=4, theta=100.0))
    rotate_(heads, table.at(torch.tensor([0, 3])))
    assert heads[0, 0].tolist() == [1.0, 0.0, 0.0, 1.0]
    expected = []
    for x, y, frequency in ((1.0, 2.0, 1.0), (3.0, 4.0, 0.1)):
        cos, sin = math.cos(3 * frequency), math.sin(3 * frequency)
        expected += [x * cos - y * sin, y * cos + x * sin]
    assert heads[1, 0].tolist() == pytest.approx(expected, rel=1e-6)


def test_part_of_a_larger_tensor_is_turned_in_place() -> None:
    whole = torch.ones((2, 5, 4))
    rotate_(whole[:, :3], RotaryTable(8, rotary_frequencies(4, 100.0)).at(torch.tensor([1, 2])))
    assert bool((whole[:, :3] != 1).all())
    assert bool((whole[:, 3:] == 1).all())


@pytest.mark.parametrize("shape", [(1, 576), (7, 64), (3, 5, 16)])
def test_a_norm_divides_by_the_root_of_the_mean_square(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(shape, generator=generator) * 100
    weight = torch.randn(shape[1:], generator=generator)
    expected = torch.nn.functional.rms_norm(rows, shape[-1:], None, 1e-5) * weight
    torch.testing.assert_close(rms_norm(rows, weight, 1e-5), expected)
