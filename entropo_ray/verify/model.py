"""What a verifier is asked, and P(YES) from a causal language model.

score = sigmoid(log p(YES | prompt) - log p(NO | prompt)), both words in full: no fixed position, no list of likely
tokens, so the score is always a number in [0, 1].
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from entropo_ray import chat

_SYSTEM = "You judge whether a patch resolves an issue."
_QUESTION = "Does the patch resolve the issue? Answer YES or NO."
_LEFT_OUT = "(left out)"


@dataclass(frozen=True, slots=True)
class Step:
    action: str
    observation: str = ""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a verifier may see of one attempt."""

    task_id: str
    sample: int
    issue: str
    patch: str
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True, slots=True)
class Labels:
    """Token ids of the two answers."""

    yes: tuple[int, ...]
    no: tuple[int, ...]

    @property
    def room(self) -> int:
        """Tokens that an answer may take."""
        return max(len(self.yes), len(self.no))


def labels(words: chat.Chat) -> Labels:
    """The answers in a model's tokens. ValueError if one begins with the other: they could not be told apart."""
    yes, no = tuple(words.encode("YES")), tuple(words.encode("NO"))
    shared = min(len(yes), len(no))
    if not shared or yes[:shared] == no[:shared]:
        raise ValueError(f"verifier.base: its tokenizer writes YES as {yes} and NO as {no}; give another model")
    return Labels(yes, no)


def render(evidence: Evidence, words: chat.Chat, max_tokens: int) -> list[int] | None:
    """Prompt ids, at most `max_tokens`; None if issue and patch alone are longer.

    Over the limit observations are blanked, the longest first; if that is not enough, the steps are left out.
    """
    steps = list(evidence.steps)
    sizes = [len(words.encode(step.observation)) for step in steps]
    longest_first = sorted(range(len(steps)), key=lambda i: -sizes[i])
    ids = _opening(evidence, steps, words)
    while len(ids) > max_tokens and longest_first:
        over = len(ids) - max_tokens
        while over > 0 and longest_first:
            i = longest_first.pop(0)
            steps[i] = replace(steps[i], observation=_LEFT_OUT)
            over -= sizes[i]
        ids = _opening(evidence, steps, words)
    if len(ids) > max_tokens:
        ids = _opening(evidence, [], words)
    return ids if len(ids) <= max_tokens else None


def _opening(evidence: Evidence, steps: Sequence[Step], words: chat.Chat) -> list[int]:
    work = "\n".join(f"> {step.action}\n{step.observation}" for step in steps)
    parts = [f"Issue:\n{evidence.issue}", f"Work:\n{work}" if work else "", f"Patch:\n{evidence.patch}", _QUESTION]
    return words.opening(_SYSTEM, "\n\n".join(filter(None, parts)))


def load(policy: Path, *, gpus: int) -> Any:
    """The weights of a directory, ready to score: bf16 on GPUs, float32 on a CPU.

    Spread over several GPUs by the library `accelerate`, which has to be installed for that alone.
    """
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if gpus else torch.float32
    spread = {"device_map": "auto"} if gpus > 1 else {}
    loaded = AutoModelForCausalLM.from_pretrained(policy, dtype=dtype, **spread).eval()
    return loaded.to("cuda") if gpus == 1 else loaded


def digest(policy: Path) -> str:
    """A short name of the weights in a directory, by the names, sizes and times of its files; reads none of them."""
    files = sorted(p for p in policy.iterdir() if p.is_file())
    said = "/".join(f"{p.name}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in files)
    return hashlib.blake2b(said.encode(), digest_size=8).hexdigest()


@torch.inference_mode()
def score_batch(model: Any, prompts: Sequence[Sequence[int]], answers: Labels) -> list[float]:
    """P(YES) for each prompt, in order; ArithmeticError if the model answers with something that is no number.

    Rows are padded on the right: attention is causal, so no token sees its padding and no mask is needed.
    """
    if not prompts:
        return []
    # answers of one token each share one row a prompt
    beginnings = list(dict.fromkeys((answers.yes[:-1], answers.no[:-1])))
    rows = [[*prompt, *beginning] for prompt in prompts for beginning in beginnings]
    width = max(map(len, rows))
    padded = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=model.device)
    hidden = model.base_model(input_ids=padded, use_cache=False).last_hidden_state  # [R, L, D]
    odds = torch.zeros(len(prompts), dtype=torch.float64)
    for sign, word in ((1, answers.yes), (-1, answers.no)):
        first = beginnings.index(word[:-1])
        row = torch.arange(first, len(rows), len(beginnings)).repeat_interleave(len(word))
        at = torch.tensor([len(prompt) - 1 + j for prompt in prompts for j in range(len(word))])
        logits = model.get_output_embeddings()(hidden[row.to(hidden.device), at.to(hidden.device)])
        logp = logits.float().log_softmax(-1).cpu()  # [B * len(word), V]
        target = torch.tensor(word * len(prompts))
        odds += sign * logp.gather(1, target[:, None]).double().view(len(prompts), len(word)).sum(1)
    if not bool(torch.isfinite(odds).all()):
        raise ArithmeticError("the verifier's log-probabilities are not finite: its weights are broken")
    scores: list[float] = torch.sigmoid(odds).tolist()
    return scores
