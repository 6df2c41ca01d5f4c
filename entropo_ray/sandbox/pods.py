"""Pods as a cluster is asked for them, and what it says of them. Plain mappings; no library.

A sandbox's root is read-only. What can be written lies in memory, as Docker's does, so that a full disk is a result and
no eviction: the working directory (an init container fills it with a copy of the image's, for which `tree_mb` are
added), /tmp, /home/agent and /dev/shm share `disk_mb` as 4 : 2 : 1 : 1. One file of the node's disk remains, which
every container gets and nobody counts (/dev/termination-log): no file may be larger than all these places.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from entropo_ray import config
from entropo_ray.sandbox import ImageMissing, SandboxError, SandboxLost, SandboxSpec, keeper, marks
from entropo_ray.sandbox.keeper import ENV, NAMES
from entropo_ray.sandbox.registry import hopeless
from entropo_ray.sandbox.stage import AGENT

Manifest = dict[str, Any]

BOX = "box"  # the container
GRACE_S = 1  # with none, a pod vanishes from the cluster, and its network policy with it, while it still runs
_FULL_MB = 64  # of a node's disk: nothing is written there but the words of a failed start
_SPARE_MB = 1024
_FILLED = "/opt/fill"
_NO_REPOSITORY = 66
# the directory itself is left out: there it belongs to root, and cannot be given another mode
_FILL = f"""
[ -d "$1/.git" ] || exit {_NO_REPOSITORY}
set -o pipefail
cd -- "$1" && find . -mindepth 1 -maxdepth 1 -print0 | tar --null -T - -cf - | tar -C "$2" -xpf -
"""
_SAFE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_NO_IMAGE = ("InvalidImageName", "ErrImageNeverPull")
_NO_PULL = ("ErrImagePull", "ImagePullBackOff")  # which a node tries again, later and later


@dataclass(frozen=True)
class State:
    """What a pod has come to. Neither running nor failed: not yet."""

    running: bool
    failed: type[SandboxError] | None
    reason: str  # in the cluster's words


def writable(spec: SandboxSpec, settings: config.Kubernetes) -> dict[str, int]:
    """The places of a sandbox that its agent may write to, with their bytes."""
    eighth = (spec.limits.disk_mb << 20) // 8
    tree = settings.tree_mb << 20
    return {spec.workdir: 4 * eighth + tree, "/tmp": 2 * eighth, "/home/agent": eighth, "/dev/shm": eighth}


def file_kib(spec: SandboxSpec) -> int:
    """The largest file that a command may write."""
    settings = spec.cluster or config.Kubernetes()
    extracting = spec.labels.get("role") == "extract"
    return (_room_mb(spec, settings) if extracting else settings.tree_mb + spec.limits.disk_mb) << 10


def _room_mb(spec: SandboxSpec, settings: config.Kubernetes) -> int:
    """For a copy of a work tree and the objects of its changes."""
    return 2 * settings.tree_mb + 4 * spec.limits.disk_mb


def agents(spec: SandboxSpec, name: str, life_s: float, owner: Manifest) -> Manifest:
    """A pod with the image's work directory in it, the agent's to change."""
    settings = spec.cluster or config.Kubernetes()
    bounds = _resources(settings, spec.limits.memory_mb + settings.tree_mb, _FULL_MB)
    places = writable(spec, settings)
    volumes = {place: _memory(size) for place, size in places.items()} | {NAMES: _memory(1 << 16)}
    box = _box(spec, keeper.words(life_s, places), bounds, list(volumes))
    fill = _container(spec, "fill", ["bash", "-c", _FILL, "bash", spec.workdir, _FILLED], bounds)
    fill |= {"volumeMounts": [{"name": "v0", "mountPath": _FILLED}]}
    return _pod(spec, name, life_s, owner, list(volumes.values()), {"initContainers": [fill], "containers": [box]})


def clean(spec: SandboxSpec, name: str, life_s: float, owner: Manifest) -> Manifest:
    """A pod with the image as it is, and room on the node's disk for work trees and the objects of their changes."""
    settings = spec.cluster or config.Kubernetes()
    room_mb = _room_mb(spec, settings)
    volumes = {"/tmp": {"emptyDir": {"sizeLimit": f"{room_mb}Mi"}}, NAMES: _memory(1 << 16)}
    bounds = _resources(settings, spec.limits.memory_mb, room_mb + _SPARE_MB)
    box = _box(spec, keeper.words(life_s, ["/tmp"]), bounds, list(volumes))
    return _pod(spec, name, life_s, owner, list(volumes.values()), {"containers": [box]})


def _pod(
    spec: SandboxSpec, name: str, life_s: float, owner: Manifest, volumes: list[Manifest], containers: Manifest
) -> Manifest:
    settings = spec.cluster or config.Kubernetes()
    known = marks.labels(spec, life_s) | {"entropo.lease": owner["name"]}
    identity = {"labels": {key: safe(value) for key, value in known.items()}, "annotations": known}
    wanted = {
        "runtimeClassName": settings.runtime_class,
        "priorityClassName": settings.priority_class,
        "nodeSelector": dict(settings.node_selector),
        "tolerations": [{"key": settings.toleration, "operator": "Exists"}] if settings.toleration else [],
        "imagePullSecrets": [{"name": settings.pull_secret}] if settings.pull_secret else [],
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": settings.namespace, "ownerReferences": [owner], **identity},
        "spec": {
            "restartPolicy": "Never",
            "activeDeadlineSeconds": math.ceil(life_s),
            "terminationGracePeriodSeconds": GRACE_S,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "hostUsers": not settings.user_namespace,
            "hostname": "sandbox",
            # nobody answers there, at once: behind the NetworkPolicy, the cluster's own would be waited for
            "dnsPolicy": "None",
            "dnsConfig": {"nameservers": ["127.0.0.1"]},
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": AGENT,
                "runAsGroup": AGENT,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            **{key: value for key, value in wanted.items() if value},
            "volumes": [{"name": f"v{number}", **volume} for number, volume in enumerate(volumes)],
            **containers,
        },
    }


def _container(spec: SandboxSpec, name: str, words: list[str], resources: Manifest) -> Manifest:
    # the directories of volumes belong to root, which git would doubt
    trusting = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*"}
    env = {**ENV, **trusting, **spec.env}
    return {
        "name": name,
        "image": spec.image,
        "imagePullPolicy": "IfNotPresent",
        "command": [_literal(word) for word in words],
        "env": [{"name": key, "value": _literal(value)} for key, value in env.items()],
        "workingDir": "/",
        "resources": resources,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }


def _box(spec: SandboxSpec, words: list[str], resources: Manifest, places: list[str]) -> Manifest:
    return _container(spec, BOX, words, resources) | {"volumeMounts": _mounts(places), "stdin": True}


def _literal(word: str) -> str:
    """So that the cluster puts no variable in."""
    return word.replace("$", "$$")


def _resources(settings: config.Kubernetes, memory_mb: int, disk_mb: int) -> Manifest:
    """Asked for and allowed alike, so that no neighbour is in want of them."""
    cpu = f"{round(settings.cpus * 1000)}m"
    amounts = {"cpu": cpu, "memory": f"{memory_mb}Mi", "ephemeral-storage": f"{disk_mb}Mi"}
    return {"requests": amounts, "limits": dict(amounts)}


def _memory(size: int) -> Manifest:
    return {"emptyDir": {"medium": "Memory", "sizeLimit": f"{-(-size // 1024)}Ki"}}


def _mounts(places: list[str]) -> list[Manifest]:
    return [{"name": f"v{number}", "mountPath": place} for number, place in enumerate(places)]


def safe(value: str) -> str:
    """A label that stands for this value; the value itself where it can be one."""
    return value if _SAFE.fullmatch(value) else hashlib.sha256(value.encode()).hexdigest()[:32]


# What a cluster says


def state(pod: Manifest, spec: SandboxSpec) -> State:
    """Of a pod whose container matters as soon as it runs, and whose init container until then."""
    status = pod.get("status") or {}
    phase = status.get("phase", "Pending")
    boxes = [s.get("state") or {} for s in status.get("containerStatuses") or ()]
    if phase in ("Failed", "Succeeded", "Unknown") or status.get("reason") == "NodeLost":
        return _ended(status, spec)
    if "deletionTimestamp" in pod.get("metadata", {}):
        return State(False, SandboxLost, "it is being deleted")
    if any("terminated" in box for box in boxes):
        return _ended(status, spec)
    if phase == "Running" and boxes and all("running" in box for box in boxes):
        return State(True, None, "")
    return _pending(status, spec)


def _ended(status: Manifest, spec: SandboxSpec) -> State:
    for fill in _terminated(status, "initContainerStatuses"):
        if fill.get("exitCode") == _NO_REPOSITORY:
            missing = f"{spec.image}: no such repository layer (an image whose {spec.workdir} holds .git)"
            return State(False, ImageMissing, missing)
        if fill.get("exitCode") and not status.get("reason"):
            said = _words(fill) + " (rollout.sandbox.kubernetes.tree_mb is the room that it has)"
            return State(False, SandboxError, f"{spec.image}: its {spec.workdir} cannot be copied: {said}")
    words = [_words(status), *(_words(box) for box in _terminated(status, "containerStatuses"))]
    words += [_words(c) for c in status.get("conditions") or () if c.get("type") == "DisruptionTarget"]
    reason = "; ".join(word for word in words if word)
    return State(False, SandboxLost, reason or f"its phase is {status.get('phase')}")


def _pending(status: Manifest, spec: SandboxSpec) -> State:
    kinds = ("initContainerStatuses", "containerStatuses")
    waiting = [w for kind in kinds for s in status.get(kind) or () if (w := (s.get("state") or {}).get("waiting"))]
    for wait in waiting:
        pulling = wait.get("reason") in _NO_PULL and hopeless(wait.get("message") or "")
        if pulling or wait.get("reason") in _NO_IMAGE:
            missing = f"{spec.image}: no such repository layer (an image that the cluster can pull): {_words(wait)}"
            return State(False, ImageMissing, missing)
        if wait.get("reason") == "CreateContainerConfigError":
            return State(False, SandboxError, _words(wait))
    held = [c for c in status.get("conditions") or () if c.get("type") == "PodScheduled" and c.get("status") == "False"]
    words = [_words(facts) for facts in (*held, *waiting)]
    return State(False, None, next((word for word in words if word), "no reason was given"))


def _terminated(status: Manifest, kind: str) -> list[Manifest]:
    return [t for s in status.get(kind) or () if (t := (s.get("state") or {}).get("terminated"))]


def _words(facts: Mapping[str, Any]) -> str:
    """Reason, exit code and message, as far as they are known."""
    code = f"exit code {facts['exitCode']}" if facts.get("exitCode") else ""
    return ": ".join(str(word).strip() for word in (facts.get("reason"), code, facts.get("message")) if word)
