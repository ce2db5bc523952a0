"""The report's charts as plain inline SVG; report.css colours them, so that they fit its mode."""

import math
from collections.abc import Sequence
from html import escape


def dumbbell(before: dict, after: dict) -> str:
    """Two shares with their intervals on a line from 0 to 100 %."""
    x = lambda share: f"{6 + 188 * min(max(share, 0), 1):.1f}"
    parts = ['<line class="axis" x1="6" x2="194" y1="12" y2="12"/>']
    for y, style, m in ((8, "s1", before), (16, "s0", after)):
        low, high = x(m["low"]), x(m["high"])
        parts.append(f'<line class="{style}" x1="{low}" x2="{high}" y1="{y}" y2="{y}"/>'
                     f'<circle class="{style}" cx="{x(m["value"])}" cy="{y}" r="3.5"/>')
    return f'<svg viewBox="0 0 200 24" aria-hidden="true">{"".join(parts)}</svg>'


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that span low..high: multiples of 1, 2 or 5 times a power of ten."""
    if high <= low:
        low, high = low - (abs(low) or 1) / 2, low + (abs(low) or 1) / 2
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    return [i * step for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


def lines(title: str, of: str, series: dict[str, Sequence[tuple[float, float]]]) -> str:
    """A figure with lines over training steps.

    Args:
        title: what is shown.
        of: the unit of the y axis.
        series: {name: points (step, value)}, one or two, of at least two points each.
    """
    width, height, left, bottom, top = 360, 210, 58, 40, 10
    last = max(x for points in series.values() for x, _ in points)
    xs = [x for x in ticks(0, last) if x <= last]
    ys = ticks(*(f(y for points in series.values() for _, y in points) for f in (min, max)))
    px = lambda x: left + (width - left - 14) * x / last
    py = lambda y: height - bottom - (height - bottom - top) * (y - ys[0]) / (ys[-1] - ys[0])
    number = lambda v: f"{v:.4g}".replace("e-0", "e-") if v else "0"
    parts = []
    for y in ys:
        parts.append(f'<line class="axis" x1="{left}" x2="{width - 14}" y1="{py(y):.1f}" '
                     f'y2="{py(y):.1f}"/><text x="{left - 6}" y="{py(y) + 4:.1f}" '
                     f'text-anchor="end">{number(y)}</text>')
    for x in xs:
        parts.append(f'<line class="axis" x1="{px(x):.1f}" x2="{px(x):.1f}" y1="{height - bottom}" '
                     f'y2="{height - bottom + 4}"/>'
                     f'<text x="{px(x):.1f}" y="{height - bottom + 18}" '
                     f'text-anchor="middle">{number(x)}</text>')
    parts.append(f'<text x="{(left + width) / 2}" y="{height - 4}" text-anchor="middle">step</text>'
                 f'<text transform="translate(12 {(height - bottom) / 2}) rotate(-90)" '
                 f'text-anchor="middle">{escape(of)}</text>')
    for i, points in enumerate(series.values()):
        line = "L".join(f"{px(x):.1f} {py(y):.1f}" for x, y in points)
        parts.append(f'<path class="s{i}" d="M{line}"/>')
    parts_of = [name.split("/") for name in series] if len(series) > 1 else []
    apart = -1 if len({each[-1] for each in parts_of}) > 1 else 0  # policy/clipfrac, val/clipfrac
    legend = "".join(f'<span class="key s{i}"></span>{escape(each[apart])}'
                     for i, each in enumerate(parts_of))
    return (f'<figure class="card"><figcaption>{escape(title)} <small>{legend}</small></figcaption>'
            f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
            f'{"".join(parts)}</svg></figure>')
