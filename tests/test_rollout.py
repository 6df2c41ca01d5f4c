"""Engines, the pool, and the stages of sampling: every request has one row, whatever dies.

One Ray cluster and one vLLM engine (CPU, a random Qwen3 of 0.1M parameters) for the whole file.
"""

import asyncio
import dataclasses
import json
import math
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from entropo_ray import chat, config, records, sandbox, store, tasks
from entropo_ray.agent import EngineError, parse
from entropo_ray.agent.scripted import ByteChat
from entropo_ray.records import Example, Grade, Outcome, Policy, Role, Stop, Task, Trajectory
from entropo_ray.rollout import sample as stage
from entropo_ray.rollout.engine import EngineDown, Pool, Reply
from entropo_ray.rollout.teach import retell, teach
from entropo_ray.tasks import local

ROOT = Path(__file__).resolve().parents[1]
BOX = config.Sandbox(memory_mb=512, disk_mb=64, pids=64, grade_s=60, life_s=600)
AGENT = config.Agent(
    prompt="brief",
    max_steps=3,
    max_steps_hard=4,
    max_tokens=2048,
    max_reply_tokens=64,
    min_reply_tokens=16,
    malformed_limit=0,
    tool_s=20,
    llm_s=150,
    wall_s=200,
    extract_s=20,
)
ROLLOUT = config.Rollout(
    samples=6, temperature=1.0, engine_gpus=0, engine_kv_mb=64, episodes=8, graders=2, agent=AGENT, sandbox=BOX
)


# --- seeds and requests ----------------------------------------------------------------------------------------------


def task(name: str, image: str = "/nowhere") -> Task:
    return Task(
        id=name,
        source="test",
        split="train",
        repo=name,
        image=image,
        workdir="/testbed",
        problem="Nothing works.",
        test_command="python -m pytest",
        visible=(),
    )


def test_a_seed_is_golden_and_63_bits():
    assert stage.seed_of(0, "fix", 0, "t", 0) == 4042172994649138887
    others = {stage.seed_of(0, role, t, "t", n) for role in ("fix", "teach") for t in range(3) for n in range(50)}
    assert len(others) == 300
    assert all(0 <= seed < 2**63 for seed in others)


def test_every_task_gets_its_first_attempt_before_any_gets_its_second():
    suite = [task(name) for name in "cab"]
    asked = stage.requests(suite, 3, role=Role.FIX, round=1, seed=7)
    assert [request.sample for request in asked] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert len({request.seed for request in asked}) == 9
    assert asked[4].seed == stage.seed_of(7, "fix", 1, asked[4].task.id, 1)


def test_attempts_at_tasks_that_are_no_longer_asked_for_are_named_before_anything_is_sampled(tmp_path):
    """A quarantine may come between two starts."""
    asked = stage.requests([task("a"), task("b")], 2, role=Role.FIX, round=0, seed=7)
    to = tmp_path / "trajectories"
    store.append(to, Example, [Example(task_id="a", sample=1, token_ids=(1,), action_mask=(True,))], key=("a", 1))
    assert [(r.task.id, r.sample) for r in stage.unanswered(asked, to)] == [("a", 0), ("b", 0), ("b", 1)]
    with pytest.raises(ValueError, match=r"attempts that this start does not ask for \(a/1\): .*tasks\.quarantined"):
        stage.unanswered([r for r in asked if r.task.id == "b"], to)


def test_no_task_is_drawn_twice_before_all_were():
    suite = [task(f"t{i}") for i in range(40)]
    rounds = [stage.drawn(suite, 15, seed=3, round=t) for t in range(8)]
    assert all(len({t.id for t in chosen}) == 15 for chosen in rounds)
    assert set(Counter(t.id for chosen in rounds for t in chosen).values()) == {3}


def test_the_tasks_of_a_round_depend_on_seed_and_round_alone():
    suite = [task(f"t{i}") for i in range(40)]
    chosen = stage.drawn(suite, 10, seed=0, round=0)
    again = stage.drawn(random.Random(1).sample(suite, 40), 10, seed=0, round=0)
    assert chosen == again
    assert len({t.id for t in chosen}) == 10
    assert chosen != stage.drawn(suite, 10, seed=0, round=1)
    assert len(stage.drawn(suite, None, seed=0, round=0)) == len(stage.drawn(suite, 99, seed=0, round=0)) == 40
    with pytest.raises(ValueError, match=r"tasks\.path"):
        stage.drawn([], 10, seed=0, round=0)


def test_a_stage_that_only_loses_gives_up_and_one_that_answers_does_not(tmp_path):
    def count(rows):
        seen = Counter()
        for lost in rows:
            answered = stage.Answered(
                task_id="t", sample=0, stop=Stop.AGENT, grade=None, lost=lost, reason="no bwrap" if lost else ""
            )
            stage._count(answered, seen, tmp_path)
        return seen

    with pytest.raises(RuntimeError, match="no bwrap"):
        count([True] * stage.HOPELESS)
    assert count([False] + [True] * 3 * stage.HOPELESS)["lost"] == 3 * stage.HOPELESS


# --- the pool --------------------------------------------------------------------------------------------------------


class Fake:
    """An engine of a few milliseconds; `broken` says what happens to a call."""

    def __init__(self, name: str, broken=None, healed: bool = False) -> None:
        self.name, self.broken, self.healed, self.episodes, self.calls = name, broken, healed, [], 0

    async def generate(self, prompt, *, episode, seed, max_tokens):
        self.calls += 1
        self.episodes.append(episode)
        if isinstance(self.broken, Exception):
            raise self.broken
        await asyncio.sleep(0.002)
        return Reply((), (), self.broken) if self.broken else Reply((65,), (-1.0,), "stop")

    async def ready(self):
        if not self.healed:
            raise EngineDown("still starting", final=False)
        self.broken = None


DOWN = EngineDown("connection reset", final=False)


def pool_of(*engines: Fake, homeless_s: float = 5.0) -> Pool:
    return Pool({engine.name: engine for engine in engines}, ByteChat(), homeless_s=homeless_s)


async def sessions(pool: Pool, count: int, turns: int = 6) -> list[Exception]:
    """The errors of `count` sessions of `turns` calls, all at once."""

    async def one(number):
        for turn in range(turns):
            completion = await pool([1] * turn, episode=f"e{number}", seed=turn, max_tokens=4)
            assert (completion.text, completion.logprobs) == ("A", (-1.0,))

    said = await asyncio.gather(*(one(i) for i in range(count)), return_exceptions=True)
    return [error for error in said if error is not None]


def test_an_episode_stays_on_its_engine_and_engines_share_the_load():
    engines = [Fake(name) for name in "abc"]
    assert asyncio.run(sessions(pool_of(*engines), 30)) == []
    homes = [set(engine.episodes) for engine in engines]
    assert sum(map(len, homes)) == len(set().union(*homes)) == 30
    assert all(len(home) == 10 for home in homes)


@pytest.mark.parametrize("final", [False, True])
def test_an_engine_that_fails_fast_attracts_no_calls(final):
    dead, *rest = [Fake(name) for name in "abcd"]
    dead.broken = EngineDown("gone", final=final)
    pool = pool_of(dead, *rest)
    assert asyncio.run(sessions(pool, 40)) == []
    assert dead.calls <= 10  # those in flight on it: a quarter of the first calls
    assert pool.extra == dead.calls


def test_calls_wait_for_a_lone_engine_that_is_restarted():
    lone = Fake("a", DOWN, healed=True)
    assert asyncio.run(sessions(pool_of(lone), 5)) == []


def test_without_a_healthy_engine_the_error_names_it_and_its_last_words():
    async def ask():
        await pool_of(Fake("engine-7", DOWN), homeless_s=0.3)([1], episode="e", seed=0, max_tokens=4)

    with pytest.raises(EngineError, match=r"engine-7: (connection reset|still starting)"):
        asyncio.run(ask())


def test_an_engine_that_is_late_three_times_in_a_row_is_left_alone():
    late, good = Fake("late", "deadline"), Fake("good")
    pool = pool_of(late, good)

    async def one_after_another():
        for number in range(40):
            await pool([1], episode=f"e{number}", seed=0, max_tokens=4)

    asyncio.run(one_after_another())
    assert late.calls == 3
    assert good.calls == 40


def test_an_unknown_error_is_not_answered_by_asking_elsewhere():
    engines = [Fake(name, ZeroDivisionError("ours")) for name in "ab"]
    (error,) = asyncio.run(sessions(pool_of(*engines), 1))
    assert error.args == ("ours",)
    assert sum(engine.calls for engine in engines) == 1


# --- the stages ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rollout():
    """With a real sandbox where there can be one."""
    backend = "plain" if sandbox.probe("bwrap") else "bwrap"
    return dataclasses.replace(ROLLOUT, sandbox=dataclasses.replace(BOX, backend=backend))


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """Four plain tasks; their directory."""
    to = tmp_path_factory.mktemp("pack") / "pack"
    tasks.write(to, local.generate(count=4, held_out=0, ambiguous=0, hidden=0, seed=0, to=to))
    return to


@pytest.fixture(scope="module")
def suite(pack):
    return tasks.load(config.Tasks(path=str(pack)))


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A random Qwen3 with a byte-level BPE of 300 words."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    to = tmp_path_factory.mktemp("policy")
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    controls = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=controls, show_progress=False
    )
    words.train_from_iterator(["def add(a, b):\n    return a + b\n"] * 3, trainer)
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|im_end|>").save_pretrained(to)
    torch.manual_seed(0)
    shape = Qwen3Config(
        vocab_size=words.get_vocab_size(),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        intermediate_size=128,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=0.2,  # a wider spread than usual, so that wrong log-probs show
        eos_token_id=2,
    )
    Qwen3ForCausalLM(shape).save_pretrained(to)
    return Policy(path=to, round=3)


def keys(rows) -> list[tuple[str, int]]:
    return sorted((row.task_id, row.sample) for row in rows)


def unsealed(product: Path, kept: list[Trajectory]) -> None:
    """A product as a kill in the middle of its stage leaves it: single parts, torn files, no `done`."""
    for path in [*product.glob("*.parquet"), product / "done"]:
        path.unlink()
    for row in kept:
        store.append(product, Trajectory, [row], key=(row.task_id, row.sample))
    (product / ".part-torn.1").write_bytes(b"PAR1")
    (product / "attempts").mkdir()
    (product / "lost").mkdir()


def killer(product: Path, pids, parts: int, killed: list[int]) -> threading.Thread:
    """SIGKILLs what `pids()` names as soon as so many parts are on disk; `killed`: the number of parts then."""

    def watch():
        give_up = time.monotonic() + 120
        while time.monotonic() < give_up:
            found = len(list(product.glob("part-*.parquet")))
            if found >= parts:
                for pid in pids():
                    os.kill(pid, signal.SIGKILL)
                    killed.append(found)
                return
            time.sleep(0.01)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def engine_pids() -> list[int]:
    import ray

    names = [name for name in ray.util.list_named_actors() if name.startswith("engine-")]
    return ray.get([ray.get_actor(name).ready.remote() for name in names], timeout=60)


def actor_pids(title: str) -> list[int]:
    """Living actors of this cluster whose class name holds `title`, from Ray's table.

    Not from process titles: calls that overlap in an actor restore each other's.
    """
    import ray._private.state

    actors = ray._private.state.actors().values()
    return [a["Pid"] for a in actors if a["State"] == "ALIVE" and title in a["ActorClassName"]]


@pytest.mark.ray
def test_sampling_survives_its_engine_and_tells_the_truth_about_its_tokens(
    cluster, rollout, suite, policy, pack, tmp_path
):
    to, killed = tmp_path / "trajectories", []
    thread = killer(to, engine_pids, 4, killed)
    numbers = stage.sample(policy, suite, rollout, seed=5, to=to, answers=str(pack))
    thread.join()
    rows = list(store.read(to, Trajectory))

    assert 0 < sum(killed) < len(rows), "the engine was not killed while episodes were open"
    assert keys(rows) == sorted((t.id, n) for t in suite for n in range(6))
    assert numbers["requested"] == numbers["answered"] == 24
    assert numbers["lost"] == 0
    for row in rows:
        assert row.seed == stage.seed_of(5, "fix", 3, row.task_id, row.sample)
        assert (row.round, row.temperature, row.kind, row.stop) == (3, 1.0, "model", Stop.ABS_STEP)
        assert row.grade is Grade.EMPTY  # a random model changes nothing
        assert len(row.token_ids) <= AGENT.max_tokens
    assert len({row.token_ids for row in rows}) == 24
    assert len({row.prompt for row in rows}) == len(suite)
    assert numbers["tokens"] == sum(len(row.token_ids) for row in rows)
    assert numbers["action_tokens"] == sum(row.num_actions for row in rows)
    surprise = -sum(sum(row.behaviour_logp) for row in rows) / numbers["action_tokens"]
    assert numbers["entropy"] == pytest.approx(surprise, rel=1e-4)
    assert not {"lost", "attempts"} & {path.name for path in to.iterdir()}
    check_logprobs(policy, rows[:8])
    check_replies(chat.load(policy.path), rows)


def check_logprobs(policy: Policy, rows: list[Trajectory]) -> None:
    """Stored log-probs against the forward pass of transformers on the stored ids."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(policy.path, dtype=torch.float32)
    for row in rows:
        ids = torch.tensor([row.token_ids])
        with torch.no_grad():
            table = model(ids).logits[0].log_softmax(-1)
        for place, sampled in enumerate(row.action_mask):
            if sampled:
                expected = table[place - 1, row.token_ids[place]].item()
                assert math.isclose(row.behaviour_logp[place], expected, abs_tol=0.05)
            else:
                assert row.behaviour_logp[place] == 0.0


def check_replies(words: chat.Chat, rows: list[Trajectory]) -> None:
    """A reply is at most so long, and an end id is its last or nowhere."""
    ends = Counter()
    for row in rows:
        for turn in row.turns:
            reply = row.token_ids[turn.start : turn.stop]
            assert 0 < len(reply) <= AGENT.max_reply_tokens
            assert not set(reply[:-1]) & set(words.end_ids)
            ends[reply[-1] in words.end_ids] += 1
    assert set(ends) == {True, False}  # both kinds were seen


@pytest.mark.ray
def test_a_teacher_that_does_not_err_resolves_plain_tasks_although_its_actors_die(
    cluster, rollout, suite, pack, tmp_path
):
    to, killed = tmp_path / "trajectories", []
    sft = config.Sft(samples=16, error_rate=0.0)
    pids = lambda: actor_pids("MapBatches(Episodes)") + actor_pids("MapBatches(Graders)")  # noqa: E731
    # so many that episodes are still open when the first grade is on disk, and their actor with them
    thread = killer(to, pids, 1, killed)
    numbers = teach(suite, rollout, sft, seed=0, to=to, answers=str(pack))
    thread.join()
    assert [found < 64 for found in killed] == [True, True], "the actors were not killed while episodes were open"
    assert keys(store.read(to, Outcome)) == sorted((t.id, n) for t in suite for n in range(16))
    assert (numbers["answered"], numbers["resolved_rate"], numbers["lost"]) == (64, 1.0, 0)
    assert "entropy" not in numbers


@pytest.mark.ray
def test_sandboxes_of_a_node_can_be_lent_by_an_actor_that_may_die(cluster, rollout, suite, pack, tmp_path):
    """Fewer than there are episodes at once, some made ahead; the killed keeper's are asked for again."""
    if rollout.sandbox.backend == "plain":
        pytest.skip("; ".join(sandbox.probe("bwrap")))
    to, killed = tmp_path / "trajectories", []
    lent = dataclasses.replace(rollout, tries=5, sandbox=dataclasses.replace(rollout.sandbox, per_node=6, ahead=2))
    thread = killer(to, lambda: actor_pids("Keeper"), 2, killed)
    numbers = teach(suite, lent, config.Sft(samples=8, error_rate=0.0), seed=0, to=to, answers=str(pack))
    thread.join()
    assert [found < 32 for found in killed] == [True], "the keeper was not killed while episodes were open"
    assert (numbers["answered"], numbers["resolved_rate"], numbers["lost"]) == (32, 1.0, 0)
    assert actor_pids("Keeper") == []


ORPHAN = """if True:
    import os, time
    from entropo_ray.rollout import lending
    if child := os.fork():
        print(child, flush=True)
        time.sleep(60)
    lending.end_with_parent()
    time.sleep(60)
"""


def test_a_keeper_ends_with_its_parent_whatever_it_waits_for():
    with subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE) as parent:
        child = os.pidfd_open(int(parent.stdout.readline()))
        time.sleep(2.5)
        assert not select.select([child], [], [], 0)[0]
        parent.kill()
    assert select.select([child], [], [], 20)[0]
    os.close(child)


@pytest.fixture(scope="module")
def taught(cluster, rollout, suite, tmp_path_factory):
    """Trajectories of a teacher that errs, not graded."""
    to = tmp_path_factory.mktemp("teach") / "trajectories"
    numbers = teach(suite, rollout, config.Sft(samples=2, error_rate=0.5), seed=0, to=to)
    assert "resolved_rate" not in numbers
    return to


@pytest.mark.ray
def test_a_stage_that_is_resumed_loses_and_repeats_nothing(taught, rollout, suite, tmp_path):
    to = tmp_path / "trajectories"
    shutil.copytree(taught, to)
    before = list(store.read(to, Trajectory))
    unsealed(to, before[::3])
    numbers = teach(suite, rollout, config.Sft(samples=2, error_rate=0.5), seed=0, to=to)
    after = list(store.read(to, Trajectory))
    assert keys(after) == keys(before)
    assert numbers["requested"] == len(before)
    assert all(row in after for row in before[::3])  # untouched, seconds included
    # a script says the same again; its tokens hold what pytest printed, seconds included
    same = lambda row: (row.task_id, row.sample, row.seed, [turn.command for turn in row.turns], row.patch)  # noqa: E731
    assert sorted(map(same, after)) == sorted(map(same, before))
    assert {path.name for path in to.iterdir()} >= {"done"}
    assert not list(to.glob("part-*"))


@pytest.mark.ray
def test_a_lost_sandbox_is_a_row_without_a_grade_and_is_asked_for_again(cluster, rollout, suite, pack, tmp_path):
    to, sft = tmp_path / "trajectories", config.Sft(samples=2, error_rate=0.0)
    homeless = dataclasses.replace(suite[0], image=str(tmp_path / "missing"))
    twice = dataclasses.replace(rollout, tries=2)
    numbers = teach([homeless, suite[1]], twice, sft, seed=0, to=to, answers=str(pack))
    assert (numbers["requested"], numbers["answered"], numbers["lost"]) == (4, 2, 2)
    assert numbers["resolved_rate"] == 1.0  # over those that have a label
    rows = list(store.read(to, Trajectory))
    lost = [row for row in rows if row.task_id == homeless.id]
    assert {(row.stop, row.grade) for row in lost} == {(Stop.INFRA_ERROR, None)}
    lines = [json.loads(line) for line in (to / "lost.jsonl").read_text().splitlines()]
    assert sorted((line["task_id"], line["sample"]) for line in lines) == keys(lost)
    assert all("missing" in line["reason"] for line in lines)

    unsealed(to, [row for row in rows if row not in lost])
    store.append(to / "lost", Trajectory, [lost[0]], key=(homeless.id, lost[0].sample))
    numbers = teach(suite[:2], twice, sft, seed=0, to=to, answers=str(pack))
    assert (numbers["requested"], numbers["answered"], numbers["lost"]) == (4, 4, 0)


@pytest.mark.ray
def test_what_was_taught_is_told_again_in_the_words_of_a_model(taught, policy, tmp_path):
    words = chat.load(policy.path)
    wide = dataclasses.replace(AGENT, max_tokens=20_000)
    told = retell(taught, policy.path, wide, keep="finished", to=tmp_path / "examples")
    source = {(row.task_id, row.sample): row for row in store.read(taught, Trajectory)}
    examples = list(store.read(tmp_path / "examples", Example))
    assert told["examples"] == len(examples) == sum(row.stop.finished for row in source.values())
    assert told["tokens"] == sum(len(example.token_ids) for example in examples)
    assert told["action_tokens"] == sum(sum(example.action_mask) for example in examples)
    for example in examples:
        pairs = zip(example.token_ids, example.action_mask, strict=True)
        said = words.decode([token for token, sampled in pairs if sampled])
        turns = source[example.task_id, example.sample].turns
        assert said.count("<|im_end|>") == len(turns)
        for turn, text in zip(turns, said.split("<|im_end|>"), strict=False):
            assert parse.parse(text).status.value == turn.parse

    with pytest.raises(ValueError, match=r"sft\.keep=resolved"):  # they were never graded
        retell(taught, policy.path, wide, keep="resolved", to=tmp_path / "none")
    lengths = sorted(len(example.token_ids) for example in examples)
    narrow = dataclasses.replace(wide, max_tokens=lengths[1])
    short = retell(taught, policy.path, narrow, keep="finished", to=tmp_path / "short")
    kept = [len(example.token_ids) for example in store.read(tmp_path / "short", Example)]
    assert sorted(kept) == [length for length in lengths if length <= lengths[1]]
    assert short["too_long"] == len(lengths) - len(kept) > 0


def test_only_graded_teaching_can_be_kept_by_its_grade(tmp_path):
    with pytest.raises(ValueError, match=r"sft\.keep"):
        teach([task("t")], ROLLOUT, config.Sft(keep="resolved"), seed=0, to=tmp_path)


def test_rows_of_the_stream_have_one_schema():
    from entropo_ray.rollout.episodes import Episodes, from_row_of, to_row_of

    episodes = Episodes.__new__(Episodes)
    episodes._kind, episodes._temperature = "model", 1.0
    request = stage.requests([task("t")], 1, role=Role.FIX, round=0, seed=0)[0]
    row = episodes._lost(request, "gone")
    table = to_row_of(row, request.task)
    assert from_row_of(table) == (row, request.task)
    assert table.drop_columns(["task"]).schema == records.arrow_schema(Trajectory)
