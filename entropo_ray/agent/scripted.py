"""Policies that follow a script: fakes for tests, and the teacher of the local pack.

They speak in UTF-8 bytes, so they need no tokenizer; their log-probabilities are 0.0 and mean nothing.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from entropo_ray.agent import parse, prompts
from entropo_ray.agent.episode import Completion, EngineError, Generate
from entropo_ray.agent.spec import Action, Value
from entropo_ray.chat import Chat, ChatML
from entropo_ray.tasks import handbook
from entropo_ray.tasks.handbook import Repair

_CONTROLS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


class ByteTokenizer:
    """The words of ByteChat: ids 0 to 255 are bytes, then come the control tokens."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="replace"))

    def decode(self, ids: Sequence[int]) -> str:
        parts = [_CONTROLS[i - 256].encode() if i >= 256 else bytes([i]) for i in ids]
        return b"".join(parts).decode("utf-8", errors="replace")

    def control(self, name: str) -> int | None:
        return 256 + _CONTROLS.index(name) if name in _CONTROLS else None


class ByteChat(ChatML):
    """ChatML over bytes: a chat that needs no files."""

    def __init__(self) -> None:
        super().__init__(ByteTokenizer())


def completion(chat: Chat, reply: str, max_tokens: int) -> Completion:
    """A reply as an engine would return it: with the id that ends it, or cut at `max_tokens`."""
    ids = (*chat.encode(reply), chat.end_ids[0])
    kept = ids[:max_tokens]
    return Completion(kept, (0.0,) * len(kept), reply, "stop" if len(kept) == len(ids) else "length")


def scripted(replies: Sequence[str], chat: Chat | None = None) -> Generate:
    """A policy that says `replies` in order, in every episode anew; EngineError when they have run out."""
    words = chat or ByteChat()
    said: dict[str, int] = {}

    async def generate(prompt: Sequence[int], *, episode: str, seed: int, max_tokens: int) -> Completion:
        turn = said[episode] = said.get(episode, -1) + 1
        if turn >= len(replies):
            raise EngineError(f"the script has {len(replies)} replies and was asked for one more")
        return completion(words, replies[turn], max_tokens)

    return generate


# ---- the teacher ----


Repairs = Callable[[str, str], Sequence[Repair]]  # (source, issue): the right fixes
Mistakes = Callable[[str, str, random.Random], Sequence[Repair]]  # the plausible wrong ones

SEARCHES = 0.05  # share of episodes that begin with a search
TESTS = 0.06  # share that run the visible tests after the edit
CAREFUL = 0.5  # share of those that answer a failing test with another repair
SLIPS = 0.05  # share whose first edit names text that is not there; the second is meant to be right
USUAL = 6  # the usual form of a fix is so many times as likely as another of the same behaviour
NEAR = 4  # a wrong fix is one of so many; the first are at the place of the fault
# How an erring teacher errs, and how often: takes its repair back, gives up, changes nothing that matters, or takes a
# plausible wrong fix. Most are habits that do not depend on the task, so that what the preferences of one task teach
# holds for others; and most come after a repair, so that an episode that errs still shows one to whoever imitates it.
FLAWS = {"doubt": 0.8, "idle": 0.1, "cosmetic": 0.05, "wrong": 0.05}
NOTE = "# checked"  # all that a cosmetic change adds

_THOUGHTS = {
    "search": ("Find where it is defined.", "Let me search for it."),
    "list": ("See which files there are.", "Let me list the repository first."),
    "view": ("Read the file first.", "Let me look at the code.", "Open the file."),
    "edit": (
        "This is the fault, so replace it.",
        "The code here is wrong; fix it.",
        "Change what causes this.",
    ),
    "note": ("A note will do.", "Mark the file as checked."),
    "test": ("Run the tests to check the change.", "Let me see what the tests say."),
    "undo": ("The tests fail, so undo the edit.", "That broke a test; take it back."),
    "doubt": ("I am not sure of this change; take it back.", "Better to leave the code as it was."),
    "finish": ("The fix is in place, so finish.", "That should resolve the issue; finish.", "Done, finish now."),
    "quit": ("I see nothing to change here.", "The code looks fine to me."),
}


@dataclass(frozen=True, slots=True)
class _Plan:
    """What the dice decided for a whole episode."""

    flaw: str  # a key of FLAWS, or ""
    searches: bool
    slips: bool
    tests: bool
    careful: bool
    dice: str  # seed of what is still to be drawn

    @classmethod
    def drawn(cls, dice: str, error_rate: float) -> _Plan:
        rng = random.Random(f"{dice}/plan")
        flaw = rng.choices(list(FLAWS), list(FLAWS.values()))[0]
        shares = (error_rate, SEARCHES, SLIPS, TESTS, CAREFUL)
        errs, searches, slips, tests, careful = (rng.random() < share for share in shares)
        return cls(flaw if errs else "", searches, slips, tests, careful, dice)


@dataclass(slots=True)
class _Seen:
    """What an episode's prompt tells of it so far."""

    issue: str
    turns: int = 0
    listed: str | None = None  # output of a search or of a directory view
    path: str | None = None
    source: str | None = None  # of the file at path, as first viewed
    edits: int = 0  # that stand
    tried: list[tuple[str, str]] = field(default_factory=list)  # (old, new) of successful edits
    undone: bool = False
    errors: int = 0  # calls that failed
    tested: bool = False
    failing: bool = False

    @classmethod
    def of(cls, messages: Sequence[tuple[str, str]]) -> _Seen:
        first = next((text for role, text in messages if role == "user"), "")
        seen = cls(prompts.issue_of(first))
        said = [text for role, text in messages[2:] if role == "assistant"]
        heard = [text for role, text in messages[2:] if role == "user"]
        for reply, observation in zip(said, heard, strict=True):
            seen.turns += 1
            seen._note(parse.parse(reply).action, observation)
        return seen

    def _note(self, action: Action | None, observation: str) -> None:
        if action is None or observation.startswith("ERROR:"):
            self.errors += 1
        elif action.name == "search":
            self.listed = observation
        elif action.name == "execute_bash":
            self.tested = True
            self.failing = not observation.startswith("exit code: 0")
        elif action.name == "file_editor":
            self._note_editor(action, observation)

    def _note_editor(self, action: Action, observation: str) -> None:
        command, path = action.arguments["command"], str(action.arguments["path"])
        if command == "view" and path.endswith(".py"):
            self.path, self.source = path, _unnumbered(observation)
        elif command == "view":
            self.listed = observation
        elif command == "undo_edit":
            self.edits, self.undone = self.edits - 1, True
        else:
            self.edits += 1
            self.tried.append((str(action.arguments.get("old_str", "")), str(action.arguments.get("new_str", ""))))


def _unnumbered(view: str) -> str:
    """The text of a file from its `cat -n` view."""
    return "".join(f"{line}\n" for line in re.findall(r"^ *[0-9]+\t(.*)$", view, re.MULTILINE))


class Teacher:
    """A policy that repairs what `repairs` sees, and errs on purpose in a share `error_rate` of its episodes.

    It reads only the prompt of its call, which is what any policy reads, and is a function of it, of the episode and
    of its seed: the seed of turn h is taken to be the episode's + h, as run_episode counts.
    """

    def __init__(
        self,
        chat: ChatML,
        error_rate: float,
        repairs: Repairs = handbook.repairs,
        mistakes: Mistakes = handbook.mistakes,
    ) -> None:
        self._chat, self._error_rate, self._repairs, self._mistakes = chat, error_rate, repairs, mistakes

    async def __call__(self, prompt: Sequence[int], *, episode: str, seed: int, max_tokens: int) -> Completion:
        seen = _Seen.of(self._chat.messages(prompt))
        dice = f"{(seed - seen.turns) % (1 << 63)}/{episode}"
        reply = self._reply(seen, _Plan.drawn(dice, self._error_rate))
        return completion(self._chat, reply, max_tokens)

    def _reply(self, seen: _Seen, plan: _Plan) -> str:
        rng = random.Random(f"{plan.dice}/{seen.turns}")
        if seen.errors > 1:  # a second try is enough
            return say(rng, "finish", "finish")
        if seen.source is None:
            return self._explore(seen, plan, rng)
        if plan.flaw == "idle" or (plan.flaw == "doubt" and seen.undone):
            return say(rng, "quit", "finish")
        if seen.edits == 0:
            return self._edit(seen, plan, rng)
        if plan.flaw == "doubt":
            return say(rng, "doubt", "file_editor", command="undo_edit", path=seen.path or "")
        if plan.tests and not seen.tested:
            return say(rng, "test", "execute_bash", cmd="python -m pytest -q --tb=no")
        if plan.careful and seen.failing and not seen.undone and self._others(seen):
            return say(rng, "undo", "file_editor", command="undo_edit", path=seen.path or "")
        return say(rng, "finish", "finish")

    def _explore(self, seen: _Seen, plan: _Plan, rng: random.Random) -> str:
        """Towards the file that the issue is about."""
        path, name = _path_in(seen.issue), _name_in(seen.issue)
        if seen.listed is None and name and (plan.searches or path is None):
            return say(rng, "search", "search", search_term=f"def {name.rpartition('.')[2]}")
        if path is None and seen.listed is not None:
            path = _path_in(seen.listed)
            if path is None:
                return say(rng, "quit", "finish")
        if path is None:
            return say(rng, "list", "file_editor", command="view", path=".")
        return say(rng, "view", "file_editor", command="view", path=f"./{path}")

    def _edit(self, seen: _Seen, plan: _Plan, rng: random.Random) -> str:
        path, source = seen.path or "", seen.source or ""
        if plan.flaw == "cosmetic":
            return say(rng, "note", "file_editor", command="insert", path=path, insert_line=0, new_str=NOTE)
        options = self._others(seen)
        if plan.flaw == "wrong" and not seen.undone:
            dice = random.Random(f"{plan.dice}/mistakes")
            options = list(self._mistakes(source, seen.issue, dice))[:NEAR]
        if not options:
            return say(rng, "quit", "finish")
        usual = options[0].kind not in handbook.OPEN and plan.flaw != "wrong"
        weights = [USUAL if usual and option is options[0] else 1 for option in options]
        chosen = random.Random(f"{plan.dice}/repair").choices(options, weights)[0]
        old, new = chosen.old, chosen.new
        if plan.slips and not seen.errors:
            old, new = new, old  # takes what should stand there for what does
        return say(rng, "edit", "file_editor", command="str_replace", path=path, old_str=old, new_str=new)

    def _others(self, seen: _Seen) -> list[Repair]:
        """Right repairs that were not tried yet."""
        repairs = self._repairs(seen.source or "", seen.issue)
        return [repair for repair in repairs if (repair.old, repair.new) not in seen.tried]


def say(rng: random.Random, thought: str, tool: str, **arguments: Value) -> str:
    """A thought of the stock, then the call."""
    return f"{rng.choice(_THOUGHTS[thought])}\n{parse.encode(Action(tool, arguments))}"


def _path_in(text: str) -> str | None:
    """The first Python file named in a text that is no test."""
    for path in re.findall(r"[\w./-]+\.py\b", text):
        if not path.rpartition("/")[2].startswith("test_"):
            return str(path).removeprefix("./")
    return None


def _name_in(issue: str) -> str | None:
    """The first function named in backticks."""
    found = re.search(r"`([A-Za-z_][\w.]*)(?:\([^`]*\))?`", issue.replace(".py`", ""))
    return found[1] if found else None
