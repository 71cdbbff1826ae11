"""Eigenvalues are counted from both ends alike: in results, tables, pictures and on a terminal."""

import io

import numpy as np
import pytest
from rich.console import Console
from tests.results.fake_results import fake_blocks, fake_result

import curvax as cx
from curvax.cli.report import print_result

N = 60
INDEFINITE = np.concatenate([np.linspace(-9.0, -5.0, 6), np.linspace(-1, 1, 48), np.arange(10, 16)])
POSITIVE = INDEFINITE + 10.0

CASES = [
    (INDEFINITE, 5, "LM", [1, 2, 3, 4, 5]),
    (INDEFINITE, 9, "LM", [1, 2, 3, 4, 5, 6, -3, -2, -1]),
    (-POSITIVE, 3, "LM", [-3, -2, -1]),
    (-POSITIVE, 3, "LA", [1, 2, 3]),
    (POSITIVE, 3, "SA", [-3, -2, -1]),
    (POSITIVE, 5, "BE", [1, 2, 3, -2, -1]),
    (INDEFINITE, (1, 3), "BE", [1, -3, -2, -1]),
    (POSITIVE, (0, 2), "BE", [-2, -1]),
]


@pytest.mark.parametrize("spectrum, k, which, indices", CASES)
@pytest.mark.parametrize("max_basis", [None, 40])
def test_an_index_is_the_place_in_the_spectrum(spectrum, k, which, indices, max_basis):
    matrix = np.diag(spectrum).astype(np.float32)
    result = cx.eigsh(matrix, k, which=which, max_basis=max_basis, block_size=1, seed=0)
    assert result.indices.tolist() == indices
    # As Python counts: the highest first, so 1 is at 0, and -1 at -1.
    ordered = np.sort(spectrum)[::-1]
    places = [i - 1 if i > 0 else i for i in indices]
    np.testing.assert_allclose(result.eigenvalues, ordered[places], rtol=1e-3, atol=1e-2)
    assert [line.split()[0] for line in str(result).splitlines()[1:]] == list(map(str, indices))


def shown_by_terminal(result):
    console = Console(width=80, file=io.StringIO())
    print_result(console, result, len(result.indices))
    lines = [line.split("│") for line in console.file.getvalue().splitlines() if "│" in line]
    return [cells[1].strip() for cells in lines]


@pytest.mark.parametrize(
    "indices",
    [[1, 2, 3, -2, -1], [-5, -4, -3, -2, -1], [1, 2, 3, 4, 5], [1, -4, -3, -2, -1], [0] * 5],
)
def test_table_terminal_and_picture_count_alike(indices):
    result = fake_result([5.0, 4.0, 3.0, 2.0, 1.0], indices=np.array(indices))
    expected = [str(i) if i else "?" for i in indices]
    assert [line.split()[0] for line in str(result).splitlines()[1:]] == expected
    assert shown_by_terminal(result) == expected
    _, lower = result.plot().axes
    drawn = [label.get_text().replace("\N{MINUS SIGN}", "-") for label in lower.get_xticklabels()]
    assert drawn == expected
    # A gap between the ends, and nowhere else.
    steps = np.diff(lower.get_xticks())
    np.testing.assert_array_equal(steps > 1, np.diff(np.sign(indices)) < 0)


def test_a_picture_of_many_numbers_both_ends():
    values = np.linspace(9, -5, 70)
    _, lower = fake_result(values).plot().axes
    drawn = [label.get_text().replace("\N{MINUS SIGN}", "-") for label in lower.get_xticklabels()]
    assert drawn == "1 5 10 15 20 25 30 35 40 45 -25 -20 -15 -10 -5 -1".split()


def test_blocks_share_the_columns_of_an_index():
    spectra = [[5.0, 4.0, 3.0, -2.0], [5.0, -1.0, -3.0], [7.0, 6.0]]
    (axes, *_) = fake_blocks("abc", lambda i: fake_result(spectra[i])).plot().axes
    values = np.asarray(axes.images[0].get_array().filled(np.nan), np.float64)
    nan = np.nan
    expected = [[5, 4, 3, nan, -2], [5, nan, nan, -1, -3], [7, 6, nan, nan, nan]]
    np.testing.assert_array_equal(values, expected)
    drawn = [label.get_text().replace("\N{MINUS SIGN}", "-") for label in axes.get_xticklabels()]
    assert drawn == ["1", "2", "3", "-2", "-1"]


def test_without_a_solve_the_signs_number_the_values(tmp_path):
    result = fake_result([3.0, 0.0, -1.0, -2.0])
    assert result.indices.tolist() == [1, 2, -2, -1]
    saved = fake_result([3.0, 2.0], indices=np.array([1, -1]))
    saved.save(tmp_path / "x")
    assert cx.load(tmp_path / "x").indices.tolist() == [1, -1]
