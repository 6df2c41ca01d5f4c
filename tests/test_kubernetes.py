"""Pods of sandboxes: their manifests, and what the backend makes of a server's words.

The contract is in test_sandbox.py. The server is tests/apiserver.py, the client the real one: no cluster was asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import functools
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from test_docker import CHANGES, KILLER
from test_sandbox import git

from entropo_ray import config
from entropo_ray.sandbox import (
    BackendDown,
    CapacityError,
    ImageMissing,
    Limits,
    SandboxError,
    SandboxLost,
    SandboxSpec,
    cgroup,
    channels,
    keeper,
    machine,
    open_sandbox,
    pods,
    probe,
    reap,
)
from entropo_ray.sandbox import kubernetes as backend
from entropo_ray.sandbox.pool import Bounds, Pool

HERE = Path(__file__).resolve().parent
CONF = HERE.parent / "conf/kuberay"
SMALL = Limits(memory_mb=192, pids=48, disk_mb=24, exec_s=20, life_s=120)
OWNER = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "name": "entropo-1", "uid": "u-1"}
FULL = config.Kubernetes(
    runtime_class="gvisor",
    node_selector={"pool": "sandboxes"},
    toleration="entropo",
    priority_class="entropo-sandbox",
    pull_secret="registry",
    cpus=0.5,
)
SPEC = SandboxSpec("registry.example/a:1", env={"X": "$(HOME)"}, labels={"task": "a b"}, cluster=FULL)


def documents(name):
    return [document for document in yaml.safe_load_all((CONF / name).read_text()) if document]


def kind(name):
    (found,) = [document for document in documents("sandbox.yaml") if document["kind"] == name]
    return found


def made(make):
    """A manifest, without what differs each time."""
    manifest = make(SPEC, "entropo-0", 90.5, OWNER)
    for known in (manifest["metadata"]["labels"], manifest["metadata"]["annotations"]):
        for key in ("entropo.owner", "entropo.host", "entropo.deadline"):
            known[key] = "-"
    (box,) = manifest["spec"]["containers"]
    source = keeper.SUPERVISOR.read_text().replace("$", "$$")
    box["command"] = ["SUPERVISOR" if word == source else word for word in box["command"]]
    return manifest


PODS = {"agents": pods.agents, "clean": pods.clean}
every_pod = pytest.mark.parametrize("make", PODS.values(), ids=PODS.keys())


# --- manifests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PODS)
def test_a_pod_is_what_it_was(name):
    """`python tests/test_kubernetes.py` writes these files; read the difference."""
    assert made(PODS[name]) == yaml.safe_load((HERE / f"golden/{name}.yaml").read_text())


@every_pod
def test_a_pod_may_do_nothing_but_compute(make):
    spec = made(make)["spec"]
    assert (spec["restartPolicy"], spec["activeDeadlineSeconds"], spec["terminationGracePeriodSeconds"]) == (
        "Never",
        91,
        1,
    )
    assert spec["hostUsers"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == 10001
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        rights = container["securityContext"]
        assert (rights["allowPrivilegeEscalation"], rights["readOnlyRootFilesystem"]) == (False, True)
        assert rights["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert set(container["resources"]["limits"]) == {"cpu", "memory", "ephemeral-storage"}
        assert "sizeLimit" in json.dumps(spec["volumes"][0]["emptyDir"])
        assert container["imagePullPolicy"] == "IfNotPresent"
    assert "runtimeClassName" not in make(SandboxSpec("a"), "n", 1, OWNER)["spec"]


@every_pod
def test_threat_10_nothing_leads_out(make):
    policy = kind("NetworkPolicy")
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert not {"ingress", "egress"} & policy["spec"].keys()
    assert policy["spec"]["podSelector"] == {"matchExpressions": [{"key": "entropo.role", "operator": "Exists"}]}
    pod = made(make)
    assert pod["metadata"]["labels"]["entropo.role"]
    assert pod["metadata"]["namespace"] == policy["metadata"]["namespace"] == config.Kubernetes().namespace
    assert not {"hostNetwork", "hostAliases"} & pod["spec"].keys()
    assert (pod["spec"]["dnsPolicy"], pod["spec"]["dnsConfig"]) == ("None", {"nameservers": ["127.0.0.1"]})


@every_pod
def test_threat_11_no_token_no_address_and_nothing_of_the_node(make):
    spec = made(make)["spec"]
    assert (spec["automountServiceAccountToken"], spec["enableServiceLinks"]) == (False, False)
    assert not {"hostPID", "hostIPC", "serviceAccountName", "shareProcessNamespace"} & spec.keys()
    assert all(set(volume) == {"name", "emptyDir"} for volume in spec["volumes"])
    assert kind("Namespace")["metadata"]["name"] == made(make)["metadata"]["namespace"] != "default"
    assert kind("Namespace")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_the_role_holds_what_is_asked_for_and_nothing_else():
    allowed = {
        (group, *resource.partition("/")[::2], verb)
        for rule in kind("Role")["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert allowed == set(backend._NEEDED)
    assert kind("RoleBinding")["roleRef"]["name"] == kind("Role")["metadata"]["name"]
    (subject,) = kind("RoleBinding")["subjects"]
    assert subject["name"] == kind("ServiceAccount")["metadata"]["name"]
    assert "ClusterRole" not in {document["kind"] for document in documents("sandbox.yaml")}


def test_the_quota_holds_the_widest_pod():
    most = kind("LimitRange")["spec"]["limits"][0]["max"]
    pod = pods.clean(SandboxSpec("a"), "n", 1, OWNER)["spec"]["containers"][0]["resources"]["limits"]
    assert int(pod["ephemeral-storage"].removesuffix("Mi")) <= int(most["ephemeral-storage"].removesuffix("Gi")) << 10
    assert int(pod["memory"].removesuffix("Mi")) <= int(most["memory"].removesuffix("Gi")) << 10
    assert {f"{side}.{name}" for side in ("requests", "limits") for name in pod} <= kind("ResourceQuota")["spec"][
        "hard"
    ].keys()


@pytest.mark.parametrize("value", ["a", "", "A.b_c-1", "x" * 63])
def test_a_label_that_can_be_one_is_kept(value):
    assert pods.safe(value) == value


@pytest.mark.parametrize("value", ["a b", "-a", "a-", "x" * 64, "ä", "a/b"])
def test_a_label_that_cannot_is_hashed_and_the_whole_value_annotated(value):
    assert pods._SAFE.fullmatch(pods.safe(value))
    assert pods.safe(value) != pods.safe(value + "x")
    pod = pods.agents(SandboxSpec("a", labels={"task": value}), "n", 1, OWNER)
    assert pod["metadata"]["annotations"]["entropo.task"] == value
    assert pod["metadata"]["labels"]["entropo.task"] == pods.safe(value)


def templates():
    """Pod templates of what Ray's operator reads, whose own kinds the client does not know."""
    for path in sorted(CONF.glob("ray*.yaml")):
        (manifest,) = documents(path.name)
        spec = manifest["spec"]
        ray = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
        for group in [ray["headGroupSpec"], *ray["workerGroupSpecs"]]:
            name = f"{path.stem} {group.get('groupName', 'head')}"
            for container in group["template"]["spec"]["containers"]:
                for amounts in container["resources"].values():
                    amounts.update({key: str(value) for key, value in amounts.items()})  # the client knows words alone
            yield pytest.param("V1PodTemplateSpec", group["template"], id=name)


def known():
    for document in documents("sandbox.yaml"):
        yield pytest.param(f"V1{document['kind']}", document, id=document["kind"])
    for name in PODS:
        yield pytest.param("V1Pod", made(PODS[name]), id=f"pod {name}")


def through_the_model(model, manifest):
    client = pytest.importorskip("kubernetes.client", reason="the Kubernetes client is not installed (extra: k8s)")
    read = getattr(client, model).from_dict(manifest)
    return client.ApiClient(client.Configuration()).sanitize_for_serialization(read)


@pytest.mark.parametrize(("model", "manifest"), [*known(), *templates()])
def test_no_field_is_unknown_to_the_client(model, manifest):
    """What is misspelt disappears on the way."""
    assert through_the_model(model, manifest) == manifest


def test_a_misspelt_field_is_found():
    manifest = made(pods.agents)
    manifest["spec"]["hostUser"] = manifest["spec"].pop("hostUsers")
    assert through_the_model("V1Pod", manifest) != manifest


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("namespace=Big", "namespace=Big"),
        ("cpus=0", "cpus=0"),
        ("tree_mb=0", "tree_mb=0"),
        ("start_s=-1", "start_s=-1"),
    ],
)
def test_what_no_cluster_takes_is_refused_by_name(words, said):
    with pytest.raises(ValueError, match=rf"rollout\.sandbox\.kubernetes\.{said}"):
        config.load(config.Run, [f"rollout.sandbox.kubernetes.{words}", "model=m", "run_dir=d"])


# --- what a cluster says of a pod -------------------------------------------------------------------------------------


def terminated(**facts):
    return {"phase": "Failed", "containerStatuses": [{"state": {"terminated": facts}}]}


def waiting(reason, message="because"):
    return {"phase": "Pending", "containerStatuses": [{"state": {"waiting": {"reason": reason, "message": message}}}]}


SAID = {
    "nothing": ({}, None, "no reason"),
    "no node": (
        {
            "conditions": [
                {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes"}
            ]
        },
        None,
        "Unschedulable: 0/3 nodes",
    ),
    "creating": (waiting("ContainerCreating"), None, "ContainerCreating: because"),
    "back-off": (waiting("ImagePullBackOff"), None, "ImagePullBackOff: because"),
    "busy registry": (waiting("ErrImagePull", "429 toomanyrequests"), None, "ErrImagePull: 429"),
    "no image": (
        waiting("ErrImagePull", "a: Not Found"),
        ImageMissing,
        "registry.example/a:1: no such repository layer",
    ),
    "slow node": (waiting("CreateContainerError", "context deadline exceeded"), None, "CreateContainerError: context"),
    "no name": (waiting("InvalidImageName"), ImageMissing, "InvalidImageName"),
    "no container": (waiting("CreateContainerConfigError"), SandboxError, "CreateContainerConfigError: because"),
    "no memory": (terminated(reason="OOMKilled", exitCode=137), SandboxLost, "OOMKilled: exit code 137"),
    "evicted": (
        {"phase": "Failed", "reason": "Evicted", "message": "low on memory"},
        SandboxLost,
        "Evicted: low on memory",
    ),
    "too old": ({"phase": "Failed", "reason": "DeadlineExceeded"}, SandboxLost, "DeadlineExceeded"),
    "no node any more": ({"phase": "Running", "reason": "NodeLost"}, SandboxLost, "NodeLost"),
    "unknown": ({"phase": "Unknown"}, SandboxLost, "Unknown"),
    "disrupted": (
        {"phase": "Failed", "conditions": [{"type": "DisruptionTarget", "reason": "DeletionByTaintManager"}]},
        SandboxLost,
        "DeletionByTaintManager",
    ),
    "no repository": (
        {"phase": "Failed", "initContainerStatuses": [{"state": {"terminated": {"exitCode": 66}}}]},
        ImageMissing,
        "no such repository layer",
    ),
    "no room": (
        {"phase": "Failed", "initContainerStatuses": [{"state": {"terminated": {"exitCode": 2, "message": "tar: x"}}}]},
        SandboxError,
        "tree_mb",
    ),
}


@pytest.mark.parametrize(("status", "error", "reason"), SAID.values(), ids=SAID.keys())
def test_what_becomes_of_a_pod_is_told_by_its_status(status, error, reason):
    now = pods.state({"status": status}, SPEC)
    assert (now.running, now.failed) == (False, error)
    assert reason in now.reason


def test_a_pod_runs_when_its_container_does():
    status = {"phase": "Running", "containerStatuses": [{"state": {"running": {}}}]}
    assert pods.state({"status": status}, SPEC).running
    assert pods.state({"status": status, "metadata": {"deletionTimestamp": "x"}}, SPEC).failed is SandboxLost
    assert not pods.state({"status": {"phase": "Running"}}, SPEC).running


# --- a server ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def layer(tmp_path_factory):
    home = tmp_path_factory.mktemp("layer")
    home.chmod(0o755)  # an image's work directory is anyone's to read
    (home / "pkg").mkdir()
    (home / "calc.py").write_text("def add(a, b):\n    return a - b\n")
    (home / "pkg/data.txt").write_text("one\ntwo\nthree\n")
    (home / ".gitignore").write_text("*.log\n__pycache__/\n")
    (home / "run.sh").write_text("echo hi\n")
    (home / "link").symlink_to("calc.py")
    git(home, "init", "-q", "-b", "main")
    git(home, "add", "-A")
    git(home, "commit", "-qm", "base")
    return home


@pytest.fixture
def server(kubernetes_server, layer):
    kubernetes_server.tell(images={"calc": str(layer)})
    return kubernetes_server


def inside(work, *, image="calc", limits=SMALL, kind="kubernetes", **spec):
    async def whole():
        async with open_sandbox(SandboxSpec(image, limits=limits, **spec), backend=kind) as sandbox:
            return await work(sandbox)

    return asyncio.run(whole())


def run(cmd, *, image="calc", cluster=None, **how):
    return inside(lambda sandbox: sandbox.exec(cmd, **how), image=image, cluster=cluster)


def names(server, **labels):
    """Pods of ours there."""
    wanted = {f"entropo.{key}": value for key, value in labels.items()}
    found = [pod["metadata"] for pod in server.pods]
    return [pod["name"] for pod in found if wanted.items() <= pod.get("labels", {}).items()]


def gone(what, patience_s=15.0):
    """True once `what()` is false or empty."""
    deadline = time.monotonic() + patience_s
    while what() and time.monotonic() < deadline:
        time.sleep(0.05)
    return not what()


def test_the_agent_is_nobody_and_finds_its_place(server):
    words = "id -u; pwd; echo $HOME; echo $X; command -v python >/dev/null && echo python; touch /usr/x /x 2>&1 | wc -l"
    done = inside(lambda sandbox: sandbox.exec(words), env={"X": "$(HOME) $$"})
    assert done.output.decode().splitlines() == ["10001", "/testbed", "/home/agent", "$(HOME) $$", "python", "2"]
    assert not names(server)


def test_git_does_not_doubt_a_volume_that_belongs_to_root(server):
    done = run("stat -c %u .; GIT_CONFIG_NOSYSTEM=1 git status --porcelain; echo $?")
    assert done.output == b"65534\n0\n"


@pytest.mark.parametrize("protocols", [["v4.channel.k8s.io"], ["v5.channel.k8s.io"]])
def test_long_words_and_much_input_cross_in_every_version(server, protocols):
    server.tell(protocols=protocols)

    async def work(sandbox):
        long = await sandbox.exec(["printf", "%s", "é" * 50_000])
        given = await sandbox.exec("wc -c", stdin=b"x" * 3_000_000)
        unread = await sandbox.exec("head -c 1", stdin=b"x" * 3_000_000)
        return long, given, unread, await sandbox.exec("head -c 50M /dev/zero")

    long, given, unread, much = inside(work)
    assert long.output.decode()[:100] == "é" * 100
    assert long.total_bytes == 100_000
    assert (given.output, unread.output) == (b"3000000\n", b"x")
    assert (much.total_bytes, much.truncated, much.exit_code) == (50 << 20, True, 0)
    assert set(server.tell()["agreed"]) == set(protocols)


def test_a_full_disk_is_a_result(server):
    async def work(sandbox):
        words = [f"head -c 100M /dev/zero > {place}/fill" for place in ("/testbed", "/tmp", "/home/agent", "/dev/shm")]
        return [
            (
                (await sandbox.exec(word)).disk_full,
                (await sandbox.exec("rm -f /*/fill fill ~/fill /dev/shm/fill")).disk_full,
            )
            for word in words
        ]

    assert inside(work, cluster=config.Kubernetes(tree_mb=8)) == [(True, False)] * 4


def test_a_work_directory_that_does_not_fit_is_said(kubernetes_server, tmp_path):
    tmp_path.chmod(0o755)
    (tmp_path / ".git").mkdir()
    (tmp_path / "big").write_bytes(b"x" * (40 << 20))
    kubernetes_server.tell(images={"big": str(tmp_path)})
    with pytest.raises(SandboxError, match=r"(Wrote only|No space left)(.|\n)*tree_mb"):
        run("true", image="big", cluster=config.Kubernetes(tree_mb=1))
    assert not names(kubernetes_server)


@pytest.mark.parametrize("ending", ["exit 0", "sleep 60", "kill -9 $PPID"])
def test_nothing_survives_the_end_of_a_command(server, ending):
    daemon = "setsid nohup bash -c \"trap '' TERM HUP; sleep 987\" >/dev/null 2>&1 </dev/null &"

    async def work(sandbox):
        done = await sandbox.exec(f"{daemon} sleep 0.3; {ending}", timeout=2)
        return done, await sandbox.exec("cat /proc/[0-9]*/cmdline | tr '\\0' ' '")

    done, left = inside(work)
    assert done.timed_out == (ending == "sleep 60")
    assert b"sleep 987" not in left.output


def test_the_first_process_kills_all_others_when_it_is_told_to(server):
    async def work(sandbox):
        (name,) = names(server)
        running = asyncio.create_task(sandbox.exec("echo on; sleep 60"))
        await asyncio.sleep(1)
        said, told = bytearray(), threading.Event()
        cluster = backend.cluster("entropo-sandbox")
        asked = await asyncio.to_thread(cluster.ask, name, "word", b"", said.extend, told)
        assert not asked.ended(2, start_s=10)
        asked.close()
        assert b"settled word\n" in said  # there are two answers: the command asks as well
        return await running, await sandbox.exec("echo alive")

    killed, after = inside(work)
    assert (killed.exit_code, killed.output, killed.timed_out) == (137, b"on\n", False)
    assert after.output == b"alive\n"


def test_one_that_kills_whatever_appears_ends_with_its_command(server):
    async def work(sandbox):
        await sandbox.exec(["python", "-c", KILLER], timeout=0.7)
        return await sandbox.exec("echo alive")

    begin = time.monotonic()
    assert inside(work).output == b"alive\n"
    assert time.monotonic() - begin < 60


def test_a_cancelled_command_dies_and_a_cancelled_opening_leaves_nothing(server):
    async def work(sandbox):
        task = asyncio.create_task(sandbox.exec("sleep 986"))
        await asyncio.sleep(0.5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await sandbox.exec("cat /proc/[0-9]*/cmdline | tr '\\0' ' '")

    assert b"sleep 986" not in inside(work).output

    async def whole(patience_s):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s), open_sandbox(SandboxSpec("calc"), backend="kubernetes"):
                await asyncio.sleep(60)

    for patience_s in (0.01, 0.2, 0.5):
        asyncio.run(whole(patience_s))
        assert not names(server)


def test_backends_agree_on_the_patch(server, layer):
    if probe("bwrap"):
        pytest.skip("; ".join(probe("bwrap")))

    async def work(sandbox):
        assert (await sandbox.exec(CHANGES["one"])).exit_code == 0
        return await sandbox.extract_patch()

    patch = inside(work)
    assert patch.files
    assert patch == inside(work, image=str(layer), kind="bwrap")
    assert not names(server)


def test_an_image_without_a_commit_is_not_the_agents_fault(kubernetes_server, tmp_path):
    tmp_path.chmod(0o755)
    git(tmp_path, "init", "-q")
    kubernetes_server.tell(images={"empty": str(tmp_path)})
    with pytest.raises(SandboxError, match="image's own git"):
        inside(lambda sandbox: sandbox.extract_patch(), image="empty")
    assert not names(kubernetes_server)


def test_many_at_once_from_two_threads(server):
    async def one(number):
        async with open_sandbox(SandboxSpec("calc", limits=SMALL), backend="kubernetes") as sandbox:
            await sandbox.write("mine", str(number).encode())
            return (await sandbox.exec("cat mine")).output == str(number).encode()

    async def four(first):
        return await asyncio.gather(*(one(first + n) for n in range(4)))

    async def both():
        return await asyncio.gather(*(asyncio.to_thread(asyncio.run, four(first)) for first in (0, 4)))

    assert asyncio.run(both()) == [[True] * 4] * 2
    assert not names(server)
    assert len(server.tell()["leases"]) == 1


# --- errors -----------------------------------------------------------------------------------------------------------

CREATE = "POST /api/v1/namespaces/entropo-sandbox/pods"
EXEC = r"GET .*/exec"


def rule(what, status, message="scripted", times=1, **how):
    return {"what": what, "status": status, "message": message, "times": times, **how}


@pytest.mark.parametrize("status", [409, 429, 500, 503])
def test_a_busy_server_is_asked_again(server, status):
    server.tell(rules=[rule(CREATE, status, times=2, headers={"Retry-After": "1"})])
    begin = time.monotonic()
    assert run("echo made").output == b"made\n"
    assert time.monotonic() - begin > 2
    assert server.tell()["asked"].count(CREATE) == 3


def test_a_server_that_failed_after_all_leaves_no_second_pod(server):
    server.tell(rules=[rule(CREATE, 500, after=True)])

    async def work(sandbox):
        return len(names(server))

    assert inside(work) == 1
    assert not names(server)


def test_intervals_grow_differ_and_end(monkeypatch):
    pytest.importorskip("kubernetes", reason="the Kubernetes client is not installed (extra: k8s)")
    from kubernetes.client import ApiException

    def ask():
        raise ApiException(status=503, reason="busy")

    waits: list[float] = []
    clock = [0.0]
    monkeypatch.setattr(backend.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(backend.time, "sleep", lambda s: (waits.append(s), clock.__setitem__(0, clock[0] + s)))
    with pytest.raises(ApiException):
        backend.patiently(ask, until=60)
    assert 55 <= sum(waits) <= 60
    assert waits[0] <= 0.1
    assert max(waits) <= 5
    first, waits[:], clock[0] = waits[0], [], 0.0
    with pytest.raises(ApiException):
        backend.patiently(ask, until=60)
    assert waits[0] != first


@pytest.mark.parametrize(
    ("status", "message", "error"),
    [
        (403, "pods is forbidden: exceeded quota: entropo", CapacityError),
        (403, "pods is forbidden: no right", BackendDown),
        (404, 'namespaces "entropo-sandbox" not found', BackendDown),
        (422, "Pod is invalid", SandboxError),
    ],
)
def test_what_the_server_refuses_becomes_the_right_error(server, status, message, error):
    server.tell(rules=[rule(CREATE, status, message)])
    with pytest.raises(SandboxError, match=message) as caught:
        run("true")
    assert type(caught.value) is error


@pytest.mark.parametrize("reason", ["ErrImagePull", "ImagePullBackOff"])
def test_an_image_that_cannot_be_pulled_is_missing(server, reason):
    server.tell(statuses={"none": [waiting("ContainerCreating"), waiting(reason, "manifest unknown")]})
    with pytest.raises(ImageMissing, match=f"none: no such repository layer .*{reason}"):
        run("true", image="none")
    assert not names(server)


def test_what_a_node_tells_in_events_alone_is_told(server):
    """And a registry that is busy is waited for."""
    server.tell(
        statuses={"busy": [waiting("ErrImagePull", "429 toomanyrequests")]},
        events=[
            {"type": "Warning", "reason": "FailedCreatePodSandBox", "message": "no user namespaces here"},
            {"type": "Normal", "reason": "Scheduled", "message": "never mind"},
        ],
    )
    said = "of busy: not running after 1 s; .*429 toomanyrequests; FailedCreatePodSandBox: no user namespaces here$"
    with pytest.raises(CapacityError, match=said):
        run("true", image="busy", cluster=config.Kubernetes(start_s=1))
    assert not names(server)


def test_a_command_that_the_server_cannot_start_is_asked_for_again(server, monkeypatch):
    """Newer servers accept the connection before they look for the node."""
    monkeypatch.setattr(machine, "_AGAIN_S", 2.0)
    monkeypatch.setattr(backend, "_FATE_S", 0.1)

    async def work(sandbox):
        await asyncio.to_thread(functools.partial(server.tell, refused=2))
        again = await sandbox.exec("echo again")
        await asyncio.to_thread(functools.partial(server.tell, refused=1000))
        with pytest.raises(SandboxLost, match="started no command: error dialing backend"):
            await sandbox.exec("true")
        return again

    assert inside(work).output == b"again\n"


def test_no_file_is_larger_than_what_may_be_written(server):
    """Threat 12: a container's termination log lies on the node's disk."""
    done = run("ulimit -f", cluster=config.Kubernetes(tree_mb=8))
    assert int(done.output) == (8 + SMALL.disk_mb) << 10


def test_a_proxy_of_the_configuration_is_for_commands_too():
    client = pytest.importorskip("kubernetes.client")
    found = client.Configuration()
    found.proxy, found.no_proxy = None, None
    assert channels._proxy(found) == {}
    found.proxy, found.no_proxy = "http://u:p@proxy.example:3128", "a.example, b.example"
    assert channels._proxy(found) == {
        "proxy_type": "http",
        "http_proxy_host": "proxy.example",
        "http_proxy_port": 3128,
        "http_proxy_auth": ("u", "p"),
        "http_no_proxy": ["a.example", "b.example"],
    }


def test_a_pod_that_never_runs_is_waited_for_until_its_time_and_the_reason_told(server):
    (status, _, _) = SAID["no node"]
    facts = {"lastTransitionTime": "2026-01-01T00:00:00Z"}
    status = {"phase": "Pending", "conditions": [{**condition, **facts} for condition in status["conditions"]]}
    server.tell(statuses={"big": [status]})
    with pytest.raises(CapacityError, match=r"of big: not running after 2 s; .*Unschedulable: 0/3 nodes"):
        run("true", image="big", cluster=config.Kubernetes(start_s=2))
    assert not names(server)


FATES = {
    "OOMKilled": terminated(reason="OOMKilled", exitCode=137),
    "Evicted: low": {"phase": "Failed", "reason": "Evicted", "message": "low"},
    "NodeLost": {"phase": "Unknown", "reason": "NodeLost"},
}


@pytest.mark.parametrize("reason", FATES)
def test_a_pod_that_ends_is_a_lost_sandbox_and_the_reason_told(server, reason):
    async def work(sandbox):
        (name,) = names(server)
        task = asyncio.create_task(sandbox.exec("sleep 60"))
        await asyncio.sleep(0.5)
        await asyncio.to_thread(functools.partial(server.tell, fail={name: FATES[reason]}))
        with pytest.raises(SandboxLost, match=reason):
            await task
        for use in (sandbox.exec("true"), sandbox.read("calc.py"), sandbox.write("x", b""), sandbox.extract_patch()):
            with pytest.raises(SandboxLost):
                await use

    inside(work)
    assert not names(server)


def test_a_sandbox_ends_with_its_life(server):
    async def work(sandbox):
        with pytest.raises(SandboxLost, match="life is over"):
            await sandbox.exec("sleep 60")
        with pytest.raises(SandboxLost, match="life is over"):
            await sandbox.exec("true")

    inside(work, limits=Limits(life_s=4))


def test_a_connection_that_is_not_made_is_tried_again_and_one_that_is_cut_is_a_lost_sandbox(server):
    async def work(sandbox):
        await asyncio.to_thread(functools.partial(server.tell, rules=[rule(EXEC, 500, times=2), rule(EXEC, 429)]))
        again = await sandbox.exec("echo again")
        await asyncio.to_thread(functools.partial(server.tell, rules=[rule(EXEC, 403, "no right to exec")]))
        with pytest.raises(BackendDown, match="no right to exec"):
            await sandbox.exec("true")
        return again

    assert inside(work).output == b"again\n"


def test_a_first_process_that_is_not_heard_is_asked_again(server, monkeypatch):
    monkeypatch.setattr(machine, "_ASK_S", 0.5)

    async def work(sandbox):
        rules = [rule(r"GET .*/attach", 500, times=2)]
        await asyncio.to_thread(functools.partial(server.tell, rules=rules, unheard=2))
        asked = len(attached())
        done = await sandbox.exec("sleep 985 & head -c 100M /dev/zero > fill; echo $?")
        return done, len(attached()) - asked, await sandbox.exec("cat /proc/[0-9]*/cmdline | tr '\\0' ' '")

    def attached():
        return [request for request in server.tell()["asked"] if request.endswith("/attach")]

    done, asked, left = inside(work, cluster=config.Kubernetes(tree_mb=8))
    assert (done.output[-2:], done.disk_full, done.oom) == (b"1\n", True, False)
    assert asked >= 5  # refused, refused, unheard, unheard, answered
    assert b"sleep 985" not in left.output


def test_a_command_whose_connection_is_cut_has_no_exit_code(server):
    """It may still run: whoever asked for it asks for another sandbox."""

    async def work(sandbox):
        task = asyncio.create_task(sandbox.exec("sleep 5"))
        await asyncio.sleep(1)
        await asyncio.to_thread(functools.partial(server.tell, cut=True))
        with pytest.raises(SandboxLost, match="no exit code of a command"):
            await task
        return names(server)

    assert inside(work) == []


def test_a_silent_connection_is_kept_open_by_pings_and_answers_those_of_the_server(server, monkeypatch):
    monkeypatch.setattr(channels, "_PING_S", 0.3)

    async def work(sandbox):
        task = asyncio.create_task(sandbox.exec("read line; echo $line", stdin=b"given\n"))
        await task
        running = asyncio.create_task(sandbox.exec("sleep 1.5; echo end"))
        await asyncio.sleep(0.5)
        await asyncio.to_thread(functools.partial(server.tell, ping=True))
        return await running

    before = server.tell()["pings"]
    assert inside(work).output == b"end\n"
    assert server.tell()["pings"] >= before + 4


def test_pods_are_made_ahead_by_the_pool(server):
    async def work():
        spec = SandboxSpec("calc", limits=SMALL)
        pool = Pool(Bounds(live=2, ahead=1), "kubernetes", tick_s=0.05)
        await pool.schedule([spec])
        async with asyncio.timeout(30):
            while not (await pool.stats()).create_ms:  # noqa: ASYNC110 (nothing tells)
                await asyncio.sleep(0.1)
        lease = await pool.acquire(spec)
        done = await pool.exec(lease, "echo ahead")
        counts = await pool.stats()
        await pool.release(lease)
        await pool.drain()
        return done.output, counts.ahead

    assert asyncio.run(work()) == (b"ahead\n", 1)
    assert not names(server)


def test_no_way_into_a_cluster_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(backend, "_clusters", {})
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(BackendDown, match=r"KUBECONFIG|not installed"):
        run("true")
    (sentence,) = probe("kubernetes")
    assert sentence.startswith("kubernetes: ")
    assert reap("kubernetes") == 0


def test_a_server_that_is_away_or_knows_nobody_is_said(server, tmp_path, monkeypatch):
    access = yaml.safe_load(server.configuration.read_text())
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "other"))
    for change, said in (({"token": "wrong"}, "Unauthorized"), (None, "does not answer")):
        if change is None:
            access["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:1"
        else:
            access["users"][0]["user"] = change
        (tmp_path / "other").write_text(yaml.safe_dump(access))
        with pytest.raises(BackendDown, match=said):
            run("true")


def test_a_probe_names_what_is_missing(server):
    missing = probe("kubernetes")
    assert missing == [
        "kubernetes: no NetworkPolicy of namespace entropo-sandbox selects entropo.role and denies ingress and egress"
    ]
    server.tell(policies=[kind("NetworkPolicy")])
    assert probe("kubernetes") == []
    server.tell(users=False)
    (sentence,) = probe("kubernetes")
    assert "user_namespace=false" in sentence
    assert probe("kubernetes", config.Kubernetes(user_namespace=False)) == []
    server.tell(denied=["create pods", "update leases"])
    (sentence,) = probe("kubernetes")
    assert sentence.startswith("kubernetes: no permission in namespace entropo-sandbox: ")
    assert sentence.endswith("create pods, create pods/exec, create pods/attach, update leases")
    for spoil in ({"policyTypes": ["Ingress"]}, {"egress": [{}]}, {"podSelector": {"matchLabels": {"a": "b"}}}):
        policy = kind("NetworkPolicy")
        policy["spec"] |= spoil
        server.tell(denied=[], users=True, policies=[policy])
        assert len(probe("kubernetes")) == 1, spoil


# --- owners -----------------------------------------------------------------------------------------------------------


def stamp(seconds_ago):
    return (datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=seconds_ago)).strftime(
        "%Y-%m-%dT%H:%M:%S.%fZ"
    )


def lease(name, seconds_ago, **labels):
    known = {"entropo.owner": "1-2-3", "entropo.host": "elsewhere", **{f"entropo.{k}": v for k, v in labels.items()}}
    spec = {"holderIdentity": "x", "leaseDurationSeconds": 60, "renewTime": stamp(seconds_ago)}
    return {"metadata": {"name": name, "uid": f"uid-{name}", "labels": known}, "spec": spec}


def pod(name, holder="", **labels):
    known = {"entropo.owner": "1-2-3", "entropo.lease": holder} | {f"entropo.{k}": v for k, v in labels.items()}
    manifest = {"metadata": {"name": name, "labels": known if holder else {"app": "other"}}}
    return manifest | {"spec": {"containers": [{"name": "x", "image": "none"}], "volumes": []}}


def test_a_pod_belongs_to_the_lease_of_its_process_and_ends_with_it(server):
    async def work(sandbox):
        told = server.tell()
        (mine,), (made,) = told["leases"], told["pods"]
        assert made["metadata"]["ownerReferences"] == [
            {**OWNER, "name": mine["metadata"]["name"], "uid": mine["metadata"]["uid"]}
        ]
        assert made["metadata"]["labels"]["entropo.owner"] == cgroup.label(os.getpid())
        renewed = mine["spec"]["renewTime"]
        backend.cluster("entropo-sandbox")._lease.renew()
        assert server.tell()["leases"][0]["spec"]["renewTime"] > renewed
        assert reap("kubernetes") == 0
        server.tell(forget=[mine["metadata"]["name"]])
        backend.cluster("entropo-sandbox")._lease.renew()
        (again,) = server.tell()["leases"]
        assert again["metadata"]["uid"] != mine["metadata"]["uid"]

    inside(work)


@pytest.fixture
def sure(monkeypatch):
    monkeypatch.setattr(backend, "_SURE_S", 0.2)


def test_a_lease_that_is_renewed_after_an_outage_of_the_server_is_held(server, sure):
    server.tell(leases=[lease("stale", 90)], pods=[pod("idle", "stale")])
    here = backend.cluster("entropo-sandbox")
    for seconds_ago in (80, 70):  # a renewal that was long on its way, and one that was not
        assert here.reap() == 0
        assert here.doubts()
        time.sleep(0.3)
        server.tell(leases=[lease("stale", seconds_ago)])
    server.tell(leases=[lease("stale", 5)])
    assert (here.reap(), here.doubts(), names(server)) == (0, False, ["idle"])


def test_a_lease_is_renewed_whatever_went_wrong(server, monkeypatch):
    held, waits = backend.cluster("entropo-sandbox")._lease, []
    renewed = iter([RuntimeError("odd"), BackendDown("away"), None])

    def wait(seconds):
        waits.append(seconds)
        if len(waits) == 4:
            raise SystemExit

    def renew():
        if (trouble := next(renewed)) is not None:
            raise trouble

    monkeypatch.setattr(backend.time, "sleep", wait)
    monkeypatch.setattr(held, "renew", renew)
    with pytest.raises(SystemExit):
        held._renew_for_ever()
    assert waits == [backend._RENEW_S, backend._AGAIN_S, backend._AGAIN_S, backend._RENEW_S]


def test_reaping_removes_what_nobody_holds_and_nothing_else(server, sure):
    late = str(int(time.time()) - 5)
    held = [pod("held", "fresh"), pod("old", "stale"), pod("orphan", "none"), pod("late", "fresh", deadline=late)]
    server.tell(leases=[lease("fresh", 5), lease("stale", 90)], pods=[*held, pod("foreign")])
    assert reap("kubernetes") == 3
    assert {p["metadata"]["name"] for p in server.pods} == {"held", "foreign"}
    assert "stale" not in {found["metadata"]["name"] for found in server.tell()["leases"]}
    assert reap("kubernetes") == 0
    server.tell(leases=[lease("stale", 90)], pods=[pod("old", "stale")])
    server.tell(renewing=["stale"])
    assert (reap("kubernetes"), names(server, lease="stale")) == (0, ["old"])  # renewed since it was looked at
    assert (reap("kubernetes"), names(server, lease="stale")) == (1, [])
    server.tell(forget=["fresh"])
    assert reap("kubernetes") == 1
    assert [p["metadata"]["name"] for p in server.pods] == ["foreign"]


def test_the_servers_clock_decides_and_not_ours(server, sure, monkeypatch):
    now = time.time
    server.tell(leases=[lease("fresh", 5), lease("stale", 90)], pods=[pod("held", "fresh"), pod("old", "stale")])
    for ahead_s in (1000, -1000):
        monkeypatch.setattr(backend.time, "time", lambda ahead_s=ahead_s: now() + ahead_s)
        reap("kubernetes")
        assert [p["metadata"]["name"] for p in server.pods] == ["held"]
    backend.cluster("entropo-sandbox")._lease.owner()
    (mine,) = [found for found in server.tell()["leases"] if found["metadata"]["name"] != "fresh"]
    renewed = datetime.datetime.fromisoformat(mine["spec"]["renewTime"]).timestamp()
    assert abs(renewed - now()) < 10


KILLED = """
import asyncio, sys
from entropo_ray.sandbox import SandboxSpec, open_sandbox

async def main():
    spec = SandboxSpec(sys.argv[1], labels={"job": "leak"})
    async with open_sandbox(spec, backend="kubernetes") as one, open_sandbox(spec, backend="kubernetes") as two:
        print("open", flush=True)
        await asyncio.gather(*(box.exec("setsid sleep 60; sleep 60") for box in (one, two)))

asyncio.run(main())
"""


def test_what_a_killed_owner_left_is_removed_by_the_command(server):
    with subprocess.Popen([sys.executable, "-c", KILLED, "calc"], stdout=subprocess.PIPE, cwd=HERE.parent) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"open\n"
        assert len(names(server, job="leak")) == 2
        owner.kill()
    words = [sys.executable, "-m", "entropo_ray.sandbox", "reap", "kubernetes/entropo-sandbox"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=HERE.parent, timeout=60)
    assert (done.returncode, done.stdout) == (0, "reaped 2\n"), done.stderr
    assert not names(server, job="leak")


if __name__ == "__main__":
    for name in PODS:
        (HERE / f"golden/{name}.yaml").write_text(yaml.safe_dump(made(PODS[name]), sort_keys=False, width=120))
