# shellcheck shell=bash disable=SC2034  # every value is read by lib.sh
# What differs from cluster to cluster; the only file to edit. Each value may also be set in the environment before
# sbatch, and MEGATRON_TIP_SITE=/path/to/another.sh takes another file in this one's place.

# --- What `megatron-tip submit` hands to sbatch. Plain sbatch takes these from its own SBATCH_PARTITION, SBATCH_ACCOUNT
# --- and SBATCH_TIMELIMIT, or from its command line.
TIP_PARTITION=${TIP_PARTITION:-}
TIP_ACCOUNT=${TIP_ACCOUNT:-}
TIP_TIME=${TIP_TIME:-24:00:00}

# --- The nodes.
# Workers of a node, one a GPU. Empty: as many as nvidia-smi lists on the first node, one where there is none.
TIP_TASKS_PER_NODE=${TIP_TASKS_PER_NODE:-}
# Commands before anything else on the batch node: modules, proxies.
TIP_PROLOGUE=${TIP_PROLOGUE:-}

# --- The software: the interpreter that has megatron_tip, as the nodes (or the container) see it.
# Empty: .venv/bin/python of the repository, python3 in a container.
TIP_PYTHON=${TIP_PYTHON:-}
# Pyxis/Enroot: an image (a .sqsh file, or REGISTRY#IMAGE:TAG). Empty: bare metal.
TIP_CONTAINER_IMAGE=${TIP_CONTAINER_IMAGE:-}
# Host folders that the container sees, SRC:DST,...; the repository is always mounted at its own path. Models, prompts
# and run.folder belong here, and must be on a file system that all nodes share.
TIP_CONTAINER_MOUNTS=${TIP_CONTAINER_MOUNTS:-}

# --- The network; README.md explains each value. Empty: left to NCCL.
# InfiniBand adapters of an H800 node, one a GPU; "=" matches the names exactly, so that an Ethernet or storage adapter
# of the same driver is left out. `ibstat -l` lists them.
TIP_NCCL_IB_HCA=${TIP_NCCL_IB_HCA:-}
# Interface of NCCL's and gloo's first contact (not of the data), such as bond0 or eth0.
TIP_SOCKET_IFNAME=${TIP_SOCKET_IFNAME:-}
# RoCE alone: the index of the RoCE v2 entry in `show_gids`, the same on all nodes.
TIP_NCCL_IB_GID_INDEX=${TIP_NCCL_IB_GID_INDEX:-}
# INFO shows which transport NCCL took: look for NET/IB and GPU Direct RDMA once, then go back to WARN.
TIP_NCCL_DEBUG=${TIP_NCCL_DEBUG:-WARN}

# --- SGLang's servers.
# First port on each node; server i of a node takes the i-th behind it.
TIP_SGLANG_PORT=${TIP_SGLANG_PORT:-31000}
# GPUs of one server.
TIP_SGLANG_TP=${TIP_SGLANG_TP:-1}
# train.sbatch: servers on each trainer node, on the trainer's own GPUs; 0: rollouts as the configuration says.
TIP_SGLANG_PER_NODE=${TIP_SGLANG_PER_NODE:-0}
# Share of a GPU's memory for a server's weights and cache: beside a trainer, and alone on its node.
TIP_SGLANG_SHARED_MEMORY=${TIP_SGLANG_SHARED_MEMORY:-0.3}
TIP_SGLANG_OWN_MEMORY=${TIP_SGLANG_OWN_MEMORY:-0.85}
# Further arguments of SGLang's command line for every server, separated by spaces.
TIP_SGLANG_ARGUMENTS=${TIP_SGLANG_ARGUMENTS:-}
# Seconds until servers must answer.
TIP_SGLANG_START_SECONDS=${TIP_SGLANG_START_SECONDS:-900}

# --- Requeues.
# After so many restarts of one job it ends instead of going back to the queue.
TIP_MAX_RESTARTS=${TIP_MAX_RESTARTS:-100}
