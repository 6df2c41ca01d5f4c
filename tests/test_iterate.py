"""jobs/iterate.py: the order of stages, what each is given, and resume after each of them."""

import importlib.util
import json
from pathlib import Path

import pytest

from entropo_ray import config, store
from entropo_ray.records import Grade, Outcome, Pair, Stop, Task

HERE = Path(__file__).resolve().parent.parent


def job(name):
    """A job's module; jobs are scripts, not a package."""
    spec = importlib.util.spec_from_file_location(f"job_{name}", HERE / "jobs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outcome(task_id, sample, grade, prompt="p"):
    return Outcome(
        task_id=task_id, sample=sample, kind="model", prompt=prompt, num_turns=1, num_actions=1, num_tokens=2,
        patch_class="", stop=Stop.AGENT, grade=grade, verdict=None,
    )  # fmt: skip


TASK = Task(
    id="t",
    source="local",
    split="train",
    repo="r",
    image="/x",
    workdir="/testbed",
    problem="",
    test_command="",
    visible=(),
)


class Stages:
    """Stands where sampling and fitting do, writes their products, and remembers what it was given."""

    def __init__(self, fail_at=None):
        self.calls = []
        self.fail_at = fail_at

    def _call(self, *call):
        if len(self.calls) == self.fail_at:
            raise OSError("injected")
        self.calls.append(call)

    def sample(self, policy, suite, cfg, *, seed, to, answers=None):
        self._call("sample", policy.path.name, policy.round)
        store.write(to, Outcome, [outcome("t", 0, Grade.RESOLVED), outcome("t", 1, Grade.UNRESOLVED)])
        return {"answered": 2.0}

    def fit(self, policy, reference, out, cfg, *, seed, to):
        self._call(
            "fit", policy.round, reference.round, [(p.chosen, p.rejected) for p in store.read(out.preferences, Pair)]
        )
        partial = store.fresh(to)
        (partial / "config.json").write_text("{}")
        store.publish(partial, to)
        return {"steps": 1.0}


@pytest.fixture
def world(tmp_path, monkeypatch):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    words = [f"model={model}", f"run_dir={tmp_path / 'run'}", "rounds=2"]
    module = job("iterate")
    monkeypatch.setattr(module.tasks, "load", lambda cfg: [TASK])
    monkeypatch.setattr(module.report, "write", lambda run_dir: Path(run_dir))

    def run(stages, *more):
        monkeypatch.setattr(module, "sample", stages.sample)
        monkeypatch.setattr(module, "fit", stages.fit)
        return module.iterate(config.load(config.Run, [*words, *more]))

    return run


def test_each_round_samples_with_the_policy_that_the_last_one_made(world):
    stages = Stages()
    assert world(stages).round == 2
    assert stages.calls == [
        ("sample", "model", 0),
        ("fit", 0, 0, [(0, 1)]),
        ("sample", "policy", 1),
        ("fit", 1, 1, [(0, 1)]),
    ]


def test_a_fixed_reference_stays_the_first_policy(world):
    stages = Stages()
    world(stages, "train.reference=first")
    assert [call[2] for call in stages.calls if call[0] == "fit"] == [0, 0]


@pytest.mark.parametrize("fail_at", [0, 1, 2, 3])
def test_the_same_command_goes_on_where_it_failed(world, fail_at):
    broken, again = Stages(fail_at), Stages()
    with pytest.raises(OSError, match="injected"):
        world(broken)
    assert world(again).round == 2
    whole = Stages()
    assert [c[0] for c in broken.calls + again.calls] == ["sample", "fit", "sample", "fit"]
    world(whole)
    assert whole.calls == []  # a finished run computes nothing


def test_every_stage_leaves_its_line_also_when_it_fails(world, tmp_path):
    with pytest.raises(OSError, match="injected"):
        world(Stages(1))
    lines = [json.loads(line) for line in (tmp_path / "run" / "stages.jsonl").read_text().splitlines()]
    assert [(line["stage"], line.get("ok")) for line in lines if line["stage"] != "start"] == [
        ("sample", True),
        ("prefer", True),
        ("fit", False),
    ]


def test_the_loop_is_short_enough_to_read():
    assert len((HERE / "jobs" / "iterate.py").read_text().splitlines()) < 80
