"""A policy that knows the reference patches and shows how an agent would make them, where no script can find them.

It looks at each place, makes the edit of the patch, and finishes. As the local pack's teacher does, it errs on
purpose, so that who imitates it does not always succeed, and preferences have something to tell apart.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence

from entropo_ray.agent import prompts, scripted
from entropo_ray.agent.episode import Completion
from entropo_ray.chat import ChatML
from entropo_ray.tasks.reference import Edit, Edits

BEFORE = 3  # lines of the file that are looked at before those that an edit replaces
FLAWS = {"doubt": 0.8, "idle": 0.2}  # takes the last edit back; makes none


class Demonstrator:
    """Plays the edits that belong to the issue in its prompt, and errs in a share `error_rate` of its episodes.

    A function of prompt, episode and seed, which is taken to be the episode's + h in turn h, as run_episode counts.
    """

    def __init__(self, chat: ChatML, error_rate: float, edits: Edits) -> None:
        self._chat, self._error_rate = chat, error_rate
        self._edits: Mapping[str, Sequence[Edit]] = {prompts.shown(problem): e for problem, e in edits.items()}

    async def __call__(self, prompt: Sequence[int], *, episode: str, seed: int, max_tokens: int) -> Completion:
        messages = self._chat.messages(prompt)
        issue = prompts.issue_of(next((text for role, text in messages if role == "user"), ""))
        turn = sum(role == "assistant" for role, _ in messages[2:])
        rng = random.Random(f"{(seed - turn) % (1 << 63)}/{episode}")
        replies = list(self._replies(self._edits[issue], rng))
        return scripted.completion(self._chat, replies[min(turn, len(replies) - 1)], max_tokens)

    def _replies(self, edits: Sequence[Edit], rng: random.Random) -> Iterator[str]:
        """All that it says in one episode, whatever it is answered."""
        errs = rng.random() < self._error_rate
        flaw = rng.choices(list(FLAWS), list(FLAWS.values()))[0] if errs else ""
        for edit in edits:
            path = f"./{edit.path}"
            seen = (max(1, edit.first - BEFORE), edit.first + edit.old.count("\n"))
            yield scripted.say(rng, "view", "file_editor", command="view", path=path, view_range=seen)
            if flaw == "idle":
                break
            old, new = edit.old, edit.new
            yield scripted.say(rng, "edit", "file_editor", command="str_replace", path=path, old_str=old, new_str=new)
        if flaw == "doubt":
            yield scripted.say(rng, "doubt", "file_editor", command="undo_edit", path=f"./{edits[-1].path}")
        yield scripted.say(rng, "quit" if flaw else "finish", "finish")
