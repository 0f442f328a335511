"""Figures: what is asked for is drawn, the same figure gives the same bytes, alternative text is required."""

from __future__ import annotations

import base64
import html
import re

import matplotlib
import numpy as np
import pytest
from IPython import display as ipython

from llmcourse import plotting


def axes_of(figure):
    return figure.axes[0]


def test_lines_draws_each_series_with_its_band_and_level():
    series = {"AdamW": ([1, 2, 3], [3.0, 2.0, 1.0]), "Muon": ([1, 2, 3], [2.5, 1.5, 0.5])}
    figure = plotting.lines(
        series,
        xlabel="step",
        ylabel="loss in nats",
        title="Two optimizers",
        bands={"Muon": ([2.0, 1.0, 0.0], [3.0, 2.0, 1.0])},
        horizontal={"entropy": 0.3},
    )
    axes = axes_of(figure)
    drawn = {line.get_label(): line for line in axes.lines}
    for name, (x, y) in series.items():
        assert drawn[name].get_xdata().tolist() == x and drawn[name].get_ydata().tolist() == y
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == (
        "step",
        "loss in nats",
        "Two optimizers",
    )
    (band,) = axes.collections
    assert {round(float(y), 6) for y in band.get_paths()[0].vertices[:, 1]} == {0.0, 1.0, 2.0, 3.0}
    assert band.get_facecolor()[0][:3] == pytest.approx(matplotlib.colors.to_rgb(drawn["Muon"].get_color()))
    assert axes.lines[2].get_ydata() == [0.3, 0.3]
    assert [text.get_text() for text in axes.texts] == ["entropy"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["AdamW", "Muon"]


def test_options_of_lines():
    one = {"loss": ([1, 10], [2.0, 1.0])}
    plain = axes_of(plotting.lines(one, xlabel="x", ylabel="y"))
    assert (plain.get_xscale(), plain.get_yscale(), plain.get_legend()) == ("linear", "linear", None)
    assert plain.lines[0].get_marker() == "None"
    other = axes_of(plotting.lines(one, xlabel="x", ylabel="y", logx=True, logy=True, markers=True))
    assert (other.get_xscale(), other.get_yscale(), other.lines[0].get_marker()) == ("log", "log", "o")


@pytest.mark.parametrize("errors", [[0.1, 0.2], [[0.1, 0.2], [0.3, 0.4]]])
def test_bars_draws_values_and_errors(errors):
    axes = axes_of(
        plotting.bars(["facts", "sums"], [0.6, 0.2], errors, ylabel="share", horizontal={"chance": 0.01})
    )
    assert [bar.get_height() for bar in axes.patches] == [0.6, 0.2]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["facts", "sums"]
    below, above = np.asarray(errors) if np.ndim(errors) == 2 else (errors, errors)
    segments = axes.collections[0].get_segments()
    for segment, value, low, high in zip(segments, (0.6, 0.2), below, above, strict=True):
        assert segment[:, 1].tolist() == pytest.approx([value - low, value + high])
    assert [text.get_text() for text in axes.texts] == ["chance"]


def test_many_labels_are_turned():
    labels = ["a rather long label of one bar"] * 3
    assert axes_of(plotting.bars(labels, [1, 2, 3], ylabel="y")).get_xticklabels()[0].get_rotation() == 20
    assert axes_of(plotting.bars(["a"], [1], ylabel="y")).get_xticklabels()[0].get_rotation() == 0


def test_heatmap_shows_the_matrix_in_its_range():
    matrix = np.arange(6.0).reshape(2, 3)
    figure = plotting.heatmap(
        matrix, ["r0", "r1"], ["a", "b", "c"], title="t", xlabel="key", ylabel="query", high=9.0
    )
    axes = axes_of(figure)
    (image,) = axes.images
    assert np.array_equal(image.get_array(), matrix) and image.get_clim() == (0.0, 9.0)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["a", "b", "c"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["r0", "r1"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("key", "query") and len(
        figure.axes
    ) == 2  # with a scale


def test_the_same_figure_gives_the_same_svg():
    def draw(y: float) -> str:
        return plotting.to_svg(plotting.lines({"a": ([0, 1], [0.0, y])}, xlabel="x", ylabel="y"))

    assert draw(1.0) == draw(1.0) != draw(2.0)
    assert draw(1.0).lstrip().startswith("<?xml") and "<dc:date>" not in draw(1.0)


def test_the_style_stays_inside():
    before = dict(matplotlib.rcParams)
    plotting.to_svg(plotting.bars(["a"], [1.0], ylabel="y"))
    assert dict(matplotlib.rcParams) == before


def test_show_gives_an_image_with_alternative_text(monkeypatch):
    shown = []
    monkeypatch.setattr(ipython, "display", shown.append)
    figure = plotting.bars(["a"], [1.0], ylabel="y")
    plotting.show(figure, alt='one bar "a" <b>')
    (page,) = shown
    source, alt = re.search(r'src="data:image/svg\+xml;base64,([^"]+)" alt="([^"]*)"', page.data).groups()
    assert base64.b64decode(source).decode() == plotting.to_svg(figure)
    assert html.unescape(alt) == 'one bar "a" <b>'
    with pytest.raises(ValueError, match="alt is empty"):
        plotting.show(figure, alt=" ")
