# syntax=docker/dockerfile:1
# docker build --target cpu -t entropo-ray:cpu .      then: docker run --rm entropo-ray:cpu python jobs/iterate.py --help
# docker build --target gpu -t entropo-ray:0.1.0 .    the image that conf/kuberay names
#
# Sandboxes need user namespaces, which Docker's default profiles forbid: run with
#   --security-opt seccomp=unconfined --security-opt apparmor=unconfined --security-opt systempaths=unconfined

FROM python:3.11-slim AS cpu
ARG RAY_VERSION=2.60.0
# compilers: torch and vLLM build small kernels at run time; wget: KubeRay's probes
RUN apt-get update \
 && apt-get install -y --no-install-recommends bubblewrap git build-essential libnuma1 wget \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY requirements/cpu.txt requirements/
RUN pip install --no-cache-dir --no-deps -r requirements/cpu.txt \
 && python -c "import importlib.metadata as m; assert m.version('ray') == '$RAY_VERSION', m.version('ray')"
COPY . .
RUN useradd --create-home --uid 1000 ray && chown ray /app
USER ray
ENV PYTHONPATH=/app PYTHONUNBUFFERED=1
CMD ["python", "jobs/iterate.py", "--help"]

FROM nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04 AS gpu
ARG RAY_VERSION=2.60.0
ENV DEBIAN_FRONTEND=noninteractive
RUN apt-get update \
 && apt-get install -y --no-install-recommends \
    bubblewrap git build-essential libnuma1 wget python3 python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*
# an environment of its own puts `python` on the path and leaves the system's packages alone
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY entropo_ray/__init__.py entropo_ray/
RUN pip install --no-cache-dir '.[gpu,k8s]' \
 && pip uninstall -y entropo_ray \
 && python -c "import importlib.metadata as m; assert m.version('ray') == '$RAY_VERSION', m.version('ray')"
COPY . .
# Ubuntu's image has a user 1000 already
RUN usermod --login ray --move-home --home /home/ray ubuntu && chown ray /app
USER ray
ENV PYTHONPATH=/app PYTHONUNBUFFERED=1
CMD ["python", "jobs/iterate.py", "--help"]
