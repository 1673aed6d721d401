"""Inline SVG pictures of the report. Every function returns an SVG element as safe markup; texts are escaped.

Colours are CSS classes (c0 .. c9, and `text`, `grid`, `shade`), so that the page's light and dark themes apply.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any


class Markup(str):
    """A string that jinja2 does not escape again."""

    def __html__(self) -> str:
        return str(self)


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: float = 11) -> str:
    return (
        f'<text class="text" x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(label, quote=True)}">'
        f"<title>{escape(label)}</title>{''.join(parts)}</svg>"
    )


def _short(text: str, limit: int) -> str:
    return text if len(text) <= limit else "\u2026" + text[-(limit - 1) :]


def bars(rows: Sequence[dict[str, Any]], name: str, value: str, label: str, unit: str) -> Markup:
    """Horizontal bars, one a row, with the value printed behind each; zero rows give an empty frame."""
    top = max((float(row[value]) for row in rows), default=0.0) or 1.0
    parts = []
    for place, row in enumerate(rows):
        y, length = 18.0 * place + 4, 330.0 * max(0.0, float(row[value])) / top
        parts.append(_text(168, y + 11, _short(str(row[name]), 28), anchor="end"))
        parts.append(
            f'<rect class="c{place % 10 if len(rows) <= 14 else 0}" x="174" y="{y:.1f}" width="{max(length, 0.5):.1f}" '
            f'height="14"><title>{escape(str(row[name]))}: {float(row[value]):.4g} {escape(unit)}</title></rect>'
        )
        parts.append(_text(180 + length, y + 11, f"{float(row[value]):.3g}"))
    return _svg(580, 18 * len(rows) + 8, label, parts)


def stacked(rows: Sequence[dict[str, Any]], name: str, share: str, label: str) -> Markup:
    """One bar of all shares; those above 4 % are named."""
    parts, x = [], 0.0
    for place, row in enumerate(rows):
        width = 580 * float(row[share])
        parts.append(
            f'<rect class="c{place % 10}" x="{x:.1f}" y="0" width="{width:.1f}" height="26">'
            f"<title>{escape(str(row[name]))}: {float(row[share]):.1%}</title></rect>"
        )
        if width > 46:
            text, limit = str(row[name]), int(width / 7)
            parts.append(_text(x + 3, 42, text if len(text) <= limit else text[: limit - 1] + "\u2026", size=10))
            parts.append(_text(x + 3, 54, f"{float(row[share]):.0%}", size=10))
        x += width
    return _svg(580, 58, label, parts)


def spikes(populations: Sequence[dict[str, Any]], label: str) -> Markup:
    """Density by population (rows) and step (columns); the darker, the denser. The number is the mean."""
    steps = max((len(p["spikes_by_step"]) for p in populations), default=1)
    density = [[count / p["neurons"] for count in p["spikes_by_step"]] for p in populations]
    top = max((value for row in density for value in row), default=0.0) or 1.0
    width = 330.0 / steps
    parts = []
    for place, (population, row) in enumerate(zip(populations, density, strict=True)):
        y = 16.0 * place + 16
        parts.append(_text(168, y + 11, _short(population["name"], 28), anchor="end"))
        for t, value in enumerate(row):
            parts.append(
                f'<rect class="c0" fill-opacity="{0.06 + 0.94 * value / top:.3f}" '
                f'x="{174 + t * width:.1f}" y="{y:.1f}" width="{max(width - 1, 0.5):.1f}" height="14"><title>'
                f"{escape(population['name'])}, step {t}: "
                f"{value:.2%}</title></rect>"
            )
        parts.append(_text(510, y + 11, f"{population['density']:.1%}"))
    parts.append(_text(174, 11, "step 0", size=10))
    parts.append(_text(504, 11, f"step {steps - 1}", anchor="end", size=10))
    return _svg(580, 16 * len(populations) + 24, label, parts)


def floor(plan: dict[str, Any], names: Sequence[str], label: str, limit: int = 1024) -> Markup:
    """Tiles on their grid: colour by the layer that fills most of one, filled as high as its cells are used."""
    tiles = plan["tiles"][:limit]
    columns = max(1, plan["columns"])
    side = 580.0 / columns if columns > 8 else 72.0
    index = {name: place for place, name in enumerate(names)}
    parts = []
    for number, tile in enumerate(tiles):
        x, y = tile["column"] * side, tile["row"] * side
        most = max(tile["layers"], key=lambda pair: pair[1])[0]
        used = side * 0.92 * tile["utilisation"]
        held = ", ".join(f"{name} ({pes} PEs)" for name, pes in tile["layers"])
        parts.append(
            f"<g><title>tile {number}: {escape(held)}; {tile['utilisation']:.0%} of its cells used</title>"
            f'<rect class="shade" x="{x + side * 0.04:.1f}" y="{y + side * 0.04:.1f}" width="{side * 0.92:.1f}" '
            f'height="{side * 0.92:.1f}"/><rect class="c{index[most] % 10}" x="{x + side * 0.04:.1f}" '
            f'y="{y + side * 0.96 - used:.1f}" width="{side * 0.92:.1f}" height="{used:.1f}"/>'
        )
        if side > 30:
            parts.append(_text(x + side * 0.08, y + side * 0.28, _short(most, max(3, int(side / 6.5))), size=9))
        parts.append("</g>")
    rows = max((tile["row"] for tile in tiles), default=0) + 1
    return _svg(max(580.0, side * columns), side * rows + 4, label, parts)


def grouped(rows: Sequence[dict[str, Any]], name: str, values: Sequence[tuple[str, str]], label: str) -> Markup:
    """Ratios side by side on a logarithmic axis from 0.1 to the largest, 1 marked; one group a row, one bar a value."""
    from math import log10

    top = max([2.0, *(float(row[key]) for row in rows for key, _ in values)])
    low, high = min(-1.0, *(log10(max(float(row[key]), 1e-6)) for row in rows for key, _ in values)), log10(top)

    def place(value: float) -> float:
        return 174 + 330 * (log10(max(value, 10**low)) - low) / (high - low)

    parts, y = [], 18.0
    for number, (_, title) in enumerate(values):
        parts.append(f'<rect class="c{number}" x="{174 + 110 * number}" y="0" width="10" height="10"/>')
        parts.append(_text(188 + 110 * number, 9, title, size=10))
    height = 18 + len(rows) * (10 * len(values) + 8)
    parts.append(f'<line class="grid" x1="{place(1):.1f}" x2="{place(1):.1f}" y1="14" y2="{height}"/>')
    for row in rows:
        parts.append(_text(168, y + 5 * len(values) + 3, _short(str(row[name]), 30), anchor="end", size=10))
        for number, (key, title) in enumerate(values):
            a, b = sorted((place(1.0), place(float(row[key]))))
            parts.append(
                f'<rect class="c{number}" x="{a:.1f}" y="{y:.1f}" width="{max(b - a, 1):.1f}" height="9">'
                f"<title>{escape(str(row[name]))}, {escape(title)}: {float(row[key]):.4g}</title></rect>"
            )
            parts.append(_text(max(b, place(1.0)) + 4, y + 8, f"{float(row[key]):.3g}x", size=9))
            y += 10
        y += 8
    return _svg(580, height + 4, label, parts)
