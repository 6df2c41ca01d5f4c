"""What entropy buys: one seed policy, one set of rollouts, many objectives, equal budgets, the same held-out tasks.

    python jobs/compare.py conf/compare.yaml [key=value ...]

Resumes like every job. Writes comparison.json and comparison.html into the run directory.
"""

import json
from dataclasses import replace

from entropo_ray import chat, compare, comparison, config, diversity, evaluate, observe, preference, store, tasks
from entropo_ray.records import Label, Outcome, Pair
from entropo_ray.rollout.sample import sample
from entropo_ray.train.fit import fit
from entropo_ray.train.reference import measure, score


def run(cfg: config.Run) -> None:
    stage = observe.stages(cfg.run_dir)
    suite, seed_policy = tasks.load(cfg.tasks), store.policy(cfg.model)
    shared = store.round_of(cfg.run_dir, 0)
    if not store.done(shared.trajectories):
        with stage("sample") as numbers:
            numbers |= sample(
                seed_policy, suite, cfg.rollout, seed=cfg.seed, answers=cfg.tasks.path, to=shared.trajectories
            )
    if not store.done(shared.reference):
        with stage("reference") as numbers:
            numbers |= score(seed_policy, shared.trajectories, None, cfg.train, to=shared.reference)
    for seed in cfg.compare.seeds:
        for arm in compare.arms(cfg):
            out, word = compare.cell(cfg.run_dir, arm, seed), f"{arm.key}-{seed}"
            if arm.train and not store.done(out.preferences):
                with stage(f"prefer {word}") as numbers:
                    numbers |= prefer(out, arm, seed)
            if arm.train and not store.done(out.policy):
                with stage(f"fit {word}") as numbers:
                    numbers |= fit(seed_policy, seed_policy, out, arm.train, seed=seed, to=out.policy)
            judge(cfg, arm, seed, stage)


def prefer(out: store.Round, arm: compare.Arm, seed: int) -> dict[str, float]:
    assert arm.train is not None
    assert arm.preference is not None
    outcomes = list(store.read(out.trajectories, Outcome))
    if arm.train.kind == "pair":
        pairs = preference.pairs(outcomes, arm.preference, seed=seed)
        return {"pairs": store.write(out.preferences, Pair, pairs)}
    return {"labels": store.write(out.preferences, Label, preference.labels(outcomes, arm.preference))}


def judge(cfg: config.Run, arm: compare.Arm, seed: int, stage: observe.Stage) -> None:
    """The held-out tasks under one arm's policy; no verifier, so that all arms have one selector."""
    ask, out, word = cfg.evaluate, compare.judged(cfg.run_dir, arm, seed), f"{arm.key}-{seed}"
    suite, policy = tasks.load(ask.tasks), compare.policy_of(cfg, arm, seed)
    heat = arm.heat * ask.heat
    rollout = replace(cfg.rollout, tasks=None, temperature=heat * cfg.rollout.temperature)
    evaluate.pin(out, evaluate.asked(replace(ask, heat=heat), policy))
    if out.numbers.is_file():
        return
    if not store.done(out.trajectories):
        with stage(f"sample {word}") as numbers:
            numbers |= sample(policy, suite, rollout, seed=seed, samples=ask.samples, to=out.trajectories)
    if not store.done(out.executions):
        with stage(f"execute {word}") as numbers:
            numbers |= evaluate.execute(out.trajectories, suite, rollout, to=out.executions)
    if not store.done(out.measures):
        with stage(f"measure {word}") as numbers:
            numbers |= measure(policy, store.policy(cfg.model), out.trajectories, None, cfg.train, to=out.measures)
    if not store.done(out.choice):
        with stage(f"choose {word}") as numbers:
            numbers |= evaluate.choose(out, suite, ask.select, model=str(policy.path))
    with stage(f"resolve {word}") as numbers:
        numbers |= evaluate.resolve(out, suite, rollout, answers=ask.tasks.path, chosen_by=ask.select)
        numbers |= diversity.entropies(out.trajectories, out.measures, chat.load(policy.path))
    store.save(out.numbers, json.dumps(numbers, indent=2) + "\n")


def main(cfg: config.Run) -> None:
    store.policy(cfg.model)
    tasks.load(cfg.tasks)
    tasks.load(cfg.evaluate.tasks)
    compare.arms(cfg)
    config.pin(cfg)
    with observe.cluster(cfg):
        run(cfg)
    result = compare.compare(cfg)
    print("\n".join(compare.lines(result)))
    print(f"page: {comparison.write(cfg.run_dir)}")


if __name__ == "__main__":
    observe.entry(main)
