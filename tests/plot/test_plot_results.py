"""Pictures of estimates and blocks: what is drawn, read from the figure's artists."""

import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import LogNorm, Normalize, SymLogNorm
from matplotlib.image import imread
from tests.results.fake_results import (
    fake_blocks,
    fake_density,
    fake_diagonal,
    fake_lanczos,
    fake_result,
    fake_trace,
)

from curvax import plot

NAN, INF = float("nan"), float("inf")
MINUS = "\N{MINUS SIGN}"


def labels(ticks):
    return [tick.get_text() for tick in ticks]


def line(axes, **properties):
    """The data `(points, 2)` of the only line of `axes` with these properties."""
    (found,) = [
        line
        for line in axes.lines
        if all(getattr(line, f"get_{name}")() == value for name, value in properties.items())
    ]
    return found.get_xydata()


def shaded(collection, x):
    """Lower and upper end of a `fill_between` at the points `x`, which it was given."""
    vertices = collection.get_paths()[0].vertices[:-1]
    n = len(x)
    below, above = vertices[1 : n + 1], vertices[n + 2 :][::-1]
    np.testing.assert_array_equal(below[:, 0], x)
    return below[:, 1], above[:, 1]


BULK = np.linspace(-3e-3, 3e-3, 31)


def bulk_with_outliers(runs=3):
    nodes = np.tile(np.concatenate([[-50.0, -20.0], BULK, [20.0, 50.0, 100.0]]), (runs, 1))
    mass = np.concatenate([[1e-4] * 2, np.exp(-0.5 * (BULK / 1e-3) ** 2), [1e-4] * 3])
    weights = np.tile(mass / mass.sum(), (runs, 1))
    return fake_density(
        nodes, weights, n=50_000, width=3e-4, outliers=[100.0, 50.0, 20.0, -20.0, -50.0]
    )


def test_a_density_is_drawn_with_band_outliers_and_its_bulk():
    result = bulk_with_outliers()
    whole, bulk = result.plot().axes
    for axes in (whole, bulk):
        assert axes.get_yscale() == "log"
        drawn = line(axes, label="density")
        np.testing.assert_array_equal(drawn, np.column_stack([result.grid, result.density]))
        floor = axes.get_ylim()[0]
        assert floor == 0.1 / (50_000 * 3e-4 * np.sqrt(2 * np.pi))
        lower, upper = shaded(axes.collections[0], result.grid)
        visible = result.lower > floor
        np.testing.assert_array_equal(lower[visible], result.lower[visible])
        np.testing.assert_array_equal(upper[result.upper > floor], result.upper[upper > floor])
        assert np.all(lower > 0)
    np.testing.assert_array_equal(line(whole, label="outliers")[:, 0], result.outliers)
    assert labels(whole.texts) == ["100", "50", f"{MINUS}50", "20", f"{MINUS}20"]
    assert whole.get_xlim()[0] < -50 and whole.get_xlim()[1] > 100
    # The second panel holds the bulk, and is not much wider than it.
    low, high = bulk.get_xlim()
    assert -6e-3 < low < -2.7e-3 and 2.7e-3 < high < 6e-3
    assert "0.0003" in bulk.get_xlabel()


def test_a_bulk_that_can_be_seen_has_no_panel_of_its_own():
    nodes, weights = [np.linspace(-1, 1, 9)] * 2, [np.full(9, 1 / 9)] * 2
    (axes,) = fake_density(nodes, weights).plot().axes
    assert not axes.texts and labels(axes.get_legend().get_texts()) == ["density", "95 % band"]
    assert len(fake_density(nodes, weights, [9.0, -5.0], n=20).plot().axes) == 1
    assert len(fake_density(nodes, weights, [90.0, -5.0], n=20).plot().axes) == 2


def test_labels_of_close_outliers_do_not_touch():
    outliers = np.array([30.0, 12.3, 12.28, 12.0, 9.0, -5.0])
    nodes = np.array([np.append(np.linspace(-1, 1, 9), outliers)])
    result = fake_density(nodes, np.full((1, 15), 1 / 15), outliers=outliers)
    (axes,) = result.plot().axes
    assert labels(axes.texts) == ["30", "12.3", "9", f"{MINUS}5"]
    np.testing.assert_array_equal(line(axes, label="outliers")[:, 0], outliers)


def test_a_trace_is_drawn_as_it_converged():
    result = fake_trace(10.0, 0.5, steps=50, until=0.7)
    upper, lower = result.plot(title="trace").axes
    products = np.arange(1.0, 51.0)
    estimates = np.array([entry.estimate for entry in result.history])
    errors = np.array([entry.stderr for entry in result.history])
    np.testing.assert_array_equal(
        line(upper, marker=".", linestyle="-"), np.column_stack([products, estimates])
    )
    low, high = shaded(upper.collections[0], products[1:])
    np.testing.assert_allclose(low, estimates[1:] - 1.96 * errors[1:])
    np.testing.assert_allclose(high, estimates[1:] + 1.96 * errors[1:])
    (bar,) = upper.containers
    np.testing.assert_array_equal(bar.lines[0].get_xydata(), [[50, 10.0]])
    np.testing.assert_allclose(
        bar.lines[2][0].get_segments()[0], [[50, result.interval[0]], [50, result.interval[1]]]
    )
    # The first, wild estimates do not set the scale.
    assert upper.get_ylim()[1] < estimates[0] and upper.get_ylim()[0] < result.interval[0]
    assert lower.get_yscale() == "log"
    np.testing.assert_array_equal(
        line(lower, marker="."), np.column_stack([products[1:], errors[1:]])
    )
    np.testing.assert_array_equal(line(lower, linestyle="--")[:, 1], [0.7, 0.7])
    assert "0.7" in lower.get_title(loc="right")


def test_traces_without_a_spread_are_drawn():
    upper, lower = fake_trace(3.0, INF, interval=(-INF, INF), steps=1).plot().axes
    assert lower.get_title(loc="right") == "not known" and not lower.lines
    assert labels(upper.get_legend().get_texts())[-1] == "result"
    upper, lower = fake_trace(3.0, 0.0, interval=(3.0, 3.0), history=()).plot().axes
    assert lower.get_title(loc="right") == "zero"
    upper, lower = fake_trace(NAN, NAN, interval=(NAN, NAN)).plot().axes
    assert lower.get_title(loc="right") == "not known"
    upper, _ = fake_trace(steps=3, interrupted=True).plot().axes
    assert upper.get_title(loc="right") == "interrupted"


def spread_rows(axes):
    """Least, 5 %, 95 % and largest of every row, and the names."""
    thin, thick = (np.array(c.get_segments())[:, :, 0] for c in axes.collections)
    return np.column_stack([thin[:, 0], thick, thin[:, 1]]), labels(axes.get_yticklabels())


def test_a_diagonal_is_drawn_by_leaf(rng):
    tree = {"a": rng.normal(size=50), "b": [rng.normal(size=(4, 5)) + 3.0]}
    errors = {"a": np.full(50, 0.1), "b": [np.full((4, 5), 0.2)]}
    (axes,) = fake_diagonal(tree, errors).plot().axes
    rows, names = spread_rows(axes)
    assert names == ["a", "b.0"] and axes.get_ylim()[0] > axes.get_ylim()[1]
    leaves = [tree["a"], tree["b"][0].ravel()]
    exact = [np.quantile(leaf, [0.0, 0.05, 0.95, 1.0]) for leaf in leaves]
    np.testing.assert_allclose(rows, exact)
    np.testing.assert_allclose(line(axes, label="median")[:, 0], [np.median(x) for x in leaves])
    np.testing.assert_array_equal(line(axes, label="median standard error")[:, 0], [0.1, 0.2])


def test_many_leaves_and_wide_ranges(rng):
    sizes = rng.permutation(100) + 1
    tree = [10.0 ** rng.uniform(-4, 1) * rng.normal(size=size) for size in sizes]
    (axes,) = fake_diagonal(tree).plot().axes
    names = [int(name) for name in labels(axes.get_yticklabels())]
    assert names == [i for i in range(100) if sizes[i] > 60]
    assert "the 40 largest of 100 leaves" in axes.get_xlabel()
    assert axes.get_xscale() == "symlog"
    assert "median standard error" not in [artist.get_label() for artist in axes.lines]


def test_entries_that_were_not_reached_are_left_out():
    tree = {"a": np.array([NAN, 1.0, 3.0]), "b": np.full(3, NAN)}
    (axes,) = fake_diagonal(tree, interrupted=True).plot().axes
    rows, names = spread_rows(axes)
    assert names == ["a"] and rows[0, 0] == 1.0 and rows[0, -1] == 3.0


def test_ritz_values_stand_at_their_weights():
    result = fake_lanczos(30, last_beta=0.5)
    values, weights, residuals = result.ritz()
    (axes,) = result.plot().axes
    drawn = np.concatenate([entry.get_xydata() for entry in axes.lines])
    assert axes.get_yscale() == "log" and len(drawn) == 30
    kept = weights > np.finfo(np.float64).eps ** 2
    drawn = drawn[np.argsort(-drawn[:, 0])]
    np.testing.assert_array_equal(drawn[kept], np.column_stack([values, weights])[kept])
    filled = [entry for entry in axes.lines if entry.get_markerfacecolor() != "white"]
    settled = np.sort(np.concatenate([entry.get_xdata() for entry in filled]))[::-1]
    np.testing.assert_array_equal(settled, values[residuals <= 1e-3 * np.max(np.abs(values))])
    assert "open" in axes.get_title(loc="right")


LAYERED = [f"model.layers.{layer}.{kind}" for layer in (10, 2) for kind in ("attn.q", "mlp")]


def test_layers_and_kinds_are_a_heat_map():
    values = [[3.0, 1.0], [2.0, -8.0], [5.0, 4.0], [7.0, 0.5]]
    blocks = fake_blocks(LAYERED, lambda i: fake_result(values[i], [0.0, [0, 9, 0, 0][i]]))
    axes, bar = blocks.plot().axes
    np.testing.assert_array_equal(axes.images[0].get_array(), [[5.0, 7.0], [3.0, -8.0]])
    assert labels(axes.get_yticklabels()) == ["2", "10"]
    assert labels(axes.get_xticklabels()) == ["attn.q", "mlp"]
    assert labels(axes.texts) == ["5", "7", "3", f"{MINUS}8"]
    assert np.round(line(axes, marker="x")).tolist() == [[1, 1]]
    assert bar.get_ylabel() == "eigenvalue" and "largest magnitude" in axes.get_xlabel()


@pytest.mark.parametrize(
    "names",
    [
        ["embed", *LAYERED],  # not all are of a layer
        ["h.0.mlp", "h.1.mlp"],  # one kind
        ["h.0.mlp", "h.0.attn"],  # one layer
        ["enc.0.a", "enc.1.a", "dec.0.b", "dec.1.b"],  # two stacks
        ["a", "b"],
    ],
)
def test_other_names_give_blocks_by_index(names):
    blocks = fake_blocks(names, lambda i: fake_result(np.arange(3.0 + i)[::-1]))
    axes, _ = blocks.plot().axes
    drawn = axes.images[0].get_array()
    assert drawn.shape == (len(names), 2 + len(names))
    for i, row in enumerate(drawn):
        np.testing.assert_array_equal(row.compressed(), np.arange(3.0 + i)[::-1])
    assert labels(axes.get_yticklabels()) == names


@pytest.mark.parametrize(
    "values, kind, ends",
    [
        ([3.0, 1.0], Normalize, (0.0, 3.0)),
        ([3.0, -1.0], Normalize, (-3.0, 3.0)),
        ([300.0, 0.5], LogNorm, (0.1, 300.0)),
        ([300.0, -0.5], SymLogNorm, (-300.0, 300.0)),
        ([0.0, 0.0], Normalize, (0.0, 1.0)),
        ([], Normalize, (0.0, 1.0)),
    ],
)
def test_colours_follow_range_and_signs(values, kind, ends):
    axes, _ = fake_blocks("ab", lambda i: fake_result(values)).plot().axes
    norm = axes.images[0].norm
    assert type(norm) is kind and (norm.vmin, norm.vmax) == pytest.approx(ends)


def test_traces_of_blocks_are_bars_with_intervals():
    blocks = fake_blocks("abc", lambda i: fake_trace(10.0 - 8 * i, 0.5 + i))
    (axes,) = blocks.plot().axes
    errors, bars = axes.containers
    assert [bar.get_width() for bar in bars] == [10.0, 2.0, -6.0]
    ends = [segment[:, 0] for segment in errors.lines[2][0].get_segments()]
    np.testing.assert_allclose(ends, [block.interval for block in blocks.values()])
    assert labels(axes.get_yticklabels()) == ["a", "b", "c"]
    unknown = fake_blocks("ab", lambda i: fake_trace(1.0, INF, interval=(-INF, INF)))
    errors, _ = unknown.plot().axes[0].containers
    assert np.all(np.ptp(errors.lines[2][0].get_segments(), axis=1) == 0)


def test_intervals_of_blocks_past_zero_stay_in_the_linear_part():
    """The others are as long as they are; that of a single sample is not drawn."""
    results = [fake_trace(1e4, 10.0), fake_trace(3.0, 2.0), fake_trace(-0.5, 1.0)]
    results.append(fake_trace(20.0, INF, interval=(-INF, INF)))
    (axes,) = fake_blocks("abcd", lambda i: results[i]).plot().axes
    assert axes.get_xscale() == "symlog"
    linear = axes.xaxis.get_transform().linthresh
    (segments,) = (c.lines[2][0].get_segments() for c in axes.containers if hasattr(c, "lines"))
    for segment, result in zip(segments[:3], results[:3], strict=True):
        low, high = segment[:, 0]
        np.testing.assert_allclose((low, high), result.interval)
        assert low > 0 or max(-low, high) <= linear
    assert np.ptp(segments[3][:, 0]) == 0 and linear == 10.0


def test_diagonals_of_blocks_are_spreads():
    tree = {"x": np.arange(50.0), "y": np.arange(50.0, 101.0)}
    blocks = fake_blocks(["a", "b"], lambda i: fake_diagonal(tree))
    rows, names = spread_rows(blocks.plot().axes[0])
    np.testing.assert_allclose(rows, [[0, 5, 95, 100]] * 2)
    assert names == ["a", "b"]


def test_many_blocks_have_readable_names():
    names = [f"{'long.' * 12}{i}" for i in range(120)]
    figure = fake_blocks(names, lambda i: fake_trace()).plot()
    shown = labels(figure.axes[0].get_yticklabels())
    assert len(shown) == 40 and shown[1].endswith(".3") and max(map(len, shown)) <= 32
    assert figure.get_figheight() < 14


def results():
    return {
        "eigen": fake_result(),
        "density": bulk_with_outliers(),
        "one run": fake_density([[0.0, 1.0]], [[0.5, 0.5]]),
        "one eigenvalue": fake_density(np.empty((0, 1)), np.empty((0, 1)), [2.0], n=1),
        "trace": fake_trace(),
        "diagonal": fake_diagonal({"a": np.arange(3.0)}),
        "scalar": fake_diagonal(np.array(2.0)),
        "nothing reached": fake_diagonal({"a": np.full(2, NAN)}, interrupted=True),
        "lanczos": fake_lanczos(1),
        "eigen blocks": fake_blocks(LAYERED, lambda i: fake_result()),
        "trace blocks": fake_blocks("a", lambda i: fake_trace()),
        "diagonal blocks": fake_blocks("a", lambda i: fake_diagonal(np.full(2, NAN))),
    }


@pytest.mark.parametrize("name", results())
def test_every_result_writes_its_picture(tmp_path, name):
    before = dict(matplotlib.rcParams)
    figure = results()[name].plot(tmp_path / "x.png", title="a title")
    pixels = imread(tmp_path / "x.png")[..., :3]
    assert 0.003 < np.mean(pixels.min(axis=-1) < 0.9) < 0.95
    # Nothing is cut: the outermost pixels are white.
    frame = np.concatenate([pixels[[0, -1]].reshape(-1, 3), pixels[:, [0, -1]].reshape(-1, 3)])
    assert frame.min() > 0.9
    assert figure.get_suptitle() == "a title" and dict(matplotlib.rcParams) == before


def test_no_picture(monkeypatch):
    with pytest.raises(ValueError, match="at least one block"):
        fake_blocks([], None).plot()
    with pytest.raises(TypeError, match="one of BlockResults, .*TraceResult to be drawn, got str"):
        plot.plot("text")
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    for result in results().values():
        with pytest.raises(ImportError, match=r"pictures need matplotlib: pip install 'curvax\["):
            result.plot()
