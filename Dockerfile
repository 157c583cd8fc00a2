# MegaTrain in a container, for one NVIDIA GPU. How to build and run it: docs/docker.md.
#
# Not built yet where this was written: there was no engine to build it with. It is linted (hadolint), and a test
# reads it.
#
# docker run wants:
#   --gpus all               the GPU, through the NVIDIA Container Toolkit
#   -v hub:/cache            models, datasets, tokens and compiled kernels outlive the container
#   --ulimit memlock=-1      only if page-locking host memory fails: NVIDIA's Linux driver does not count what it locks
#   --shm-size=8g            only for PyTorch data loaders with worker processes, such as a Trainer's

# 13.0: the CUDA that the locked PyTorch is built for; its wheels bring the libraries, so `base` is enough. Ubuntu 24.04
# has Python 3.12.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# gcc and Python's headers: Triton builds a launcher for its kernels (engine.kernels: liger, engine.compile: blocks).
# Ubuntu's archive keeps one version of a package, so that pinning it would break the build at the next update.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev numactl python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/megatrain
ENV PATH=/opt/megatrain/bin:$PATH
RUN python3 -m venv "$VIRTUAL_ENV"

# Every dependency by version and hash. A layer of its own: sources change more often.
COPY requirements-extras.lock /build/
RUN pip install --no-cache-dir --require-hashes --only-binary :all: -r /build/requirements-extras.lock

COPY pyproject.toml README.md LICENSE /build/
COPY src /build/src
RUN pip install --no-cache-dir --no-deps --no-build-isolation /build && rm -rf /build

# Open to all users, since `docker run --user` may name any; files in it are their owner's.
RUN useradd --create-home --uid 10001 trainer \
    && mkdir --mode 1777 /cache \
    && install --directory --owner trainer --group trainer /work
ENV HF_HOME=/cache/huggingface \
    XDG_CACHE_HOME=/cache \
    NUMBA_CACHE_DIR=/cache/numba \
    TRITON_CACHE_DIR=/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor
VOLUME /cache

USER 10001
WORKDIR /work
# As Ctrl-C: the step is finished and saved (`docker stop --time 600`).
STOPSIGNAL SIGINT
ENTRYPOINT ["megatrain"]
CMD ["doctor"]
