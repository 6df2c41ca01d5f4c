"""Evaluate a policy on tasks that it never saw: attempts, evidence, a choice, and only then the hidden tests.

    python jobs/evaluate.py conf/local.yaml [evaluate.model=DIR evaluate.name=WORD] [key=value ...]

Products lie in run_dir/evaluation[-name], the numbers beside it in evaluation[-name].json. Without a verifier
(jobs/verifier.py) the choice rests on the visible tests alone. With evaluate.official=true the choices are graded by
SWE-bench's own harness, too, whose containers are root and have a network: start the job on a node that can spare it.
"""

import dataclasses
import json

from entropo_ray import chat, config, diversity, evaluate, observe, store, tasks
from entropo_ray.rollout.sample import sample
from entropo_ray.train.reference import measure, same_vocabulary
from entropo_ray.verify.app import score


def run(cfg: config.Run) -> dict[str, float]:
    ask, stage = cfg.evaluate, observe.stages(cfg.run_dir)
    suite = tasks.load(ask.tasks)
    heat = ask.heat * cfg.rollout.temperature
    rollout = dataclasses.replace(cfg.rollout, tasks=None, temperature=heat)  # every task, not one round's draw
    out, judge = store.evaluation_of(cfg.run_dir, ask.name), store.verifier_of(cfg.run_dir)
    policy = store.policy(ask.model) if ask.model else store.last_policy(cfg.run_dir, start=cfg.model)
    if ask.measure:
        same_vocabulary(policy, store.policy(cfg.model))
    evaluate.pin(out, evaluate.asked(ask, policy))
    if not store.done(out.trajectories):
        with stage("sample") as numbers:  # no answers given: nothing is graded here
            numbers |= sample(policy, suite, rollout, seed=cfg.seed, samples=ask.samples, to=out.trajectories)
    if not store.done(out.executions):
        with stage("execute") as numbers:
            numbers |= evaluate.execute(out.trajectories, suite, rollout, to=out.executions)
    if ask.measure and not store.done(out.measures):
        with stage("measure") as numbers:
            numbers |= measure(policy, store.policy(cfg.model), out.trajectories, None, cfg.train, to=out.measures)
    if not store.done(judge):
        observe.log.info("verify  skipped: no verifier in %s (jobs/verifier.py makes one)", judge)
    elif not store.done(out.scores) and not store.done(out.choice):  # later evidence has no part in the choice
        with stage("verify") as numbers:
            numbers |= score(out.trajectories, suite, cfg.verifier, policy=judge, to=out.scores)
    if not store.done(out.choice):
        with stage("choose") as numbers:  # Choice records and predictions.jsonl
            numbers |= evaluate.choose(out, suite, ask.select, model=str(policy.path))
    with stage("resolve") as numbers:  # this stage opens answers, and the next; none before
        numbers |= evaluate.resolve(out, suite, rollout, answers=ask.tasks.path, chosen_by=ask.select)
        if store.done(out.measures):
            numbers |= diversity.entropies(out.trajectories, out.measures, chat.load(policy.path))
    if ask.official or store.done(out.official):
        with stage("official") as more:  # the choices, and their hidden tests by SWE-bench's own harness
            workers, limit_s = ask.official_workers, ask.official_s
            more |= evaluate.officially(out, suite, answers=ask.tasks.path, workers=workers, timeout_s=limit_s)
        numbers |= more
    store.save(out.numbers, json.dumps(numbers, indent=2) + "\n")
    return numbers


def table(numbers: dict[str, float]) -> str:
    """Every number with its 95 % interval, one a line."""
    lines = []
    for name, value in numbers.items():
        if not name.endswith(("_low", "_high")):
            low, high = numbers.get(f"{name}_low"), numbers.get(f"{name}_high")
            between = f"   [{low:.3f}, {high:.3f}]" if low is not None and high is not None else ""
            lines.append(f"{name:20} {value:9.4g}{between}")
    return "\n".join(lines)


def beside(cfg: config.Run) -> str:
    """This evaluation against every other one of the run that is finished, over the tasks that both have."""
    mine = store.evaluation_of(cfg.run_dir, cfg.evaluate.name)
    lines = []
    for other in sorted(mine.numbers.parent.glob("evaluation*.json")):
        if other == mine.numbers:
            continue
        name = other.stem.removeprefix("evaluation").removeprefix("-")
        compared = evaluate.compare(store.evaluation_of(cfg.run_dir, name), mine)
        if compared:
            lines.append(f"\nminus {other.stem}:\n{table(compared)}")
    return "".join(lines)


def main(cfg: config.Run) -> None:
    suite = tasks.load(cfg.evaluate.tasks)
    if cfg.evaluate.official:
        evaluate.check_official(suite)
    config.pin(cfg)
    with observe.cluster(cfg):
        numbers = run(cfg)
    print(table(numbers) + beside(cfg))
    out = store.evaluation_of(cfg.run_dir, cfg.evaluate.name)
    if store.done(out.official):
        print((out.official / "agreement.txt").read_text(), end="")
    print(f"numbers: {out.numbers}")


if __name__ == "__main__":
    observe.entry(main)
