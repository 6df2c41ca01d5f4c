"""Fit a verifier: examples from every graded round of the run, then imitation of YES and NO.

    python jobs/verifier.py conf/local.yaml [key=value ...]

Products lie in run_dir/verifier. The start is verifier.base, or the run's last policy.
"""

from itertools import count, takewhile
from pathlib import Path

from entropo_ray import config, observe, store, tasks
from entropo_ray.records import Policy
from entropo_ray.train.fit import imitate
from entropo_ray.verify.examples import examples


def verifier(cfg: config.Run) -> Policy:
    stage = observe.stages(cfg.run_dir)
    suite = tasks.load(cfg.tasks)
    to = store.verifier_of(cfg.run_dir)
    told = to.with_name("examples")
    start = store.policy(cfg.verifier.base) if cfg.verifier.base else store.last_policy(cfg.run_dir, start=cfg.model)
    if not store.done(told):
        with stage("examples") as numbers:
            numbers |= examples(graded(cfg.run_dir), suite, cfg.verifier, chat_path=start.path, to=told)
    if not store.done(to):
        with stage("imitate") as numbers:
            numbers |= imitate(start, told, cfg.verifier, seed=cfg.seed, to=to)
    return store.policy(str(to))


def graded(run_dir: str) -> list[Path]:
    """The trajectories of the seed and of every round that is whole; ValueError if there are none."""
    rounds = takewhile(store.done, (store.round_of(run_dir, t).trajectories for t in count()))
    found = [*filter(store.done, [store.seed_of(run_dir).trajectories]), *rounds]
    if not found:
        raise ValueError(f"run_dir={run_dir}: no graded trajectories there yet; run jobs/sft.py or jobs/iterate.py")
    return found


def main(cfg: config.Run) -> None:
    tasks.load(cfg.tasks)
    graded(cfg.run_dir)
    config.pin(cfg)
    with observe.cluster(cfg):
        policy = verifier(cfg)
    print(f"verifier: {policy.path}")


if __name__ == "__main__":
    observe.entry(main)
