"""A seed policy: imitate a scripted teacher that reads only what a policy may read, or one that knows the answers.

    python jobs/sft.py conf/local.yaml [key=value ...]

teach (the teacher's trajectories, same agent code and sandboxes) -> start (given base, or a tokenizer and a random
Qwen3) -> retell (the trajectories in the model's tokens) -> imitate. Products lie in run_dir/seed.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from entropo_ray import config, observe, store, tasks
from entropo_ray.agent import replay
from entropo_ray.records import Policy, Trajectory
from entropo_ray.rollout.teach import retell, teach
from entropo_ray.train.fit import imitate
from entropo_ray.train.initial import start


def sft(cfg: config.Run) -> Policy:
    stage = observe.stages(cfg.run_dir)
    suite = tasks.load(replace(cfg.tasks, split=cfg.sft.split))
    seed = store.seed_of(cfg.run_dir)
    if not store.done(seed.trajectories):
        with stage("teach") as numbers:
            shown = cfg.tasks.path if cfg.sft.teacher == "reference" else None
            numbers |= teach(suite, cfg.rollout, cfg.sft, seed=cfg.seed, to=seed.trajectories, shown=shown)
    base = store.policy(cfg.sft.base) if cfg.sft.base else Policy(path=seed.base, round=0)
    if not cfg.sft.base and not store.done(seed.base):
        with stage("start") as numbers:
            numbers |= start(texts(seed.trajectories), cfg.sft.shape, seed=cfg.seed, to=seed.base)
    if not store.done(seed.examples):
        with stage("retell") as numbers:
            numbers |= retell(seed.trajectories, base.path, cfg.rollout.agent, keep=cfg.sft.keep, to=seed.examples)
    if not store.done(seed.policy):
        with stage("imitate") as numbers:
            numbers |= imitate(
                base, seed.examples, cfg.sft, read_epochs=cfg.sft.read_epochs, seed=cfg.seed, to=seed.policy
            )
    return store.policy(str(seed.policy))


def texts(trajectories: Path) -> Iterator[str]:
    """What the tokenizer is trained on: all that was said in the teacher's episodes."""
    for trajectory in store.read(trajectories, Trajectory):
        yield replay.text(trajectory)


def main(cfg: config.Run) -> None:
    tasks.load(replace(cfg.tasks, split=cfg.sft.split))
    config.pin(cfg)
    with observe.cluster(cfg):
        policy = sft(cfg)
    print(f"policy: {policy.path}")


if __name__ == "__main__":
    observe.entry(main)
