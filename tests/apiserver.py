"""A stand-in for a Kubernetes server: as much of its interface as the backend uses, over TLS, for the real client.

A pod is a bubblewrap with the pod's own words, volumes (tmpfs of their size) and first process; a command enters its
namespaces. Not covered: scheduling, admission, images in layers, and every limit but those of volumes and life.
`python tests/apiserver.py CERTIFICATE KEY` prints a port; whatever it mounted and started ends with it.
Below /stub, tests say what shall go wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

from aiohttp import WSMsgType, web

from entropo_ray.sandbox import bwrap, kernel
from entropo_ray.sandbox.stage import ROOT, STAGE, Runner, Stage

TOKEN = "open-sesame"
_UNITS = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}
_SPACES = ("user", "mnt", "pid", "ipc", "net", "uts")
_AGENT = ["setpriv", "--reuid=10001", "--regid=10001", "--clear-groups"]
_IMAGE_ENV = {"PATH": "/opt/runner/bin:/usr/bin:/bin", "PYTHONPATH": "/opt/runner/site"}


class Error(Exception):
    def __init__(self, status: int, message: str, reason: str = "", headers: dict[str, str] | None = None) -> None:
        self.status, self.headers = status, headers or {}
        self.body = {"kind": "Status", "status": "Failure", "code": status, "message": message, "reason": reason}


class Pod:
    """A manifest, its status, and what runs of it."""

    def __init__(self, server: Server, manifest: dict[str, Any]) -> None:
        self.server, self.manifest = server, manifest
        self.name = manifest["metadata"]["name"]
        self.spec = manifest["spec"]
        self.box: asyncio.subprocess.Process | None = None
        self.spaces: list[int] = []
        self.volumes: dict[str, str] = {}
        self.attached: list[web.WebSocketResponse] = []
        self.tasks: list[asyncio.Task[None]] = []
        manifest["metadata"] |= {"uid": uuid.uuid4().hex, "creationTimestamp": "2026-01-01T00:00:00Z"}
        self.say({"phase": "Pending"})

    def say(self, status: dict[str, Any]) -> None:
        for kind in ("initContainerStatuses", "containerStatuses"):
            known = {"name": "x", "image": "x", "imageID": "x", "ready": False, "restartCount": 0}
            status = status | ({kind: [known | facts for facts in status[kind]]} if kind in status else {})
        self.manifest["status"] = status
        self.server.tell(self, "MODIFIED")

    async def run(self) -> None:
        """Until its first process ends."""
        image = self.server.images.get(self.spec["containers"][0]["image"])
        if image is None:
            waiting = {"reason": "ErrImagePull", "message": "not found"}
            return self.say({"phase": "Pending", "containerStatuses": [{"state": {"waiting": waiting}}]})
        for volume in self.spec["volumes"]:
            self.volumes[volume["name"]] = _volume(f"{STAGE}/volumes/{self.name}-{volume['name']}", volume["emptyDir"])
        for container in self.spec.get("initContainers", []):
            process = await self._start(container, image, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            said, _ = await process.communicate()
            if process.returncode:
                ended = {"exitCode": process.returncode, "reason": "Error", "message": said.decode()[-2000:]}
                return self.say({"phase": "Failed", "initContainerStatuses": [{"state": {"terminated": ended}}]})
        reading, writing = os.pipe()
        container = self.spec["containers"][0]
        self.box = await self._start(container, image, info=writing, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        os.close(writing)
        with os.fdopen(reading) as facts:
            pid = json.loads(await asyncio.to_thread(facts.read))["child-pid"]
        while _preparing(pid):  # noqa: ASYNC110 (nothing tells of its end)
            await asyncio.sleep(0.005)
        self.spaces = [os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY) for name in _SPACES]
        self.tasks.append(asyncio.create_task(self._tell_attached()))
        self.say({"phase": "Running", "containerStatuses": [{"state": {"running": {}}}]})
        self.tasks.append(asyncio.create_task(self._expire(self.spec["activeDeadlineSeconds"])))
        code = await self.box.wait()
        if self.manifest["status"]["phase"] == "Running":
            ended = {"exitCode": code, "reason": "Error"}
            self.say({"phase": "Failed", "containerStatuses": [{"state": {"terminated": ended}}]})
        return None

    async def _tell_attached(self) -> None:
        """What its first process says, to whoever listens now."""
        while data := await self.box.stdout.read(1 << 15):
            heard = [] if self.server.unheard else list(self.attached)
            self.server.unheard = max(0, self.server.unheard - 1)
            for connection in heard:
                with contextlib.suppress(ConnectionError):
                    await connection.send_bytes(b"\1" + data)
        for connection in list(self.attached):
            with contextlib.suppress(ConnectionError):
                await connection.close()

    async def _expire(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        self.fail({"phase": "Failed", "reason": "DeadlineExceeded", "message": "Pod was active longer than allowed"})

    def fail(self, status: dict[str, Any]) -> None:
        self.say(status)
        self.kill()

    def kill(self) -> None:
        if self.box is not None and self.box.returncode is None:
            self.box.kill()

    def end(self) -> None:
        self.kill()
        for task in self.tasks:
            task.cancel()
        for fd in self.spaces:
            os.close(fd)
        self.spaces = []
        for directory in self.volumes.values():
            subprocess.run(["umount", "-l", directory], check=False)
            Path(directory).rmdir()
        self.volumes = {}

    async def _start(
        self, container: dict[str, Any], image: str, info: int | None = None, **streams: Any
    ) -> asyncio.subprocess.Process:
        words = [*_AGENT, "--no-new-privs", "bwrap", "--unshare-all", "--unshare-user", "--as-pid-1"]
        words += ["--die-with-parent", "--clearenv", "--hostname", self.spec["hostname"], "--ro-bind", ROOT, "/"]
        words += ["--proc", "/proc", "--dev-bind", "/dev", "/dev", "--ro-bind", image, "/testbed"]
        for mount in container["volumeMounts"]:
            words += ["--bind", self.volumes[mount["name"]], mount["mountPath"]]
        for key, value in self.env(container).items():
            words += ["--setenv", key, value]
        words += ["--chdir", "/"] + ([] if info is None else ["--info-fd", str(info)])
        words += ["--", *(word.replace("$$", "$") for word in container["command"])]
        handed = () if info is None else (info,)
        return await asyncio.create_subprocess_exec(*words, pass_fds=handed, **{"stdin": subprocess.DEVNULL, **streams})

    def env(self, container: dict[str, Any]) -> dict[str, str]:
        return {**_IMAGE_ENV, **{item["name"]: item["value"].replace("$$", "$") for item in container["env"]}}

    async def enter(self, words: list[str]) -> asyncio.subprocess.Process:
        kinds = {"mnt": "mount"}
        spaces = [f"--{kinds.get(n, n)}=/proc/self/fd/{fd}" for n, fd in zip(_SPACES, self.spaces, strict=True)]
        inside = [*_AGENT, "nsenter", "--preserve-credentials", *spaces, "--", *words]
        env = self.env(self.spec["containers"][0])
        pipe = subprocess.PIPE
        return await asyncio.create_subprocess_exec(
            *inside, env=env, pass_fds=self.spaces, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, cwd="/"
        )


def _preparing(pid: int) -> bool:
    """Bubblewrap has not become the first process yet."""
    return Path(f"/proc/{pid}/exe").readlink().name == "bwrap"


def _volume(directory: str, volume: dict[str, str]) -> str:
    """As the kubelet makes it: of root, for everyone."""
    number, unit = re.fullmatch(r"(\d+)(\w\w)", volume["sizeLimit"]).groups()
    Path(directory).mkdir(parents=True)
    kernel.mount("tmpfs", directory, "tmpfs", 0, f"mode=777,size={int(number) * _UNITS[unit]}")
    return directory


class Server:
    def __init__(self) -> None:
        self.pods: dict[str, Pod] = {}
        self.leases: dict[str, dict[str, Any]] = {}
        self.images: dict[str, str] = {}
        self.rules: list[dict[str, Any]] = []
        self.statuses: dict[str, list[dict[str, Any]]] = {}  # of an image: instead of running
        self.denied: list[str] = []
        self.policies: list[dict[str, Any]] = []
        self.protocols = ["v5.channel.k8s.io", "v4.channel.k8s.io"]
        self.agreed: list[str] = []
        self.asked: list[str] = []
        self.pings = 0
        self.renewing: list[str] = []  # each of these Leases right after the next look at all
        self.users = True  # whether hostUsers is understood
        self.events: list[dict[str, Any]] = []
        self.refused = 0  # so many commands are not started, as is told when the connection stands already
        self.unheard = 0  # what first processes say so many times is lost
        self.commands: list[web.WebSocketResponse] = []
        self.version = 0
        self.listeners: list[asyncio.Queue[tuple[str, dict[str, Any]]]] = []

    def tell(self, pod: Pod, kind: str) -> None:
        self.version += 1
        pod.manifest["metadata"]["resourceVersion"] = str(self.version)
        for listener in self.listeners:
            listener.put_nowait((kind, json.loads(json.dumps(pod.manifest))))

    @web.middleware
    async def guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        try:
            if request.path.startswith("/stub"):
                return await handler(request)
            if request.headers.get("Authorization") != f"Bearer {TOKEN}":
                raise Error(401, "Unauthorized")
            self.asked.append(f"{request.method} {request.path}")
            late = None
            for rule in self.rules:
                if rule["times"] and re.fullmatch(rule["what"], f"{request.method} {request.path}"):
                    rule["times"] -= 1
                    late = Error(rule["status"], rule["message"], headers=rule.get("headers"))
                    if not rule.get("after"):
                        raise late
                    break
            answer = await handler(request)
            if late is not None:
                raise late
            return answer
        except Error as error:
            return web.json_response(error.body, status=error.status, headers=error.headers)

    # Pods

    async def create_pod(self, request: web.Request) -> web.Response:
        manifest = await request.json()
        if request.query.get("dryRun"):
            manifest["spec"] |= {} if self.users else {"hostUsers": None}
            return web.json_response(manifest, status=201)
        if manifest["metadata"]["name"] in self.pods:
            raise Error(409, "pods already exists", "AlreadyExists")
        pod = Pod(self, manifest)
        self.pods[pod.name] = pod
        if scripted := self.statuses.get(manifest["spec"]["containers"][0]["image"]):
            pod.tasks.append(asyncio.create_task(self._play(pod, scripted)))
        else:
            pod.tasks.append(asyncio.create_task(pod.run()))
        return web.json_response(manifest, status=201)

    async def _play(self, pod: Pod, scripted: list[dict[str, Any]]) -> None:
        for status in scripted:
            await asyncio.sleep(0.05)
            pod.say(status)

    async def list_pods(self, request: web.Request) -> web.StreamResponse:
        wanted = [word for word in request.query.get("labelSelector", "").split(",") if word]
        found = [p for p in self.pods.values() if all(w in p.manifest["metadata"].get("labels", {}) for w in wanted)]
        if request.query.get("watch") == "true":
            return await self._watch(request)
        items = [pod.manifest for pod in found]
        return web.json_response({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items})

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        name = request.query["fieldSelector"].partition("=")[2]
        answer = web.StreamResponse(headers={"Content-Type": "application/json"})
        await answer.prepare(request)
        heard: asyncio.Queue[tuple[str, dict[str, Any]]] = asyncio.Queue()
        self.listeners.append(heard)
        try:
            if name in self.pods:
                heard.put_nowait(("ADDED", self.pods[name].manifest))
            async with asyncio.timeout(int(request.query["timeoutSeconds"])):
                while True:
                    kind, manifest = await heard.get()
                    if manifest["metadata"]["name"] == name:
                        event = {"type": kind, "object": manifest}
                        await answer.write(json.dumps(event).encode() + b"\n")
        except (TimeoutError, ConnectionError):
            pass
        finally:
            self.listeners.remove(heard)
        return answer

    def _pod(self, request: web.Request) -> Pod:
        name = request.match_info["name"]
        if name not in self.pods:
            raise Error(404, f'pods "{name}" not found', "NotFound")
        return self.pods[name]

    async def read_pod(self, request: web.Request) -> web.Response:
        return web.json_response(self._pod(request).manifest)

    async def delete_pod(self, request: web.Request) -> web.Response:
        pod = self._pod(request)
        self._delete(pod)
        return web.json_response(pod.manifest)

    def _delete(self, pod: Pod) -> None:
        del self.pods[pod.name]
        pod.end()
        self.tell(pod, "DELETED")

    # Commands

    async def stream(self, request: web.Request) -> web.StreamResponse:
        pod = self._pod(request)
        if not pod.spaces or pod.box is None or pod.box.returncode is not None:
            raise Error(500, "container not running")
        connection = web.WebSocketResponse(protocols=self.protocols, max_msg_size=0, autoping=False)
        await connection.prepare(request)
        self.commands.append(connection)
        self.agreed.append(connection.ws_protocol or "")
        if request.match_info["how"] == "attach":
            pod.attached.append(connection)
            async for message in connection:
                if message.type == WSMsgType.BINARY and pod.box.stdin is not None:
                    pod.box.stdin.write(message.data[1:])
            pod.attached.remove(connection)
            return connection
        if self.refused:
            self.refused -= 1
            failure = {"status": "Failure", "reason": "InternalError", "message": "error dialing backend"}
            await connection.send_bytes(b"\3" + json.dumps(failure).encode())
            await connection.close()
            return connection
        process = await pod.enter(request.query.getall("command"))
        giving = asyncio.create_task(self._give(connection, process))
        pod.tasks.append(giving)
        assert process.stdout is not None
        with contextlib.suppress(ConnectionError):
            while data := await process.stdout.read(1 << 15):
                await connection.send_bytes(b"\1" + data)
            code = await process.wait()
            await connection.send_bytes(b"\3" + json.dumps(_status(128 - code if code < 0 else code)).encode())
            await connection.close()
        giving.cancel()
        return connection

    async def _give(self, connection: web.WebSocketResponse, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        with contextlib.suppress(ConnectionError):
            async for message in connection:
                self.pings += message.type in (WSMsgType.PING, WSMsgType.PONG)
                if message.type == WSMsgType.PING:
                    await connection.pong(message.data)
                if message.type == WSMsgType.BINARY and message.data[0] == 0:
                    process.stdin.write(message.data[1:])
                    await process.stdin.drain()

    # Leases and rights

    def _lease(self, request: web.Request) -> dict[str, Any]:
        name = request.match_info["name"]
        if name not in self.leases:
            raise Error(404, f'leases "{name}" not found', "NotFound")
        return self.leases[name]

    def _kept(self, lease: dict[str, Any]) -> dict[str, Any]:
        self.version += 1
        lease["metadata"]["resourceVersion"] = str(self.version)
        self.leases[lease["metadata"]["name"]] = lease
        return lease

    async def create_lease(self, request: web.Request) -> web.Response:
        lease = await request.json()
        if lease["metadata"]["name"] in self.leases:
            raise Error(409, "leases already exists", "AlreadyExists")
        lease["metadata"]["uid"] = uuid.uuid4().hex
        return web.json_response(self._kept(lease), status=201)

    async def list_leases(self, request: web.Request) -> web.Response:
        items = [lease for lease in self.leases.values() if "entropo.owner" in lease["metadata"].get("labels", {})]
        answer = web.json_response({"kind": "LeaseList", "metadata": {}, "items": items})
        while self.renewing:
            self._kept(self.leases[self.renewing.pop()])
        return answer

    async def read_lease(self, request: web.Request) -> web.Response:
        return web.json_response(self._lease(request))

    async def replace_lease(self, request: web.Request) -> web.Response:
        before, lease = self._lease(request), await request.json()
        if lease["metadata"].get("resourceVersion") != before["metadata"]["resourceVersion"]:
            raise Error(409, "the object has been modified", "Conflict")
        return web.json_response(self._kept(lease))

    async def delete_lease(self, request: web.Request) -> web.Response:
        lease, body = self._lease(request), await request.text()
        wanted = (json.loads(body).get("preconditions") or {}).get("resourceVersion") if body else None
        if wanted and wanted != lease["metadata"]["resourceVersion"]:
            raise Error(409, "the resourceVersion in the precondition does not match", "Conflict")
        del self.leases[lease["metadata"]["name"]]
        for pod in list(self.pods.values()):
            owners = {owner["uid"] for owner in pod.manifest["metadata"].get("ownerReferences", [])}
            if lease["metadata"]["uid"] in owners:
                self._delete(pod)
        return web.json_response({"kind": "Status", "status": "Success"})

    async def review(self, request: web.Request) -> web.Response:
        body = await request.json()
        wanted = body["spec"]["resourceAttributes"]
        word = f"{wanted['verb']} {wanted['resource']}"
        body["status"] = {"allowed": word not in self.denied}
        return web.json_response(body, status=201)

    async def list_events(self, request: web.Request) -> web.Response:
        about = {"involvedObject": {"name": request.query["fieldSelector"].partition("=")[2]}, "metadata": {}}
        items = [about | event for event in self.events]
        return web.json_response({"kind": "EventList", "metadata": {}, "items": items})

    async def list_policies(self, request: web.Request) -> web.Response:
        return web.json_response({"kind": "NetworkPolicyList", "metadata": {}, "items": self.policies})

    # What tests say

    async def stub(self, request: web.Request) -> web.Response:
        told = await request.json()
        if told.get("reset"):
            self._reset()
        await self._shake(cut=told.get("cut", False), ping=told.get("ping", False))
        self.images |= {name: self._image(directory) for name, directory in told.get("images", {}).items()}
        self.rules += told.get("rules", [])
        self.statuses |= told.get("statuses", {})
        self.denied = told.get("denied", self.denied)
        self.policies = told.get("policies", self.policies)
        self.protocols = told.get("protocols", self.protocols)
        self.unheard = told.get("unheard", self.unheard)
        self.refused = told.get("refused", self.refused)
        self.users = told.get("users", self.users)
        self.events = told.get("events", self.events)
        for name, status in told.get("fail", {}).items():
            self.pods[name].fail(status)
        for lease in told.get("leases", []):
            self._kept(lease)
        for manifest in told.get("pods", []):
            self.pods[manifest["metadata"]["name"]] = Pod(self, manifest)
        self.renewing += told.get("renewing", [])
        for name in told.get("forget", []):
            del self.leases[name]
        facts = {"pods": [pod.manifest for pod in self.pods.values()], "leases": list(self.leases.values())}
        return web.json_response(facts | {"asked": self.asked, "agreed": self.agreed, "pings": self.pings})

    def _reset(self) -> None:
        for pod in list(self.pods.values()):
            self._delete(pod)
        self.leases.clear()
        self.rules, self.statuses, self.denied, self.asked, self.agreed = [], {}, [], [], []
        self.users, self.events, self.refused = True, [], 0
        self.protocols = ["v5.channel.k8s.io", "v4.channel.k8s.io"]

    async def _shake(self, *, cut: bool, ping: bool) -> None:
        """Every connection to a command."""
        for connection in self.commands:
            if cut and connection._req is not None and connection._req.transport is not None:
                connection._req.transport.abort()
            if ping:
                with contextlib.suppress(ConnectionError):
                    await connection.ping()

    def _image(self, directory: str) -> str:
        """A copy of the mount, where the agent's user can reach it."""
        place = f"{STAGE}/images/{uuid.uuid4().hex}"
        Path(place).mkdir(parents=True)
        kernel.bind(directory, place)
        return place

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self.guard], client_max_size=1 << 24)
        pods, leases = "/api/v1/namespaces/{ns}/pods", "/apis/coordination.k8s.io/v1/namespaces/{ns}/leases"
        app.add_routes(
            [
                web.post(pods, self.create_pod),
                web.get(pods, self.list_pods),
                web.get(pods + "/{name}", self.read_pod),
                web.delete(pods + "/{name}", self.delete_pod),
                web.get(pods + "/{name}/{how:exec|attach}", self.stream),
                web.post(leases, self.create_lease),
                web.get(leases, self.list_leases),
                web.get(leases + "/{name}", self.read_lease),
                web.put(leases + "/{name}", self.replace_lease),
                web.delete(leases + "/{name}", self.delete_lease),
                web.post("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", self.review),
                web.get("/apis/networking.k8s.io/v1/namespaces/{ns}/networkpolicies", self.list_policies),
                web.get("/api/v1/namespaces/{ns}/events", self.list_events),
                web.post("/stub", self.stub),
            ]
        )
        return app


def _status(code: int) -> dict[str, Any]:
    if code == 0:
        return {"status": "Success"}
    causes = [{"reason": "ExitCode", "message": str(code)}]
    return {"status": "Failure", "reason": "NonZeroExitCode", "details": {"causes": causes}}


async def serve(certificate: str, key: str) -> None:
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate, key)
    runner = web.AppRunner(Server().app())
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
    await site.start()
    print(runner.addresses[0][1], flush=True)  # noqa: T201
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    await ended.wait()
    os._exit(0)  # what it started dies with it, and its mounts with its namespace


if __name__ == "__main__":
    stage = Stage(Runner(**bwrap._runner()))
    for place in ("/testbed", "/opt/entropo", "/opt/fill"):
        stage.mount_point(place)
    asyncio.run(serve(*sys.argv[1:]))
