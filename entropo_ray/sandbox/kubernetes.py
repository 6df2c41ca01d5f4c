"""Sandboxes of a Kubernetes cluster: pods without network, rights or writable disk, in a namespace of their own.

An image is a reference that the cluster can pull; else it is as in a Docker sandbox (see docker.py), its work directory
readable by anyone. conf/kuberay/sandbox.yaml makes the namespace with the policy that cuts its network, and the role of
who may make pods there: KUBECONFIG's user, or the service account of the pod that we run in.

A process holds a Lease there and renews it; its pods belong to that Lease, and so end with it. Pods end themselves when
their life is over, and whoever reaps removes those whose Lease was not renewed.

Not covered: the number of processes (a setting of nodes: podPidsLimit), and what the kernel ends for want of memory:
where the kubelet ends whole containers (singleProcessOOMKill unset), the sandbox is lost. Never tried on a cluster yet.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import email.utils
import functools
import hashlib
import importlib.util
import json
import math
import os
import random
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from entropo_ray import config
from entropo_ray.sandbox import (
    BackendDown,
    CapacityError,
    ImageMissing,
    Sandbox,
    SandboxError,
    SandboxLost,
    SandboxSpec,
    cgroup,
    marks,
    pods,
)
from entropo_ray.sandbox.attached import Sink, Source
from entropo_ray.sandbox.channels import BOOT, Channels, Refused, dial, header
from entropo_ray.sandbox.container import Container, threaded
from entropo_ray.sandbox.machine import Machine
from entropo_ray.sandbox.pods import BOX, Manifest, State

T = TypeVar("T")

_ANSWER_S = 60.0  # one request
_PATIENCE_S = 60.0  # with a server that is busy or away
_LOOK_S = 5  # one watch; how soon a cut is seen
_FATE_S = 3.0  # until the cluster knows of a container's end
_RENEW_S, _STALE_S = 15.0, 60.0
_RENEWED_S, _AGAIN_S = 5.0, 2.0  # a renewal's answer, and until it is tried again
_SURE_S = 20.0  # what is stale after so long again has no owner: an outage of the server makes all stale
_FILL_S = 300.0
_AGAIN = (0, 409, 429, 500, 502, 503, 504)
_NEEDED = [
    *(("", "pods", "", verb) for verb in ("create", "get", "list", "watch", "delete")),
    *(("", "pods", sub, verb) for sub in ("exec", "attach") for verb in ("get", "create")),
    *(("coordination.k8s.io", "leases", "", verb) for verb in ("create", "get", "list", "update", "delete")),
    ("", "events", "", "list"),
    ("networking.k8s.io", "networkpolicies", "", "list"),
]


@contextlib.contextmanager
def _asking(what: str, *, missing: type[SandboxError] = SandboxLost) -> Iterator[None]:
    """Trouble of the cluster as trouble of ours."""
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ApiException as error:
        text = f"{what}: {_said(error)}"
        if error.status == 404:
            raise missing(text) from error
        if error.status == 403 and "exceeded quota" in text:
            raise CapacityError(text) from error
        down = error.status in (401, 403, *_AGAIN)
        raise (BackendDown if down else SandboxError)(text) from error
    except (HTTPError, OSError) as error:
        raise BackendDown(f"{what}: the Kubernetes server does not answer: {error}") from error


def _said(error: Any) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(json.loads(error.body)["message"])
    return str(error.reason or error.status)


def patiently(ask: Callable[[], T], *, until: float, cut: threading.Event | None = None) -> T:
    """What `ask` returns, asked again while the server is busy, at growing intervals that no two askers share."""
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    pause_s = 0.1
    while True:
        try:
            return ask()
        except (ApiException, HTTPError) as error:
            status = error.status if isinstance(error, ApiException) else 0
            wanted = (getattr(error, "headers", None) or {}).get("Retry-After", "")  # of either library
            wait_s = max(random.uniform(pause_s / 2, pause_s), float(wanted) if wanted.isdigit() else 0.0)
            stop = cut is not None and cut.is_set()
            if status not in _AGAIN or stop or time.monotonic() + wait_s > until:
                raise
        time.sleep(wait_s)
        pause_s = min(2 * pause_s, 5.0)


class Cluster:
    """One namespace of a cluster. From any thread: each has a client of its own, for those cannot be shared."""

    def __init__(self, namespace: str) -> None:
        self.process, self.namespace = os.getpid(), namespace
        self._configuration = _configuration()
        self._clients = threading.local()
        self._lease = _Lease(self)
        self._specs: dict[str, SandboxSpec] = {}
        self._patience_s = 5.0  # of the first answer, which may never come
        self.found = self.reap()  # by the first look, which nobody asked for
        self._patience_s = _PATIENCE_S

    def client(self) -> Any:
        from kubernetes.client import ApiClient

        if not hasattr(self._clients, "client"):
            self._clients.client = ApiClient(self._configuration)
        return self._clients.client

    def core(self) -> Any:
        from kubernetes.client import CoreV1Api

        return CoreV1Api(self.client())

    def leases(self) -> Any:
        from kubernetes.client import CoordinationV1Api

        return CoordinationV1Api(self.client())

    def asked(self, what: str, ask: Callable[[], T], *, missing: type[SandboxError] = SandboxLost) -> T:
        with _asking(what, missing=missing):
            return patiently(ask, until=time.monotonic() + self._patience_s)

    def agents(self, spec: SandboxSpec, life_s: float, cut: threading.Event) -> Machine[Channels]:
        """A pod with the image's work directory in it, the agent's to change."""
        return self._start(pods.agents, spec, life_s, cut)

    def clean(self, spec: SandboxSpec, cut: threading.Event) -> Machine[Channels]:
        """A pod with room for a copy of a work tree and the objects of its changes."""
        own = SandboxSpec(
            spec.image,
            workdir=spec.workdir,
            limits=spec.limits,
            labels={**spec.labels, "role": "extract"},
            cluster=spec.cluster,
        )
        settings = spec.cluster or config.Kubernetes()
        life_s = 4 * spec.limits.exec_s + _FILL_S + settings.start_s
        return self._start(pods.clean, own, life_s, cut)

    def _start(
        self,
        manifest: Callable[[SandboxSpec, str, float, Manifest], Manifest],
        spec: SandboxSpec,
        life_s: float,
        cut: threading.Event,
    ) -> Machine[Channels]:
        """One that fails half-way is removed, or left to the reaper: it was labelled when it was made."""
        if life_s <= 0:
            raise SandboxLost(f"a pod of {spec.image}: its life is over")
        start_s = (spec.cluster or config.Kubernetes()).start_s
        until = time.monotonic() + start_s
        with _asking(f"creating a pod in namespace {self.namespace}", missing=BackendDown):
            owner = self._lease.owner()
            make = functools.partial(self._create, lambda name: manifest(spec, name, life_s, owner))
            name = patiently(make, until=min(until, time.monotonic() + _PATIENCE_S), cut=cut)
        self._specs[name] = spec
        try:
            self._await(name, spec, start_s, until, cut)
            machine = Machine(self, name, life_s)
            machine.fill()
        except BaseException:
            self.remove(name)
            raise
        return machine

    def _create(self, manifest: Callable[[str], Manifest]) -> str:
        """Under a new name each time: a server that failed may have made it all the same."""
        from kubernetes.client import ApiException, V1Pod

        name = f"entropo-{uuid.uuid4().hex[:16]}"
        try:
            body = V1Pod.from_dict(manifest(name))
            self.core().create_namespaced_pod(self.namespace, body, _request_timeout=_ANSWER_S)
        except BaseException as error:
            if not isinstance(error, ApiException) or error.status not in (403, 409, 429):
                self.remove(name)
            raise
        return name

    def _await(self, name: str, spec: SandboxSpec, start_s: float, until: float, cut: threading.Event) -> None:
        """Until the pod runs. The class of the error says whether to ask again."""
        reason = "nothing was heard of it"
        while time.monotonic() < until:
            if cut.is_set():
                raise SandboxLost(f"{name}: nobody waits for it any more")
            for now in self._seen(name, spec, until):
                if now.running:
                    return
                if now.failed is ImageMissing or now.failed is SandboxError:
                    raise now.failed(now.reason)
                if now.failed:
                    raise now.failed(f"{name}: {now.reason}")
                reason = now.reason
                if cut.is_set():
                    break
        said = "; ".join([reason, *self._warnings(name)])
        raise CapacityError(f"{name} of {spec.image}: not running after {start_s:.0f} s; the cluster says: {said}")

    def _warnings(self, name: str) -> list[str]:
        """What no status says: networks, mounts and user namespaces that a node could not make."""
        which = {"field_selector": f"involvedObject.name={name}", "_request_timeout": _ANSWER_S}
        try:
            ask = functools.partial(self.core().list_namespaced_event, self.namespace, **which)
            found = self.asked(f"events of {name}", ask).items
        except SandboxError:
            return []
        told = [f"{event.reason}: {event.message}" for event in found if event.type == "Warning"]
        return list(dict.fromkeys(told))[-3:]

    def _seen(self, name: str, spec: SandboxSpec, until: float) -> Iterator[State]:
        """What the cluster tells of a pod, for one watch."""
        from kubernetes.client import ApiException
        from kubernetes.watch import Watch
        from urllib3.exceptions import HTTPError

        window = max(1, min(_LOOK_S, math.ceil(until - time.monotonic())))
        how = {"field_selector": f"metadata.name={name}", "timeout_seconds": window}
        try:
            watch = Watch().stream(
                self.core().list_namespaced_pod, self.namespace, _request_timeout=window + _LOOK_S, **how
            )
            for event in watch:
                if event["type"] == "DELETED":
                    yield State(False, SandboxLost, "it was deleted")
                    return
                yield pods.state(event["raw_object"], spec)
        except ApiException as error:
            if error.status not in (*_AGAIN, 410):
                with _asking(f"watching {name}"):
                    raise
            time.sleep(random.uniform(0.5, 1.0))
        except HTTPError:  # the next watch begins with what is
            time.sleep(random.uniform(0.5, 1.0))

    def begin(
        self, name: str, words: Sequence[str], env: Mapping[str, str], source: Source, sink: Sink, cut: threading.Event
    ) -> Channels:
        """Start a command as the agent."""
        first = header(words, env, len(source))
        boot = ["bash", "-c", BOOT, "bash", str(pods.file_kib(self._specs.get(name, SandboxSpec(""))))]
        query = {"container": BOX, "command": boot, "stdin": "true", "stdout": "true"}
        return Channels(self._dialled(name, "exec", query), source, sink, cut, first)

    def ask(self, name: str, word: str, tree: Source, sink: Sink, cut: threading.Event) -> Channels:
        """Say a word, and then a tree, to the first process, which answers as soon as nobody else runs."""
        query = {"container": BOX, "stdin": "true", "stdout": "true"}
        return Channels(self._dialled(name, "attach", query), tree, sink, cut, f"settle {word}\n".encode())

    def _dialled(self, name: str, how: str, query: Mapping[str, Any]) -> Any:
        until, pause_s = time.monotonic() + _PATIENCE_S, 0.2
        path = f"/api/v1/namespaces/{self.namespace}/pods/{name}/{how}"
        while True:
            try:
                return dial(self._configuration, path, query, _ANSWER_S)
            except Refused as error:
                text = f"{name}: no {how}: {error}"
                if error.status in (401, 403):
                    raise BackendDown(text) from error
                if error.status == 404 or time.monotonic() > until:
                    raise SandboxLost(text) from error
                if fate := self._look(name):
                    raise SandboxLost(f"{name}: {fate}") from error
            time.sleep(random.uniform(pause_s / 2, pause_s))
            pause_s = min(2 * pause_s, 5.0)

    def fate(self, name: str) -> str:
        """Why the pod is no more; empty if it still runs after the moment that a cluster needs to notice."""
        until = time.monotonic() + _FATE_S
        while not (fate := self._look(name)) and time.monotonic() < until:
            time.sleep(0.2)
        return fate

    def _look(self, name: str) -> str:
        spec = self._specs.get(name, SandboxSpec(""))
        try:
            read = functools.partial(self.core().read_namespaced_pod, name, self.namespace, _request_timeout=_ANSWER_S)
            pod = self.client().sanitize_for_serialization(self.asked(name, read))
        except SandboxLost:
            return "it was deleted"
        now = pods.state(pod, spec)
        return now.reason if now.failed else ""

    def remove(self, name: str) -> None:
        """Idempotent, never raises: what stays is labelled, and its deadline passes."""
        self._specs.pop(name, None)
        with contextlib.suppress(SandboxError):
            self._delete(name)

    def _delete(self, name: str) -> None:
        delete = functools.partial(
            self.core().delete_namespaced_pod,
            name,
            self.namespace,
            grace_period_seconds=pods.GRACE_S,
            _request_timeout=_ANSWER_S,
        )
        self.asked(f"removing {name}", delete)

    def reap(self) -> int:
        """Remove pods of ours whose Lease is gone or stale, or whose deadline is past, and such Leases; their number.

        What a Lease says is compared with the server's clock. Pods are listed first: each is younger than its Lease.
        """
        how: dict[str, Any] = {"label_selector": "entropo.owner,entropo.lease", "_request_timeout": _ANSWER_S}
        found = self.asked("looking for left pods", lambda: self.core().list_namespaced_pod(self.namespace, **how))
        living = self._lease.living()
        left = 0
        for pod in found.items:
            known = pod.metadata.labels or {}
            going = pod.metadata.deletion_timestamp is not None
            if not going and (known["entropo.lease"] not in living or marks.late(known)):
                left += 1
                with contextlib.suppress(SandboxLost):  # it went with its Lease, or another reaper was here
                    self._delete(pod.metadata.name)
        return left

    def doubts(self) -> bool:
        """Whether a Lease is stale that the next look may find renewed."""
        return self._lease.doubts()

    def probe(self, settings: config.Kubernetes) -> list[str]:
        """What is missing in this namespace."""
        from kubernetes.client import AuthorizationV1Api, V1SelfSubjectAccessReview

        review = AuthorizationV1Api(self.client()).create_self_subject_access_review
        missing = []
        for group, resource, sub, verb in _NEEDED:
            wanted = {"namespace": self.namespace, "group": group, "resource": resource, "verb": verb}
            spec = {"resourceAttributes": wanted | ({"subresource": sub} if sub else {})}
            body = V1SelfSubjectAccessReview.from_dict({"spec": spec})
            ask = functools.partial(review, body, _request_timeout=_ANSWER_S)
            if not self.asked("asking what is permitted", ask).status.allowed:
                missing.append(f"{verb} {resource}{f'/{sub}' if sub else ''}")
        sentences = [f"no permission in namespace {self.namespace}: {', '.join(missing)}"] if missing else []
        if settings.user_namespace and "create pods" not in missing and not self._separates_users(settings):
            sentences.append(
                "the server ignores hostUsers (before 1.33, a feature gate): root inside is root on the node; "
                "rollout.sandbox.kubernetes.user_namespace=false says that this is known"
            )
        if "list networkpolicies" in missing:
            return [*sentences, f"whether a NetworkPolicy cuts the network of {self.namespace} cannot be seen"]
        return sentences if self._cut_off() else [*sentences, self._open_network()]

    def _separates_users(self, settings: config.Kubernetes) -> bool:
        """Whether a pod would be made with what was asked for; none is."""
        from kubernetes.client import V1Pod

        spec = SandboxSpec("probe", cluster=settings)
        lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "name": self._lease.name, "uid": "none"}
        body = V1Pod.from_dict(pods.clean(spec, f"{self._lease.name}-probe", 1.0, lease))
        make = functools.partial(
            self.core().create_namespaced_pod, self.namespace, body, dry_run="All", _request_timeout=_ANSWER_S
        )
        return self.asked("a pod that is not made", make).spec.host_users is False

    def _open_network(self) -> str:
        return f"no NetworkPolicy of namespace {self.namespace} selects entropo.role and denies ingress and egress"

    def _cut_off(self) -> bool:
        from kubernetes.client import NetworkingV1Api

        policies = NetworkingV1Api(self.client()).list_namespaced_network_policy
        ask = functools.partial(policies, self.namespace, _request_timeout=_ANSWER_S)
        found = self.client().sanitize_for_serialization(self.asked("looking for a NetworkPolicy", ask))
        return any(_denies(policy["spec"]) for policy in found["items"])


def _denies(policy: Manifest) -> bool:
    """Every pod of ours, in both directions."""
    selected = policy.get("podSelector") or {}
    others = [
        e for e in selected.get("matchExpressions") or () if (e["key"], e["operator"]) != ("entropo.role", "Exists")
    ]
    rules = policy.get("ingress") or policy.get("egress")
    return not (selected.get("matchLabels") or others or rules) and {"Ingress", "Egress"} <= set(policy["policyTypes"])


class _Lease:
    """The Lease of this process, and those of others."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        owner = cgroup.label(os.getpid())
        self._labels = {"entropo.owner": pods.safe(owner), "entropo.host": pods.safe(marks.host())}
        self.name = f"entropo-{hashlib.sha256(f'{marks.host()} {owner}'.encode()).hexdigest()[:16]}"
        self._turn = threading.Lock()
        self._held: Any = None
        self._ahead_s = 0.0  # the server's clock, less ours
        self._doubted: dict[str, tuple[str, float]] = {}  # stale Leases: their version, and since when it was so

    def owner(self) -> Manifest:
        """Reference to it, for what shall end with it; made, and renewed from then on, when first asked for."""
        with self._turn:
            if self._held is None:
                self._held = self._made()
                threading.Thread(target=self._renew_for_ever, name="lease", daemon=True).start()
            uid = self._held.metadata.uid
        return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "name": self.name, "uid": uid}

    def _made(self) -> Any:
        """A new one, or the one that this process has by another way."""
        from kubernetes.client import ApiException, V1Lease

        self._now()
        spec = {
            "holderIdentity": self._labels["entropo.owner"],
            "leaseDurationSeconds": int(_STALE_S),
            "renewTime": self._stamp(),
        }
        body = {"metadata": {"name": self.name, "labels": self._labels}, "spec": spec}
        leases, place = self._cluster.leases(), self._cluster.namespace

        def make() -> Any:
            try:
                return leases.create_namespaced_lease(place, V1Lease.from_dict(body), _request_timeout=_ANSWER_S)
            except ApiException as error:
                if error.status != 409:
                    raise
                return leases.read_namespaced_lease(self.name, place, _request_timeout=_ANSWER_S)

        return patiently(make, until=time.monotonic() + _PATIENCE_S)

    def _renew_for_ever(self) -> None:
        """As long as the process lives; one that cannot be renewed in time is lost, with all that belongs to it."""
        pause_s = _RENEW_S
        while True:
            time.sleep(pause_s)
            try:
                self.renew()
                pause_s = _RENEW_S
            except Exception:  # whatever it was: without this thread, all sandboxes of this process would end
                pause_s = _AGAIN_S

    def renew(self) -> None:
        from kubernetes.client import ApiException

        leases, place = self._cluster.leases(), self._cluster.namespace
        try:
            held = leases.read_namespaced_lease(self.name, place, _request_timeout=_RENEWED_S)
            held.spec.renew_time = self._time()
            held = leases.replace_namespaced_lease(self.name, place, held, _request_timeout=_RENEWED_S)
        except ApiException as error:
            if error.status != 404:
                raise
            held = self._made()
        with self._turn:
            self._held = held

    def doubts(self) -> bool:
        return bool(self._doubted)

    def living(self) -> set[str]:
        """Names of all that hold. Deleted is what has no owner, unless it was just renewed.

        That is one whose owner is dead here, and one that is stale and was not renewed since a look some time ago.
        """
        found, now = self._now()
        living, doubted = set(), {}
        for lease in found.items:
            name, known, renewed = lease.metadata.name, lease.metadata.labels or {}, lease.spec.renew_time
            version, used = lease.metadata.resource_version, marks.in_use(known)
            if used and renewed is not None and now - renewed.timestamp() < _STALE_S:
                living.add(name)
                continue
            if used:
                before, since = self._doubted.get(name, ("", 0.0))
                doubted[name] = version, since if before == version else time.monotonic()
            if (used and time.monotonic() - doubted[name][1] < _SURE_S) or not self._deleted(name, version):
                living.add(name)
            else:
                doubted.pop(name, None)
        self._doubted = doubted
        return living

    def _deleted(self, name: str, version: str) -> bool:
        """False if it has another version by now; one that cannot be deleted is as good as deleted."""
        from kubernetes.client import ApiException, V1DeleteOptions, V1Preconditions

        same = V1DeleteOptions(preconditions=V1Preconditions(resource_version=version))
        delete = self._cluster.leases().delete_namespaced_lease
        with contextlib.suppress(SandboxError), _asking(f"removing Lease {name}"):
            try:
                delete(name, self._cluster.namespace, body=same, _request_timeout=_ANSWER_S)
            except ApiException as error:
                if error.status == 409:
                    return False
                raise
        return True

    def _now(self) -> tuple[Any, float]:
        """Leases of ours, and the time on the server's clock."""
        how: dict[str, Any] = {"label_selector": "entropo.owner", "_request_timeout": _ANSWER_S}
        ask = functools.partial(
            self._cluster.leases().list_namespaced_lease_with_http_info, self._cluster.namespace, **how
        )
        found, _, headers = self._cluster.asked("looking for Leases", ask, missing=BackendDown)
        said = {key.lower(): value for key, value in headers.items()}.get("date")
        if said:
            self._ahead_s = email.utils.parsedate_to_datetime(said).timestamp() - time.time()
        return found, time.time() + self._ahead_s

    def _time(self) -> datetime.datetime:
        return datetime.datetime.fromtimestamp(time.time() + self._ahead_s, datetime.UTC)

    def _stamp(self) -> str:
        return self._time().strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _configuration() -> Any:
    """Whom to ask, and as who. BackendDown says what was looked for when there is none."""
    if importlib.util.find_spec("kubernetes") is None:
        raise BackendDown("the Kubernetes client is not installed: pip install 'entropo_ray[k8s]'")
    from kubernetes import client
    from kubernetes import config as access

    found = client.Configuration()
    inside = "KUBECONFIG" not in os.environ and "KUBERNETES_SERVICE_HOST" in os.environ
    try:
        if inside:
            access.load_incluster_config(found)
        else:
            # named, for the library looks at the variable once, when it is imported
            access.load_kube_config(config_file=os.environ.get("KUBECONFIG"), client_configuration=found)
    except (access.ConfigException, OSError) as error:
        where = "the service account of this pod" if inside else "KUBECONFIG, else ~/.kube/config; we are in no pod"
        raise BackendDown(f"no way into a cluster ({where}): {error}") from error
    found.retries = False  # we have a clock of our own
    return found


_clusters: dict[str, Cluster] = {}
_starting = threading.Lock()


def cluster(namespace: str) -> Cluster:
    """The one of this process."""
    with _starting:
        known = _clusters.get(namespace)
        if known is None or known.process != os.getpid():
            known = _clusters[namespace] = Cluster(namespace)
        return known


@contextlib.asynccontextmanager
async def open_kubernetes(spec: SandboxSpec) -> AsyncIterator[Sandbox]:
    if spec.site:  # a directory of this machine
        raise ImageMissing(f"{spec.site}: an image brings its packages itself; give backend=bwrap")
    settings = spec.cluster or config.Kubernetes()
    sandbox = Container(await threaded(functools.partial(cluster, settings.namespace)), spec)
    try:
        await sandbox.open()
        yield sandbox
    finally:
        await asyncio.shield(sandbox.close())


def reap(settings: config.Kubernetes | None = None) -> int:
    """Remove what dead owners left in the namespace, and what is past its deadline; the number of pods.

    A cluster that does not answer keeps what it has.
    """
    try:
        here = cluster((settings or config.Kubernetes()).namespace)
        before, here.found = here.found, 0
        found = before + here.reap()
        if here.doubts():
            time.sleep(_SURE_S)
            found += here.reap()
        return found
    except BackendDown:
        return 0


def probe(settings: config.Kubernetes | None = None) -> list[str]:
    """What this cluster lacks, one sentence each."""
    settings = settings or config.Kubernetes()
    try:
        return [f"kubernetes: {sentence}" for sentence in cluster(settings.namespace).probe(settings)]
    except SandboxError as error:
        return [f"kubernetes: {error}"]
