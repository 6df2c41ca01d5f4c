"""A Python project with tests, brought here: its source tree, and the site of what it imports.

Sources come as a source distribution by pip, or from a directory. What the project needs is installed as wheels into
the site, beside a description of the project itself but never its modules: a sandbox holds no second copy of them.
"""

from __future__ import annotations

import configparser
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

RUNNER = ("pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments")  # every sandbox has these already
_TREE_BYTES = 200 << 20
_COMPILED = (".pyx", ".pxd", ".c", ".cc", ".cpp", ".rs", ".so", ".pyd", ".f90")
_RESIDUE = {".git", ".hg", "__pycache__", ".pytest_cache", ".tox", ".nox", ".venv", ".hypothesis", ".mypy_cache"}
_ASIDE = {"test", "tests", "testing", "docs", "doc", "examples", "example", "benchmarks", "scripts", "tools", "bench"}
_ASIDE |= {"setup", "conftest", "noxfile", "tasks", "versioneer", "build", "dist"}
_TEST_EXTRAS = (("test", "tests", "testing", "pytest"), ("dev", "develop", "development"))
_TEST_FILES = (
    "*requirements*test*.txt",
    "*test*requirements*.txt",
    "requirements/*test*.txt",
    "tests/requirements.txt",
)
_NO_TESTS = {"pytest", "tox", "nox", "flake8", "mypy", "black", "ruff", "pre-commit", "twine", "build", "wheel"}
_NO_TESTS |= {"setuptools", "pip", "pylint", "isort", "codecov", "coveralls", "sphinx", "furo", "hatch", "bump2version"}
_PLUGINS = {  # what a project's pytest configuration says -> the plugin that understands it
    r"--cov\b|--no-cov": "pytest-cov",
    r"-n[ =]?(\d|auto)|--dist\b": "pytest-xdist",
    r"--benchmark": "pytest-benchmark",
    r"--timeout\b|^\s*timeout\s*=": "pytest-timeout",
    r"asyncio_mode|asyncio_default": "pytest-asyncio",
    r"--randomly|-p no:randomly": "pytest-randomly",
}
_START = '''"""Makes the repository importable wherever a program starts, behind everything else."""

import os
import sys

for _root in {roots!r}:
    sys.path.append(os.path.join(os.environ.get("TESTBED", "/testbed"), _root).rstrip("/."))
'''


@dataclass(frozen=True, kw_only=True)
class Project:
    """A source tree without caches, history and metadata, and what it says of itself."""

    word: str  # as the user named it
    name: str
    version: str
    tree: Path
    roots: tuple[str, ...]  # below the tree, where its modules lie
    modules: tuple[str, ...]  # top-level names
    needs: tuple[str, ...]  # requirements
    tests: tuple[str, ...]  # requirements of its tests
    metadata: str = field(repr=False)
    entry_points: str = field(repr=False)

    @property
    def digest(self) -> str:
        """Of everything that the site is made from."""
        python = sys.version_info[:2]
        facts = [self.name, self.version, self.roots, self.needs, self.tests, self.metadata, self.entry_points, python]
        return hashlib.blake2b(json.dumps(facts).encode(), digest_size=10).hexdigest()


def words(packages: str) -> list[str]:
    """The packages of source.package. ValueError if one is named twice."""
    found = [word.strip() for word in packages.split(",") if word.strip()]
    if repeated := [word for word in found if found.count(word) > 1]:
        raise ValueError(f"source.package={packages}: names {repeated[0]} twice")
    return found


def fetch(word: str, to: Path, *, timeout_s: float) -> Project:
    """The project of one word of source.package, its tree in the empty directory `to`.

    ValueError, one line: not to be had, no source distribution, compiled modules, or modules that the runner has.
    """
    if Path(word).is_dir():
        _copy(Path(word), to)
    elif re.fullmatch(r"[A-Za-z0-9][\w.-]*(==[\w.!+-]+)?", word):
        _download(word, to, timeout_s)
    else:
        raise ValueError(f"source.package={word}: neither a directory nor NAME or NAME==VERSION of the package index")
    project = _described(word, to)
    if compiled := sorted(p for p in _below(to) if p.suffix in _COMPILED and not set(p.parts) & {"docs", "doc"}):
        raise ValueError(f"source.package={word}: {compiled[0].relative_to(to)}: compiled modules; give a pure project")
    if taken := sorted({*project.modules} & {*RUNNER, *sys.stdlib_module_names}):
        raise ValueError(f"source.package={word}: every sandbox has a module {taken[0]} already; give another project")
    _clean(to)
    return project


def furnish(project: Project, to: Path, *, timeout_s: float) -> list[str]:
    """Make the site of a project at `to`; requirements of its tests that are not to be had, which are left out.

    One that is there already stays. ValueError, one line, when a requirement of the project itself is not to be had as
    a wheel.
    """
    if to.is_dir():
        return []
    partial = to.with_name(f".{to.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if project.needs:
        _install(project.word, project.needs, partial, timeout_s)
    missing = []
    try:
        _install(project.word, project.tests, partial, timeout_s)
    except ValueError:
        for requirement in project.tests:
            try:
                _install(project.word, [requirement], partial, timeout_s)
            except ValueError:
                missing.append(requirement)
    _remove(partial, project)
    description = partial / f"{re.sub('[-_.]+', '_', project.name)}-{project.version}.dist-info"
    description.mkdir()
    (description / "METADATA").write_text(project.metadata)
    if project.entry_points:
        (description / "entry_points.txt").write_text(project.entry_points)
    (partial / "sitecustomize.py").write_text(_START.format(roots=project.roots))
    for path in (partial, *partial.rglob("*")):
        path.chmod(path.stat().st_mode | (0o755 if path.is_dir() else 0o644))  # the agent is another user
    partial.replace(to)
    return missing


# The tree


def _copy(source: Path, to: Path) -> None:
    """A directory's files; of a git repository those that it tracks."""
    listed = subprocess.run(
        ["git", "-C", str(source), "ls-files", "-z"], capture_output=True, timeout=60, check=False
    ).stdout.decode()
    names = [name for name in listed.split("\0") if name] or [str(p.relative_to(source)) for p in _below(source)]
    for name in names:
        path = source / name
        if path.is_file() and not path.is_symlink():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, to / name)
            (to / name).chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)


def _below(tree: Path) -> Iterator[Path]:
    return (p for p in sorted(tree.rglob("*")) if p.is_file() and not _RESIDUE & set(p.relative_to(tree).parts))


def _download(word: str, to: Path, timeout_s: float) -> None:
    name = word.partition("==")[0]
    store = to.with_name(f"{to.name}.sdist")
    _pip(word, ["download", "--no-deps", "--no-binary", name, "--dest", str(store), word], timeout_s)
    (archive,) = store.iterdir()
    if not archive.name.endswith((".tar.gz", ".tar.bz2", ".tar.xz")):
        raise ValueError(f"source.package={word}: {archive.name}: not a tar archive; give another version")
    with tarfile.open(archive) as tar:
        size = sum(member.size for member in tar.getmembers())
        if size > _TREE_BYTES:
            raise ValueError(f"source.package={word}: {size >> 20} MiB unpacked, more than {_TREE_BYTES >> 20}")
        tar.extractall(store / "tree", filter="data")
    (top,) = (store / "tree").iterdir()
    shutil.copytree(top, to, dirs_exist_ok=True)
    shutil.rmtree(store)


def _clean(tree: Path) -> None:
    """Remove what tells of other versions, of builds and of test runs."""
    for path in sorted(tree.rglob("*")):
        residue = path.name in _RESIDUE or path.name.endswith((".egg-info", ".dist-info", ".pyc"))
        top = path.parent == tree and path.name in ("build", "dist", "PKG-INFO")
        if path.is_symlink():
            path.unlink()  # it could lead anywhere
        elif (residue or top) and path.is_dir():
            shutil.rmtree(path)
        elif (residue or top) and path.exists():
            path.unlink()


# What a project says of itself


def _described(word: str, tree: Path) -> Project:
    info = HeaderParser().parsestr(_text(tree / "PKG-INFO"))
    table = _toml(tree / "pyproject.toml")
    project = table.get("project", {})
    old = configparser.RawConfigParser()
    old.read_string(_text(tree / "setup.cfg"))
    name = info["Name"] or project.get("name") or old.get("metadata", "name", fallback="") or Path(word).resolve().name
    version = info["Version"] or project.get("version") or "0"
    roots = ("src", ".") if any((tree / "src").glob("*")) else (".",)
    eggs = sorted(tree.glob("**/*.egg-info"))
    needs = info.get_all("Requires-Dist") or [*_extras(tree, table, old, eggs).get("", [])]
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    return Project(
        word=word,
        name=canonicalize_name(str(name)),
        version=str(version),
        tree=tree,
        roots=roots,
        modules=tuple(_modules(tree / roots[0])),
        needs=tuple(_usable(needs)),
        tests=tuple(_tests(tree, table, old, eggs, info.get_all("Requires-Dist") or [])),
        metadata=_text(tree / "PKG-INFO") or metadata,
        entry_points="".join(_text(egg / "entry_points.txt") for egg in eggs[:1]),
    )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(_text(path))
    except tomllib.TOMLDecodeError:
        return {}


def _modules(root: Path) -> list[str]:
    packages = [p.name for p in root.iterdir() if p.is_dir() and any(p.glob("*.py"))]
    files = [p.stem for p in root.glob("*.py")]
    return sorted({name for name in (*packages, *files) if name.isidentifier() and name not in _ASIDE})


def _extras(
    tree: Path, table: dict[str, Any], old: configparser.RawConfigParser, eggs: Sequence[Path]
) -> dict[str, list[str]]:
    """Requirements by the name of their extra or group, "" those without a name."""
    found: dict[str, list[str]] = {}
    project = table.get("project", {})
    groups = {"": project.get("dependencies", []), **project.get("optional-dependencies", {})}
    for name, entries in (*groups.items(), *table.get("dependency-groups", {}).items()):
        found.setdefault(name, []).extend(entry for entry in entries if isinstance(entry, str))
    found.setdefault("", []).extend(old.get("options", "install_requires", fallback="").splitlines())
    found.setdefault("tests", []).extend(old.get("options", "tests_require", fallback="").splitlines())
    if old.has_section("options.extras_require"):
        for name, text in old.items("options.extras_require"):
            found.setdefault(name, []).extend(text.splitlines())
    for egg in eggs[:1]:
        name, condition = "", ""
        for line in _text(egg / "requires.txt").splitlines():
            if section := re.fullmatch(r"\[([^:\]]*):?([^\]]*)\]", line.strip()):
                name, condition = section[1], section[2]
            elif line.strip():
                found.setdefault(name, []).append(f"{line}; {condition}" if condition else line)
    return found


def _tests(
    tree: Path,
    table: dict[str, Any],
    old: configparser.RawConfigParser,
    eggs: Sequence[Path],
    required: Sequence[str],
) -> list[str]:
    """What the tests import, as far as it is declared, and the plugins that the project's configuration asks for."""
    extras = _extras(tree, table, old, eggs)
    wanted: list[str] = []
    for names in _TEST_EXTRAS:
        for name in names:
            wanted += [*extras.get(name, []), *_usable(required, extra=name, only=True)]
        if wanted:
            break
    for pattern in _TEST_FILES:
        for path in sorted(tree.glob(pattern)):
            wanted += [line.partition("#")[0] for line in _text(path).splitlines()]
    said = "\n".join(_text(tree / name) for name in ("pytest.ini", "tox.ini", "setup.cfg", "pyproject.toml"))
    wanted += [plugin for sign, plugin in _PLUGINS.items() if re.search(sign, said, re.MULTILINE)]
    return [w for w in _usable(wanted) if canonicalize_name(Requirement(w).name) not in _NO_TESTS]


def _usable(requirements: Iterable[str], *, extra: str = "", only: bool = False) -> list[str]:
    """Those that hold here, without markers and each once; `only`: those that the extra adds."""
    found: dict[str, str] = {}
    for text in requirements:
        try:
            requirement = Requirement(text.strip())
        except InvalidRequirement:  # blank, an option of pip, a reference to another file
            continue
        marker = requirement.marker
        if marker is not None and not marker.evaluate({"extra": extra}):
            continue
        if only and (marker is None or marker.evaluate({"extra": ""})):
            continue
        requirement.marker = None
        found.setdefault(canonicalize_name(requirement.name), str(requirement))
    return sorted(found.values())


# The site


def _install(word: str, requirements: Sequence[str], to: Path, timeout_s: float) -> None:
    if requirements:
        options = ["--target", str(to), "--upgrade", "--only-binary", ":all:", "--no-compile"]
        _pip(word, ["install", *options, *requirements], timeout_s)


def _pip(word: str, command: Sequence[str], timeout_s: float) -> None:
    options = ["--quiet", "--disable-pip-version-check", "--no-input"]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pip", *command[:1], *options, *command[1:]],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"source.package={word}: pip {command[0]} did not end in {timeout_s:g} s; raise source.fetch_s"
        ) from None
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")] or ["no reason given"]
        raise ValueError(
            f"source.package={word}: pip {command[0]} failed: {errors[-1].removeprefix('ERROR: ')}; "
            "give a name and version that the package index has"
        )


def _remove(site: Path, project: Project) -> None:
    """The project itself, which a requirement may have brought, other copies of its modules, and the runner."""
    for description in site.glob("*.dist-info"):
        name = canonicalize_name(description.name.removesuffix(".dist-info").rpartition("-")[0])
        if name == project.name or name in RUNNER:
            shutil.rmtree(description)
    for path in sorted(site.rglob("*"), reverse=True):
        top = path.parent == site
        ours = path.name.removesuffix(".py") in project.modules and (top or "_vendor" in path.parts)
        if (ours or (top and path.name.removesuffix(".py") in RUNNER) or path.name == "__pycache__") and path.exists():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(site / "bin", ignore_errors=True)  # its programs name the interpreter that installed them
