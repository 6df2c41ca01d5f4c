"""One Ray cluster, one Docker engine and one Kubernetes server for all tests that need one: starting takes seconds.

A second cluster in the same process would inherit the actors of the first.
"""

import functools
import os
import re
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as there are cores: a second thread each only waits
    os.environ.setdefault("OMP_NUM_THREADS", "1")
settings.register_profile("whole", deadline=None)  # a busy machine is no failure
settings.load_profile("whole")


SHARED = {
    "cluster": r"\(.*\bcluster\b",
    "engine": r"\bdocker_host\b|\bmark\.docker\b",
}  # what a file with a user of each holds


@functools.cache
def group(path):
    """With `-n N --dist loadfile` a file is one process's, and so are all with the cluster, or with the engine."""
    text = (ROOT / path).read_text()
    return next((name for name, users in SHARED.items() if re.search(users, text)), path)


def pytest_collection_modifyitems(items):
    """Those that take longest come first."""
    order = {name: place for place, name in enumerate(SHARED)}
    items.sort(key=lambda item: order.get(group(str(item.path.relative_to(ROOT))), len(order)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadFileScheduling

    class Grouped(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return group(nodeid.partition("::")[0])

    return Grouped(config, log)


@pytest.fixture(scope="session")
def cluster():
    """Its address."""
    os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
    os.environ |= {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
    import ray

    home = tempfile.mkdtemp(prefix="er-")  # short: the names of Ray's sockets end at 107 characters
    context = ray.init(
        num_cpus=8,  # logical: stages of a pipeline each ask for their own
        resources={"sandbox": 64},
        include_dashboard=False,
        object_store_memory=200 << 20,
        log_to_driver=False,
        _temp_dir=home,
    )
    yield context.address_info["address"]
    ray.shutdown()
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="session")
def docker_host():
    """Address of a Docker engine, which DOCKER_HOST names meanwhile."""
    import engine

    with engine.running() as address:
        yield address


@pytest.fixture(scope="session")
def kubernetes_service():
    """A server made for tests."""
    import cluster

    with cluster.running() as server:
        yield server


@pytest.fixture
def kubernetes_server(kubernetes_service):
    """The same, with nothing left of other tests, which KUBECONFIG names meanwhile."""
    with kubernetes_service.fresh():
        yield kubernetes_service


@pytest.fixture
def kubernetes_cluster():
    """A cluster that somebody named."""
    import cluster

    return cluster.named()
