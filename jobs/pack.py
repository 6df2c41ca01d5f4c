"""Make the task pack at tasks.path and prove it: each reference patch resolves its task, no patch at all does not.

    python jobs/pack.py conf/local.yaml [key=value ...]
    python jobs/pack.py conf/local.yaml pack.check=true     # prove an existing pack again
    python jobs/pack.py conf/local.yaml pack.check=true pack.quarantine=true      # and leave out what does not hold
    python jobs/pack.py conf/inject.yaml source.package=NAME_OR_DIRECTORY tasks.path=PACK    # bugs put into a package
    python jobs/pack.py conf/rows.yaml source.rows=FILE_OR_HUB_NAME tasks.path=PACK    # rows of public data sets

A pack that is whole is left as it is.
"""

from entropo_ray import config, ingest, observe, store


def main(cfg: config.Run) -> None:
    path = store.place(cfg.tasks.path)
    if cfg.pack.check:
        numbers = ingest.check(cfg.pack, cfg.rollout.sandbox, path=path, source=cfg.source)
    else:
        numbers = ingest.ingest(cfg.pack, cfg.rollout.sandbox, seed=cfg.pack.seed, to=path, source=cfg.source)
    print(f"pack: {path}  " + "  ".join(f"{key} {value:g}" for key, value in numbers.items()))


if __name__ == "__main__":
    observe.entry(main)
