"""comparison.json of jobs/compare.py as one page: what each objective reached, and what lies outside its interval."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from entropo_ray import page, store

_CURVES = 3  # of one plot, beside the one that all are compared with
_TITLES = {
    "distinct": "distinct solutions",
    "entropy_passing": "H(passing), nats",
    "patches": "patches an attempt",
    "vendi": "Vendi score",
}


def write(run_dir: str | Path) -> Path:
    """comparison.html beside comparison.json."""
    home = store.place(run_dir)
    result = json.loads((home / "comparison.json").read_text())
    n = result["samples"]
    facts = (
        f"{result['tasks']} held-out tasks, {n} attempts each, seeds {', '.join(map(str, result['seeds']))}; "
        f"differences are to <b>{html.escape(result['against'])}</b>"
    )
    parts = [
        f"<header><h1>Comparison</h1><p>{facts}</p></header>",
        page.section("Results", _table(result, ["pass@1", f"pass@{n}", f"best@{n}"])),
        page.section("Diversity", _table(result, ["patches", "vendi", "distinct", "entropy_passing"])),
        page.section("What lies outside the intervals", _said(result)),
        page.section(
            "Plots", f'<div class="figures two">{"".join(_figures(result["arms"], n, result["against"]))}</div>'
        ),
        page.section("Policies and budgets", _facts(result["facts"])),
    ]
    return store.save(home / "comparison.html", page.page("Comparison", "".join(parts)))


MEASURES = ("pass@1", "pass@{n}", "best@{n}", "distinct", "entropy_passing")  # what is said in words


def outside(entry: Mapping[str, Any]) -> bool:
    """Whether 0 lies outside the interval of a difference; False where there is none."""
    low, high = entry.get("minus_low"), entry.get("minus_high")
    return low is not None and high is not None and bool(low > 0 or high < 0)


def caution(result: Mapping[str, Any]) -> str:
    """What the stars and bold figures mean, and how many there would be by chance."""
    count = (len(result["arms"]) - 1) * len(MEASURES)
    seeds = f"{len(result['seeds'])} seeds" if len(result["seeds"]) > 1 else "one seed (its variance is not known)"
    return (
        f"* differs from {result['against']} by more than its 95 % interval over {result['tasks']} tasks and {seeds}; "
        f"of {count} comparisons {count / 20:.1f} would by chance"
    )


def _table(result: Mapping[str, Any], names: Sequence[str]) -> str:
    heads = ["arm"]
    for name in names:
        heads += [_TITLES.get(name, name), f"minus {html.escape(result['against'])}"]
    rows = []
    for arm, measures in result["arms"].items():
        row = [html.escape(arm)]
        for name in names:
            row += [_cell(measures[name], name), _gap(measures[name], name)]
        rows.append(row)
    note = f"In brackets: 95 % intervals over tasks and seeds, paired for differences. {caution(result)} (bold here)."
    return page.table(heads, rows, words=(0,)) + f'<p class="note">{html.escape(note)}</p>'


def _scaled(value: float | None, name: str) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f}" if "@" in name else f"{value:.2f}"


def _cell(entry: Mapping[str, Any], name: str) -> str:
    low, high = _scaled(entry["low"], name), _scaled(entry["high"], name)
    return f"{_scaled(entry['mean'], name)} <small>[{low}, {high}]</small>"


def _gap(entry: Mapping[str, Any], name: str) -> str:
    if "minus" not in entry:
        return ""
    text = _scaled(entry["minus"], name)
    bounds = f"<small>[{_scaled(entry['minus_low'], name)}, {_scaled(entry['minus_high'], name)}]</small>"
    return f"<b>{text}</b> {bounds}" if outside(entry) else f"{text} {bounds}"


def _said(result: Mapping[str, Any]) -> str:
    """A line for each difference that is larger than its interval, and how many are not."""
    n, against = result["samples"], html.escape(result["against"])
    clear, unclear = [], 0
    for arm, measures in result["arms"].items():
        for name in (word.format(n=n) for word in MEASURES):
            entry = measures[name]
            if entry.get("minus") is None:
                continue
            if outside(entry):
                way = "above" if entry["minus"] > 0 else "below"
                clear.append(f"<li>{html.escape(arm)}: {_TITLES.get(name, name)} {way} {against}</li>")
            else:
                unclear += 1
    rest = f"<p>{unclear} other differences to {against} lie within their intervals.</p>"
    return f"<ul>{''.join(clear)}</ul>{rest}"


def _figures(found: Mapping[str, Any], n: int, against: str) -> list[str]:
    points = [(arm, 100 * m["pass@1"]["mean"], 100 * m[f"pass@{n}"]["mean"]) for arm, m in found.items()]
    title = f"pass@{n} against pass@1, percent"
    figures = [page.figure(title, page.scatter(points, x="pass@1", y=f"pass@{n}"))]
    ks, others = [float(k) for k in range(1, n + 1)], [arm for arm in found if arm != against]
    plots = max(1, math.ceil(len(others) / _CURVES))
    for kind in ("pass", "best"):
        for number in range(plots):
            curves = [
                page.Series(arm, ks, [100 * found[arm][f"{kind}@{k:.0f}"]["mean"] for k in ks])
                for arm in [against, *others[number::plots]]
            ]
            figures.append(page.figure(f"{kind}@k, percent", page.plot(curves, x="k", whole=True)))
    return figures


def _facts(facts: Mapping[str, Mapping[str, float]]) -> str:
    names = list(dict.fromkeys(name for row in facts.values() for name in row))
    rows = [
        [html.escape(arm), *(f"{row[name]:.4g}" if name in row else "–" for name in names)]
        for arm, row in facts.items()
    ]
    return page.table(["arm", *(html.escape(name.replace("_", " ")) for name in names)], rows, words=(0,))
