"""EntroPO rounds: sample with the policy, prefer, fit, and go on with the new policy.

    python jobs/iterate.py conf/local.yaml [key=value ...]

Resume needs no flag: a stage whose product is whole is not run again.
"""

from entropo_ray import config, observe, preference, report, store, tasks
from entropo_ray.records import Label, Outcome, Pair, Policy
from entropo_ray.rollout.sample import sample
from entropo_ray.train.early import early
from entropo_ray.train.fit import fit


def iterate(cfg: config.Run) -> Policy:
    stage = observe.stages(cfg.run_dir)
    suite = tasks.load(cfg.tasks)
    first = policy = store.policy(cfg.model)  # pi_0
    for t in range(cfg.rounds):
        out = store.round_of(cfg.run_dir, t)
        reference = policy if cfg.train.reference == "round" else first  # pi_ref
        if not store.done(out.trajectories):  # tau ~ pi_t, and u(tau) from the hidden tests
            with stage("sample", round=t) as numbers, early(reference, out, cfg):
                numbers |= sample(
                    policy, suite, cfg.rollout, seed=cfg.seed, answers=cfg.tasks.path, to=out.trajectories
                )
        if not store.done(out.preferences):  # D_t
            with stage("prefer", round=t) as numbers:
                numbers |= prefer(out, cfg)
        if not store.done(out.policy):  # pi_{t+1} = argmin L_EntroPO(pi; pi_ref, D_t)
            with stage("fit", round=t) as numbers:
                numbers |= fit(policy, reference, out, cfg.train, seed=cfg.seed, to=out.policy)
        policy = store.policy(str(out.policy), round=t + 1)
        report.write(cfg.run_dir)
    return policy


def prefer(out: store.Round, cfg: config.Run) -> dict[str, float]:
    """Pairs (or labels, for losses of single trajectories) of one round, by key, and their counts."""
    outcomes = list(store.read(out.trajectories, Outcome))
    counts = preference.counts(outcomes, cfg.preference)
    if cfg.train.kind == "pair":
        pairs = preference.pairs(outcomes, cfg.preference, seed=cfg.seed)
        return {"pairs": store.write(out.preferences, Pair, pairs), **counts}
    labels = preference.labels(outcomes, cfg.preference)
    return {"labels": store.write(out.preferences, Label, labels), **counts}


def main(cfg: config.Run) -> None:
    store.policy(cfg.model)  # a missing model is said before a cluster is started
    tasks.load(cfg.tasks)
    config.pin(cfg)
    with observe.cluster(cfg):
        policy = iterate(cfg)
    print(report.table(cfg.run_dir))
    print(f"policy: {policy.path}\nreport: {report.write(cfg.run_dir)}")


if __name__ == "__main__":
    observe.entry(main)
