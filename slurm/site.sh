# shellcheck shell=bash disable=SC2034  # every value is read by lib.sh
# The values that differ from cluster to cluster; the only file to edit. Each value may also be set in the environment
# before sbatch, and MEGATRON_TIP_SITE=/path/to/another.sh replaces this file by another.

# --- What `megatron-tip submit` passes to sbatch. Plain sbatch takes these from its own SBATCH_PARTITION, SBATCH_ACCOUNT
# --- and SBATCH_TIMELIMIT, or from its command line.
TIP_PARTITION=${TIP_PARTITION:-}
TIP_ACCOUNT=${TIP_ACCOUNT:-}
TIP_TIME=${TIP_TIME:-24:00:00}

# --- The nodes.
# Workers per node, one per GPU. Empty: as many as nvidia-smi lists on the first node, or one without GPUs.
TIP_TASKS_PER_NODE=${TIP_TASKS_PER_NODE:-}
# Commands to run first on the batch node: modules, proxies.
TIP_PROLOGUE=${TIP_PROLOGUE:-}

# --- The software: the interpreter that has megatron_tip, as the nodes (or the container) see it.
# Empty: the repository's .venv/bin/python; in a container python3.
TIP_PYTHON=${TIP_PYTHON:-}
# Pyxis/Enroot: an image (a .sqsh file, or REGISTRY#IMAGE:TAG). Empty: bare metal.
TIP_CONTAINER_IMAGE=${TIP_CONTAINER_IMAGE:-}
# Host folders that the container sees, SRC:DST,...; the repository is always mounted at its own path. List models,
# prompts and run.folder here; they must be on a file system that all nodes share.
TIP_CONTAINER_MOUNTS=${TIP_CONTAINER_MOUNTS:-}

# --- The network; README.md explains each value. Empty: left to NCCL.
# InfiniBand adapters of an H800 node, one per GPU; "=" matches the names exactly, which excludes Ethernet and storage
# adapters of the same driver. `ibstat -l` lists them.
TIP_NCCL_IB_HCA=${TIP_NCCL_IB_HCA:-}
# Interface of NCCL's and gloo's first contact (not of the data), such as bond0 or eth0.
TIP_SOCKET_IFNAME=${TIP_SOCKET_IFNAME:-}
# RoCE only: the index of the RoCE v2 entry in `show_gids`, the same on all nodes.
TIP_NCCL_IB_GID_INDEX=${TIP_NCCL_IB_GID_INDEX:-}
# INFO shows which transport NCCL uses: look for NET/IB and GPU Direct RDMA once, then return to WARN.
TIP_NCCL_DEBUG=${TIP_NCCL_DEBUG:-WARN}

# --- SGLang servers.
# First port on each node; server i of a node uses this port plus i.
TIP_SGLANG_PORT=${TIP_SGLANG_PORT:-31000}
# GPUs of one server.
TIP_SGLANG_TP=${TIP_SGLANG_TP:-1}
# train.sbatch: servers per trainer node, on the trainer's own GPUs; 0: rollouts as the configuration says.
TIP_SGLANG_PER_NODE=${TIP_SGLANG_PER_NODE:-0}
# Share of a GPU's memory for a server's weights and cache: next to a trainer, and alone on its node.
TIP_SGLANG_SHARED_MEMORY=${TIP_SGLANG_SHARED_MEMORY:-0.3}
TIP_SGLANG_OWN_MEMORY=${TIP_SGLANG_OWN_MEMORY:-0.85}
# Additional command-line arguments of SGLang for every server, separated by spaces.
TIP_SGLANG_ARGUMENTS=${TIP_SGLANG_ARGUMENTS:-}
# Seconds within which servers must answer.
TIP_SGLANG_START_SECONDS=${TIP_SGLANG_START_SECONDS:-900}

# --- Requeues.
# After this many restarts a job ends instead of going back to the queue.
TIP_MAX_RESTARTS=${TIP_MAX_RESTARTS:-100}
