"""The parts of a page: tables, figures and plots as inline HTML and SVG.

A page stands alone: inline style, plots drawn here, no scripts, nothing fetched.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

_POINTS = 200  # of one curve; longer ones are averaged


@dataclass(frozen=True, slots=True)
class Series:
    """One curve; `errors` are half widths of intervals around `ys`, or nothing."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    errors: Sequence[float] = ()


_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 330, 190, 44, 70, 12, 30
_LETTER = 6.2  # mean width of a letter of a name
# dark enough for print, told apart by lightness and by dashes, not by hue alone
_INKS = (("#1d4e89", ""), ("#b4541a", "5 3"), ("#3f7d4e", "2 2"), ("#7a4a8c", "8 3 2 3"))


def plot(series: Sequence[Series], *, x: str, zero: bool = False, whole: bool = False) -> str:
    """An SVG of a few curves with their names at their ends. `zero`: y starts at 0; `whole`: x has whole numbers."""
    drawn = [s for s in series if len(s.xs)]
    if not drawn:
        return ""
    spans = [(y - e, y + e) for s in drawn for y, e in zip(s.ys, s.errors or [0.0] * len(s.ys), strict=True) if y == y]
    low, high = min((a for a, _ in spans), default=0.0), max((b for _, b in spans), default=1.0)
    ticks = _ticks(0.0 if zero else low, high)
    xticks = _ticks(min(min(s.xs) for s in drawn), max(max(s.xs) for s in drawn), whole=whole)
    across = _scale(min(min(s.xs) for s in drawn), max(max(s.xs) for s in drawn), _LEFT, _WIDTH - _RIGHT)
    up = _scale(min(ticks[0], low), max(ticks[-1], high), _HEIGHT - _BOTTOM, _TOP)
    parts = [
        _grid(ticks, up),
        *(_mark(v, across(v)) for v in xticks if _LEFT - 0.5 <= across(v) <= _WIDTH - _RIGHT + 0.5),
    ]
    parts += [_curve(s, i, across, up) for i, s in enumerate(drawn)]
    parts += _names(drawn, up)
    return _svg(parts, [s.name for s in drawn], x)


def scatter(points: Sequence[tuple[str, float, float]], *, x: str, y: str) -> str:
    """An SVG of named points (name, x, y), each with its name beside it; the same name before a colon has one ink."""
    if not points:
        return ""
    xs, ys = [at for _, at, _ in points], [at for _, _, at in points]
    xticks, yticks = _ticks(min(xs), max(xs)), _ticks(min(ys), max(ys))
    across = _scale(min(xticks[0], min(xs)), max(xticks[-1], max(xs)), _LEFT, _WIDTH - _RIGHT)
    up = _scale(min(yticks[0], min(ys)), max(yticks[-1], max(ys)), _HEIGHT - _BOTTOM, _TOP)
    kinds = list(dict.fromkeys(name.partition(":")[0] for name, _, _ in points))
    parts = [_grid(yticks, up), *(_mark(v, across(v)) for v in xticks)]
    for name, right, high in points:
        ink = _INKS[kinds.index(name.partition(":")[0]) % len(_INKS)][0]
        parts.append(
            f'<circle cx="{across(right):.1f}" cy="{up(high):.1f}" r="3" fill="{ink}"/>'
            f'<text x="{across(right) + 5:.1f}" y="{up(high) + 3:.1f}" fill="{ink}" class="name">'
            f"{html.escape(name)}</text>"
        )
    parts.append(f'<text x="{_LEFT}" y="{_TOP - 3}" class="axis">{html.escape(y)}</text>')
    return _svg(parts, [name for name, _, _ in points], x)


def _svg(parts: Sequence[str], names: Sequence[str], x: str) -> str:
    """The picture, with room on its right for the longest of the names that may begin there, and x below its axis."""
    width = _WIDTH + max(0.0, _LETTER * max(len(name) for name in names) - _RIGHT + 7)
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    axis = f'<text x="{middle:.0f}" y="{_HEIGHT - 3}" text-anchor="middle" class="axis">{html.escape(x)}</text>'
    return f'<svg viewBox="0 0 {width:.0f} {_HEIGHT}" role="img">{"".join(parts)}{axis}</svg>'


def _scale(low: float, high: float, start: float, stop: float) -> Callable[[float], float]:
    """From [low, high] to pixels; a single value lies in the middle."""
    if high == low:
        return lambda _: (start + stop) / 2
    return lambda value: start + (value - low) / (high - low) * (stop - start)


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Three to six round numbers that cover [low, high]."""
    span = high - low
    if span <= 0:
        return [low] if whole else [low - 0.5 * (abs(low) or 1), low, low + 0.5 * (abs(low) or 1)]
    rough = span / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough)
    step = max(1.0, math.ceil(step)) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _grid(ticks: Sequence[float], up: Callable[[float], float]) -> str:
    return "".join(
        f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{up(v):.1f}" y2="{up(v):.1f}" class="grid"/>'
        f'<text x="{_LEFT - 6}" y="{up(v) + 3:.1f}" text-anchor="end" class="tick">{tick(v)}</text>'
        for v in ticks
    )


def _mark(value: float, x: float) -> str:
    return f'<text x="{x:.1f}" y="{_HEIGHT - 16}" text-anchor="middle" class="tick">{tick(value)}</text>'


def tick(value: float) -> str:
    """Four digits, with a real minus sign."""
    return f"{value:.4g}".replace("-", "\N{MINUS SIGN}")


def _curve(series: Series, number: int, across: Callable[[float], float], up: Callable[[float], float]) -> str:
    ink, dash = _INKS[number % len(_INKS)]
    points = [(across(x), up(y)) for x, y in zip(series.xs, series.ys, strict=True) if y == y]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    parts = [f'<polyline points="{line}" stroke="{ink}" stroke-dasharray="{dash}" class="curve"/>']
    for (x, _), y, e in zip(points, series.ys, series.errors, strict=False):
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{up(y - e):.1f}" y2="{up(y + e):.1f}" stroke="{ink}"/>')
    if len(points) <= 12:
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{ink}"/>' for x, y in points]
    return "".join(parts)


def _names(series: Sequence[Series], up: Callable[[float], float]) -> list[str]:
    """The curves' names beside their last points, moved apart where they would lie on each other."""
    ends = sorted((up(s.ys[-1]), i) for i, s in enumerate(series) if s.ys[-1] == s.ys[-1])
    parts, floor = [], 0.0
    for y, i in ends:
        floor = max(y, floor + 12)
        ink = _INKS[i % len(_INKS)][0]
        name = html.escape(series[i].name)
        parts.append(f'<text x="{_WIDTH - _RIGHT + 7}" y="{floor + 3:.1f}" fill="{ink}" class="name">{name}</text>')
    return parts


def thin(values: Sequence[float]) -> list[float]:
    """At most _POINTS means of neighbours."""
    size = math.ceil(len(values) / _POINTS)
    return [fmean(values[i : i + size]) for i in range(0, len(values), size)] if size > 1 else list(values)


def figure(title: str, picture: str, note: str = "") -> str:
    """A plot under its title; nothing for nothing."""
    said = f"<small>{note}</small>" if note else ""
    return f"<figure><figcaption>{html.escape(title)}{said}</figcaption>{picture}</figure>" if picture else ""


def page(title: str, body: str) -> str:
    """A whole document around `body`, which is HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n<body>{body}</body></html>\n"
    )


def section(title: str, body: str) -> str:
    """HTML under a heading; nothing for nothing."""
    return f"<section><h2>{title}</h2>{body}</section>\n" if body else ""


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, words: Sequence[int] = ()) -> str:
    """A table of cells that are HTML already; the columns `words` hold text, the others numbers."""
    mark = [' class="word"' if i in words else "" for i in range(len(heads))]
    head = "".join(f"<th{m}>{h}</th>" for m, h in zip(mark, heads, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{m}>{cell}</td>" for m, cell in zip(mark, row, strict=True)) + "</tr>\n" for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


_STYLE = """
:root { color-scheme: light; --ink: #1f2328; --soft: #656d76; --line: #d9dde2; --wash: #f6f7f8; --link: #1d4e89 }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 72rem; padding: 2.5rem 1.5rem 4rem; color: var(--ink); background: #fff;
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
header p { margin: .2rem 0; max-width: 60rem }
h1 { font-size: 1.7rem; font-weight: 600; letter-spacing: -.01em; margin: 0 0 .5rem; overflow-wrap: anywhere }
h2 { font-size: 1.1rem; font-weight: 600; margin: 2.4rem 0 .7rem; padding-bottom: .3rem;
  border-bottom: 1px solid var(--line) }
h3 { font-size: .95rem; font-weight: 600; margin: 1.6rem 0 .4rem }
a { color: var(--link); text-decoration-thickness: 1px; text-underline-offset: 2px }
small, .note { color: var(--soft); font-size: .82rem; font-weight: 400 }
.note { max-width: 52rem; margin: .6rem 0 0 }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums }
th { font-weight: 500; color: var(--soft); vertical-align: bottom }
th, td { padding: .32rem .9rem .32rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line) }
td { vertical-align: top }
th.word, td.word { text-align: left }
td.word:last-child { white-space: normal; min-width: 18rem }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: 1.2rem 1.6rem;
  margin-top: 1.2rem }
.two { grid-template-columns: repeat(auto-fill, minmax(26rem, 1fr)); max-width: 62rem }
figure { margin: 0; break-inside: avoid }
figcaption { font-size: .87rem; font-weight: 500; margin-bottom: .3rem }
svg { display: block; width: 100%; height: auto; max-width: 27rem }
svg text { font: 10.5px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif }
.grid { stroke: #e6e9ec; stroke-width: 1 }
.curve { fill: none; stroke-width: 1.7; stroke-linejoin: round }
.tick, .axis { fill: #656d76 }
.name { font-weight: 500 }
pre { margin: 0; padding: .7rem .9rem; overflow-wrap: anywhere; white-space: pre-wrap; background: var(--wash);
  border-radius: 4px; font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace }
pre.reply { background: #fff; border: 1px solid var(--line) }
pre.seen { margin-top: .4rem; color: #3b424a }
pre span { print-color-adjust: exact; -webkit-print-color-adjust: exact }
.add { color: #1a6a35 } .cut { color: #a1302a } .hunk { color: var(--soft) }
details { margin-top: .4rem } summary { cursor: pointer; color: var(--soft); font-size: .82rem }
ul { margin: .3rem 0; padding-left: 1.2rem }
@media (max-width: 34rem) { .figures, .two { grid-template-columns: 1fr } }
@media print {
  body { max-width: none; padding: 0; font-size: 11px }
  h2 { break-after: avoid } tr { break-inside: avoid } .wide { overflow: visible } nav { display: none }
  .figures, .two { grid-template-columns: repeat(2, 1fr) }
  table { font-size: 9px } th, td { padding-right: .5rem }
}
"""
