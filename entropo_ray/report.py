"""A run as one page: what each round cost and brought, how training went, what the held-out tasks say.

The page stands alone: inline style, plots drawn here as SVG, no scripts, nothing fetched. It is written again after
each round, from products on disk alone; what is not there yet is left out.
"""

from __future__ import annotations

import functools
import html
import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from entropo_ray import chat, config, observe, store, tasks
from entropo_ray.records import Attempt, Grade, Task, Trajectory, Turn

_SHOWN_TASKS = 3  # with both sides, in the latest round: their best and worst attempt become pages
_FOLD_LINES = 40  # longer observations are folded
_POINTS = 200  # of one curve; longer ones are averaged
_MISSING = "–"


# --- numbers of a round ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One round in numbers; None where a product does not exist yet.

    Means are over tasks with an answered attempt; attempts that infrastructure lost have no grade and do not count.
    """

    round: int
    tasks: int
    attempts: int
    samples: int  # the most attempts that a task has: k of pass@k and best@k
    pass_1: float
    pass_1_error: float  # half of the 95 % interval of pass@1, over tasks
    pass_k: float
    best_k: float | None  # None: the tasks' visible tests are not known
    pairs: int | None
    both: int  # tasks with a resolved and an unresolved attempt
    entropy: float | None  # nats per action token
    turns: float
    lost: int
    seconds: dict[str, float]  # by stage, over all starts


def rounds(run_dir: str | Path) -> list[Row]:
    """A row for each round whose trajectories are whole."""
    home = store.place(run_dir)
    lines, suite = observe.lines(home), _suite(home)
    rows: list[Row] = []
    while store.done(store.round_of(home, len(rows)).trajectories):
        rows.append(_row(home, len(rows), lines, suite))
    return rows


def _row(home: Path, t: int, lines: Sequence[Mapping[str, Any]], suite: Mapping[str, Task]) -> Row:
    out = store.round_of(home, t)
    attempts = list(store.read(out.trajectories, Attempt))
    of_task = by_task(attempts)
    shares = [fmean(_resolved(a) for a in mine) for mine in of_task.values()]
    known = bool(of_task) and of_task.keys() <= suite.keys()
    best = [best_of(mine, suite[task_id].visible) for task_id, mine in of_task.items()] if known else []
    return Row(
        round=t,
        tasks=len(of_task),
        attempts=len(attempts),
        samples=max(map(len, of_task.values()), default=0),
        pass_1=_mean(shares),
        pass_1_error=1.96 * stdev(shares) / math.sqrt(len(shares)) if len(shares) > 1 else 0.0,
        pass_k=_mean([float(share > 0) for share in shares]),
        best_k=_mean(best) if known else None,
        pairs=store.rows(out.preferences) if store.done(out.preferences) else None,
        both=sum(0 < share < 1 for share in shares),
        entropy=_last(lines, t, "sample", "entropy"),
        turns=_mean([float(a.num_turns) for a in attempts]),
        lost=sum(a.grade is None for a in attempts),
        seconds=_seconds(lines, t),
    )


def by_task(attempts: Iterable[Attempt]) -> dict[str, list[Attempt]]:
    """The graded attempts of each task, by task and sample."""
    found: dict[str, list[Attempt]] = defaultdict(list)
    for attempt in sorted(attempts, key=lambda a: (a.task_id, a.sample)):
        if attempt.grade is not None:
            found[attempt.task_id].append(attempt)
    return found


def best_of(attempts: Sequence[Attempt], visible: Sequence[str]) -> float:
    """P(the attempt chosen by visible evidence resolves the task): finished, then fewest visible tests failed.

    Ties are broken by chance. Where nothing was run (no patch, or one that does not apply) all visible tests count as
    failed, and one more: such an attempt ranks behind any that was run.
    """
    keys = [_key(a, frozenset(visible)) for a in attempts]
    return fmean(_resolved(a) for a, key in zip(attempts, keys, strict=True) if key == max(keys))


def _key(attempt: Attempt, visible: frozenset[str]) -> tuple[bool, int]:
    verdict = attempt.verdict
    ran = verdict is not None and (verdict.passed or verdict.failed)
    broken = len(visible & set(verdict.failed)) if verdict is not None and ran else len(visible) + 1
    return attempt.stop.finished, -broken


def _resolved(attempt: Attempt) -> float:
    return float(attempt.grade is Grade.RESOLVED)


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else 0.0


def _last(lines: Sequence[Mapping[str, Any]], t: int, stage: str, name: str) -> float | None:
    """The number that a stage of this round left when it last ended well."""
    found = [line.get(name) for line in lines if (line["stage"], line.get("round")) == (stage, t) and line.get("ok")]
    return found[-1] if found else None


def _seconds(lines: Sequence[Mapping[str, Any]], t: int) -> dict[str, float]:
    spent: dict[str, float] = defaultdict(float)
    for line in lines:
        if line.get("round") == t and line["stage"] != "start":
            spent[line["stage"]] += line["seconds"]
    return dict(spent)


def _config(home: Path) -> config.Run | None:
    path = home / "config.yaml"
    return config.load(config.Run, [str(path)]) if path.is_file() else None


def _suite(home: Path) -> dict[str, Task]:
    """The tasks of the run's pack by id; none where the run was moved away from its pack."""
    cfg = _config(home)
    if cfg is None or not Path(cfg.tasks.path).is_dir():
        return {}
    return {task.id: task for task in tasks.load(config.Tasks(path=cfg.tasks.path, split="all"))}


# --- the table -------------------------------------------------------------------------------------------------------


def table(run_dir: str | Path) -> str:
    """The rounds as text for a terminal; one line that says so where there is none."""
    rows = rounds(run_dir)
    if not rows:
        return f"{run_dir}: no round is sampled yet"
    cells = [_heads(rows), *([cell for _, cell in _cells(row)] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def _heads(rows: Sequence[Row]) -> list[str]:
    k = max(row.samples for row in rows)
    return [head.replace("@k", f"@{k}") for head, _ in _cells(rows[0])]


def _cells(row: Row) -> list[tuple[str, str]]:
    """Head and text of every cell of a round."""
    return [
        ("round", str(row.round)),
        ("tasks", str(row.tasks)),
        ("attempts", str(row.attempts)),
        ("lost", str(row.lost)),
        ("both sides", str(row.both)),
        ("pairs", _number(row.pairs)),
        ("pass@1", f"{row.pass_1:.3f} ±{row.pass_1_error:.3f}"),
        ("pass@k", f"{row.pass_k:.3f}"),
        ("best@k", _number(row.best_k, 3)),
        ("entropy", _number(row.entropy, 3)),
        ("turns", f"{row.turns:.1f}"),
        ("sample", _time(row.seconds.get("sample"))),
        ("fit", _time(row.seconds.get("fit"))),
        ("all stages", _time(sum(row.seconds.values()) or None)),
    ]


def _number(value: float | None, digits: int = 0) -> str:
    return _MISSING if value is None else f"{value:.{digits}f}"


def _time(seconds: float | None) -> str:
    return _MISSING if seconds is None else observe.duration(seconds)


# --- plots -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Series:
    """One curve; `errors` are half widths of intervals around `ys`, or nothing."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    errors: Sequence[float] = ()


_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 330, 190, 44, 70, 12, 30
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
    parts = [_grid(ticks, up), *(_mark(v, across(v)) for v in xticks if across(v) <= _WIDTH - _RIGHT + 0.5)]
    parts += [_curve(s, i, across, up) for i, s in enumerate(drawn)]
    parts += _names(drawn, up)
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{_HEIGHT - 3}" text-anchor="middle" class="axis">{html.escape(x)}</text>')
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}</svg>'


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
        f'<text x="{_LEFT - 6}" y="{up(v) + 3:.1f}" text-anchor="end" class="tick">{_tick(v)}</text>'
        for v in ticks
    )


def _mark(value: float, x: float) -> str:
    return f'<text x="{x:.1f}" y="{_HEIGHT - 16}" text-anchor="middle" class="tick">{_tick(value)}</text>'


def _tick(value: float) -> str:
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


def _thin(values: Sequence[float]) -> list[float]:
    """At most _POINTS means of neighbours."""
    size = math.ceil(len(values) / _POINTS)
    return [fmean(values[i : i + size]) for i in range(0, len(values), size)] if size > 1 else list(values)


def _figure(title: str, picture: str, note: str = "") -> str:
    """A plot under its title; nothing for nothing."""
    said = f"<small>{note}</small>" if note else ""
    return f"<figure><figcaption>{html.escape(title)}{said}</figcaption>{picture}</figure>" if picture else ""


# --- the page --------------------------------------------------------------------------------------------------------


def write(run_dir: str | Path) -> Path:
    """report.html of a run, and the pages of the attempts that it links to."""
    home = store.place(run_dir)
    rows, lines = rounds(home), observe.lines(home)
    parts = [
        _headline(home, rows),
        _section("Rounds", _rounds(rows) + _round_plots(rows)),
        _section("Held-out tasks", _evaluations(home)),
        _section("Training", _training(home, len(rows))),
        _section("Attempts to read", _attempts(home, rows)),
        _section("Stages", _stages(lines)),
    ]
    return _save(home / "report.html", _page(f"{home.name} · report", "".join(parts)))


def _save(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
    return path


def _page(title: str, body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n<body>{body}</body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>\n" if body else ""


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, words: Sequence[int] = ()) -> str:
    """A table of cells that are HTML already; the columns `words` hold text, the others numbers."""
    mark = [' class="word"' if i in words else "" for i in range(len(heads))]
    head = "".join(f"<th{m}>{h}</th>" for m, h in zip(mark, heads, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{m}>{cell}</td>" for m, cell in zip(mark, row, strict=True)) + "</tr>\n" for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _headline(home: Path, rows: Sequence[Row]) -> str:
    cfg = _config(home)
    facts = []
    if cfg is not None:
        loss = f"EntroPO-{cfg.train.loss.upper()}, β {cfg.train.beta:g}, λ {cfg.train.entropy:g}"
        facts.append(f"{len(rows)} of {cfg.rounds} rounds · {loss} · seed {cfg.seed} · {html.escape(cfg.model)}")
    if rows:
        first, last = rows[0], rows[-1]
        change = f" (round 0: {first.pass_1:.3f})" if len(rows) > 1 else ""
        facts.append(
            f"On the training tasks of round {last.round}, <b>pass@1 {last.pass_1:.3f}</b>{change}, "
            f"pass@{last.samples} {last.pass_k:.3f}."
        )
    else:
        facts.append("No round is sampled yet.")
    return f"<header><h1>{html.escape(home.name)}</h1>{''.join(f'<p>{fact}</p>' for fact in facts)}</header>\n"


def _rounds(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    body = [[html.escape(cell) for _, cell in _cells(row)] for row in rows]
    note = (
        "Each round draws its own training tasks. pass@1 with its 95 % interval over tasks; pass@k: any of k attempts "
        "resolves the task; best@k: the one chosen by visible tests does. Entropy: nats per sampled token. "
        "Lost attempts have no grade and do not count."
    )
    return _table(_heads(rows), body) + f'<p class="note">{note}</p>'


def _round_plots(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    at = [float(row.round) for row in rows]
    k = max(row.samples for row in rows)
    resolved = [
        Series("pass@1", at, [row.pass_1 for row in rows], [row.pass_1_error for row in rows]),
        Series(f"pass@{k}", at, [row.pass_k for row in rows]),
        _present(f"best@{k}", rows, lambda row: row.best_k),
    ]
    taught = [_present("pairs", rows, lambda row: row.pairs), Series("both sides", at, [float(r.both) for r in rows])]
    spent = [_present(name, rows, functools.partial(_minutes, stage=name)) for name in ("sample", "fit")]
    draw = functools.partial(plot, x="round", whole=True)
    entropy = _present("entropy", rows, lambda row: row.entropy)
    figures = [
        _figure("Resolved, share of tasks", draw(resolved, zero=True)),
        _figure("Entropy, nats per token", draw([entropy], zero=True)),
        _figure("Tasks and pairs that teach", draw(taught, zero=True)),
        _figure("Time, minutes", draw(spent, zero=True)),
    ]
    return f'<div class="figures two">{"".join(figures)}</div>'


def _minutes(row: Row, *, stage: str) -> float | None:
    return row.seconds[stage] / 60 if stage in row.seconds else None


def _present(name: str, rows: Sequence[Row], value: Callable[[Row], float | None]) -> Series:
    """A curve over the rounds that have the value."""
    found = [(float(row.round), float(v)) for row in rows if (v := value(row)) is not None]
    return Series(name, [x for x, _ in found], [y for _, y in found])


_CURVES = {
    "loss": "Loss",
    "accuracy": "Accuracy, share of pairs in order",
    "margin": "Margin of implicit rewards, nats",
    "kl": "KL to the reference, nats",
    "entropy": "Entropy, nats per token",
    "logp_chosen": "Log-probability of chosen, nats",
    "logp_rejected": "Log-probability of rejected, nats",
    "useful_share": "Share of pairs with a gradient",
}


def _training(home: Path, count: int) -> str:
    """Curves of every fitting stage that has left its steps."""
    logs = {f"round {t}": store.round_of(home, t).policy / "steps.jsonl" for t in range(count)}
    preference = {name: _steps(path) for name, path in logs.items() if path.is_file()}
    others = {"imitation": store.seed_of(home).policy, "verifier": store.verifier_of(home)}
    figures = [
        _figure(title, plot([_steps_of(key, n, s) for n, s in preference.items()], x="step", whole=True))
        for key, title in _CURVES.items()
    ]
    for name, policy in others.items():
        path = policy / "steps.jsonl"
        if path.is_file():
            curve = _steps_of("loss", name, _steps(path))
            figures.append(_figure(f"Loss of {name}", plot([curve], x="step", zero=True, whole=True)))
    drawn = "".join(figures)
    return f'<div class="figures">{drawn}</div>' if drawn else ""


def _steps(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _steps_of(key: str, name: str, steps: Sequence[Mapping[str, float]]) -> Series:
    points = [(float(step.get("step", i)), float(step[key])) for i, step in enumerate(steps) if key in step]
    return Series(name, _thin([x for x, _ in points]), _thin([y for _, y in points]))


def _stages(lines: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for line in lines:
        if line["stage"] == "start":
            continue
        numbers = {k: v for k, v in line.items() if k not in ("at", "stage", "round", "ok", "seconds", "error")}
        said = " · ".join(f"{k} {v:.4g}" for k, v in numbers.items() if isinstance(v, int | float))
        end = "" if line["ok"] else f"<b>failed</b> {html.escape(str(line.get('error', '')))} "
        rows.append(
            [
                html.escape(line["at"].replace("T", " ").removesuffix("Z")),
                _MISSING if line.get("round") is None else str(line["round"]),
                html.escape(line["stage"]),
                _time(line["seconds"]),
                f"{end}<small>{html.escape(said)}</small>",
            ]
        )
    return _table(["end, UTC", "round", "stage", "time", "numbers"], rows, words=(0, 2, 4)) if rows else ""


# --- held-out tasks --------------------------------------------------------------------------------------------------


def _evaluations(home: Path) -> str:
    """A column for each evaluation*.json, a row for each number, with its interval where it has one."""
    found = {path.stem: _numbers(json.loads(path.read_text())) for path in sorted(home.glob("evaluation*.json"))}
    names = dict.fromkeys(name for numbers in found.values() for name in numbers if not _bound(name, numbers))
    heads = ["", *(html.escape(_title(stem)) for stem in found)]
    rows = [
        [html.escape(name.replace("_at_", "@")), *(_interval(name, numbers) for numbers in found.values())]
        for name in names
    ]
    note = '<p class="note">In brackets: 95 % intervals over tasks.</p>'
    return _table(heads, rows, words=(0,)) + note if rows else ""


def _title(stem: str) -> str:
    return stem.removeprefix("evaluation").removeprefix("-") or "last policy"


def _numbers(value: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of nested JSON by dotted name."""
    found: dict[str, float] = {}
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            found |= _numbers(inner, f"{prefix}{name}.")
        elif isinstance(inner, int | float):
            found[f"{prefix}{name}"] = float(inner)
    return found


def _bound(name: str, numbers: Mapping[str, float]) -> bool:
    base, _, end = name.rpartition("_")
    return end in ("low", "high") and base in numbers


def _interval(name: str, numbers: Mapping[str, float]) -> str:
    if name not in numbers:
        return _MISSING
    value = numbers[name]
    text = f"{value:.0f}" if value.is_integer() and f"{name}_low" not in numbers else f"{value:.3f}"
    if f"{name}_low" not in numbers:
        return text
    return f"{text} <small>[{numbers[f'{name}_low']:.3f}, {numbers[f'{name}_high']:.3f}]</small>"


# --- attempts --------------------------------------------------------------------------------------------------------


def _attempts(home: Path, rows: Sequence[Row]) -> str:
    """Links to the best and the worst attempt at a few tasks of the latest round; the pages are written too."""
    if not rows:
        return ""
    t = rows[-1].round
    chosen = contrasts(store.read(store.round_of(home, t).trajectories, Attempt))[:_SHOWN_TASKS]
    keys = [(a.task_id, a.sample) for pair in chosen for a in pair]
    pages = _pages(home, t, keys)
    lines = [
        [
            html.escape(good.task_id),
            *(
                f'<a href="{html.escape(str(pages[a.task_id, a.sample].relative_to(home)))}">sample {a.sample}</a> '
                f"<small>{a.grade}, {a.num_turns} turns</small>"
                for a in (good, bad)
            ),
        ]
        for good, bad in chosen
    ]
    return _table([f"task of round {t}", "best", "worst"], lines, words=(0, 1, 2)) if lines else ""


def contrasts(attempts: Iterable[Attempt]) -> list[tuple[Attempt, Attempt]]:
    """For each task with both sides its shortest resolved and its longest other attempt, most even tasks first."""
    found = []
    for mine in by_task(attempts).values():
        good = [a for a in mine if a.grade is Grade.RESOLVED]
        bad = [a for a in mine if a.grade is not Grade.RESOLVED]
        if good and bad:
            pair = min(good, key=lambda a: (a.num_actions, a.sample)), max(bad, key=lambda a: (a.num_actions, a.sample))
            found.append((abs(len(good) - len(bad)), pair))
    return [pair for _, pair in sorted(found, key=lambda item: (item[0], item[1][0].task_id))]


def trajectory(run_dir: str | Path, *, round: int, task_id: str, sample: int) -> Path:
    """One attempt of a round turn by turn. ValueError if the round has no such attempt."""
    pages = _pages(store.place(run_dir), round, [(task_id, sample)])
    if not pages:
        raise ValueError(f"task={task_id} sample={sample}: not among the trajectories of round {round} of {run_dir}")
    return pages[task_id, sample]


def _pages(home: Path, t: int, keys: Sequence[tuple[str, int]]) -> dict[tuple[str, int], Path]:
    suite, words = _suite(home), _words(home, t)
    pages = {}
    for attempt in store.find(store.round_of(home, t).trajectories, Trajectory, keys):
        name = f"round-{t:02d}-{re.sub(r'[^A-Za-z0-9.]+', '-', attempt.task_id)}-{attempt.sample}.html"
        decode = words if attempt.kind == "model" else None
        body = _conversation(attempt, suite.get(attempt.task_id), decode)
        pages[attempt.task_id, attempt.sample] = _save(home / "report" / name, _page(attempt.task_id, body))
    return pages


Decode = Callable[[Sequence[int]], str]


def _words(home: Path, t: int) -> Decode | None:
    """The tokenizer that round t sampled with; None where its directory is not here."""
    cfg = _config(home)
    path = store.round_of(home, t - 1).policy if t else store.place(cfg.model) if cfg else None
    return chat.load(path).decode if path is not None and (path / "tokenizer.json").is_file() else None


def _conversation(attempt: Trajectory, task: Task | None, decode: Decode | None) -> str:
    said = [p for p, mask in zip(attempt.behaviour_logp, attempt.action_mask, strict=True) if mask]
    facts = [
        f"<b>{attempt.grade or 'no grade'}</b>",
        f"round {attempt.round}, sample {attempt.sample}",
        f"stopped: {attempt.stop}{f' ({html.escape(attempt.reason)})' if attempt.reason else ''}",
        f"{attempt.num_turns} turns",
        f"{len(attempt.token_ids)} tokens, {attempt.num_actions} sampled at T {attempt.temperature:g}",
        f"mean log-probability {_tick(round(_mean(said), 3))} nats",
        observe.duration(attempt.wall_s),
    ]
    note = '<p class="note">The darker a token, the less probable it was to the policy.</p>' if decode else ""
    parts = [
        '<nav><a href="../report.html">report</a></nav>',
        f"<header><h1>{html.escape(attempt.task_id)}</h1><p>{' · '.join(facts)}</p>{note}</header>",
        _section("Issue", f"<pre>{html.escape(task.problem)}</pre>" if task else ""),
        *(_turn(attempt, number, turn, decode) for number, turn in enumerate(attempt.turns, 1)),
        _section("Patch", _patch(attempt.patch)),
        _section("Verdict", _verdict(attempt)),
    ]
    return "".join(parts)


def _turn(attempt: Trajectory, number: int, turn: Turn, decode: Decode | None) -> str:
    span = slice(turn.start, turn.stop)
    reply = shaded(attempt.token_ids[span], attempt.behaviour_logp[span], decode) if decode else html.escape(turn.reply)
    facts = [turn.tool or f"no call ({turn.parse})", *turn.flags]
    facts += [f"exit {turn.exit_code}"] if turn.exit_code >= 0 else []
    facts.append(f"generated in {turn.generate_s:.1f} s, ran {turn.act_s:.1f} s")
    return (
        f"<section><h3>Turn {number} <small>{html.escape(' · '.join(facts))}</small></h3>"
        f'<pre class="reply">{reply}</pre>{_observation(turn.observation)}</section>\n'
    )


def _observation(text: str) -> str:
    lines = text.splitlines()
    if not text:
        return ""
    if len(lines) <= _FOLD_LINES:
        return f'<pre class="seen">{html.escape(text)}</pre>'
    return (
        f'<details><summary>{len(lines)} lines observed</summary><pre class="seen">{html.escape(text)}</pre></details>'
    )


def shaded(ids: Sequence[int], logps: Sequence[float], decode: Decode) -> str:
    """Sampled tokens as HTML, the less probable the darker; probable ones stay plain text.

    Bytes of one character may be spread over tokens: such tokens are shown together.
    """
    parts, held, nats = [], [], 0.0
    for token, logp in zip(ids, logps, strict=True):
        held.append(token)
        nats += logp
        text = decode(held)
        if "\N{REPLACEMENT CHARACTER}" in text and len(held) < 4:
            continue
        parts.append(_token(text, nats))
        held, nats = [], 0.0
    return "".join(parts) + (html.escape(decode(held)) if held else "")


def _token(text: str, logp: float) -> str:
    shade = min(0.7, -logp / 5)
    if shade < 0.02:
        return html.escape(text)
    title = f"{math.exp(logp):.2g}"
    return f'<span title="p {title}" style="background:rgba(214,120,40,{shade:.2f})">{html.escape(text)}</span>'


def _patch(patch: str) -> str:
    kinds = {"+": "add", "-": "cut", "@": "hunk"}
    lines = []
    for line in patch.splitlines():
        kind = "" if line.startswith(("+++", "---")) else kinds.get(line[:1], "")
        lines.append(f'<span class="{kind}">{html.escape(line)}</span>' if kind else html.escape(line))
    return f"<pre>{chr(10).join(lines)}</pre>" if lines else "<p>No change.</p>"


def _verdict(attempt: Trajectory) -> str:
    verdict = attempt.verdict
    if verdict is None:
        return "<p>Nothing was graded.</p>"
    said = f"{len(verdict.passed)} tests passed, {len(verdict.failed)} failed, in {verdict.seconds:.1f} s."
    failed = "".join(f"<li>{html.escape(test)}</li>" for test in verdict.failed)
    reason = f"<p>{html.escape(verdict.reason)}</p>" if verdict.reason else ""
    return f"<p>{said}</p>{reason}{f'<ul>{failed}</ul>' if failed else ''}"


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
