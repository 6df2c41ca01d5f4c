"""Serve the run's verifier over HTTP until this is stopped (Ctrl-C or SIGTERM).

    python jobs/serve.py conf/local.yaml [key=value ...]

Scoring stages on the same cluster (RAY_ADDRESS) join it by verifier.app.
"""

import time
from pathlib import Path

from ray import serve

from entropo_ray import config, observe, store
from entropo_ray.verify import app


def stay(cfg: config.Verifier, policy: Path) -> None:
    """Deploy and watch; the application goes when this is stopped. RuntimeError if it goes by itself."""
    handle = app.deploy(cfg, policy, http=True)
    assert handle is not None
    print(f"verifier: POST http://{cfg.host}:{cfg.port}/score (described at /docs)", flush=True)
    try:
        while state := serve.status().applications.get(cfg.app):
            if state.status not in ("RUNNING", "DEPLOYING", "UNHEALTHY"):  # Serve itself replaces unhealthy replicas
                break
            time.sleep(5)
        raise RuntimeError(f"verifier.app={cfg.app} is no longer running: {state.message if state else 'deleted'}")
    finally:
        serve.delete(cfg.app)


def main(cfg: config.Run) -> None:
    policy = store.verifier_of(cfg.run_dir)
    if not store.done(policy):
        raise ValueError(f"run_dir={cfg.run_dir}: no verifier there yet; run jobs/verifier.py first")
    with observe.cluster(cfg):
        stay(cfg.verifier, policy)


if __name__ == "__main__":
    observe.entry(main)
