"""Results as text, and results of blocks as a mapping."""

import dataclasses

import numpy as np
import pytest
from tests.results.fake_results import (
    fake_blocks,
    fake_density,
    fake_diagonal,
    fake_lanczos,
    fake_result,
    fake_solution,
    fake_trace,
    odd_results,
)

import curvax as cx
from curvax.adapters.adapted import Verification
from curvax.results import BlockResults

NAN = float("nan")


def test_every_table_fits_a_terminal():
    wide = "blocks.11.attention.self.query_key_value.kernel"
    values = 1e-90 * np.array([-1.23456789, 1.23456789, 1e89])
    results = [
        *odd_results().values(),
        fake_result(values * 1e-9, residuals=[NAN, 1e-100, 0.0], interrupted=True),
        fake_solution(method="minres", damping=1.23456e-5, tol=1.23456e-5, converged=False),
        fake_trace(-1.23456789e-90, 1e-90, method="xnystrace", num_matvecs=10**7),
        fake_diagonal({f"{wide}.{i}": values for i in range(9)}),
        fake_density([np.linspace(-1, 1, 9)], [np.full(9, 1 / 9)], outliers=-1e-9 * np.arange(40)),
        fake_blocks([wide + "0", wide + "1"], lambda i: fake_result(values), size=10**9),
        fake_blocks([wide + "0", wide + "1"], lambda i: fake_trace(1e-90), size=10**9),
        fake_blocks([wide + "0", wide + "1"], lambda i: fake_diagonal(values), size=10**9),
    ]
    for result in results:
        assert max(map(len, str(result).splitlines())) <= 80, str(result)


@pytest.mark.parametrize("name", odd_results())
def test_the_cell_of_a_notebook_shows_the_table(name):
    result = odd_results()[name]
    assert repr(result) == str(result) and "array" not in repr(result)


def test_a_plan_and_a_verification_show_what_they_print():
    plan = cx.plan(np.eye(3, dtype=np.float32), 1)
    assert repr(plan) == str(plan) and repr(plan).startswith("1 eigenpairs of 3 parameters")
    found = Verification(1e-7, 2e-7, 4e-7, 8e-7, "w", 3e-5, "torch", {"outputs": 1e-4})
    assert (
        repr(found)
        == str(found)
        == (
            "relative differences: outputs 1.0e-07, loss 2.0e-07, gradient 4.0e-07 (of w 8.0e-07), "
            "Hessian-vector product 3.0e-05 against torch"
        )
    )


def test_a_solution_is_told_in_whole_sentences():
    assert str(fake_solution()) == (
        "CG solved A x = b with 11 products, and 1 to verify.\n"
        "The measured relative residual is 1.23e-06, within the tolerance of 1e-05."
    )
    failed = dict(converged=False, relative_residual=0.5, method="minres", damping=0.25)
    assert str(fake_solution(num_matvecs=12345, **failed)) == (
        "MINRES did not solve (A + 0.25 I) x = b with 12,345 products, and 1 to verify.\n"
        "The measured relative residual is 5.00e-01, above the tolerance of 1e-05."
    )
    interrupted = str(fake_solution(**failed, interrupted=True))
    assert interrupted.startswith("Interrupted: MINRES did not solve")


def test_table_of_eigenpairs():
    result = fake_result([3.0, 2.0, -1.0], residuals=[1e-3, 0.5, 2e-3])
    head, *rows = cells(result)
    names = ["index", "eigenvalue", "residual", "bound", "rel. bound", "est. error", "converged"]
    assert head == " ".join(names).split()
    assert rows == [
        ["1", "3", "1.00e-03", "1.00e-03", "3.33e-04", "1.00e-06", "yes"],
        ["2", "2", "5.00e-01", "5.00e-01", "2.50e-01", "2.50e-01", "NO"],
        ["-1", "-1", "2.00e-03", "2.00e-03", "2.00e-03", "4.00e-06", "yes"],
    ]


def test_table_of_an_interrupted_solve_calls_estimates_not_verified():
    errors = np.array([1e-6, 0.25, 0.1])
    found = dict(residuals=[1e-3, NAN, NAN], estimated_errors=errors, interrupted=True)
    result = fake_result([3.0, 2.0, -1.0], **found)
    assert cells(result)[1:] == [
        ["1", "3", "1.00e-03", "1.00e-03", "3.33e-04", "1.00e-06", "yes"],
        ["2", "2", "-", "-", "-", "2.50e-01", "not", "verified"],
        ["-1", "-1", "-", "-", "-", "1.00e-01", "not", "verified"],
        "interrupted: what is not verified is an estimate".split(),
    ]
    blocks = fake_blocks("ab", lambda i: result)
    assert cells(blocks)[1] == ["a", "100", "3", "2", "-1", "-", "1/3"]
    assert str(blocks).endswith("\ninterrupted: the results are what was known by then")


def cells(result):
    return [line.split() for line in str(result).splitlines()]


def test_table_of_a_trace():
    result = fake_trace(12.5, 0.25, interval=(12.0, 13.0), num_deflated=3)
    assert cells(result)[1:] == [["12.5", "2.50e-01", "12", "13", "hutchinson", "20", "3"]]
    assert cells(dataclasses.replace(result, interrupted=True))[-1] == ["interrupted"]


def test_table_of_a_diagonal():
    tree = {"a": np.arange(4.0), "b": {"c": np.float32([-1.0, 3.0])}}
    errors = {"a": np.array([1.0, 3.0, 2.0, 9.0]), "b": {"c": np.array([0.5, 0.7])}}
    head, *rows = cells(fake_diagonal(tree, errors))
    assert head == ["leaf", "size", "sum", "mean", "min", "max", "stderr"]
    assert rows[0] == ["a", "4", "6", "1.5", "0", "3", "2.5"]
    assert rows[1] == ["b.c", "2", "2", "1", "-1", "3", "0.6"]
    assert rows[2] == ["total", "6", "8", "1.33", "-1", "3"]
    many = cells(fake_diagonal([np.ones(2)] * 25))
    assert len(many) == 23 and many[-2] == ["and", "5", "more"] and many[-1][2] == "50"


def test_table_of_an_interrupted_diagonal_leaves_out_what_was_not_reached():
    tree = {"a": np.array([2.0, NAN, 4.0]), "b": np.full(5, NAN)}
    rows = cells(fake_diagonal(tree, interrupted=True))
    assert rows[1] == ["a", "3", "6", "3", "2", "4", "0"]
    assert rows[2] == ["b", "5", "0", "nan", "nan", "nan", "nan"]
    assert rows[3] == ["total", "8", "6", "3", "2", "4"]
    ending = "\ninterrupted after 20 products: 6 entries not reached"
    assert str(fake_diagonal(tree, interrupted=True)).endswith(ending)
    estimated = fake_diagonal({"a": np.ones(2)}, {"a": np.ones(2)}, interrupted=True)
    assert str(estimated).endswith("\ninterrupted after 20 products")


def test_table_of_a_density():
    nodes, weights = [[-1.0, 1.0]] * 2, [[0.25, 0.75], [0.35, 0.65]]
    result = fake_density(nodes, weights, [7.5], n=1000, width=1e-3, rounding=1e-3)
    low, high = result.cdf_interval(0.0)
    assert 0.25 < low < 0.2997 < high < 0.35
    assert str(result).splitlines() == [
        "parameters  1,000, eigenvalues deflated: 1",
        "runs        2 of 2 steps, 4 products",
        "width       0.001",
        # The nodes, and what rounding leaves open.
        "5 % below   -1, 95 % in [-1.001, -0.999]",
        "50 % below  1, 95 % in [0.999, 1.001]",
        "95 % below  1, 95 % in [0.999, 1.001]",
        f"below 0     0.2997, 95 % in [{low:.4f}, {high:.4f}] (below -0.002, beyond rounding)",
        "outliers    7.5",
    ]
    # Runs that broke down, or that an interrupt ended, have as many steps as nodes.
    short = fake_density([[-1.0, 1.0, NAN], [-1.0, 0.5, 1.0]], [[0.5, 0.5, NAN], [1 / 3] * 3])
    assert "runs        2 of 2 to 3 steps, 6 products" in str(short)
    ended = fake_density([[-1.0, 1.0, NAN]], [[0.5, 0.5, NAN]], interrupted=True)
    assert "runs        1 of 2 steps" in str(ended) and str(ended).endswith("\ninterrupted")
    # Zeros are not below zero.
    flat = fake_density([[-1e-8, 1.0]], [[0.25, 0.75]], n=1000, rounding=1e-6)
    assert "below 0     0.0000, 95 % in [0.0000, 0.0000] (below -2e-06, b" in str(flat)
    old = str(dataclasses.replace(result, residuals=None)).splitlines()
    assert old == [line for line in str(result).splitlines() if "below" not in line]
    many = str(fake_density(nodes, weights, outliers=np.arange(30.0)[::-1])).split("outliers")[1]
    assert many.split() == [*(f"{i}," for i in range(29, 9, -1)), "and", "10", "more"]


def test_table_of_the_recurrence():
    result = fake_lanczos(30, last_beta=0.25)
    tridiagonal = np.diag(result.alphas) + np.diag(result.betas, 1) + np.diag(result.betas, -1)
    values, vectors = np.linalg.eigh(tridiagonal)
    first, header, *rows = cells(result)
    assert first == ["steps", "30,", "last", "beta", "0.25"] and len(rows) == 11
    shown = np.array([row for row in rows if row != ["..."]], np.float64)
    places = [*range(-1, -6, -1), *range(4, -1, -1)]
    np.testing.assert_allclose(shown[:, 0], values[places], rtol=1e-5)
    np.testing.assert_allclose(shown[:, 1], 0.25 * np.abs(vectors[-1, places]), rtol=1e-2)
    np.testing.assert_allclose(shown[:, 2], vectors[0, places] ** 2, rtol=1e-2)


def test_tables_of_blocks():
    eigen = fake_blocks("ab", lambda i: fake_result([2.0, 1.0, -0.5, -3.0], [0, 0, 0, i]))
    assert cells(eigen)[1:] == [
        ["a", "100", "-3", "2", "1", "0.00e+00", "4/4"],
        ["b", "100", "-3", "2", "1", "1.00e+00", "3/4"],
    ]
    traces = fake_blocks("ab", lambda i: fake_trace(10.0 + i))
    assert cells(traces)[2] == ["b", "100", "11", "5.00e-01", "0.11"]
    few = fake_blocks("ab", lambda i: fake_trace(interval=(NAN, NAN), no_interval="few samples"))
    assert str(few) == f"{fake_blocks('ab', lambda i: fake_trace())}\nno intervals: few samples"
    diagonals = fake_blocks("a", lambda i: fake_diagonal({"x": np.ones(2), "y": np.array(4.0)}))
    assert cells(diagonals)[1] == ["a", "100", "6", "2", "1", "4"]


def test_blocks_are_an_immutable_mapping():
    results = {"a": fake_result([1.0]), "b": fake_result([2.0], residuals=[9.0])}
    blocks = BlockResults(results, {"a": 3, "b": 4})
    results.clear()
    assert list(blocks) == ["a", "b"] and len(blocks) == 2 and blocks["b"].eigenvalues == 2.0
    assert (blocks.num_matvecs, blocks.num_verification) == (120, 2) and not blocks.all_converged
    assert fake_blocks("ab", lambda i: fake_result([1.0])).all_converged
    with pytest.raises(dataclasses.FrozenInstanceError):
        blocks.results = {}
    with pytest.raises(TypeError):
        blocks["a"] = results
    traces = fake_blocks("ab", lambda i: fake_trace())
    assert traces.num_matvecs == 40
    with pytest.raises(AttributeError, match="all_converged is for eigenpairs.*'a'.*TraceResult"):
        _ = traces.all_converged


def test_blocks_of_other_results_are_refused():
    with pytest.raises(TypeError, match="got EigenResult, TraceResult"):
        BlockResults({"a": fake_result(), "b": fake_trace()}, {"a": 1, "b": 1})
    with pytest.raises(TypeError, match="got LanczosTridiagonal"):
        BlockResults({"a": fake_lanczos()}, {"a": 1})
    with pytest.raises(ValueError, match=r"sizes must have the names of results, \['a'\], got"):
        BlockResults({"a": fake_trace()}, {"b": 1})
