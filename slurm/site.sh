# shellcheck shell=bash disable=SC2034  # every value is read by lib.sh
# The values that differ from cluster to cluster; the only file to edit. Each value may also be set in the environment
# before sbatch, and MEGATRON_TIP_SITE=/path/to/another.sh replaces this file by another.

# --- What `megatron-tip submit` passes to sbatch. Plain sbatch takes these from its own SBATCH_PARTITION, SBATCH_ACCOUNT
# --- and SBATCH_TIMELIMIT, or from its command line.
TIP_PARTITION=${TIP_PARTITION:-}
TIP_ACCOUNT=${TIP_ACCOUNT:-}
TIP_TIME=${TIP_TIME:-24:00:00}

# --- The nodes.
# GPUs per node. Empty: as many as SLURM gave the job, or as nvidia-smi lists on the first node; 0: run on CPUs.
TIP_GPUS_PER_NODE=${TIP_GPUS_PER_NODE:-}
# How `megatron-tip submit` asks SLURM for them; the number per node is appended, as in --gres=gpu: or --gpus-per-node=.
# Empty: not at all, on clusters that do not count GPUs and give whole nodes (--exclusive).
TIP_GPU_REQUEST=${TIP_GPU_REQUEST---gpus-per-node=}
# Workers per node. Empty: one per GPU, or one without GPUs. Fewer leave GPUs to SGLang servers (sglang.gpus).
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
# How many there are, their GPUs and their memory are in the configuration: rollout.servers, [sglang].
# First port on each node; server i of a node uses this port plus i. Not from 20000 to 29999: the trainer's.
TIP_SGLANG_PORT=${TIP_SGLANG_PORT:-31000}
# Additional command-line arguments of SGLang for every server, separated by spaces.
TIP_SGLANG_ARGUMENTS=${TIP_SGLANG_ARGUMENTS:-}
# Seconds within which servers must answer.
TIP_SGLANG_START_SECONDS=${TIP_SGLANG_START_SECONDS:-900}

# --- Requeues.
# After this many restarts a job ends instead of going back to the queue.
TIP_MAX_RESTARTS=${TIP_MAX_RESTARTS:-100}
