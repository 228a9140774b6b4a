import numpy as np
import pytest
import torch

from megatron_tip.selection.normalise import NORMALISERS
from megatron_tip.selection.order_statistics import quantiles
from megatron_tip.selection.replicas import Replicas
from tests.helpers.selection import clipped, min_max, norm_b


def normalised(name: str, values: torch.Tensor) -> np.ndarray:
    normaliser = NORMALISERS[name]
    wanted = [("z", p) for p in normaliser.probabilities]
    found = quantiles({"z": values}, wanted, len(values), Replicas())
    return normaliser.function(values.double(), *(found[key] for key in wanted)).numpy()


@pytest.mark.parametrize("num_values", [1, 2, 3, 40, 41, 1000])
def test_normalisers_equal_their_formulas_in_numpy(num_values):
    values = torch.randn(num_values, generator=torch.Generator().manual_seed(num_values)) ** 3
    z = values.double().numpy()
    np.testing.assert_array_equal(normalised("robust", values), norm_b(z))
    np.testing.assert_array_equal(normalised("min_max", values), min_max(z))
    np.testing.assert_array_equal(normalised("clipped_min_max", values), min_max(clipped(z)))
    np.testing.assert_array_equal(normalised("above_median", values), z > np.median(z))
    np.testing.assert_array_equal(normalised("raw", values), z)


@pytest.mark.parametrize("name", ["robust", "min_max", "clipped_min_max", "above_median"])
def test_a_constant_becomes_zero(name):
    assert not normalised(name, torch.full((7,), 3.25)).any()


def test_an_outlier_does_not_squeeze_the_robust_scale():
    values = torch.cat([torch.linspace(0, 1, 100), torch.tensor([1e30])])
    assert normalised("robust", values)[50] == pytest.approx(0.5, abs=0.02)
    assert normalised("clipped_min_max", values)[50] == pytest.approx(0.5, abs=0.02)
    assert normalised("min_max", values)[50] < 1e-20
