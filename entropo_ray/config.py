"""Every knob once: files and words to frozen dataclasses.

Any number of YAML files and `key=value` words are merged left to right over the defaults below. Units are in the names.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

C = TypeVar("C")


@dataclass(frozen=True)
class Pack:
    """jobs/pack.py: how many tasks of the local source, and how each is proved."""

    seed: int = 0  # of the generated tasks; a run's own seed is another, so that runs can share a pack
    count: int = 64  # training tasks
    held_out: int = 50  # tasks of the test split
    families: int | None = None  # of plain functions, the first so many of the source; none: all
    practice: int = 0  # tasks for a teacher alone: never graded, so neither validated nor held with answers
    ambiguous: float = 0.34  # share of tasks whose issue leaves two or more plausible causes
    hidden: float = 0.08  # share of tasks that hide the type of the answer (same issue, different hidden tests)
    runs: int = 1  # times that the reference patch must pass and the empty patch must fail
    check: bool = False  # prove the pack that lies at tasks.path again, instead of making one
    quarantine: bool = False  # with check: those that no longer hold are left out from now on, and no error


@dataclass(frozen=True)
class Source:
    """jobs/pack.py: where tasks come from. The local kind makes use of nothing else here."""

    kind: Literal["local", "inject", "rows"] = "local"  # inject: bugs put into Python packages; rows: public data sets
    rows: str = ""  # of kind rows, like all up to `pulls`: .json, .jsonl, .parquet, a directory, owner/name[:split]
    limit: int | None = None  # the first so many rows
    images: dict[str, str] = field(default_factory=dict)  # family -> name of its images with {image} or {id} in it
    mirror: str = ""  # registry prefix that takes the place of the registry in names of images
    push: str = ""  # registry prefix that prepared images are pushed to, for other nodes; "": they stay here
    pull_s: float = 1800.0  # one image, all tries and pauses together
    pull_tries: int = 6  # each pause is about twice as long as the one before
    pulls: int = 3  # images pulled at once
    package: str = ""  # NAME or NAME==VERSION of the package index, or a directory; several with commas
    count: int = 40  # tasks to keep of each package, if there are so many
    seed: int = 0  # of injected bugs, and of held_out
    tries: int = 5  # mutants run for each task that is to be kept
    per_function: int = 3  # tasks of one function at most
    combined: float = 0.15  # share of mutants that hold two changes of one function
    held_out: float = 0.2  # share of tasks for the test split, if it can be had; rows: of repositories
    held_out_by: Literal["file", "package"] = "file"  # what lies in one split whole, so that no function is in both
    file_s: float = 5.0  # test files that run longer are left out
    suite_s: float = 15.0  # all test files together; what is beyond is left out, by seed
    fetch_s: float = 300.0  # one download or installation


@dataclass(frozen=True)
class Tasks:
    path: str = "runs/packs/local"
    split: Literal["train", "test", "practice", "all"] = "train"  # all: train and test
    limit: int | None = None  # the first so many
    quarantined: bool = False  # those in the pack's quarantine.jsonl, too
    quarantine: list[str] = field(default_factory=list)  # more files of that form: a run's flaky.jsonl, for one


@dataclass(frozen=True)
class Agent:
    """Limits of one episode and what the policy sees."""

    tools: Literal["r2egym"] = "r2egym"
    prompt: Literal["full", "brief"] = "full"  # brief: a few lines, for policies of a few million parameters
    max_steps: int = 50  # soft: the countdown ends here
    max_steps_hard: int = 60
    max_tokens: int = 65_536  # prompt and all turns, in the policy's own tokens
    max_reply_tokens: int = 16_384
    min_reply_tokens: int = 256  # less room than this ends the episode
    tool_s: float = 90.0  # one tool call
    llm_s: float = 600.0  # one generation
    wall_s: float = 3600.0  # one episode
    extract_s: float = 60.0  # reading the patch at the end
    malformed_limit: int = 3  # consecutive unreadable replies; 0: no limit
    observation_chars: int = 10_000
    observation_lines: int = 80
    countdown: bool = True  # tell the policy how many steps remain
    auto_concise_lines: int = 110  # condensed view of longer Python files; 0: never


@dataclass(frozen=True)
class Kubernetes:
    """Pods of backend=kubernetes; conf/kuberay/sandbox.yaml makes their namespace and the right to make them."""

    namespace: str = "entropo-sandbox"
    runtime_class: str = ""  # gvisor, kata, ...; empty: the cluster's own
    user_namespace: bool = True  # root inside is nobody on the node; false where nodes cannot
    node_selector: dict[str, str] = field(default_factory=dict)
    toleration: str = ""  # key of the taint of sandbox nodes
    priority_class: str = ""
    pull_secret: str = ""  # a Secret of that namespace, for images that not everybody may pull
    cpus: float = 1.0
    tree_mb: int = 1024  # room for the copy of an image's work directory, beside disk_mb, in memory
    start_s: float = 600.0  # for a pod to run, its image pulled


@dataclass(frozen=True)
class Sandbox:
    """Limits of one sandbox; `grade_*` hold where hidden tests run."""

    backend: Literal["bwrap", "docker", "kubernetes"] = "bwrap"
    memory_mb: int = 4096
    pids: int = 256
    cpu: float = 0.0  # processors that one sandbox may keep busy; 0: no limit
    disk_mb: int = 2048
    output_kb: int = 64
    grade_s: float = 300.0
    confirm: int = 0  # more runs where all that failed before passes, and what passed before does not: flaky?
    life_s: float = 3600.0
    per_node: int = 0  # at once on one node, lent by one actor there; 0: episode and grader actors make their own
    ahead: int = 0  # of per_node, made before they are asked for: where making one takes seconds
    wait_s: float = 600.0  # for one of per_node to come free
    strict: bool = False  # refuse to start where a limit cannot be enforced
    kubernetes: Kubernetes = field(default_factory=Kubernetes)


@dataclass(frozen=True)
class Rollout:
    samples: int = 16  # attempts per task
    tasks: int | None = None  # tasks drawn for one round, by (seed, round); none: all
    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    engines: int = 1
    engine_gpus: int = 1  # 0: the CPU build of vLLM
    engine_kv_mb: int = 0  # key-value cache; 0: vLLM decides
    episodes: int = 64  # in flight over all episode actors
    episode_actors: int = 1
    graders: int = 8  # in flight over all grader actors
    tries: int = 3  # times that an episode or grade lost to infrastructure is asked for
    agent: Agent = field(default_factory=Agent)
    sandbox: Sandbox = field(default_factory=Sandbox)


@dataclass(frozen=True)
class Preference:
    finished_only: bool = True  # only episodes that called finish teach
    max_tokens: int | None = None  # longer trajectories do not teach, and are counted; none: they are an error in train
    pairing: Literal["random", "all", "one", "best_worst", "rare"] = "random"  # rare: DivPO
    pairs_per_task: int = 8  # of pairing random and rare
    weights: Literal["none", "pass_k"] = "none"  # of tasks: pass_k favours those that few attempts resolve
    k: int = 8  # of weights pass_k
    balance: bool = False  # labels: both sides weigh the same in sum


@dataclass(frozen=True)
class Fit:
    """One fitting stage; accumulation is derived: batch / (workers x micro_batch)."""

    max_tokens: int = 65_536  # longer trajectories are an error here, never cut
    lr: float = 1e-5
    warmup: float = 0.1  # share of steps
    schedule: Literal["cosine", "constant"] = "cosine"
    weight_decay: float = 0.0
    clip: float = 1.0  # global gradient norm
    epochs: int = 1
    steps: int = 0  # whole optimizer steps, epoch behind epoch, however much data there is; 0: epochs decide
    batch: int = 32  # units (pairs, labels or examples) a step, over all workers
    micro_batch: int = 1  # units a worker holds at once
    pack_tokens: int = 0  # instead: as many units as have so many tokens; one that is longer is alone. 0: micro_batch
    workers: int = 1
    sequence_parallel: int = 1  # neighbouring workers that share each pack, where one cannot hold it
    worker_gpus: int = 1  # 0: gloo on CPU
    worker_threads: int = 0  # torch threads of a CPU worker; 0: cores / workers
    zero_stage: Literal[0, 1, 2, 3] = 3
    offload: bool = False  # optimizer states in host memory
    nvme_dir: str = ""  # with offload and zero_stage=3: or in files there, on a disk of each node
    deterministic: bool = False  # the same bits each time on a GPU, too; an error where there is no such kernel
    checkpoint_steps: int = 0  # steps between in-stage checkpoints; 0: none
    precision: Literal["bf16", "fp32"] = "bf16"
    checkpointing: bool = False  # recompute activations in the backward pass
    keep_attention: bool = False  # with checkpointing: but not attention's outputs, the dearest to recompute
    host_activations: bool = False  # with checkpointing: what is kept lies in host memory until the backward pass
    mlp_tokens: int = 0  # tokens that an MLP sees at once, recomputed in the backward pass; 0: all
    logits: int = 0  # fp32 logits held at once; 0: what suits the device
    lora_rank: int = 0  # 0: all weights are trained
    lora_alpha: float = 16.0  # an adapter counts alpha / rank times
    lora_targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    share_prefix: bool = True  # what trajectories of one task have in common at their beginning is computed once


@dataclass(frozen=True)
class Train(Fit):
    """The EntroPO update (method: alpha = beta + entropy); conf/objective/ has its relatives."""

    loss: Literal["dpo", "ipo", "kto", "bco", "sft"] = "dpo"  # sft: imitate what passed (rejection sampling)
    variant: Literal["theory", "released"] = "theory"  # released: as the code published with the paper computes
    beta: float = 0.1
    entropy: float = 0.01  # lambda; where entropy_target is given, what the first round's is made from
    entropy_target: float | None = None  # nats per action token of fresh rollouts, held by changing lambda each round
    entropy_step: float = 1.0  # of log lambda per nat of distance
    entropy_min: float = 1e-4  # bounds of lambda
    entropy_max: float = 1.0
    smoothing: float = 0.05  # label smoothing of dpo
    gap: float = 0.0  # dpo: margin that a pair must exceed (SimPO); ipo: the utility gap of a pair
    nll: float = 0.0  # weight of the chosen trajectory's mean negative log-likelihood
    length: Literal["raw", "debias", "mean"] = "debias"
    length_tokens: float | None = None  # c of length mean; none: the round's mean action tokens
    turns: Literal["all", "last", "branch", "dmpo"] = "all"  # whose actions count; branch: the first that differs
    gamma: float = 0.7  # of turns dmpo
    # reference point of kto; exact needs the reference's distributions, so a rank holds it beside the policy
    z0: Literal["exact", "onpolicy", "group", "kto", "none", "released"] = "exact"
    delta: Literal["learned", "mean", "group"] = "learned"  # reference point of bco
    weight_pass: float = 1.0  # of kto and bco
    weight_fail: float = 1.0
    reference: Literal["round", "first"] = "round"
    reference_early: bool = False  # score trajectories while others are sampled; takes workers beside the engines
    stale: Literal["keep", "drop", "weigh"] = "keep"  # trajectories whose policy has moved on; weigh: WPO
    drift: float = 0.1  # nats per action token since sampling, above which stale=drop drops
    mismatch_max: float = 0.1  # nats per action token between engines and trainer on fresh rollouts; 0: no bound
    ess_min: float = 0.3  # share of the units that weights must leave in effect, else the update is refused

    @property
    def kind(self) -> Literal["pair", "label", "example"]:
        """What the loss learns from."""
        return "pair" if self.loss in ("dpo", "ipo") else "example" if self.loss == "sft" else "label"


@dataclass(frozen=True)
class Model:
    """Shape of the randomly initialised Qwen3 that jobs/sft.py starts from when sft.base is empty."""

    vocab: int = 1024
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    mlp: int = 384


@dataclass(frozen=True)
class Sft(Fit):
    teacher: Literal["scripted", "reference"] = "scripted"  # knows the local pack; or shows the reference patches
    base: str = ""  # a Hugging Face causal LM; "": a tokenizer and a random Qwen3 are made here
    split: Literal["train", "practice"] = "train"  # tasks of the pack that the teacher plays on
    samples: int = 2  # teacher attempts per task
    error_rate: float = 0.45  # share of attempts in which the teacher errs on purpose
    keep: Literal["all", "finished", "resolved"] = "finished"
    read_epochs: int = 0  # the first so many predict what is read, too: where a model begins that knows no language
    shape: Model = field(default_factory=Model)


@dataclass(frozen=True)
class Verifier(Fit):
    base: str = ""  # "": the last policy of the run
    app: str = "verifier"  # name of the Serve application
    host: str = "127.0.0.1"
    port: int = 8000
    replicas: int = 1
    replica_gpus: int = 1
    batch_tokens: int = 65_536  # padded tokens scored at once


@dataclass(frozen=True)
class Select:
    execution: bool = True
    verifier_min: float = 0.01
    tie: Literal["verifier", "most_turns", "fewest_turns", "first"] = "verifier"


@dataclass(frozen=True)
class Evaluate:
    tasks: Tasks = field(default_factory=lambda: Tasks(split="test"))
    model: str = ""  # "": the policy of the last whole round
    name: str = ""  # result goes to evaluation-<name>; "": evaluation
    samples: int = 16
    heat: float = 1.0  # sampling is at rollout.temperature times this
    measure: bool = True  # exact entropies, and the KL to the run's first policy, by a pass of train's workers
    official: bool = False  # the choices through SWE-bench's own harness, too, by the Docker engine of this node
    official_workers: int = 1  # containers of it at once
    official_s: int = 1800  # one of its test runs
    select: Select = field(default_factory=Select)


@dataclass(frozen=True)
class Compare:
    """jobs/compare.py: every arm from one policy and one set of rollouts, with equal budgets."""

    arms: tuple[str, ...] = (
        "seed",
        "sft",
        "dpo",
        "kto",
        "tempered_dpo",
        "entropo_dpo",
        "entropo_kto",
        "entropo_bco",
        "divpo",
    )
    seeds: tuple[int, ...] = (0, 1, 2)  # of the order of data, of pair draws and of the evaluation's sampling
    ratios: tuple[float, ...] = (0.05, 0.1, 0.5, 1.0)  # lambda / beta of arms with entropy
    steps: int = 16  # optimizer steps of every arm
    against: str = "dpo"  # the arm that differences are taken to


@dataclass(frozen=True)
class Run:
    model: str = "???"  # directory or hub name of the first policy
    run_dir: str = "???"
    rounds: int = 3
    seed: int = 0
    ray_cpus: int = 0  # logical CPUs of a local cluster; 0: what the machine has
    pack: Pack = field(default_factory=Pack)
    source: Source = field(default_factory=Source)
    tasks: Tasks = field(default_factory=Tasks)
    rollout: Rollout = field(default_factory=Rollout)
    preference: Preference = field(default_factory=Preference)
    train: Train = field(default_factory=Train)
    sft: Sft = field(default_factory=Sft)
    verifier: Verifier = field(default_factory=Verifier)
    evaluate: Evaluate = field(default_factory=Evaluate)
    compare: Compare = field(default_factory=Compare)


# What may differ between two starts of one run: speed, and what comes later.
MAY_CHANGE = (
    "rounds",
    "ray_cpus",
    "evaluate.",
    "compare.arms",
    "compare.seeds",
    "compare.ratios",
    "compare.against",
    "pack.",
    "source.",
    "tasks.quarantined",
    "tasks.quarantine",
    "rollout.engines",
    "rollout.engine_kv_mb",
    "rollout.episodes",
    "rollout.episode_actors",
    "rollout.graders",
    "rollout.tries",
    "rollout.sandbox.per_node",
    "rollout.sandbox.ahead",
    "rollout.sandbox.wait_s",
    "rollout.sandbox.kubernetes.",
    "train.workers",
    "train.worker_threads",
    "train.micro_batch",
    "train.pack_tokens",
    "train.share_prefix",
    "train.offload",
    "train.nvme_dir",
    "train.reference_early",
    "train.checkpoint_steps",
    "sft.workers",
    "sft.worker_threads",
    "sft.micro_batch",
    "sft.pack_tokens",
    "sft.share_prefix",
    "verifier.",
)


def load(schema: type[C], words: list[str]) -> C:
    """Dataclass defaults <- YAML files <- `key=value` words, left to right.

    Raises ValueError with one line naming the key, the value and what to do.
    """
    merged = OmegaConf.structured(schema)
    for word in words:
        try:
            for layer in _layers(word):
                merged = OmegaConf.merge(merged, layer)
        except OmegaConfBaseException as error:
            raise ValueError(_complaint(schema, word, error)) from None
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        raise ValueError(f"{missing[0]} is required: give it in a YAML file or as {missing[0]}=VALUE")
    config = typing.cast(C, OmegaConf.to_object(merged))
    check = getattr(config, "model", None) is not None and schema is Run
    if check:
        _check(typing.cast(Run, config))
    return config


def _layers(word: str, above: tuple[Path, ...] = ()) -> typing.Iterator[Any]:
    """A word's settings, after those of the file that it includes (`include: FILE`, seen from its own place)."""
    layer = _layer(word)
    base = layer.pop("include", None) if isinstance(layer, DictConfig) else None
    if base is not None:
        path = Path(word).parent / str(base)
        if path in above:
            raise ValueError(f"{word}: include={base}: it includes itself")
        yield from _layers(str(path), (*above, path))
    yield layer


def _layer(word: str) -> Any:
    if "=" in word and not word.endswith((".yaml", ".yml")):
        key, _, value = word.partition("=")
        if value == "":
            # the YAML reading of nothing is null; on a command line it means the empty text
            return OmegaConf.from_dotlist([f"{key}=''"])
        return OmegaConf.from_dotlist([word])
    path = Path(word)
    if not path.is_file():
        raise ValueError(f"{word}: no such configuration file (words are FILE.yaml or key=value)")
    try:
        return OmegaConf.load(path)
    except Exception as error:  # any YAML error; the library has a dozen classes for them
        raise ValueError(f"{word}: not readable as YAML: {str(error).splitlines()[0]}") from None


def _complaint(schema: type, word: str, error: OmegaConfBaseException) -> str:
    key = str(getattr(error, "full_key", None) or "")
    what = str(error).splitlines()[0]
    if "not in" in what:
        near = difflib.get_close_matches(key, keys(schema), n=1, cutoff=0.6)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{word}: unknown key {key}{hint}"
    return f"{word}: {key}: {what}"


def keys(schema: type) -> list[str]:
    """Every key of a schema with its full path."""
    return [key for key, _ in _flat(OmegaConf.to_container(OmegaConf.structured(schema)))]


def _flat(node: Any, prefix: str = "") -> typing.Iterator[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        for name, value in node.items():
            yield from _flat(value, f"{prefix}{name}.")
    else:
        yield prefix[:-1], node


def _check(cfg: Run) -> None:
    """Combinations that cannot work, refused before any machine is asked for."""
    agent = cfg.rollout.agent
    train = cfg.train
    rules: list[tuple[bool, str]] = [
        (cfg.rounds >= 0, f"rounds={cfg.rounds}: must not be negative"),
        (cfg.rollout.samples >= 1, f"rollout.samples={cfg.rollout.samples}: must be at least 1"),
        (cfg.rollout.temperature > 0, f"rollout.temperature={cfg.rollout.temperature}: must be above 0"),
        *_objective(train),
        (cfg.rollout.sandbox.confirm >= 0, f"rollout.sandbox.confirm={cfg.rollout.sandbox.confirm}: not negative"),
        (not cfg.pack.quarantine or cfg.pack.check, "pack.quarantine=true: belongs to pack.check=true"),
        (cfg.evaluate.heat > 0, f"evaluate.heat={cfg.evaluate.heat}: must be above 0"),
        (cfg.evaluate.official_workers >= 1, f"evaluate.official_workers={cfg.evaluate.official_workers}: at least 1"),
        (cfg.evaluate.official_s >= 1, f"evaluate.official_s={cfg.evaluate.official_s}: must be at least 1"),
        (cfg.preference.pairs_per_task >= 1, f"preference.pairs_per_task={cfg.preference.pairs_per_task}: at least 1"),
        (
            cfg.preference.weights == "none" or 1 <= cfg.preference.k <= cfg.rollout.samples,
            f"preference.k={cfg.preference.k}: must lie between 1 and rollout.samples={cfg.rollout.samples}",
        ),
        (agent.tool_s < agent.wall_s, f"rollout.agent.tool_s={agent.tool_s}: must be below wall_s={agent.wall_s}"),
        (
            agent.max_steps <= agent.max_steps_hard,
            f"rollout.agent.max_steps={agent.max_steps}: must not exceed max_steps_hard={agent.max_steps_hard}",
        ),
        (
            agent.min_reply_tokens <= agent.max_reply_tokens < agent.max_tokens,
            f"rollout.agent.max_reply_tokens={agent.max_reply_tokens}: must lie between "
            f"min_reply_tokens={agent.min_reply_tokens} and max_tokens={agent.max_tokens}",
        ),
        (
            0 <= cfg.rollout.sandbox.ahead <= cfg.rollout.sandbox.per_node,
            f"rollout.sandbox.ahead={cfg.rollout.sandbox.ahead}: must lie between 0 and "
            f"rollout.sandbox.per_node={cfg.rollout.sandbox.per_node}",
        ),
        (
            cfg.rollout.sandbox.cpu == 0 or cfg.rollout.sandbox.cpu >= 0.01,
            f"rollout.sandbox.cpu={cfg.rollout.sandbox.cpu}: give processors, at least 0.01, or 0 for no limit",
        ),
        (0 <= cfg.sft.error_rate < 1, f"sft.error_rate={cfg.sft.error_rate}: must lie in [0, 1)"),
        (
            0 <= cfg.sft.read_epochs <= cfg.sft.epochs,
            f"sft.read_epochs={cfg.sft.read_epochs}: must lie between 0 and sft.epochs={cfg.sft.epochs}",
        ),
        (0 <= cfg.pack.ambiguous + cfg.pack.hidden <= 1, "pack.ambiguous + pack.hidden: must lie in [0, 1]"),
        *_sourcing(cfg.source),
        *_pods(cfg.rollout.sandbox.kubernetes),
    ]
    for name, fit in (("train", cfg.train), ("sft", cfg.sft), ("verifier", cfg.verifier)):
        rules += _fitting(name, fit)
    for holds, complaint in rules:
        if not holds:
            raise ValueError(complaint)


def _sourcing(source: Source) -> list[tuple[bool, str]]:
    counts = ((name, getattr(source, name)) for name in ("count", "tries", "per_function", "pull_tries", "pulls"))
    bounds = ((name, getattr(source, name)) for name in ("file_s", "suite_s", "fetch_s", "pull_s"))
    return [
        (
            source.kind != "inject" or bool(source.package.replace(",", "").strip()),
            "source.package is empty: source.kind=inject needs a project of the package index or a directory",
        ),
        (
            source.kind != "rows" or bool(source.rows.strip()),
            "source.rows is empty: source.kind=rows needs a file, a directory or a name of the hub, owner/name[:split]",
        ),
        (source.limit is None or source.limit >= 1, f"source.limit={source.limit}: must be at least 1"),
        *((_is_prefix(p), f"source.{k}={p}: give host[:port][/path]") for k, p in _prefixes(source)),
        *((number >= 1, f"source.{name}={number}: must be at least 1") for name, number in counts),
        *((seconds > 0, f"source.{name}={seconds}: must be above 0") for name, seconds in bounds),
        (0 <= source.combined <= 1, f"source.combined={source.combined}: must lie in [0, 1]"),
        (0 <= source.held_out < 1, f"source.held_out={source.held_out}: must lie in [0, 1)"),
    ]


def _prefixes(source: Source) -> list[tuple[str, str]]:
    return [("mirror", source.mirror), ("push", source.push)]


def _is_prefix(text: str) -> bool:
    return "://" not in text and not any(letter.isspace() for letter in text)


def _fitting(name: str, fit: Fit) -> list[tuple[bool, str]]:
    readers = fit.workers // max(1, fit.sequence_parallel)
    share = 1 if fit.pack_tokens else readers * fit.micro_batch
    return [
        (fit.workers >= 1, f"{name}.workers={fit.workers}: must be at least 1"),
        (fit.lr > 0, f"{name}.lr={fit.lr}: must be above 0"),
        (
            fit.sequence_parallel >= 1 and fit.workers % fit.sequence_parallel == 0,
            f"{name}.sequence_parallel={fit.sequence_parallel}: must divide {name}.workers={fit.workers}",
        ),
        (
            fit.checkpointing or not (fit.keep_attention or fit.host_activations),
            f"{name}.keep_attention, {name}.host_activations: belong to {name}.checkpointing=true",
        ),
        (
            not fit.nvme_dir or (fit.offload and fit.zero_stage == 3),
            f"{name}.nvme_dir={fit.nvme_dir}: needs {name}.offload=true and {name}.zero_stage=3",
        ),
        (
            not fit.nvme_dir or not fit.checkpoint_steps,
            f"{name}.checkpoint_steps={fit.checkpoint_steps}: DeepSpeed does not bring Adam's moments back from "
            f"{name}.nvme_dir; give {name}.checkpoint_steps=0, or no nvme_dir",
        ),
        (fit.mlp_tokens >= 0, f"{name}.mlp_tokens={fit.mlp_tokens}: must not be negative"),
        (fit.logits >= 0, f"{name}.logits={fit.logits}: must not be negative"),
        (fit.lora_rank >= 0, f"{name}.lora_rank={fit.lora_rank}: must not be negative"),
        (not fit.lora_rank or bool(fit.lora_targets), f"{name}.lora_targets=[]: name the layers that get adapters"),
        (fit.pack_tokens >= 0, f"{name}.pack_tokens={fit.pack_tokens}: must not be negative"),
        (fit.steps >= 0, f"{name}.steps={fit.steps}: must not be negative"),
        (
            share > 0 and fit.batch % share == 0,
            f"{name}.batch={fit.batch}: must be a multiple of workers x micro_batch = {share}"
            + (" (workers / sequence_parallel)" if fit.sequence_parallel > 1 else ""),
        ),
        (
            not (fit.keep_attention and fit.host_activations),
            f"{name}.keep_attention and {name}.host_activations: attention keeps its own on the device; give one",
        ),
    ]


def check_objective(train: Train) -> None:
    """ValueError for settings of the objective that contradict each other, with what to do."""
    for holds, complaint in _objective(train):
        if not holds:
            raise ValueError(complaint)


def _objective(train: Train) -> list[tuple[bool, str]]:
    numbers = "beta entropy entropy_step entropy_min entropy_max smoothing gap nll gamma weight_pass weight_fail drift"
    finite = [
        (math.isfinite(getattr(train, n)), f"train.{n}={getattr(train, n)}: must be finite") for n in numbers.split()
    ]
    return [*finite, *_losses(train), *_baselines(train), *_control(train), *(_released(train))]


def _losses(train: Train) -> list[tuple[bool, str]]:
    loss, pairs, labels = train.loss, train.kind == "pair", train.kind == "label"
    return [
        (train.beta >= 0, f"train.beta={train.beta}: must not be negative"),
        (train.entropy >= 0, f"train.entropy={train.entropy}: must not be negative"),
        (train.beta + train.entropy > 0, "train.beta=0 and train.entropy=0: one of them must be positive"),
        (0 <= train.smoothing < 0.5, f"train.smoothing={train.smoothing}: must lie in [0, 0.5)"),
        (loss != "ipo" or train.gap > 0, f"train.gap={train.gap}: train.loss=ipo needs a gap above 0"),
        (not labels or not train.gap, f"train.gap={train.gap}: is of pairs; train.loss={loss} has none"),
        (not labels or not train.nll, f"train.nll={train.nll}: is of pairs; train.loss={loss} has none"),
        (train.turns != "branch" or pairs, f"train.turns=branch: is of pairs; train.loss={loss} has none"),
        (loss != "sft" or train.turns == "all", f"train.turns={train.turns}: train.loss=sft knows only all"),
        (
            train.turns != "branch" or (train.length != "mean" and not train.nll),
            "train.turns=branch: has no train.length=mean and no train.nll: a pair that never parts has no tokens",
        ),
        (0 < train.gamma <= 1, f"train.gamma={train.gamma}: must lie in (0, 1]"),
        (train.weight_pass > 0, f"train.weight_pass={train.weight_pass}: must be above 0"),
        (train.weight_fail > 0, f"train.weight_fail={train.weight_fail}: must be above 0"),
        (
            train.length_tokens is None or train.length_tokens > 0,
            f"train.length_tokens={train.length_tokens}: must be above 0",
        ),
    ]


def _baselines(train: Train) -> list[tuple[bool, str]]:
    kto, released = train.loss == "kto", train.variant == "released"
    plain = train.batch >= 2 and train.length == "raw" and train.turns == "all"
    return [
        (
            not kto or train.z0 != "kto" or plain,
            f"train.z0=kto: needs train.batch of 2 or more (it is {train.batch}), train.length=raw (it is "
            f"{train.length}) and train.turns=all (it is {train.turns}); train.z0=onpolicy works with any",
        ),
        (
            not kto or train.z0 != "exact" or train.length != "mean",
            "train.z0=exact: is no mean reward under train.length=mean; give train.z0=onpolicy, or another length",
        ),
        (
            not kto or train.z0 != "released" or released,
            f"train.z0=released: belongs to train.variant=released (it is {train.variant})",
        ),
        (
            not kto or train.z0 == "released" or not released,
            f"train.z0={train.z0}: train.variant=released has its own; give train.z0=released",
        ),
    ]


def _pods(pods: Kubernetes) -> list[tuple[bool, str]]:
    key = "rollout.sandbox.kubernetes"
    name = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
    return [
        (bool(name.fullmatch(pods.namespace)), f"{key}.namespace={pods.namespace}: must be a name of a namespace"),
        (pods.cpus > 0, f"{key}.cpus={pods.cpus}: must be above 0"),
        (pods.tree_mb > 0, f"{key}.tree_mb={pods.tree_mb}: must be above 0"),
        (pods.start_s > 0, f"{key}.start_s={pods.start_s}: must be above 0"),
    ]


def _control(train: Train) -> list[tuple[bool, str]]:
    """Of entropy, and of staleness."""
    target, low, high = train.entropy_target, train.entropy_min, train.entropy_max
    powerless = train.loss == "sft" or (train.variant == "released" and train.loss == "kto")
    return [
        (
            target is None or (target > 0 and 0 < low <= train.entropy <= high),
            f"train.entropy_target={target}: must be above 0, with train.entropy={train.entropy} between "
            f"train.entropy_min={low} (above 0) and train.entropy_max={high}",
        ),
        (target is None or not powerless, f"train.entropy_target={target}: this loss has no lambda to change"),
        (train.entropy_step > 0, f"train.entropy_step={train.entropy_step}: must be above 0"),
        (train.loss != "sft" or train.stale == "keep", f"train.stale={train.stale}: train.loss=sft keeps all"),
        (train.drift > 0, f"train.drift={train.drift}: must be above 0"),
        (0 <= train.ess_min < 1, f"train.ess_min={train.ess_min}: must lie in [0, 1)"),
    ]


def _released(train: Train) -> list[tuple[bool, str]]:
    if train.variant != "released":
        return []
    return [
        (train.loss in ("dpo", "kto"), f"train.variant=released: has no train.loss={train.loss}"),
        (train.length == "raw", f"train.length={train.length}: train.variant=released knows only raw"),
        (train.turns == "all", f"train.turns={train.turns}: train.variant=released knows only all"),
        (
            not train.smoothing,
            f"train.smoothing={train.smoothing}: train.variant=released ignores it; give train.smoothing=0",
        ),
        (
            not train.gap and not train.nll and train.weight_pass == train.weight_fail == 1,
            "train.variant=released: knows no train.gap and train.nll, and train.weight_pass and weight_fail are 1",
        ),
    ]


def pin(cfg: Run) -> None:
    """Write run_dir/config.yaml, or hold this start against the one that is there.

    Raises ValueError with the first key that differs and is not in MAY_CHANGE: a run keeps its configuration.
    """
    run_dir = Path(cfg.run_dir)
    path = run_dir / "config.yaml"
    if os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") and not run_dir.is_absolute():
        raise ValueError(
            f"run_dir={cfg.run_dir}: a submitted job runs in a temporary copy; give an absolute path on shared storage"
        )
    new = OmegaConf.structured(cfg)
    if path.is_file():
        old = dict(_flat(OmegaConf.to_container(OmegaConf.load(path))))
        for key, value in _flat(OmegaConf.to_container(new)):
            fixed = not any(key == k or (k.endswith(".") and key.startswith(k)) for k in MAY_CHANGE)
            if fixed and key in old and old[key] != value:
                raise ValueError(
                    f"{key}={value}: {path} was made with {key}={old[key]}; give another run_dir, or the old value"
                )
    run_dir.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(OmegaConf.to_yaml(new))
    partial.replace(path)


def section(cfg: Any) -> dict[str, Any]:
    """A section as plain values, for workers and records of a run."""
    return dataclasses.asdict(cfg)
