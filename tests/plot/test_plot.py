"""Pictures: what is drawn, read from the figure's artists and from the pixels."""

import builtins

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread
from tests.results.fake_results import GPT_LIKE, fake_result

import curvax as cx
from curvax.plot import plot_spectrum


def drawn_points(axes, label=None):
    """The y values of the marker lines of `axes`, restricted to those with `label`."""
    return np.concatenate(
        [
            line.get_ydata()
            for line in axes.lines
            if line.get_marker() == "o" and matches(line, label)
        ]
        or [np.empty(0)]
    )


def matches(line, label):
    return label is None or line.get_label() == label


def test_writes_a_picture_of_the_expected_size(tmp_path):
    path = tmp_path / "spectrum.png"
    plot_spectrum(fake_result(), path, title="Hessian of the demo")
    pixels = imread(path)
    assert pixels.shape[:2] == (880, 1280)
    inked = np.mean(pixels[..., :3].min(axis=-1) < 0.9)
    assert 0.01 < inked < 0.3
    # Both panels are drawn: blue stems in the upper half, grey markers in the lower quarter.
    blue = (pixels[..., 2] > pixels[..., 0] + 0.3).any(axis=1)
    assert blue[:440].any() and (pixels[660:, :, :3].max(axis=-1) < 0.6).any()


@pytest.mark.parametrize("suffix", ["pdf", "svg"])
def test_the_suffix_picks_the_format(tmp_path, suffix):
    path = tmp_path / f"spectrum.{suffix}"
    plot_spectrum(fake_result(), str(path))
    start = path.read_bytes()[:5]
    assert start == {"pdf": b"%PDF-", "svg": b"<?xml"}[suffix]


def test_draws_every_value_and_residual():
    result = fake_result()
    upper, lower = plot_spectrum(result).axes
    np.testing.assert_array_equal(sorted(drawn_points(upper)), sorted(GPT_LIKE))
    np.testing.assert_array_equal(sorted(drawn_points(lower)), sorted(result.residuals))
    assert lower.get_yscale() == "log"
    dashed = [line for line in lower.lines if line.get_linestyle() not in ("-", "None")]
    np.testing.assert_allclose(dashed[0].get_ydata(), 1e-3 * 30.06)
    assert "1.0e-03" in lower.get_title(loc="right")
    assert upper.get_legend() is None


def test_the_tolerance_is_relative_to_the_largest_of_the_spectrum():
    """Which is not among the lowest values."""
    basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(60, 60)))
    matrix = ((basis * np.geomspace(1e-3, 50.0, 60)) @ basis.T).astype(np.float32)
    for rows in (None, 40):
        result = cx.eigsh(matrix, 3, which="SA", relative_to="largest", max_basis=rows, seed=0)
        _, lower = plot_spectrum(result).axes
        (dashed,) = (line for line in lower.lines if line.get_linestyle() not in ("-", "None"))
        np.testing.assert_allclose(dashed.get_ydata(), result.tol_effective[:2] * 50.0, rtol=1e-3)


@pytest.mark.parametrize("low, high", [(0.15, 6.0), (0.3, 0.8), (1e-7, 1e-2), (3.0, 3.5)])
def test_labels_of_a_logarithmic_panel_do_not_touch(low, high):
    figure = plot_spectrum(fake_result(residuals=np.geomspace(low, high, 15)))
    figure.canvas.draw()
    lower = figure.axes[1]
    boxes = [
        label.get_window_extent()
        for label in [*lower.get_yticklabels(), *lower.get_yticklabels(minor=True)]
        if label.get_text()
        and lower.get_ylim()[0] <= label.get_position()[1] <= lower.get_ylim()[1]
    ]
    boxes.sort(key=lambda box: box.y0)
    assert len(boxes) >= 2
    assert all(one.y1 <= other.y0 + 1 for one, other in zip(boxes, boxes[1:], strict=False))


def test_marks_what_did_not_converge_and_shows_its_bounds():
    residuals = np.full(15, 1e-4)
    residuals[[4, 12]] = 1.5
    upper, lower = plot_spectrum(fake_result(residuals=residuals)).axes
    np.testing.assert_array_equal(drawn_points(upper, "not converged"), [9.54, -3.5])
    np.testing.assert_array_equal(drawn_points(lower, "not converged"), [1.5, 1.5])
    (bars,) = upper.containers
    ends = [np.ptp(segment[:, 1]) for segment in bars.lines[2][0].get_segments()]
    np.testing.assert_allclose(ends, [3.0, 3.0])
    assert [text.get_text() for text in upper.get_legend().get_texts()] == [
        "not converged",
        "bound",
    ]


def test_values_are_written_beside_few_markers_only():
    upper, _ = plot_spectrum(fake_result([12.345, 11.0, -0.5])).axes
    assert [text.get_text() for text in upper.texts] == ["12.3", "11.0", "\N{MINUS SIGN}0.500"]
    upper, lower = plot_spectrum(fake_result(np.linspace(9, 1, 150))).axes
    assert not upper.texts
    labels = [label.get_text() for label in lower.get_xticklabels()]
    assert labels[:3] == ["1", "10", "20"] and labels[-1] == "150"


@pytest.mark.parametrize(
    "values, scale",
    [(GPT_LIKE, "linear"), ([1e4, 30.0, 0.1, -1.0], "symlog"), ([1.0, 0.0], "linear")],
)
def test_scale_follows_the_range(values, scale):
    assert plot_spectrum(fake_result(values)).axes[0].get_yscale() == scale


def bars(axes):
    """The ends `(m, 2)` of the error bars, and the values that they belong to."""
    for container in axes.containers:
        segments = container.lines[2][0].get_segments()
        yield from ((segment[:, 1].min(), segment[:, 1].max()) for segment in segments)


@pytest.mark.parametrize(
    "values, bounds, scale, linear",
    [
        # Known to be positive: the scale stays logarithmic down to it.
        ([1e4, 30.0, 0.1, -1.0], [1.0, 9.0, 0.03, 0.01], "symlog", 0.1),
        # Of either sign: the linear part holds the bar, at its true length.
        ([1e4, 30.0, 0.1, -1.0], [1.0, 9.0, 0.3, 0.01], "symlog", 1.0),
        ([1e4, 30.0, 0.1, -1.0], [1.0, 9.0, 0.03, 4.0], "symlog", 10.0),
        ([1e4, 0.0, -30.0], [1.0, 2.0, 1.0], "symlog", 10.0),
        # What is smaller is known no better than a linear axis shows it.
        ([1e4, 30.0, 0.1, -1.0], [1.0, 50.0, 0.01, 0.01], "linear", None),
        ([1e4, 30.0, 0.1, -1.0], [1.0, 9.0, np.inf, np.nan], "symlog", 0.1),
    ],
)
def test_no_bar_crosses_the_linear_part_of_a_scale(values, bounds, scale, linear):
    (axes, _) = plot_spectrum(fake_result(values, residuals=bounds)).axes
    assert axes.get_yscale() == scale
    if linear is not None:
        assert axes.yaxis.get_transform().linthresh == linear
    expected = [(value - bound, value + bound) for value, bound in zip(values, bounds, strict=True)]
    for low, high in bars(axes):
        assert min(abs(low - a) + abs(high - b) for a, b in expected) < 1e-9 * max(values)
        assert linear is None or low * high > 0 or max(-low, high) <= linear


def test_bars_are_as_long_as_what_is_not_known():
    """Random values over eight decades: no bar that reaches past zero leaves the linear part."""
    rng = np.random.default_rng(0)
    crossing = 0
    for _ in range(20):
        values = -np.sort(-rng.choice([-1, 1], 12) * 10.0 ** rng.uniform(-4, 4, 12))
        bounds = np.abs(values) * 10.0 ** rng.uniform(-4, 0.5, 12)
        bounds[np.abs(values) > 1e2] *= 1e-3
        (axes, _) = plot_spectrum(fake_result(values, residuals=bounds)).axes
        heights = axes.yaxis.get_transform()
        if axes.get_yscale() == "symlog":
            for low, high in bars(axes):
                inside = max(-low, high) <= heights.linthresh
                crossing += inside
                # Elsewhere from half to one and a half of a value: within a decade.
                assert inside or np.ptp(heights.transform([low, high])) <= 0.75 * heights.linthresh
    assert crossing > 10


@pytest.mark.parametrize("values", [[], [3.0], [-3.0], [0.0, 0.0], [1e-14, -1e-15], [1e14, 1e13]])
def test_extreme_results_are_drawn(tmp_path, values):
    path = tmp_path / "spectrum.png"
    plot_spectrum(fake_result(values), path)
    assert path.stat().st_size > 5000


def test_an_interrupted_solve_has_no_residuals(tmp_path):
    result = fake_result(residuals=np.full(15, np.nan), interrupted=True)
    upper, lower = plot_spectrum(result, tmp_path / "spectrum.png").axes
    assert lower.get_title(loc="right").startswith("not measured")
    assert drawn_points(upper, "not converged").size == 15 and drawn_points(lower).size == 0


def test_global_state_is_untouched(monkeypatch):
    before = dict(matplotlib.rcParams)
    import matplotlib.pyplot as plt

    open_figures = plt.get_fignums()
    plot_spectrum(fake_result())
    assert plt.get_fignums() == open_figures and dict(matplotlib.rcParams) == before


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    def no_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real_import(name, *args, **kwargs)

    real_import = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    with pytest.raises(ImportError, match=r"pip install 'curvax\[plot\]'"):
        plot_spectrum(fake_result())
