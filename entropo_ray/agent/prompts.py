"""What the policy is told, next to the tools and the parser that it must agree with.

Two lengths: `full` for language models, `brief` (two lines and the issue) for policies of a few million parameters.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass

from entropo_ray import config
from entropo_ray.agent import parse, spec
from entropo_ray.records import Task

PROBLEM_CHARS = 40_000


@dataclass(frozen=True, slots=True)
class PromptFields:
    """All that a template may hold: no patch, test, verdict or other attempt can be formatted in."""

    problem: str
    workdir: str


_EXAMPLE = parse.encode(spec.Action("file_editor", {"command": "view", "path": "src/shapes.py", "view_range": (1, 40)}))

_SYSTEM = f"""You are a programming agent. You fix one issue in a repository by calling tools.

Tools:

{{tools}}

Every reply is a short thought followed by exactly one call in this form:

{parse.FORMAT}

For example:

I look at the area computation first.
{_EXAMPLE}

Values are taken verbatim, white space included; a value of several lines may stand on lines of its own.
{parse.ESCAPE_RULE}

Reminders:
- One call a reply; think first, then call.
- Required parameters must be there; use no others than the tool has.
- The call's result comes as the next message.
"""

_TASK = """Consider this issue of the repository in {workdir}:

<github_issue>
{problem}
</github_issue>

Change the repository so that the issue is resolved. Test files are handled elsewhere: you need not change them.

1. Explore the repository to find the code that the issue is about.
2. Reproduce the issue with a short script.
3. Find the cause.
4. Fix it with a change as small as it can be.
5. Run your script again to see the issue gone.
6. Run the existing tests that touch the change.
7. Think of edge cases, and handle them.
8. Call finish.

Do not print more than you need: results of calls are cut when they are long.
"""

# Neither the form of a call nor a tool's parameters are told: a policy this small knows them from imitation or not at
# all, and the correction that answers a malformed call shows them.
_BRIEF_SYSTEM = "Reply with a thought and one call: file_editor, execute_bash, search or finish."

_BRIEF_TASK = """<github_issue>
{problem}
</github_issue>
Fix it in {workdir}, then call finish."""

_ISSUE = re.compile(r"<github_issue>\n(.*)\n</github_issue>", re.DOTALL)


def system(cfg: config.Agent) -> str:
    """The system message; equal for all tasks."""
    return _BRIEF_SYSTEM if cfg.prompt == "brief" else _SYSTEM.replace("{tools}", spec.describe()).rstrip("\n")


def task(task: Task, cfg: config.Agent) -> str:
    """The first user message."""
    return _fill(PromptFields(shown(task.problem), task.workdir), cfg)


def _fill(fields: PromptFields, cfg: config.Agent) -> str:
    template = _BRIEF_TASK if cfg.prompt == "brief" else _TASK.rstrip("\n")
    return template.format(problem=fields.problem, workdir=fields.workdir)


def shown(problem: str) -> str:
    text = problem.strip()
    text = text.removeprefix("[ISSUE]").removesuffix("[/ISSUE]").strip("\n")
    return text if len(text) <= PROBLEM_CHARS else f"{text[:PROBLEM_CHARS]}\n(cut at {PROBLEM_CHARS} characters)"


def issue_of(message: str) -> str:
    """The issue in a first user message; "" where there is none."""
    found = _ISSUE.search(message)
    return found[1] if found else ""


def remaining(steps: int) -> str:
    """What an observation ends with under agent.countdown."""
    if steps > 0:
        return f"Steps remaining: {steps}"
    return "Steps remaining: 0. Call finish now."


def unreadable(parsed: parse.Parsed, cap: int | None) -> str:
    """The observation for a reply that was not run; `cap` is the token cap where the reply hit it."""
    cut = f" The reply was cut at {cap} tokens; be shorter." if cap is not None else ""
    return f"ERROR: {parsed.message}{cut}"


def scaffold(cfg: config.Agent) -> str:
    """Digest of all that policies were told and could do: two episodes compare only if theirs are equal."""
    parts = {
        "codec": ["xml", parse.VERSION],
        "tools": spec.spec_hash(),
        "system": system(cfg),
        "task": _fill(PromptFields("{problem}", "{workdir}"), cfg),
        "remaining": [remaining(1), remaining(0)] if cfg.countdown else [],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
