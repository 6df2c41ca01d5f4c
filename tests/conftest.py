"""One Ray cluster, one Docker engine and one Kubernetes server for all tests that need one: starting takes seconds.

A second cluster in the same process would inherit the actors of the first.
"""

import os
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


def pytest_collection_modifyitems(items):
    """For `-n N --dist loadgroup`: a file is one process's, and so are all files with the cluster, or with the engine.

    Those come first, since they take longest; without `-n` they only do that.
    """
    shared = {
        "cluster": lambda item: "cluster" in item.fixturenames,
        "engine": lambda item: item.get_closest_marker("docker"),
    }
    group = {item.path: name for name, uses in shared.items() for item in items if uses(item)}
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group.get(item.path, item.path.name)))
    order = [*shared, ""]
    items.sort(key=lambda item: order.index(group.get(item.path, "")))


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
