"""Curves over the steps, drawn as SVG whose colours are the page's, in the light and in the dark."""

import math
from collections.abc import Sequence
from xml.etree import ElementTree as ET

import numpy as np

from launch.report_html import element

Points = Sequence[tuple[int, float]]

MAX_POINTS = 400  # of a curve; more are averaged, neighbours with neighbours
COLOURS = 8  # of the style sheet
_WIDTH, _HEIGHT = 440, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 10, 10, 26


def chart(title: str, caption: str, series: dict[str, Points]) -> ET.Element | None:
    """A figure of the curves that have points, their last values below it; None if none has."""
    curves = {name: _thinned(points) for name, points in series.items() if points}
    if not curves:
        return None
    steps = np.concatenate([curve[:, 0] for curve in curves.values()])
    values = np.concatenate([curve[:, 1] for curve in curves.values()])
    x_range, y_range = (0.0, max(steps.max(), 1.0)), _padded(*_fences(values))
    drawing = element("svg", *_axes(x_range, y_range), viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=title)
    names = element("p", class_="legend")
    for i, (name, curve) in enumerate(curves.items()):
        drawing.append(_curve(curve, x_range, y_range, i))
        last = f"{series[name][-1][1]:.4g}"
        names.append(element("span", element("i", class_=f"c{i % COLOURS}"), f"{name} {last}"))
    hidden = int(((values < y_range[0]) | (values > y_range[1])).sum())
    if averaged := max(-(-len(series[name]) // MAX_POINTS) for name in curves) - 1:
        caption += f" Each point is the mean of {averaged + 1}."
    if hidden:
        caption += f" {hidden} points lie far outside and are not shown."
    return element("figure", element("h3", title), drawing, names, element("figcaption", caption), class_="chart")


def _thinned(points: Points) -> np.ndarray:
    """float64 [n, 2], at most `MAX_POINTS`."""
    array = np.asarray(points, np.float64)
    share = -(-len(array) // MAX_POINTS)
    return np.array([array[i : i + share].mean(0) for i in range(0, len(array), share)])


def _fences(values: np.ndarray) -> tuple[float, float]:
    """Lowest and highest value, but for those far outside what nearly all are in: the first losses, a spike."""
    low, high = np.quantile(values, [0.05, 0.95])
    reach = 3 * (high - low)
    return max(values.min(), low - reach), min(values.max(), high + reach)


def _padded(low: float, high: float) -> tuple[float, float]:
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return float(low - margin), float(high + margin)


def _ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers within a range."""
    unit = 10.0 ** math.floor(math.log10(high - low))
    step = max(unit * factor for factor in (0.2, 0.5, 1, 2) if unit * factor * 3 <= high - low)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _place(value: float, value_range: tuple[float, float], begin: float, end: float) -> float:
    low, high = value_range
    return begin + (end - begin) * (value - low) / (high - low)


def _axes(x_range: tuple[float, float], y_range: tuple[float, float]) -> list[ET.Element]:
    drawn = []
    for tick in _ticks(*y_range):
        y = f"{_place(tick, y_range, _HEIGHT - _BOTTOM, _TOP):.1f}"
        drawn.append(element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y))
        drawn.append(element("text", f"{tick:.4g}", x=_LEFT - 7, y=y, dy="0.35em", text_anchor="end"))
    for tick in _ticks(*x_range):
        x = _place(tick, x_range, _LEFT, _WIDTH - _RIGHT)
        anchor = "end" if x > _WIDTH - 30 else "middle"
        drawn.append(element("text", _shorter(tick), x=f"{x:.1f}", y=_HEIGHT - 6, text_anchor=anchor))
    return drawn


def _shorter(step: float) -> str:
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if step >= unit:
            return f"{step / unit:g}{letter}"
    return f"{step:g}"


def _curve(curve: np.ndarray, x_range: tuple[float, float], y_range: tuple[float, float], i: int) -> ET.Element:
    """A line, or for a single point a dot; later rounds of the colours are dashed."""
    xs = _place(curve[:, 0], x_range, _LEFT, _WIDTH - _RIGHT)
    ys = _place(curve[:, 1].clip(*y_range), y_range, _HEIGHT - _BOTTOM, _TOP)
    name = f"c{i % COLOURS}" + (" dashed" if i >= COLOURS else "")
    if len(curve) == 1:
        return element("circle", cx=f"{xs[0]:.1f}", cy=f"{ys[0]:.1f}", r=4, class_=name)
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
    return element("polyline", points=points, class_=name)
