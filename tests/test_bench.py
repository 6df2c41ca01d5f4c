"""Benchmarks compare like with like: every system computes the same loss and gradient on the same tokens."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from entropo_ray.bench import head, ranks, trainer
from entropo_ray.bench.cases import Case, body, least_flops
from entropo_ray.bench.systems import SYSTEMS, Settings, read, rows_of
from entropo_ray.train.size import Shape

ROOT = Path(__file__).parents[1]
SMALL = Shape(vocab=97, hidden=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=48, tied=True)
PAIRS = Case("small", SMALL, pairs=2, prompt=20, chosen=90, rejected=60, share=0.4)


@pytest.fixture
def trl(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))  # it and accelerate write into it
    return pytest.importorskip("trl", reason="needs `pip install --no-deps trl==1.16.0`", exc_type=ImportError)


def checked(name, settings, home):
    system = SYSTEMS[name](settings)
    found = system.check(home / f"{name}.npz") | {"file": home / f"{name}.npz"}
    step = system.step()
    assert step["loss"] == pytest.approx(found["loss"], abs=1e-6)
    assert step["wall"] > 0
    return found


@pytest.mark.parametrize("kto", [False, True])
def test_all_systems_of_a_case_agree_with_full_logits_in_double(trl, tmp_path, kto):
    settings = Settings(Case(**asdict(PAIRS) | {"shape": SMALL, "kto": kto}), "cpu", "fp32", 1)
    assert read(json.dumps(asdict(settings))) == settings
    truth = checked("fp64", settings, tmp_path)
    for name in ("ours", "trl") if kto else ("ours", "trl", "trl precomputed"):
        apart = trainer._difference(checked(name, settings, tmp_path), truth)
        assert apart["loss_error"] < 1e-5
        assert apart["gradient_error"] < 1e-4


def test_a_difference_of_gradients_is_seen(tmp_path):
    np.savez(tmp_path / "one.npz", w=np.array([1.0, 2.0]), v=np.array([2.0]))
    np.savez(tmp_path / "two.npz", w=np.array([1.0, 2.0]), v=np.array([2.3]))
    one, two = ({"loss": loss, "file": tmp_path / f"{name}.npz"} for loss, name in ((0.5, "one"), (0.25, "two")))
    found = trainer._difference(two, one)
    assert found == {"loss_error": 0.25, "gradient_error": pytest.approx(0.1)}


def test_the_share_of_sampled_tokens_and_the_least_work_are_as_said():
    case = Case("", body(), chosen=20_000, rejected=10_000)
    (chosen, rejected), *_ = rows_of(Settings(case, "cpu", "fp32", 1))
    assert (len(chosen.token_ids), len(rejected.token_ids)) == (20_000, 10_000)
    assert chosen.action_mask[128:].mean() == pytest.approx(0.22, abs=0.01)
    assert (chosen.token_ids[:128] == rejected.token_ids[:128]).all()
    double = Case("", body(), pairs=2, chosen=20_000, rejected=10_000)
    assert least_flops(double) == 2 * least_flops(case)


def test_the_head_is_measured_in_a_process_of_its_own():
    cfg = head.Logprob(tokens=[2048], vocab=40_000, hidden=32, repeats=1, threads=1)
    tiles, full = (head._measured(name, 2048, cfg) for name in ("tiles", "full logits"))
    assert tiles["seconds"] > 0
    assert full["gib"] > 2 * tiles["gib"] > 0


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "nothing: no such benchmark; give one of trainer, logprob"),
        (["trainer", "cases=[vocabulary,larger]"], "larger: unknown; cases are vocabulary"),
        (["trainer", "stepps=3"], "stepps"),
    ],
)
def test_wrong_words_get_one_line(words, complaint):
    command = [sys.executable, str(ROOT / "jobs" / "bench.py"), *words]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False
    )
    assert done.returncode == 1
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr


def test_ranks_are_timed_and_their_memory_stands_beside_what_is_expected(capsys):
    small = {"layers": 1, "hidden": 64, "vocab": 97, "pairs": 2, "tokens": 64, "steps": 1}
    found = ranks.run(ranks.Ranks(ranks=[1], stages=[2], device="cpu", **small))["1 x ZeRO-2"]
    assert found["speed_up"] == 1
    assert found["tokens_per_s"] == pytest.approx(2 * (64 + 48) / found["seconds"])
    assert 0 <= found["gib"] < 1
    assert found["expected_gib"] == ranks.expected(ranks.Ranks(device="cpu", **small), 1, 2)["all"]
    assert "1 x ZeRO-2" in capsys.readouterr().out
