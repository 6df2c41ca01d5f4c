"""One update without Ray: the first round of a run that has preferences and no new policy yet.

    python jobs/fit.py conf/local.yaml [key=value ...] train.workers=1
    torchrun --nproc-per-node 2 jobs/fit.py conf/local.yaml [key=value ...] train.workers=2

For measuring and debugging on any GPU host. jobs/iterate.py with the same words goes on behind it.
"""

from entropo_ray import config, observe, store
from entropo_ray.train import alone


def next_round(cfg: config.Run) -> int:
    """ValueError where the run has none to fit."""
    for t in range(cfg.rounds):
        out = store.round_of(cfg.run_dir, t)
        if store.done(out.preferences) and not store.done(out.policy):
            return t
    raise ValueError(f"run_dir={cfg.run_dir}: none of its rounds has preferences and no policy: nothing to fit")


def main(cfg: config.Run) -> None:
    t = next_round(cfg)
    out = store.round_of(cfg.run_dir, t)
    first = store.policy(cfg.model)
    policy = store.policy(str(store.round_of(cfg.run_dir, t - 1).policy), round=t) if t else first
    reference = policy if cfg.train.reference == "round" else first
    with alone.ranks(gpus=cfg.train.worker_gpus > 0) as driving:
        if driving:
            config.pin(cfg)
            with observe.stages(cfg.run_dir)("fit", round=t) as numbers:
                numbers |= alone.fit(policy, reference, out, cfg.train, seed=cfg.seed, to=out.policy)
            print(f"policy: {out.policy}")


if __name__ == "__main__":
    observe.entry(main)
