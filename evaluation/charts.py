"""The report's charts as inline SVG; page.html colours them for light and dark mode."""

import math
from collections.abc import Sequence
from html import escape

CURVES = (  # title, unit of the y axis, metrics drawn together
    ("Loss", "loss", "loss"),
    ("Implicit rewards", "β · log-ratio", "rewards/chosen rewards/rejected"),
    ("Reward margin", "chosen − rejected", "rewards/margins"),
    ("Pairs ranked right", "share of the batch", "rewards/accuracies"),
    ("Response scores", "log-probability", "logps/chosen logps/rejected"),
    ("Hallucinating completions", "share of the rollout", "truth/hallucination"),
    ("Reward", "per completion", "objective/scores objective/rlhf_reward"),
    ("Reward model, and a held-out one", "per completion", "score/rm score/held_out"),
    ("KL to the reference", "nats per completion", "objective/kl"),
    ("Length of completions", "tokens", "response/length"),
    ("Entropy", "nats per token", "objective/entropy"),
    ("Clipped", "share of the tokens", "policy/clipfrac val/clipfrac"),
    ("Variance explained by the baseline", "share", "val/explained_variance"),
    ("Log-probabilities of sampling and training", "mean difference", "rollout/logp_mismatch"),
    ("Kinds recognised", "share", "accuracy/kind"),
    ("Gradient norm", "before clipping", "grad_norm"),
    ("Learning rate", "per step", "learning_rate"),
)
WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 58, 346, 10, 170  # of the plot


def dumbbell(before: dict, after: dict) -> str:
    """Draw two shares with their intervals on a line from 0 to 100 %."""
    x = lambda share: f"{6 + 188 * min(max(share, 0), 1):.1f}"
    parts = ['<line class="axis" x1="6" x2="194" y1="12" y2="12"/>']
    for y, style, m in ((8, "s1", before), (16, "s0", after)):
        low, high = x(m["low"]), x(m["high"])
        parts.append(f'<line class="{style}" x1="{low}" x2="{high}" y1="{y}" y2="{y}"/>'
                     f'<circle class="{style}" cx="{x(m["value"])}" cy="{y}" r="3.5"/>')
    return f'<svg viewBox="0 0 200 24" aria-hidden="true">{"".join(parts)}</svg>'


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return round numbers that span low..high: multiples of 1, 2 or 5 times a power of ten."""
    if high <= low:
        low, high = low - (abs(low) or 1) / 2, low + (abs(low) or 1) / 2
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    return [i * step for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


def curves(steps: Sequence[dict]) -> list[str]:
    """Draw a chart for every group of logged metrics that the run has."""
    charts = []
    for title, unit, names in CURVES:
        series = {name: [(row["step"], row[name]) for row in steps
                         if math.isfinite(row.get(name, math.nan))] for name in names.split()}
        if series := {name: points for name, points in series.items() if len(points) > 1}:
            charts.append(lines(title, unit, series))
    return charts


def lines(title: str, unit: str, series: dict[str, Sequence[tuple[float, float]]]) -> str:
    """Draw one or two series over training steps, {name: points (step, value)}, as a figure."""
    steps, values = zip(*(point for points in series.values() for point in points))
    ys, last = ticks(min(values), max(values)), max(steps)
    px = lambda x: f"{LEFT + (RIGHT - LEFT) * x / last:.1f}"
    py = lambda y: f"{BOTTOM - (BOTTOM - TOP) * (y - ys[0]) / (ys[-1] - ys[0]):.1f}"
    axis = lambda x1, x2, y1, y2: f'<line class="axis" x1="{x1}" x2="{x2}" y1="{y1}" y2="{y2}"/>'
    text = lambda words, place, anchor="middle": (
        f'<text {place} text-anchor="{anchor}">{escape(words)}</text>')
    parts = [text("step", f'x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 4}"'),
             text(unit, f'transform="translate(12 {BOTTOM / 2}) rotate(-90)"')]
    for y in ys:
        place = f'x="{LEFT - 6}" y="{float(py(y)) + 4:.1f}"'
        parts += [axis(LEFT, RIGHT, py(y), py(y)), text(number(y), place, "end")]
    for x in (x for x in ticks(0, last) if x <= last):
        place = f'x="{px(x)}" y="{BOTTOM + 18}"'
        parts += [axis(px(x), px(x), BOTTOM, BOTTOM + 4), text(number(x), place)]
    legend = ""
    for i, (name, points) in enumerate(series.items()):
        path = "L".join(f"{px(x)} {py(y)}" for x, y in points)
        parts.append(f'<path class="s{i}" d="M{path}"/>')
        legend += f'<span class="key s{i}"></span>{escape(name)}'
    return (f'<figure class="card"><figcaption>{escape(title)} <small>{legend}</small>'
            f'</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
            f'aria-label="{escape(title)}">{"".join(parts)}</svg></figure>')


def number(value: float) -> str:
    """Format the label of a tick in about six characters: 0.25, 1.5e-4."""
    small = 0 < abs(value) < 1e-3
    return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-") if small else f"{value:.4g}"
