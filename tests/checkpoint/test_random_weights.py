import numpy as np
import pytest
from numpy.typing import NDArray

from sa3_convert.checkpoint.synthetic import Weights, generator_for, pieces
from sa3_convert.checkpoint.tensors import Constant, Distribution, Embedding, Matrix, Normal, TensorSpec, Uniform

MATRIX = TensorSpec((1024, 768), "F32", Matrix(768))


def draw(spec: TensorSpec, weights: Weights = "gaussian", *keys: str | int) -> NDArray[np.float32]:
    return np.concatenate(list(pieces(spec, weights, generator_for(*keys)))).reshape(spec.shape)


def kurtosis(values: NDArray[np.float32]) -> float:
    centred = values.astype(np.float64) - values.mean()
    return float((centred**4).mean() / (centred**2).mean() ** 2)


def test_a_generator_depends_on_every_key() -> None:
    first = generator_for(0, "a", "b").integers(1 << 62)
    assert first == generator_for(0, "a", "b").integers(1 << 62)
    others = [generator_for(*keys).integers(1 << 62) for keys in ((1, "a", "b"), (0, "a", "c"), (0, "ab", ""))]
    assert first not in others


@pytest.mark.parametrize("weights", ["gaussian", "heavy-tailed"])
def test_both_kinds_of_matrix_have_mean_zero_and_variance_one_over_fan_in(weights: Weights) -> None:
    values = draw(MATRIX, weights)
    assert values.dtype == np.float32
    assert abs(values.mean()) < 0.01 * values.std()
    assert values.std() == pytest.approx(768**-0.5, rel=0.02)


def test_gaussian_matrices_have_no_tails() -> None:
    assert kurtosis(draw(MATRIX)) == pytest.approx(3, abs=0.1)


def test_heavy_tailed_matrices_have_tails_and_outlier_channels() -> None:
    values = draw(MATRIX, "heavy-tailed")
    assert kurtosis(values) > 6
    # Mean magnitudes: a deviation would itself be moved by the tails.
    columns, rows = np.abs(values).mean(axis=0), np.abs(values).mean(axis=1)
    loud_columns, loud_rows = columns > 2.2 * np.median(columns), rows > 1.6 * np.median(rows)
    assert loud_columns.sum() == 768 // 128
    assert loud_rows.sum() == 1024 // 128
    ordinary = values[np.ix_(~loud_rows, ~loud_columns)]
    # Without the channels Student's t is left.
    assert 4.5 < kurtosis(ordinary) < 40


def test_a_small_matrix_has_an_outlier_channel_too() -> None:
    columns = draw(TensorSpec((4096, 32), "F32", Matrix(32)), "heavy-tailed").std(axis=0)
    assert (columns > 2 * np.median(columns)).sum() == 1


def test_outlier_channels_of_a_kernel_span_its_taps() -> None:
    values = draw(TensorSpec((512, 128, 3), "F32", Matrix(384)), "heavy-tailed")
    spread = values.std(axis=0)
    assert len(set(spread.argmax(axis=0).tolist())) == 1


def test_a_heavy_tailed_embedding_has_outlier_columns_and_no_outlier_rows() -> None:
    values = draw(TensorSpec((4096, 256), "BF16", Embedding(0.05)), "heavy-tailed")
    assert values.std() == pytest.approx(0.05, rel=0.03)
    columns, rows = values.std(axis=0), np.abs(values).mean(axis=1)
    assert (columns > 2 * np.median(columns)).sum() == 2
    assert rows.max() < 1.6 * np.median(rows)


@pytest.mark.parametrize("distribution", [Normal(0.1), Normal(0.2, mean=1), Uniform(0.5, 1), Constant(0.83)], ids=repr)
def test_everything_but_matrices_is_the_same_in_both_kinds(distribution: Distribution) -> None:
    spec = TensorSpec((1000,), "F32", distribution)
    np.testing.assert_array_equal(draw(spec, "gaussian", 1), draw(spec, "heavy-tailed", 1), strict=True)


def test_pieces_stay_small() -> None:
    spec = TensorSpec((6000, 2048), "F32", Matrix(2048))
    for weights in ("gaussian", "heavy-tailed"):
        sizes = [piece.size for piece in pieces(spec, weights, generator_for(0))]
        assert sum(sizes) == spec.elements
        assert max(sizes) <= 1 << 22


def test_an_empty_tensor_has_no_values() -> None:
    assert list(pieces(TensorSpec((1, 0, 1), "F32", Normal(0.1)), "gaussian", generator_for(0))) == []
