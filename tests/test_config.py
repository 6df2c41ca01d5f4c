"""config: one schema for all jobs, refusals in one line that names key, value and remedy, and the pin of a run."""

import dataclasses
from pathlib import Path

import pytest

from entropo_ray import config
from entropo_ray.config import Run, load, pin

WORDS = ["model=m", "run_dir=r"]


def refusal(*words):
    """The one line with which these words are refused."""
    with pytest.raises(ValueError, match=r"\S") as raised:
        load(Run, [*WORDS, *words])
    text = str(raised.value)
    assert "\n" not in text
    return text


def test_the_defaults_hold_and_words_come_last(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("model: a\nrun_dir: r\ntrain: {lr: 1.0e-4, beta: .2}\n")
    second.write_text("model: b\ntrain: {lr: 1.0e-3}\n")
    cfg = load(Run, [str(first), str(second), "train.beta=0.3"])
    assert (cfg.model, cfg.train.lr, cfg.train.beta) == ("b", 1e-3, 0.3)
    assert cfg.train.entropy == Run().train.entropy


def test_words_before_a_file_lose_to_it(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("seed: 3\n")
    assert load(Run, [*WORDS, "seed=1", str(file)]).seed == 3


def test_an_empty_value_is_the_empty_text():
    assert load(Run, [*WORDS, "sft.base="]).sft.base == ""


def test_a_configuration_cannot_be_changed():
    cfg = load(Run, WORDS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.train.lr = 1.0


@pytest.mark.parametrize("missing", ["model", "run_dir"])
def test_what_is_required_is_asked_for(missing):
    with pytest.raises(ValueError, match=f"{missing} is required: give it in a YAML file or as {missing}=VALUE"):
        load(Run, [word for word in WORDS if not word.startswith(missing)])


def test_an_unknown_key_is_refused_and_a_near_one_offered():
    assert "unknown key train.betta; did you mean train.beta?" in refusal("train.betta=1")


def test_an_unknown_key_of_a_file_is_refused_with_the_file(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("rollout: {agent: {max_turns: 3}}\n")
    text = refusal(str(file))
    assert str(file) in text
    assert "rollout.agent.max_turns" in text


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("train.lr=fast", "train.lr"),
        ("train.loss=ppo", "train.loss"),
        ("rounds=1.5", "rounds"),
        ("train.zero_stage=4", "train.zero_stage"),
        ("nothere.yaml", "no such configuration file"),
        ("rounds", "no such configuration file"),
        ("rounds=-1", "rounds=-1: must not be negative"),
        ("rollout.samples=0", "rollout.samples=0: must be at least 1"),
        ("rollout.sandbox.confirm=-1", "rollout.sandbox.confirm=-1: not negative"),
        ("pack.quarantine=true", "pack.quarantine=true: belongs to pack.check=true"),
        ("evaluate.official_workers=0", "evaluate.official_workers=0: at least 1"),
        ("evaluate.official_s=0", "evaluate.official_s=0: must be at least 1"),
        ("rollout.temperature=0", "rollout.temperature=0"),
        ("train.beta=-1", "train.beta=-1"),
        ("train.lr=0", "train.lr=0"),
        ("train.nvme_dir=/disk", "train.nvme_dir=/disk: needs train.offload=true and train.zero_stage=3"),
        ("train.smoothing=0.5", "train.smoothing=0.5"),
        ("train.batch=31 train.workers=2", "train.batch=31: must be a multiple of workers x micro_batch = 2"),
        ("sft.workers=0", "sft.workers=0: must be at least 1"),
        ("verifier.micro_batch=0", "verifier.batch=32"),
        ("train.beta=0 train.entropy=0", "one of them must be positive"),
        ("rollout.agent.tool_s=9999", "rollout.agent.tool_s=9999"),
        ("rollout.sandbox.cpu=0.001", "rollout.sandbox.cpu=0.001: give processors, at least 0.01, or 0"),
        ("rollout.agent.max_steps=70", "rollout.agent.max_steps=70: must not exceed max_steps_hard=60"),
        ("rollout.agent.max_reply_tokens=70000", "rollout.agent.max_reply_tokens=70000"),
        ("sft.error_rate=1", "sft.error_rate=1"),
        ("pack.ambiguous=0.9 pack.hidden=0.2", "pack.ambiguous + pack.hidden"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(word, said):
    assert said in refusal(*word.split())


def test_checkpoints_that_could_not_be_gone_on_from_are_refused():
    words = ("train.nvme_dir=/disk", "train.offload=true", "train.checkpoint_steps=2")
    assert "train.checkpoint_steps=2: DeepSpeed does not bring Adam's moments back" in refusal(*words)


@pytest.mark.parametrize("text", ["a: [1", "- 1\n-2: {"])
def test_a_file_that_is_not_yaml_is_named(tmp_path, text):
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    assert "broken.yaml: not readable as YAML" in refusal(str(file))


def test_every_key_has_its_full_path():
    keys = config.keys(Run)
    assert {"train.lr", "rollout.agent.max_tokens", "evaluate.select.tie", "run_dir"} <= set(keys)
    assert len(keys) == len(set(keys))


def test_keys_that_may_change_exist():
    keys = config.keys(Run)
    unknown = [k for k in config.MAY_CHANGE if not any(key == k or key.startswith(k) for key in keys)]
    assert not unknown


def run_at(tmp_path, *words):
    return load(Run, ["model=m", f"run_dir={tmp_path / 'run'}", *words])


def test_a_pinned_run_can_be_loaded_again_from_its_own_file(tmp_path):
    cfg = run_at(tmp_path, "train.beta=0.2", "sft.base=", "tasks.limit=3")
    pin(cfg)
    assert load(Run, [str(tmp_path / "run" / "config.yaml")]) == cfg
    pin(cfg)  # the same again is no change


def test_another_value_for_a_run_names_key_both_values_and_the_remedy(tmp_path):
    pin(run_at(tmp_path, "train.beta=0.1"))
    with pytest.raises(ValueError, match=r"^train\.beta=0\.2: .* train\.beta=0\.1; give another run_dir"):
        pin(run_at(tmp_path, "train.beta=0.2"))
    assert load(Run, [str(tmp_path / "run" / "config.yaml")]).train.beta == 0.1


@pytest.mark.parametrize("word", ["rounds=9", "evaluate.samples=2", "rollout.engines=3", "verifier.lr=1e-3"])
def test_speed_and_what_comes_later_may_change(tmp_path, word):
    pin(run_at(tmp_path))
    pin(run_at(tmp_path, word))
    key, _, value = word.partition("=")
    kept = load(Run, [str(tmp_path / "run" / "config.yaml")])
    found = kept
    for part in key.split("."):
        found = getattr(found, part)
    assert float(found) == float(value)


def test_a_key_whose_name_begins_like_a_free_one_is_not_free(tmp_path):
    """`rollout.engines` is free, `rollout.engine_gpus` is not; `pack.` frees a section, `tasks.path` stays."""
    pin(run_at(tmp_path))
    for word in ("rollout.engine_gpus=0", "tasks.path=elsewhere", "rollout.samples=2"):
        with pytest.raises(ValueError, match="give another run_dir"):
            pin(run_at(tmp_path, word))


def test_a_submitted_job_needs_an_absolute_run_dir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(ValueError, match=r"run_dir=r: .* absolute path"):
        pin(load(Run, WORDS))
    assert not Path("r").exists()
    pin(run_at(tmp_path))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.loss=ipo"], "train.gap=0.0: train.loss=ipo needs a gap above 0"),
        (["train.loss=kto", "train.gap=1"], "train.gap=1.0: is of pairs"),
        (["train.loss=bco", "train.nll=.1"], "train.nll=0.1: is of pairs"),
        (["train.loss=kto", "train.turns=branch"], "train.turns=branch: is of pairs"),
        (["train.gamma=0"], "train.gamma=0.0: must lie in (0, 1]"),
        (["train.beta=inf"], "train.beta=inf: must be finite"),
        (
            ["train.loss=kto", "train.z0=kto"],
            "train.z0=kto: needs train.batch of 2 or more (it is 32), train.length=raw",
        ),
        (["train.loss=kto", "train.length=mean"], "train.z0=exact: is no mean reward under train.length=mean"),
        (["train.loss=kto", "train.z0=released"], "train.z0=released: belongs to train.variant=released"),
        (["train.variant=released", "train.loss=bco"], "train.variant=released: has no train.loss=bco"),
        (
            ["train.variant=released", "train.loss=kto", "train.length=raw"],
            "train.z0=exact: train.variant=released has",
        ),
        (["train.variant=released"], "train.length=debias: train.variant=released knows only raw"),
        (["train.variant=released", "train.length=raw"], "train.smoothing=0.05: train.variant=released ignores it"),
        (
            ["train.entropy_target=0.5", "train.entropy=0"],
            "train.entropy_target=0.5: must be above 0, with train.entropy",
        ),
        (
            ["preference.weights=pass_k", "preference.k=99"],
            "preference.k=99: must lie between 1 and rollout.samples=16",
        ),
        (["train.loss=sft", "train.stale=drop"], "train.stale=drop: train.loss=sft keeps all"),
        (["train.loss=sft", "train.entropy_target=1"], "train.entropy_target=1.0: this loss has no lambda"),
        (["train.turns=branch", "train.nll=1"], "train.turns=branch: has no train.length=mean and no train.nll"),
        (["evaluate.heat=0"], "evaluate.heat=0.0: must be above 0"),
    ],
)
def test_settings_of_the_objective_that_contradict_each_other_are_refused(words, said):
    assert said in refusal(*words)


def test_a_file_may_include_another_and_wins_over_it(tmp_path):
    (tmp_path / "base.yaml").write_text("model: a\nrun_dir: r\nseed: 1\n")
    (tmp_path / "top.yaml").write_text("include: base.yaml\nseed: 2\n")
    cfg = load(Run, [str(tmp_path / "top.yaml")])
    assert (cfg.model, cfg.seed) == ("a", 2)
    assert load(Run, [str(tmp_path / "top.yaml"), "seed=3"]).seed == 3


def test_includes_that_end_nowhere_are_named(tmp_path):
    (tmp_path / "a.yaml").write_text("include: b.yaml\n")
    (tmp_path / "b.yaml").write_text("include: a.yaml\n")
    assert "it includes itself" in refusal(str(tmp_path / "a.yaml"))
    (tmp_path / "c.yaml").write_text("include: none.yaml\n")
    assert "none.yaml: no such configuration file" in refusal(str(tmp_path / "c.yaml"))
