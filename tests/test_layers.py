"""The floors: who may import whom, which library is behind which door, and that the tools agree.

Absolute imports at any depth are read from the syntax tree; imports by string are not seen.
"""

import ast
import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent.parent
PACKAGE = HERE / "entropo_ray"

FLOORS = [
    ["records", "config"],
    ["tasks", "sandbox", "chat", "store", "preference", "select", "observe", "patches", "page"],
    ["agent", "grade", "grade_inside", "official", "factory", "factory_inside", "curate"],
    ["rollout", "train", "verify", "ingest", "diversity"],
    ["evaluate", "report", "doctor", "bench", "comparison"],
    ["compare"],
    ["jobs"],
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
ABOVE_RAY = {room for room, floor in FLOOR.items() if floor >= 3}
DOORS = {
    "omegaconf": {"config"},
    "pyarrow": {"records", "store", "tasks.rows", "rollout", "train", "verify"},
    "datasets": {"tasks.rows", "bench"},
    "tokenizers": {"chat", "train.initial", "bench"},
    "ray": {*ABOVE_RAY, "observe"},
    "torch": {"train", "verify.model", "bench"},
    "transformers": {"train", "verify.model", "bench"},
    "deepspeed": {"train.worker"},
    "peft": {"train.lora"},
    "trl": {"bench"},
    "vllm": {"rollout.engine"},
    "swebench": {"evaluate", "tasks.rows", "tasks.scripted"},
    "docker": {"sandbox.docker", "sandbox.images"},
    "kubernetes": {"sandbox.kubernetes"},
    "websocket": {"sandbox.channels"},
    "entropo_ray.records.Answer": {"tasks", "grade"},
}
FILES = sorted([*PACKAGE.rglob("*.py"), *(HERE / "jobs").glob("*.py")])


def room(path):
    """The room of a file relative to the project root; the package's own __init__ has none."""
    if path.parts[0] == "jobs":
        return "jobs"
    return path.parts[1].removesuffix(".py")


def imported(tree):
    """Every name that a module imports; `from a import b` counts as a.b. Names a class of records too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and node.attr == "Answer":
            yield "entropo_ray.records.Answer"


def violation(path, text):
    """What a file at `path` (relative to the project root) does that its floor does not allow; None if nothing."""
    here = room(path)
    if here not in FLOOR:
        return f"{here} has no floor"
    try:
        names = set(imported(ast.parse(text)))
    except AssertionError as error:
        return str(error)
    if any(name == "jobs" or name.startswith("jobs.") for name in names):
        return "a job is never imported"
    ours = {name.split(".")[1] for name in names if name.startswith("entropo_ray.")} - {here, "__version__"}
    if sideways := {r for r in ours if FLOOR.get(r, 99) >= FLOOR[here]}:
        return f"reaches up or sideways to {sorted(sideways)}"
    for door, open_to in DOORS.items():
        if any(name == door or name.startswith(f"{door}.") for name in names) and not {
            here,
            f"{here}.{path.stem}",
        } & set(open_to):
            return f"{door} has no door here"
    if "answers.jsonl" in text and here not in {"tasks", "grade"}:
        return "answers.jsonl is named outside tasks and grade"
    return None


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(HERE)))
def test_imports_go_down_and_through_doors(path):
    relative = path.relative_to(HERE)
    if relative == Path("entropo_ray/__init__.py"):
        assert not list(imported(ast.parse(path.read_text()))), "nothing happens at import"
        return
    assert violation(relative, path.read_text()) is None


PLANTED = {
    "upward from": ("entropo_ray/grade.py", "from entropo_ray.rollout.sample import sample"),
    "upward plain import": ("entropo_ray/agent/tools.py", "import entropo_ray.evaluate"),
    "sideways between leaves": ("entropo_ray/chat.py", "from entropo_ray import store"),
    "sideways on floor 2": ("entropo_ray/agent/tools.py", "from entropo_ray.grade import check"),
    "sideways on floor 3": ("entropo_ray/train/fit.py", "def f():\n    from entropo_ray.rollout import engine"),
    "sideways on floor 4": ("entropo_ray/report.py", "from entropo_ray.evaluate import pass_at_k"),
    "relative": ("entropo_ray/train/fit.py", "from . import batch"),
    "torch in grade": ("entropo_ray/grade.py", "import torch.nn"),
    "vllm outside engine": ("entropo_ray/rollout/sample.py", "from vllm import SamplingParams"),
    "deepspeed outside worker": ("entropo_ray/train/fit.py", "import deepspeed"),
    "ray in store": ("entropo_ray/store.py", "import ray"),
    "torch inside a function": ("entropo_ray/select.py", "def f():\n    import torch\n"),
    "omegaconf outside config": ("jobs/iterate.py", "from omegaconf import OmegaConf"),
    "answer in evaluate": ("entropo_ray/evaluate.py", "from entropo_ray.records import Answer"),
    "answer as an attribute": ("entropo_ray/verify/app.py", "from entropo_ray import records\nx = records.Answer"),
    "answers by file": ("entropo_ray/agent/tools.py", 'PATH = "answers.jsonl"'),
    "a job imports a job": ("jobs/evaluate.py", "from jobs.iterate import iterate"),
    "no floor": ("entropo_ray/helpers.py", ""),
    "datasets outside its door": ("entropo_ray/tasks/pack.py", "def f():\n    import datasets"),
    "unknown room": ("entropo_ray/report.py", "from entropo_ray.helpers import x"),
}


@pytest.mark.parametrize(("path", "text"), PLANTED.values(), ids=PLANTED.keys())
def test_planted_violations_are_found(path, text):
    assert violation(Path(path), text) is not None


ALLOWED = {
    "down": ("entropo_ray/evaluate.py", "from entropo_ray import grade, select, store\nimport ray"),
    "own folder": ("entropo_ray/train/fit.py", "from entropo_ray.train import batch\nimport torch"),
    "a door for one module": ("entropo_ray/rollout/engine.py", "import vllm.outputs"),
    "a job": ("jobs/evaluate.py", "from entropo_ray.evaluate import resolve"),
}


@pytest.mark.parametrize(("path", "text"), ALLOWED.values(), ids=ALLOWED.keys())
def test_what_is_allowed_is_not_refused(path, text):
    assert violation(Path(path), text) is None


def test_the_lower_floors_start_without_heavy_libraries():
    light = [p for p in FILES if p.parts[len(HERE.parts)] != "jobs" and p != PACKAGE / "__init__.py"]
    light = [p for p in light if FLOOR[room(p.relative_to(HERE))] <= 2]
    modules = sorted(".".join(p.relative_to(HERE).with_suffix("").parts).removesuffix(".__init__") for p in light)
    heavy = ["torch", "ray", "vllm", "deepspeed", "transformers", "swebench", "datasets", "docker", "kubernetes"]
    program = (
        f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=HERE, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr[-2000:]


def test_the_package_directory_is_never_on_the_path():
    """entropo_ray/select.py would stand before the standard module of that name."""
    assert str(PACKAGE) not in {str(Path(p or ".").resolve()) for p in sys.path}


@pytest.mark.parametrize(
    "words",
    [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]],
    ids=["ruff check", "ruff format", "mypy --strict"],
)
def test_tools_agree(words, tmp_path):
    if importlib.util.find_spec(words[0]) is None:
        pytest.skip(f"{words[0]} is not installed (extra: dev)")
    # a cache of its own: one that another process writes to at the same time gives answers about files long gone
    more = ["--cache-dir", str(tmp_path)] if words[0] == "mypy" else ["entropo_ray", "jobs", "tests"]
    done = subprocess.run([sys.executable, "-m", *words, *more], cwd=HERE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def test_mypy_is_strict_for_the_whole_package():
    """The setting that the test above relies on."""
    mypy = tomllib.loads((HERE / "pyproject.toml").read_text())["tool"]["mypy"]
    assert mypy["strict"] is True
    assert "entropo_ray" in mypy["files"]


def test_no_function_is_longer_than_a_page():
    long = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > 60:
                    long.append(f"{path.relative_to(HERE)}:{node.lineno} {node.name} has {lines} lines")
    assert not long
