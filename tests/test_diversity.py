"""diversity: entropies join by key and fall into turns and segments; solutions are counted as what they are."""

import math

import numpy as np
import pytest

from entropo_ray import diversity, store
from entropo_ray.agent.scripted import ByteChat
from entropo_ray.agent.spans import spans
from entropo_ray.records import Measure, Trajectory, Turn

WORDS = ByteChat()
CALL = "Look first.\n<function=search>\n  <parameter=term>x</parameter>\n</function>"


def texts(reply):
    ids = [*WORDS.encode(reply), WORDS.end_ids[0]]
    return {name: WORDS.decode(ids[start:stop]) for name, (start, stop) in spans(ids, WORDS).items()}


def test_a_reply_falls_into_thought_tool_and_arguments():
    found = texts(CALL)
    assert found["thought"] == "Look first.\n"
    assert found["tool"] == "<function=search>"
    assert found["arguments"].startswith("\n  <parameter=term>x</parameter>\n</function>")
    assert len(found["arguments"]) > len("\n  <parameter=term>x</parameter>\n</function>")  # the end of turn, too


def test_a_reply_without_a_call_is_all_thought_and_no_token_is_lost():
    assert texts("I give up.")["tool"] == texts("I give up.")["arguments"] == ""
    for reply in (CALL, "é<function=a>", "no", "<function=a>\n</function>"):
        found = texts(reply)
        assert "".join(found.values()) == WORDS.decode([*WORDS.encode(reply), WORDS.end_ids[0]])


class Coarse:
    """Words of several letters: a token may join the tool's name with what stands around it."""

    WORDS = (
        "Look first.\n",
        "\n<function=",
        "search>\n  <parameter=",
        "term>",
        "x",
        "</parameter>\n</function>",
        "!<func",
    )
    WORDS = (*WORDS, "tion=search>\n</function>")

    def decode(self, ids):
        return "".join(self.WORDS[i] for i in ids)


def test_a_token_that_holds_a_part_of_the_name_belongs_to_the_tool():
    found = spans([0, 1, 2, 3, 4, 5], Coarse())
    assert found == {"thought": (0, 1), "tool": (1, 3), "arguments": (3, 6)}
    assert spans([0, 6, 7], Coarse()) == {"thought": (0, 1), "tool": (1, 3), "arguments": (3, 3)}
    assert spans([0, 4], Coarse()) == {"thought": (0, 2), "tool": (2, 2), "arguments": (2, 2)}


def trajectory(sample, replies):
    ids, mask, turns = [1, 2], [False, False], []
    for reply in replies:
        said = [*WORDS.encode(reply), WORDS.end_ids[0]]
        start = len(ids)
        ids, mask = [*ids, *said, 3], [*mask, *[True] * len(said), False]
        turns.append(
            Turn(
                reply=reply, tool="", command="", parse="ok", observation="", exit_code=0, flags=(), start=start,
                stop=start + len(said), generate_s=0.0, act_s=0.0,
            )
        )  # fmt: skip
    return Trajectory(
        task_id="t", sample=sample, round=0, seed=0, kind="model", scaffold="", prompt="", temperature=1.0,
        turns=tuple(turns), token_ids=tuple(ids), action_mask=tuple(mask), behaviour_logp=(0.0,) * len(ids),
        num_turns=len(turns), num_actions=sum(mask), num_tokens=len(ids), patch="", patch_class="", files=(),
        stop="agent", reason="", wall_s=0.0, grade=None, verdict=None,
    )  # fmt: skip


def measured(one, value):
    nats = tuple(float(value(n)) for n in range(one.num_actions))
    return Measure(task_id="t", sample=one.sample, logp=nats, entropy=nats, kl=tuple(n / 2 for n in nats))


def test_entropies_are_means_per_action_token_by_turn_and_segment(tmp_path):
    one, other, unscored = trajectory(0, [CALL, "no"]), trajectory(1, ["no"]), trajectory(2, ["lost"])
    first = len(WORDS.encode(CALL)) + 1
    store.write(tmp_path / "t", Trajectory, [one, other, unscored])
    # one nat on the thought of the first reply, three on all the rest of the first attempt, five on the second
    thought = len("Look first.\n")
    rows = [measured(other, lambda n: 5), measured(one, lambda n: 1 if n < thought else 3)]
    store.write(tmp_path / "m", Measure, rows)
    found = diversity.entropies(tmp_path / "t", tmp_path / "m", WORDS)
    second = len("no") + 1
    total = thought + 3 * (first - thought) + 3 * second + 5 * second
    assert found["entropy_exact"] == pytest.approx(total / (first + 2 * second))
    assert found["kl"] == pytest.approx(found["entropy_exact"] / 2)
    assert found["entropy_tool"] == pytest.approx(3)
    assert found["entropy_arguments"] == pytest.approx(3)
    assert found["entropy_thought"] == pytest.approx((thought + 8 * second) / (thought + 2 * second))
    assert found["entropy_turn_2"] == pytest.approx(3)
    assert "entropy_turn_3" not in found


def test_entropy_over_classes_and_its_effective_number():
    assert diversity.entropy(["a", "a", "a"]) == 0
    assert math.exp(diversity.entropy(["a", "b", "c", "d"])) == pytest.approx(4)
    assert diversity.entropy([]) == 0


def test_vendi_is_the_golden_number_one_for_copies_and_n_for_strangers():
    assert diversity.vendi(np.array([[1, 0.9, 0.1], [0.9, 1, 0.1], [0.1, 0.1, 1]])) == pytest.approx(2.147050, abs=1e-6)
    assert diversity.vendi(np.ones((4, 4))) == pytest.approx(1)
    assert diversity.vendi(np.eye(4)) == pytest.approx(4)
    with pytest.raises(ValueError, match="ones on its diagonal"):
        diversity.vendi(np.zeros((2, 2)))
