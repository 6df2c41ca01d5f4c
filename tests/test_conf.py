"""conf/ and the Dockerfile: every file loads, names what exists, and agrees with the others.

Nothing here asks a Kubernetes server; the manifests were never applied to a live cluster.
"""

import dataclasses
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

from entropo_ray import config

HERE = Path(__file__).resolve().parent.parent
CONF = sorted((HERE / "conf").glob("*.yaml"))
OBJECTIVES = sorted((HERE / "conf" / "objective").glob("*.yaml"))
KUBERAY = {
    path.stem: yaml.safe_load(path.read_text()) for path in sorted((HERE / "conf" / "kuberay").glob("ray*.yaml"))
}
DOCKERFILE = (HERE / "Dockerfile").read_text()
# off by default: the operator refuses manifests that use them
GATED = {"networkPolicy", "tlsOptions", "historyServerOptions"}


def ray_version():
    """The one that pyproject.toml pins."""
    wanted = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]["dependencies"]
    (version,) = [m[1] for word in wanted if (m := re.match(r"ray\[.*\]==(.*)", word))]
    return version


def nodes(value):
    """Every mapping of a manifest."""
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from nodes(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from nodes(inner)


def cluster_of(manifest):
    spec = manifest["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def containers(manifest):
    return [c for node in nodes(manifest) for c in node.get("containers", [])]


def gpus(group):
    (container,) = group["template"]["spec"]["containers"]
    return container["resources"]["limits"].get("nvidia.com/gpu", 0)


every_manifest = pytest.mark.parametrize("manifest", KUBERAY.values(), ids=KUBERAY.keys())


@pytest.mark.parametrize("path", CONF, ids=lambda p: p.name)
def test_every_configuration_loads(path):
    cfg = config.load(config.Run, [str(path)])
    assert cfg.run_dir
    assert cfg.rollout.agent.max_tokens <= cfg.train.max_tokens, "fitting would refuse what sampling makes"


@pytest.mark.parametrize("path", CONF, ids=lambda p: p.name)
def test_a_configuration_says_only_what_the_schema_knows_and_says_it_once(path):
    class Strict(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            keys = [key.value for key, _ in node.value]
            assert len(keys) == len(set(keys)), f"repeated in {path.name}: {keys}"
            return super().construct_mapping(node, deep)

    yaml.load(path.read_text(), Strict)


def test_the_authors_values_are_in_their_configuration():
    cfg = config.load(config.Run, [str(HERE / "conf" / "qwen3_coder_30b.yaml")])
    assert (cfg.train.beta, cfg.train.entropy, cfg.train.lr) == (0.1, 0.01, 1e-5)
    assert (cfg.rollout.temperature, cfg.rollout.top_p, cfg.rollout.top_k) == (0.7, 0.8, 20)
    assert (cfg.evaluate.samples, cfg.rollout.agent.max_steps, cfg.rollout.agent.max_tokens) == (16, 100, 65_536)
    assert (cfg.evaluate.select.verifier_min, cfg.evaluate.select.tie) == (0.01, "most_turns")


def test_a_laptop_needs_no_gpu():
    cfg = config.load(config.Run, [str(HERE / "conf" / "local.yaml")])
    asked = [cfg.rollout.engine_gpus, cfg.sft.worker_gpus, cfg.train.worker_gpus]
    assert [*asked, cfg.verifier.worker_gpus, cfg.verifier.replica_gpus] == [0] * 5


def test_the_three_kinds_are_there():
    assert {m["kind"] for m in KUBERAY.values()} == {"RayCluster", "RayJob", "RayService"}
    assert {m["apiVersion"] for m in KUBERAY.values()} == {"ray.io/v1"}


@every_manifest
def test_ray_is_one_version_everywhere(manifest):
    assert cluster_of(manifest)["rayVersion"] == ray_version()
    assert set(re.findall(r"ARG RAY_VERSION=(\S+)", DOCKERFILE)) == {ray_version()}


def test_one_image_runs_everywhere_and_the_dockerfile_says_how_it_is_built():
    images = {c["image"] for manifest in KUBERAY.values() for c in containers(manifest)}
    (image,) = images
    version = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]["version"]
    assert image == f"entropo-ray:{version}"
    assert f"--target gpu -t {image}" in DOCKERFILE


@every_manifest
def test_names_are_short_dns_labels(manifest):
    groups = [group["groupName"] for group in cluster_of(manifest)["workerGroupSpecs"]]
    for name in [manifest["metadata"]["name"], *groups]:
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
        assert len(name) <= 47


@every_manifest
def test_replicas_lie_between_their_bounds(manifest):
    for group in cluster_of(manifest)["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert group["maxReplicas"] > 0


@every_manifest
def test_no_field_behind_a_gate_is_used(manifest):
    assert not GATED & {key for node in nodes(manifest) for key in node}


@every_manifest
def test_start_parameters_are_text_and_resources_are_said_once(manifest):
    cluster = cluster_of(manifest)
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        start = group.get("rayStartParams", {})
        assert all(isinstance(value, str) for value in start.values())
        assert not (group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & start.keys())
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@every_manifest
def test_gpu_groups_tolerate_the_taint_and_ask_for_what_they_may_use(manifest):
    for group in cluster_of(manifest)["workerGroupSpecs"]:
        spec = group["template"]["spec"]
        (container,) = spec["containers"]
        assert container["resources"]["limits"] == container["resources"]["requests"]
        tolerated = {t["key"] for t in spec.get("tolerations", [])}
        assert ("nvidia.com/gpu" in tolerated) == (gpus(group) > 0)


@every_manifest
def test_workers_have_no_token_and_are_not_restarted_in_place(manifest):
    for group in cluster_of(manifest)["workerGroupSpecs"]:
        spec = group["template"]["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["restartPolicy"] == "Never"  # the autoscaler's second version replaces pods


@every_manifest
def test_every_mount_has_its_volume(manifest):
    for spec in nodes(manifest):
        if "containers" in spec:
            volumes = {volume["name"] for volume in spec["volumes"]}
            assert {m["name"] for c in spec["containers"] for m in c["volumeMounts"]} <= volumes


@every_manifest
def test_sandboxes_are_carried_by_pods_whose_root_is_nobody(manifest):
    for group in cluster_of(manifest)["workerGroupSpecs"]:
        if "sandbox" in group.get("resources", {}):
            spec = group["template"]["spec"]
            assert spec["hostUsers"] is False
            assert not any(c["securityContext"].get("privileged") for c in spec["containers"])


def job_words():
    """What the RayJob runs, as words."""
    return shlex.split(KUBERAY["rayjob"]["spec"]["entrypoint"])


def test_the_job_runs_a_file_that_exists_with_words_that_load(monkeypatch):
    monkeypatch.chdir(HERE)
    python, script, *words = job_words()
    assert python == "python"
    assert (HERE / script).is_file()
    cfg = config.load(config.Run, words)
    assert Path(cfg.run_dir).is_absolute()
    (mount,) = {
        m["mountPath"] for c in containers(KUBERAY["rayjob"]) for m in c["volumeMounts"] if m["name"] == "entropo"
    }
    assert all(path.startswith(f"{mount}/") for path in (cfg.run_dir, cfg.model, cfg.tasks.path))


def test_a_job_that_never_gets_its_machines_fails_and_leaves_nothing():
    spec = KUBERAY["rayjob"]["spec"]
    assert 0 < spec["preRunningDeadlineSeconds"] < spec["activeDeadlineSeconds"]
    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"] is True  # what ttlSecondsAfterFinished needs
    assert not {"clusterSelector", "deletionStrategy"} & spec.keys()  # exclude backoffLimit and the ttl


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_the_cluster_is_large_enough_for_the_configuration(name):
    cfg = config.load(config.Run, [str(HERE / "conf" / "qwen3_coder_30b.yaml")])
    groups = cluster_of(KUBERAY[name])["workerGroupSpecs"]
    most = sum(gpus(group) * group["maxReplicas"] for group in groups)
    assert cfg.rollout.engines * cfg.rollout.engine_gpus <= most
    assert max(fit.workers * fit.worker_gpus for fit in (cfg.sft, cfg.train, cfg.verifier)) <= most
    (boxes,) = [g for g in groups if "sandbox" in g.get("resources", {})]
    each = int(boxes["resources"]["sandbox"])
    assert cfg.rollout.episodes + cfg.rollout.graders <= each * boxes["maxReplicas"]
    assert cfg.rollout.episodes / cfg.rollout.episode_actors <= each


def test_the_service_builds_the_verifier_with_keys_that_exist():
    (app,) = yaml.safe_load(KUBERAY["rayservice"]["spec"]["serveConfigV2"])["applications"]
    module, _, name = app["import_path"].partition(":")
    source = HERE / Path(*module.split(".")).with_suffix(".py")
    assert re.search(rf"^def {name}\(", source.read_text(), re.MULTILINE)
    knobs = set(app["args"]) - {"policy"}
    assert knobs <= {field.name for field in dataclasses.fields(config.Verifier)}
    cfg = config.Verifier(**{key: app["args"][key] for key in knobs})
    assert cfg.max_tokens <= cfg.batch_tokens
    groups = cluster_of(KUBERAY["rayservice"])["workerGroupSpecs"]
    assert cfg.replicas * cfg.replica_gpus <= sum(gpus(group) * group["maxReplicas"] for group in groups)
    ports = {p["containerPort"] for c in containers(KUBERAY["rayservice"]) for p in c.get("ports", [])}
    assert 8000 in ports


def stages():
    """The Dockerfile's targets by name."""
    parts = re.split(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, flags=re.MULTILINE)
    return dict(zip(parts[2::3], parts[3::3], strict=True))


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_both_images_have_what_sandboxes_need_and_copy_what_exists(target):
    body = stages()[target]
    assert {"bubblewrap", "git"} <= set(body.replace("\\", " ").split())
    assert "WORKDIR /app" in body
    assert "PYTHONPATH=/app" in body
    for line in re.findall(r"^COPY (.+)$", body, re.MULTILINE):
        assert all((HERE / source).exists() for source in line.split()[:-1]), line
    assert re.search(r"^USER \w+$", body, re.MULTILINE), "sandboxes inside need no root outside"


def test_nothing_of_a_run_goes_into_an_image():
    ignored = (HERE / ".dockerignore").read_text().split()
    assert {".git", ".venv", "runs"} <= set(ignored)


@pytest.mark.parametrize("path", OBJECTIVES, ids=lambda p: p.stem)
def test_every_objective_loads_on_the_local_default_and_names_its_source(path):
    cfg = config.load(config.Run, [str(HERE / "conf/local.yaml"), str(path)])
    head = path.read_text().split("train:")[0]
    assert re.search(r"arXiv \d{4}\.\d{5}|baseline|Rejection sampling", head)
    plain = config.load(config.Run, [str(HERE / "conf/local.yaml")])
    assert (cfg.train, cfg.preference, cfg.evaluate) != (plain.train, plain.preference, plain.evaluate) or (
        path.stem == "entropo_dpo"  # which the default is
    )


def test_objectives_are_different_settings_of_one_section():
    found = [config.load(config.Run, [str(HERE / "conf/local.yaml"), str(path)]) for path in OBJECTIVES]
    settings = {(repr(cfg.train), repr(cfg.preference), repr(cfg.evaluate)) for cfg in found}
    assert len(settings) == len(OBJECTIVES) == 22
