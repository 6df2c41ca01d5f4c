"""store: a product is whole or it is not; a kill between any two parts loses nothing that was said to be there."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from entropo_ray import store
from entropo_ray.records import Example, Pair, Score

KEYS = [("b", 0), ("a", 1), ("a", 0), ("a/1", 0)]


def score(task_id, sample, value=0.5):
    return Score(task_id=task_id, sample=sample, verifier=value)


def append(product, key, value=0.5):
    return store.append(product, Score, [score(*key, value)], key=key)


def test_parts_are_there_at_once_and_the_product_is_not_whole_before_the_seal(tmp_path):
    product = tmp_path / "p"
    for key in KEYS:
        append(product, key)
    assert store.keys(product) == set(KEYS)
    assert not store.done(product)
    with pytest.raises(FileNotFoundError, match="run the stage that makes it again"):
        next(store.read(product, Score))
    assert store.seal(product, Score) == len(KEYS)
    assert store.done(product)
    assert [(s.task_id, s.sample) for s in store.read(product, Score)] == sorted(KEYS)
    assert store.keys(product) == set(KEYS)
    assert store.rows(product) == store.facts(product)["rows"] == len(KEYS)


def test_the_same_key_again_replaces_its_part(tmp_path):
    product = tmp_path / "p"
    append(product, ("a", 0), 0.1)
    append(product, ("a", 1), 0.2)
    append(product, ("a", 0), 0.9)
    assert store.seal(product, Score) == 2
    assert [s.verifier for s in store.read(product, Score)] == [0.9, 0.2]


def test_a_key_in_two_parts_is_refused_and_the_product_stays_open(tmp_path):
    product = tmp_path / "p"
    append(product, ("a", 0))
    store.append(product, Score, [score("a", 0)], key=("a", 1))
    with pytest.raises(AssertionError, match="occurs twice"):
        store.seal(product, Score)
    assert not store.done(product)


def test_keys_that_look_alike_have_their_own_parts(tmp_path):
    product = tmp_path / "p"
    for key in [("a/1", 0), ("a", 10), ("a/1/0", 0), ("a", 1)]:
        append(product, key)
    assert len(list(product.glob("part-*.parquet"))) == 4


def test_many_rows_may_share_one_part(tmp_path):
    product = tmp_path / "p"
    store.append(product, Score, [score("a", 0), score("a", 3)], key=("a", 0))
    assert store.keys(product) == {("a", 0), ("a", 3)}


def test_an_empty_product_is_whole_too(tmp_path):
    assert store.seal(tmp_path / "sealed", Example) == 0
    assert list(store.read(tmp_path / "sealed", Example)) == []
    assert store.write(tmp_path / "written", Pair, []) == 0
    assert list(store.read(tmp_path / "written", Pair)) == []


def test_a_sealed_product_reads_the_merged_parts_alone(tmp_path):
    """What a kill between `done` and the removal of single parts leaves behind must not count twice."""
    product = tmp_path / "p"
    append(product, ("a", 0))
    single = next(product.glob("part-*.parquet"))
    left = single.read_bytes()
    store.seal(product, Score)
    single.write_bytes(left)
    assert len(list(store.read(product, Score))) == 1
    assert store.rows(product) == 1


def test_a_seal_that_died_before_done_is_done_again(tmp_path):
    product = tmp_path / "p"
    for key in KEYS:
        append(product, key)
    singles = {p.name: p.read_bytes() for p in product.glob("part-*.parquet")}
    store.seal(product, Score)
    (product / "done").unlink()
    for name, content in singles.items():
        (product / name).write_bytes(content)
    append(product, ("c", 5))
    assert store.seal(product, Score) == len(KEYS) + 1


def test_merged_parts_are_bounded_and_keep_every_row(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_MERGED_BYTES", 3000)
    product = tmp_path / "p"
    for sample in range(12):
        append(product, ("t", sample))
    assert store.seal(product, Score) == 12
    assert len(list(product.glob("merged-*.parquet"))) > 1
    assert not list(product.glob("part-*.parquet"))
    assert store.keys(product) == {("t", sample) for sample in range(12)}


def test_write_is_a_whole_product_and_never_overwrites_one(tmp_path):
    product = tmp_path / "p"
    (product / "junk").mkdir(parents=True)
    pair = Pair(task_id="a", chosen=0, rejected=1)
    assert store.write(product, Pair, [pair]) == 1
    assert list(store.read(product, Pair)) == [pair]
    assert not (product / "junk").exists()
    with pytest.raises(AssertionError, match="whole already"):
        store.write(product, Pair, [])


def test_a_projection_reads_its_own_columns(tmp_path):
    store.write(tmp_path / "p", Score, [score("a", 0)])
    columns = pq.read_table(store.parts_of(tmp_path / "p")[0]).column_names
    assert columns == ["task_id", "sample", "verifier"]


def test_records_are_found_by_key(tmp_path):
    product = tmp_path / "p"
    for key in KEYS:
        append(product, key, len(key[0]) / 10)
    store.seal(product, Score)
    found = store.find(product, Score, [("a", 1), ("a/1", 0), ("b", 7)])
    assert [(s.task_id, s.sample, s.verifier) for s in found] == [("a", 1, 0.1), ("a/1", 0, 0.3)]
    assert store.find(product, Score, []) == []
    assert store.find(product, Score, [("a", 7)]) == []


WRITER = """
import sys
from pathlib import Path
from entropo_ray import store
from entropo_ray.records import Score
product = Path(sys.argv[1])
there = store.keys(product)
for sample in range(int(sys.argv[2])):
    if ("t", sample) in there:
        continue
    store.append(product, Score, [Score(task_id="t", sample=sample, verifier=sample / 1000)], key=("t", sample))
    print(sample, flush=True)
store.seal(product, Score)
"""


def writer(product, count):
    """A process of its own that appends `count` rows, says each, and seals."""
    command = [sys.executable, "-c", WRITER, str(product), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)


def test_a_killed_writer_keeps_what_it_said_and_the_next_one_finishes(tmp_path):
    """SIGKILL at three random moments: every row that was said to be durable is there once, and no other is torn."""
    product, count, said = tmp_path / "p", 150, set()
    rng = random.Random(0)
    for _ in range(3):
        process = writer(product, count)
        said.add(("t", int(process.stdout.readline())))
        time.sleep(rng.uniform(0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        said |= {("t", int(line)) for line in process.stdout.read().split()}
        process.wait(timeout=30)
        assert not store.done(product)
        assert said <= store.keys(product)
    last = writer(product, count)
    again = {("t", int(line)) for line in last.stdout.read().split()}
    assert last.wait(timeout=60) == 0
    assert not again & said
    assert [s.sample for s in store.read(product, Score)] == list(range(count))


def test_a_directory_is_published_by_rename_and_marked_last(tmp_path):
    product = tmp_path / "round-00" / "policy"
    partial = store.fresh(product)
    (partial / "weights").write_text("w")
    assert not product.exists()
    store.publish(partial, product, steps=3)
    assert store.done(product)
    assert store.facts(product) == {"steps": 3}
    assert not partial.exists()
    with pytest.raises(AssertionError, match="whole already"):
        store.publish(store.fresh(product), product)


def test_a_fresh_directory_forgets_the_last_attempt(tmp_path):
    (store.fresh(tmp_path / "p") / "half").write_text("")
    assert list(store.fresh(tmp_path / "p").iterdir()) == []


def test_done_is_one_line_of_json(tmp_path):
    (tmp_path / "p").mkdir()
    store.mark(tmp_path / "p", rows=2, parts=1)
    assert json.loads((tmp_path / "p" / "done").read_text()) == {"rows": 2, "parts": 1}
    assert (tmp_path / "p" / "done").read_text().count("\n") == 1


def test_products_of_a_run_lie_below_it(tmp_path):
    out = store.round_of(tmp_path, 3)
    assert out.trajectories == tmp_path / "round-03" / "trajectories"
    assert store.seed_of(tmp_path).policy == tmp_path / "seed" / "policy"
    assert store.evaluation_of(tmp_path).numbers == tmp_path / "evaluation.json"
    assert store.evaluation_of(tmp_path, "seed").numbers == tmp_path / "evaluation-seed.json"


def model_at(path):
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


def test_the_last_policy_is_that_of_the_last_whole_round(tmp_path):
    first = model_at(tmp_path / "first")
    assert store.last_policy(tmp_path, start=str(first)).path == first
    for t in range(2):
        store.mark(model_at(store.round_of(tmp_path, t).policy))
    model_at(store.round_of(tmp_path, 2).policy)  # not marked: not whole
    last = store.last_policy(tmp_path, start=str(first))
    assert (last.path, last.round) == (store.round_of(tmp_path, 1).policy, 2)


def test_a_policy_is_a_directory_with_weights_or_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model_at(tmp_path / "m")
    assert store.policy("m").path == tmp_path / "m"
    assert store.policy("Qwen/Qwen3-4B", round=1).path == Path("Qwen/Qwen3-4B")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"model=empty: no config\.json"):
        store.policy("empty")
    for word in ("./nothing", "runs/local/seed/policy", "nothing"):
        with pytest.raises(ValueError, match=f"model={word}: no such directory"):
            store.policy(word)
