# What README.md's "Install for GPUs" installs, as an image for a cluster. It has not been built: a test only compares its
# commands with README.md and pyproject.toml.
#
#   docker build --tag megatron-tip .
#   docker run --gpus all --ipc host megatron-tip megatron-tip doctor
#   enroot import --output megatron-tip.sqsh dockerd://megatron-tip     # TIP_CONTAINER_IMAGE of slurm/site.sh
#
# The base has the compiler and the headers of CUDA and cuDNN that Transformer Engine is built with. Its CUDA must be of
# the major version that torch is built for; --build-arg BASE=... chooses another.
ARG BASE=nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04
FROM ${BASE}

# ibverbs: InfiniBand for NCCL. numa: SGLang.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        build-essential git ibverbs-providers libibverbs1 libnuma1 python3.12 python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/*

RUN python3.12 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /opt/megatron_tip
COPY pyproject.toml README.md LICENSE ./
COPY megatron_tip megatron_tip
# SGLang pins torch; on Linux, PyPI's build is for CUDA.
RUN pip install --editable ".[tasks,sglang,tracking,monitoring]"
RUN pip install "setuptools>=77" wheel
RUN pip install --no-build-isolation --editable ".[transformer-engine]"
COPY examples examples
COPY slurm slurm
COPY tools tools
