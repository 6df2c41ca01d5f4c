"""A run as one page: what each round cost and brought, how training went, what the held-out tasks say.

The page stands alone: inline style, plots drawn here as SVG, no scripts, nothing fetched. It is written again after
each round, from products on disk alone; what is not there yet is left out.
"""

from __future__ import annotations

import functools
import html
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from entropo_ray import chat, config, observe, page, store, tasks
from entropo_ray.records import Attempt, Grade, Task, Trajectory, Turn

_SHOWN_TASKS = 3  # with both sides, in the latest round: their best and worst attempt become pages
_FOLD_LINES = 40  # longer observations are folded
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
    flaky: int  # attempts whose hidden tests said this once and that once
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
        flaky=sum(a.grade is Grade.FLAKY for a in attempts),
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
    return {task.id: task for task in tasks.load(config.Tasks(path=cfg.tasks.path, split="all", quarantined=True))}


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
        ("flaky", str(row.flaky)),
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


# --- the page --------------------------------------------------------------------------------------------------------


def write(run_dir: str | Path) -> Path:
    """report.html of a run, and the pages of the attempts that it links to."""
    home = store.place(run_dir)
    rows, lines = rounds(home), observe.lines(home)
    parts = [
        _headline(home, rows),
        page.section("Rounds", _rounds(rows) + _round_plots(rows)),
        page.section("Held-out tasks", _evaluations(home)),
        page.section("Training", _training(home, len(rows))),
        page.section("Attempts to read", _attempts(home, rows)),
        page.section("Stages", _stages(lines)),
    ]
    return store.save(home / "report.html", page.page(f"{home.name} · report", "".join(parts)))


def _headline(home: Path, rows: Sequence[Row]) -> str:
    cfg = _config(home)
    facts = []
    if cfg is not None:
        loss = f"loss {cfg.train.loss}, β {cfg.train.beta:g}, λ {cfg.train.entropy:g}"
        if cfg.train.entropy_target is not None:
            loss += f" towards {cfg.train.entropy_target:g} nats a token"
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
    return page.table(_heads(rows), body) + f'<p class="note">{note}</p>'


def _round_plots(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    at = [float(row.round) for row in rows]
    k = max(row.samples for row in rows)
    resolved = [
        page.Series("pass@1", at, [row.pass_1 for row in rows], [row.pass_1_error for row in rows]),
        page.Series(f"pass@{k}", at, [row.pass_k for row in rows]),
        _present(f"best@{k}", rows, lambda row: row.best_k),
    ]
    taught = [
        _present("pairs", rows, lambda row: row.pairs),
        page.Series("both sides", at, [float(r.both) for r in rows]),
    ]
    spent = [_present(name, rows, functools.partial(_minutes, stage=name)) for name in ("sample", "fit")]
    draw = functools.partial(page.plot, x="round", whole=True)
    entropy = _present("entropy", rows, lambda row: row.entropy)
    figures = [
        page.figure("Resolved, share of tasks", draw(resolved, zero=True)),
        page.figure("Entropy, nats per token", draw([entropy], zero=True)),
        page.figure("Tasks and pairs that teach", draw(taught, zero=True)),
        page.figure("Time, minutes", draw(spent, zero=True)),
    ]
    return f'<div class="figures two">{"".join(figures)}</div>'


def _minutes(row: Row, *, stage: str) -> float | None:
    return row.seconds[stage] / 60 if stage in row.seconds else None


def _present(name: str, rows: Sequence[Row], value: Callable[[Row], float | None]) -> page.Series:
    """A curve over the rounds that have the value."""
    found = [(float(row.round), float(v)) for row in rows if (v := value(row)) is not None]
    return page.Series(name, [x for x, _ in found], [y for _, y in found])


_CURVES = {
    "loss": "Loss",
    "accuracy": "Accuracy, share of pairs in order",
    "margin": "Margin of implicit rewards, nats",
    "kl": "KL to the reference, nats",
    "entropy": "Entropy, nats per token",
    "logp_chosen": "Log-probability of chosen, nats",
    "logp_rejected": "Log-probability of rejected, nats",
    "ratio_chosen": "Chosen against the reference, nats",
    "displaced_share": "Share of chosen less likely than before",
    "useful_share": "Share of pairs with a gradient",
    "z0": "Reference point z0 or delta",
}


def _training(home: Path, count: int) -> str:
    """Curves of every fitting stage that has left its steps."""
    logs = {f"round {t}": store.round_of(home, t).policy / "steps.jsonl" for t in range(count)}
    preference = {name: _steps(path) for name, path in logs.items() if path.is_file()}
    others = {"imitation": store.seed_of(home).policy, "verifier": store.verifier_of(home)}
    figures = [
        page.figure(title, page.plot([_steps_of(key, n, s) for n, s in preference.items()], x="step", whole=True))
        for key, title in _CURVES.items()
    ]
    for name, policy in others.items():
        path = policy / "steps.jsonl"
        if path.is_file():
            curve = _steps_of("loss", name, _steps(path))
            figures.append(page.figure(f"Loss of {name}", page.plot([curve], x="step", zero=True, whole=True)))
    drawn = "".join(figures)
    return f'<div class="figures">{drawn}</div>' if drawn else ""


def _steps(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _steps_of(key: str, name: str, steps: Sequence[Mapping[str, float]]) -> page.Series:
    points = [(float(step.get("step", i)), float(step[key])) for i, step in enumerate(steps) if key in step]
    return page.Series(name, page.thin([x for x, _ in points]), page.thin([y for _, y in points]))


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
    return page.table(["end, UTC", "round", "stage", "time", "numbers"], rows, words=(0, 2, 4)) if rows else ""


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
    return page.table(heads, rows, words=(0,)) + note if rows else ""


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
    return page.table([f"task of round {t}", "best", "worst"], lines, words=(0, 1, 2)) if lines else ""


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
        pages[attempt.task_id, attempt.sample] = store.save(home / "report" / name, page.page(attempt.task_id, body))
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
        f"mean log-probability {page.tick(round(_mean(said), 3))} nats",
        observe.duration(attempt.wall_s),
    ]
    note = '<p class="note">The darker a token, the less probable it was to the policy.</p>' if decode else ""
    parts = [
        '<nav><a href="../report.html">report</a></nav>',
        f"<header><h1>{html.escape(attempt.task_id)}</h1><p>{' · '.join(facts)}</p>{note}</header>",
        page.section("Issue", f"<pre>{html.escape(task.problem)}</pre>" if task else ""),
        *(_turn(attempt, number, turn, decode) for number, turn in enumerate(attempt.turns, 1)),
        page.section("Patch", _patch(attempt.patch)),
        page.section("Verdict", _verdict(attempt)),
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
