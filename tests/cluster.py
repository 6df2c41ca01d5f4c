"""Kubernetes servers for tests: the stand-in of apiserver.py on this machine, or a cluster that somebody names.

`python tests/cluster.py REFERENCE` makes, with a Docker engine, the image that tests on a cluster need; push it, then
KUBECONFIG=... ENTROPO_KUBERNETES_IMAGE=REFERENCE python -m pytest -m kubernetes tests/test_sandbox.py
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import ssl
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from apiserver import TOKEN

from entropo_ray.sandbox import kubernetes, probe

HERE = Path(__file__).resolve().parent
IMAGE = "ENTROPO_KUBERNETES_IMAGE"
_START_S = 30
_here: list[Server] = []


class Server:
    """The stand-in, seen from a test."""

    def __init__(self, port: int, certificate: Path, home: Path) -> None:
        self._url = f"https://127.0.0.1:{port}"
        self._tls = ssl.create_default_context(cafile=certificate)
        self.configuration = home / "kubeconfig"
        access = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": {"server": self._url, "certificate-authority": str(certificate)}}],
            "users": [{"name": "u", "user": {"token": TOKEN}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "x",
        }
        self.configuration.write_text(yaml.safe_dump(access))

    def tell(self, **words: Any) -> dict[str, Any]:
        """What shall happen there; its pods, leases and requests."""
        request = urllib.request.Request(f"{self._url}/stub", json.dumps(words).encode())
        with urllib.request.urlopen(request, context=self._tls, timeout=_START_S) as answer:
            return dict(json.load(answer))

    @property
    def pods(self) -> list[dict[str, Any]]:
        return list(self.tell()["pods"])

    @contextlib.contextmanager
    def fresh(self) -> Iterator[None]:
        self.tell(reset=True, policies=[])
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("KUBECONFIG", str(self.configuration))
            patch.setattr(kubernetes, "_clusters", {})
            patch.setattr(kubernetes, "_RENEW_S", 3600.0)  # tests renew by hand
            _here.append(self)
            try:
                yield
            finally:
                _here.pop()


@contextlib.contextmanager
def running() -> Iterator[Server]:
    """Skips, saying why, where there can be none."""
    if importlib.util.find_spec("kubernetes") is None:
        pytest.skip("the Kubernetes client is not installed (extra: k8s)")
    if os.geteuid() != 0 or not all(map(shutil.which, ("bwrap", "nsenter", "setpriv", "openssl"))):
        pytest.skip("a stand-in for a Kubernetes server needs root, bubblewrap, util-linux and openssl")
    if probe("bwrap") and any("cannot" in sentence for sentence in probe("bwrap")):
        pytest.skip("; ".join(probe("bwrap")))
    with tempfile.TemporaryDirectory(prefix="entropo-test-") as home:
        certificate, key = Path(home, "certificate"), Path(home, "key")
        words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
        words += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
        subprocess.run(words, check=True, capture_output=True, timeout=_START_S)
        serve = ["setpriv", "--pdeathsig", "KILL", sys.executable, str(HERE / "apiserver.py"), certificate, key]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
        with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True, env=env, cwd=HERE) as process:
            try:
                assert process.stdout is not None
                yield Server(int(process.stdout.readline()), certificate, Path(home))
            finally:
                process.kill()


def named() -> str:
    """The image of a cluster that somebody named. Skips, saying why, where there is none."""
    if importlib.util.find_spec("kubernetes") is None:
        pytest.skip("the Kubernetes client is not installed (extra: k8s)")
    if not os.environ.get("KUBECONFIG") or not os.environ.get(IMAGE):
        pytest.skip(f"no cluster: KUBECONFIG and {IMAGE} (tests/cluster.py says what it holds) are not both set")
    if missing := probe("kubernetes"):
        pytest.skip("; ".join(missing))
    return os.environ[IMAGE]


def image_of(directory: str | Path) -> str:
    """A reference to what `directory` holds."""
    if not _here:
        return os.environ[IMAGE]
    name = f"test/{hashlib.sha256(str(directory).encode()).hexdigest()[:16]}"
    _here[-1].tell(images={name: str(directory)})
    return name


def push_ready(reference: str) -> None:
    """Make an image of this name with the repository of test_sandbox.py."""
    import docker
    import engine
    from test_sandbox import make_layer

    with tempfile.TemporaryDirectory() as home, engine.running():
        make_layer(Path(home, "layer"))
        image = docker.from_env().images.get(engine.image_of(Path(home, "layer")))
        image.tag(reference)


if __name__ == "__main__":
    push_ready(sys.argv[1])
