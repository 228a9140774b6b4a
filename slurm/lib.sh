# shellcheck shell=bash
# Functions for all scripts in this folder; source this file, do not run it. Functions are tip_*, values TIP_* (site.sh).
# The script that sources it must set TIP_ROOT, the repository.

# Exit code of `megatron-tip train` that means: stopped by a signal, checkpoint written, run me again.
TIP_EXIT_RESUMABLE=75

tip_log() {
  printf '%s %s\n' "$(date '+%F %T')" "$*" >&2
}

tip_fail() {
  tip_log "error: $*"
  exit 2
}

# Reads the site's values and sets the environment of every task. From here on the script remembers a warning before the
# time limit; until the workers exist, nothing else receives it.
TIP_WARNED=
tip_setup() {
  trap 'TIP_WARNED=1' USR1
  # shellcheck source=slurm/site.sh
  source "${MEGATRON_TIP_SITE:-$TIP_ROOT/slurm/site.sh}"
  if [[ -n $TIP_PROLOGUE ]]; then eval "$TIP_PROLOGUE"; fi
  if [[ -z $TIP_GPUS_PER_NODE ]]; then
    TIP_GPUS_PER_NODE=${SLURM_GPUS_ON_NODE:-$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)}
    # An empty list, other than none at all, asks for the CPU.
    if [[ -z ${CUDA_VISIBLE_DEVICES-unset} ]]; then TIP_GPUS_PER_NODE=0; fi
  fi
  if [[ -z $TIP_TASKS_PER_NODE ]]; then TIP_TASKS_PER_NODE=$((TIP_GPUS_PER_NODE > 0 ? TIP_GPUS_PER_NODE : 1)); fi
  export TIP_GPUS_PER_NODE # a worker that is promised GPUs and sees none refuses to run
  if [[ -z $TIP_PYTHON ]]; then
    if [[ -n $TIP_CONTAINER_IMAGE ]]; then TIP_PYTHON=python3; else TIP_PYTHON=$TIP_ROOT/.venv/bin/python; fi
  fi
  export PYTHONPATH=$TIP_ROOT${PYTHONPATH:+:$PYTHONPATH}
  export PYTHONUNBUFFERED=1
  tip_network
  tip_log "job ${SLURM_JOB_ID:-none}, restart ${SLURM_RESTART_COUNT:-0}, nodes ${SLURM_JOB_NODELIST:-none}," \
    "$TIP_TASKS_PER_NODE tasks and $TIP_GPUS_PER_NODE GPUs per node${TIP_CONTAINER_IMAGE:+, container $TIP_CONTAINER_IMAGE}"
}

# Exports the network settings; a value that the caller has already exported takes precedence.
tip_network() {
  export NCCL_DEBUG=${NCCL_DEBUG:-$TIP_NCCL_DEBUG}
  if [[ -n $TIP_NCCL_IB_HCA ]]; then export NCCL_IB_HCA=${NCCL_IB_HCA:-$TIP_NCCL_IB_HCA}; fi
  if [[ -n $TIP_NCCL_IB_GID_INDEX ]]; then export NCCL_IB_GID_INDEX=${NCCL_IB_GID_INDEX:-$TIP_NCCL_IB_GID_INDEX}; fi
  if [[ -n $TIP_SOCKET_IFNAME ]]; then
    export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$TIP_SOCKET_IFNAME}
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$TIP_SOCKET_IFNAME}
  fi
  # A collective that a dead peer will never join raises an error instead of waiting for its timeout.
  export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
  # Megatron overlaps tensor-parallel communication with computation only if kernels start in launch order.
  export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
}

# tip_address NODE: the address at which other nodes reach it. NodeAddr may differ from the node's name.
tip_address() {
  local address
  address=$(scontrol show node "$1" | grep -oE 'NodeAddr=[^ ]+' | head -n 1)
  [[ -n $address ]] || tip_fail "scontrol show node $1: expected a NodeAddr, got none"
  printf '%s\n' "${address#NodeAddr=}"
}

# tip_srun_arguments NODES TASKS_PER_NODE [NODELIST]: prints the arguments of srun, one per line.
tip_srun_arguments() {
  local nodes=$1 tasks=$2 nodelist=${3:-}
  printf '%s\n' --kill-on-bad-exit=1 --nodes="$nodes" --ntasks="$((nodes * tasks))" --ntasks-per-node="$tasks" --label
  if [[ -n ${SLURM_CPUS_ON_NODE:-} ]]; then
    printf '%s\n' --cpus-per-task="$((SLURM_CPUS_ON_NODE >= tasks ? SLURM_CPUS_ON_NODE / tasks : 1))"
  fi
  if [[ -n $nodelist ]]; then printf '%s\n' --nodelist="$nodelist"; fi
  if [[ -n $TIP_CONTAINER_IMAGE ]]; then
    # Root is not remapped, so that the run's files belong to the user. The working directory is the same as outside.
    printf '%s\n' --container-image="$TIP_CONTAINER_IMAGE" --no-container-mount-home --no-container-remap-root \
      --container-mounts="$TIP_ROOT:$TIP_ROOT${TIP_CONTAINER_MOUNTS:+,$TIP_CONTAINER_MOUNTS}" --container-workdir="$PWD"
  fi
}

# tip_newest_checkpoint: prints the name of the run's newest checkpoint, such as step_000020; nothing without one.
TIP_FOLDER=
TIP_CHECKPOINT_BEFORE=
tip_newest_checkpoint() {
  local found=("$TIP_FOLDER"/checkpoints/step_*)
  if [[ -n $TIP_FOLDER && -e ${found[0]} ]]; then printf '%s\n' "${found[@]##*/}" | sort -V | tail -n 1; fi
}

# tip_train NODES NODELIST CONFIG [section.key=value ...]: trains on those nodes and returns srun's exit code.
tip_train() {
  local nodes=$1 nodelist=$2 first
  shift 2
  first=$(scontrol show hostnames "$nodelist" | head -n 1)
  # tip_fail within $(...) ends only that subshell; an assignment of its own returns its exit code.
  if [[ -z ${MASTER_ADDR:-} ]]; then MASTER_ADDR=$(tip_address "$first") || exit; fi
  export MASTER_ADDR
  TIP_FOLDER=$(tip_setting run.folder "$@" 2>/dev/null) || TIP_FOLDER= # the run itself says what is wrong
  TIP_CHECKPOINT_BEFORE=$(tip_newest_checkpoint)
  mapfile -t arguments < <(tip_srun_arguments "$nodes" "$TIP_TASKS_PER_NODE" "$nodelist")
  tip_run srun "${arguments[@]}" "$TIP_PYTHON" -m megatron_tip.cli train "$@"
}

# tip_serve CONFIG [section.key=value ...]: starts the SGLang servers that the placement has on the job's nodes, if it is
# for the job to start them, and puts the trainer's further settings into TIP_SERVED. A server reads its arguments and
# passwords from its standard input, and exits when that closes. tip_wait_for_servers then waits until all of them answer.
TIP_SERVER_INPUTS=()
TIP_SERVER_PROCESSES=()
TIP_URLS=()
TIP_SERVED=()
tip_serve() {
  local nodes=() addresses=() python visible node address lines kind role index gpus url arguments options input
  if ((TIP_ROLLOUT_NODES + TIP_TEACHER_NODES == 0)); then
    # On a single node the run starts its servers itself; without any, no interpreter is needed here.
    if ((SLURM_JOB_NUM_NODES == 1)) || ! { [[ $* == *sglang* ]] || grep -q sglang "$1"; }; then return 0; fi
  fi
  mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  for node in "${nodes[@]}"; do
    address=$(tip_address "$node") || exit
    addresses+=("$address")
  done
  export TIP_TASKS_PER_NODE TIP_ROLLOUT_NODES TIP_TEACHER_NODES TIP_SGLANG_PORT TIP_SGLANG_ARGUMENTS
  mapfile -t python < <(tip_python)
  lines=$("${python[@]}" -m megatron_tip.commands.serving servers "$(tip_joined "${addresses[@]}")" "$@") || exit 2
  while IFS=$'\t' read -r kind role index gpus url arguments; do
    if [[ $kind == trainer ]]; then TIP_SERVED+=("$role"); fi
    if [[ $kind != server ]]; then continue; fi
    mapfile -t options < <(tip_srun_arguments 1 1 "${nodes[index]}")
    visible=()
    if [[ $gpus != - ]]; then visible=("CUDA_VISIBLE_DEVICES=$gpus"); fi
    # --overlap: servers and the trainer's step may share nodes. env: takes effect after SLURM sets the variable itself.
    exec {input}> >(exec srun "${options[@]}" --overlap \
      env "${visible[@]}" "$TIP_PYTHON" -m megatron_tip.rollout.sglang.main)
    TIP_SERVER_PROCESSES+=("$!")
    TIP_SERVER_INPUTS+=("$input")
    printf '%s\n' "$arguments" >&"$input"
    if [[ $url != - ]]; then TIP_URLS+=("$url"); fi
  done <<<"$lines"
  tip_log "servers: ${TIP_URLS[*]:-started by the run}"
}

tip_wait_for_servers() {
  local python processes=("${TIP_SERVER_PROCESSES[@]}")
  if ((${#TIP_URLS[@]} == 0)); then return 0; fi
  tip_log "waiting for ${#TIP_URLS[@]} servers"
  mapfile -t python < <(tip_python)
  if [[ -n $TIP_CONTAINER_IMAGE ]]; then processes=(); fi # it need not see the processes outside
  tip_run "${python[@]}" -m megatron_tip.commands.serving wait "$TIP_SGLANG_START_SECONDS" \
    "$(tip_joined "${processes[@]}")" "${TIP_URLS[@]}" || tip_finish "$?"
}

tip_stop_servers() {
  local input
  for input in "${TIP_SERVER_INPUTS[@]}"; do exec {input}>&-; done
  TIP_SERVER_INPUTS=()
}

# tip_python: prints the command that runs the interpreter from the batch node, one word per line. The interpreter may
# exist in the container alone.
tip_python() {
  if [[ -n $TIP_CONTAINER_IMAGE ]]; then
    printf '%s\n' srun --overlap
    tip_srun_arguments 1 1 | grep -v -e --label
  fi
  printf '%s\n' "$TIP_PYTHON"
}

# tip_setting SECTION.KEY CONFIG [section.key=value ...]: prints one value of the configuration.
tip_setting() {
  local name=$1 python
  shift
  mapfile -t python < <(tip_python)
  "${python[@]}" -c 'import sys; from megatron_tip.config.io import load_config
config = load_config(sys.argv[2], sys.argv[3:])
section, key = sys.argv[1].split(".")
print(getattr(getattr(config, section), key))' "$name" "$@"
}

# tip_sweep_run SWEEP INDEX: prints the configuration file of a sweep's run, then its overrides, one per line.
tip_sweep_run() {
  local python
  mapfile -t python < <(tip_python)
  "${python[@]}" -m megatron_tip.cli sweep "$1" --run "$2"
}

# tip_joined WORD...: prints the words with commas between them.
tip_joined() { (IFS=, && printf '%s\n' "$*"); }

# tip_run COMMAND...: runs the command and returns its exit code. It forwards SIGUSR1 (the warning before a time limit,
# from --signal=B:USR1@...) and SIGTERM to the command, and srun forwards them to every task. TIP_WARNED records that
# SIGUSR1 came; if it came earlier, the command is not run.
tip_run() {
  local code=0 child
  if [[ -n $TIP_WARNED ]]; then return "$TIP_EXIT_RESUMABLE"; fi
  "$@" &
  child=$!
  # shellcheck disable=SC2064  # expand now: this child
  trap "TIP_WARNED=1; tip_forward USR1 $child" USR1
  # shellcheck disable=SC2064
  trap "tip_forward TERM $child" TERM
  if [[ -n $TIP_WARNED ]]; then tip_forward USR1 "$child"; fi # the signal came between starting the child and the trap
  wait "$child" || code=$?
  # A trap ends `wait` early, while the child is still running.
  while kill -0 "$child" 2>/dev/null; do
    code=0
    wait "$child" || code=$?
  done
  trap 'TIP_WARNED=1' USR1
  trap - TERM
  return "$code"
}

tip_forward() {
  tip_log "SIG$1: the workers write a checkpoint and end"
  kill -s "$1" "$2" 2>/dev/null || true
}

# tip_finish CODE: ends the script, and requeues the job if the warning before the time limit ended a run that can
# continue and has another newest checkpoint than when this start began: a run that had no time for a step would not have
# it the next time either. It does not requeue after scancel: a user who cancels a job does not want it back. SLURM itself
# requeues after pre-emption (PreemptMode=REQUEUE) and node failure. A warning that comes while the workers are still
# starting ends them by the signal itself, and srun ends the remaining ones by SIGTERM or SIGKILL a moment after the first:
# nothing is lost. A task of an array needs its array name: the last task's own number means the whole array.
tip_finish() {
  local code=$1 job=$SLURM_JOB_ID newest
  if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
  tip_stop_servers
  newest=$(tip_newest_checkpoint)
  if [[ -n $TIP_WARNED ]]; then
    case $((code - 128)) in "$(kill -l USR1)" | "$(kill -l TERM)" | "$(kill -l KILL)") code=$TIP_EXIT_RESUMABLE ;; esac
  fi
  if ((code == 0)); then
    tip_log "finished"
  elif ((code != TIP_EXIT_RESUMABLE)); then
    tip_log "failed with exit code $code; the first error is above"
  elif [[ -z $TIP_WARNED ]]; then
    if [[ -n $newest ]]; then newest="with a checkpoint"; else newest="before the first step was done"; fi
    tip_log "stopped $newest; submit the same command again to continue"
  elif [[ $newest == "$TIP_CHECKPOINT_BEFORE" ]]; then
    tip_log "not requeued: this start finished no step (newest checkpoint: ${newest:-none}), and the next one would not" \
      "either; submit the same command again with a longer --time"
  elif ((${SLURM_RESTART_COUNT:-0} >= TIP_MAX_RESTARTS)); then
    tip_log "not requeued: restarted $SLURM_RESTART_COUNT times already (TIP_MAX_RESTARTS)"
  else
    tip_log "requeued: the run continues from its last checkpoint, $newest" # SLURM may end this script during the next line
    scontrol requeue "$job" || tip_log "but the requeue failed (see above); submit the same command again to continue"
  fi
  exit "$code"
}
