"""The pictures of a comparison: every row has its name, no name covers another, and no line ends without a sign."""

import itertools

import numpy as np
import pytest

from recipes import plots

STRATEGIES = ["sync"] * 10 + ["stale"] * 2 + ["diloco"] * 4 + ["eager"]


def rows_of(strategies=STRATEGIES, points=10, **changes) -> list[dict]:
    """The first row is named `first`; of the others row n ends n % 3 hundredths above it, so that names crowd."""
    steps = np.arange(1, points + 1) * 100
    found = []
    for i, strategy in enumerate(["sync", *strategies]):
        losses = 1.5 + i % 3 / 100 + 1 / np.sqrt(steps / 100)
        found.append(
            {"name": f"{strategy} {i}, with a name of some length" if i else "first", "steps": steps.tolist(),
             "config": {"sync.strategy": strategy}, "wire_bytes_per_step": 1e6 / (i + 1),
             "eval_losses": [(losses + off).tolist() for off in (-0.03, 0.0, 0.03)]}
        )  # fmt: skip
    for name, change in changes.items():
        row = found[int(name.removeprefix("row"))]
        row["eval_losses"] = [[change(x) if i > 4 else x for i, x in enumerate(y)] for y in row["eval_losses"]]
    return found


def drawn(rows: list[dict], **options):
    limits = plots._loss_limits(rows)
    return plots.picture(rows, plots._loss, "Loss", "note", ylim=limits, **options)


def names(axes) -> list[str]:
    return [text.get_text() for text in axes.texts if text.get_text() != "↑"]


def test_each_row_is_in_one_panel_beside_the_first():
    rows = rows_of()
    figure = drawn(rows)
    panels = [names(axes) for axes in figure.axes]
    assert all("first" in found and len(found) <= plots.MOST + 1 for found in panels)
    others = [name for found in panels for name in found if name != "first"]
    assert sorted(others) == sorted(row["name"] for row in rows[1:])
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["sync", "sync, stale", "diloco, eager"]


@pytest.mark.parametrize("strategies", [STRATEGIES, ["sync"] * 7, ["diloco"], []], ids=len)
def test_no_name_covers_another_or_leaves_the_picture(strategies):
    figure = drawn(rows_of(strategies), xscale="log")
    figure.canvas.draw()
    shown = [text for axes in figure.axes for text in axes.texts if text.get_text() != "↑"]
    boxes = [text.get_window_extent() for text in shown]
    assert len(boxes) == len(strategies) + len(figure.axes)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    width, height = figure.canvas.get_width_height()
    assert all(min(box.x0, box.y0) >= 0 and box.x1 <= width and box.y1 <= height for box in boxes)


def arrows(axes) -> list[tuple[float, str]]:
    return sorted((text.get_position()[0], text.get_color()) for text in axes.texts if text.get_text() == "↑")


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_where_a_line_leaves_the_frame_an_arrow_of_its_colour_says_so(scale):
    """All come into it below 300 steps; this one goes out between its fifth and its sixth point, for good."""
    rows = rows_of(["sync"] * 3, row2=lambda x: x + 50)
    (axes,) = drawn(rows, xscale=scale).axes
    lines = [line for line in axes.lines if len(line.get_xdata()) == 10]
    color = next(line.get_color() for line in lines if max(line.get_ydata()) > 50)
    into, out = (place for place, found in arrows(axes) if found == color)
    assert 200 < into < 300 and 500 < out < 600
    assert len(arrows(axes)) == 5
    assert [name for name in names(axes) if name.endswith("↑")] == [f"{rows[2]['name']} ↑"]


def test_a_line_that_is_never_in_the_frame_and_one_that_ends_early_have_a_sign():
    rows = rows_of(["sync"] * 3, row1=lambda x: np.nan)
    rows[2]["eval_losses"] = [[x + 90 for x in losses] for losses in rows[2]["eval_losses"]]
    rows[3]["eval_losses"] = [[np.nan] * 10] * 3
    (axes,) = drawn(rows).axes
    assert f"{rows[2]['name']} ↑" in names(axes) and arrows(axes)[-1][0] == 1000
    assert [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "x"] == [500]
    assert f"{rows[3]['name']}: NaN" in names(axes)


@pytest.mark.parametrize(("points", "marker"), [(10, "o"), (40, "None")])
def test_few_points_are_marked_and_seeds_have_a_band(points, marker):
    rows = rows_of(["sync"] * 2, points)
    (axes,) = drawn(rows).axes
    assert [line.get_marker() for line in axes.lines if len(line.get_xdata()) == points] == [marker] * 3
    assert len(axes.collections) == 3
    for band in axes.collections:
        inside = band.get_paths()[0].vertices
        assert np.ptp(inside[inside[:, 0] == 100, 1]) == pytest.approx(0.06)


def test_a_name_that_is_too_long_is_cut_and_keeps_its_sign():
    rows = rows_of(["sync"], row1=lambda x: x + 50)
    rows[1]["name"] = "one of many words " * 20
    figure = drawn(rows)
    figure.canvas.draw()
    (name,) = (text for text in figure.axes[0].texts if text.get_text().startswith("one of"))
    assert name.get_text().endswith("… ↑") and name.get_window_extent().x1 <= figure.canvas.get_width_height()[0]


def test_places_are_apart_and_near_what_was_wanted():
    assert plots.apart([1, 2, 30], 14, 100) == [1, 15, 30]
    assert plots.apart([90, 95, 99], 14, 100) == [72, 86, 100]
    assert plots.apart([], 14, 100) == []
