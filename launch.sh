#!/usr/bin/env bash
# Start train.py in one process, or in several through torchrun. `launch.sh --help` says what it reads.
# This file decides which processes to start. How they run and fail is in nanofinetune/launch/job.py.
#
# Underneath: `accelerate launch` and `accelerate config` (accelerate 1.15). They too choose the processes, and hand them
# to torchrun (torch 2.13).
#   - Kept: options, and a file of settings that a questionnaire writes.
#   - We also read the variables of SLURM and of Kubeflow. One node takes a free port, never 29500.
#   - N processes on a CPU are N ranks of one job; `accelerate launch --cpu` starts one process.
#   - The ranks share all cores; torchrun gives each rank one.
#   - Left out: DeepSpeed, FSDP, Megatron, mpirun, TPU pods, torch.compile, choosing GPUs by number.
#
# Proof: test_launch_sh_table in tests/launch/test_launch.py, test_config_asks_and_launch_sh_reads in
# tests/launch/test_config.py.
set -euo pipefail

usage() {
    cat <<'END'
launch.sh [-n N] [--max-restarts N] [--print] [train.py's arguments]    train
launch.sh config                                                        ask, and write launch.env

  -n N              processes on this node (default: one for each NVIDIA GPU, else 1)
  --max-restarts N  how often all processes are started again after one has failed (default 0); never after a mistake
                    of yours (exit code 2), which would only repeat
  --print           print the command instead of running it
  -- ARGUMENTS      everything after it goes to train.py (python train.py --help lists its options)

Each setting comes from the command line, else the environment, else launch.env beside this file:
  NPROC_PER_NODE                as -n                    OMP_NUM_THREADS     threads a process (default: cores / N)
  NNODES, NODE_RANK             nodes, this one's number MASTER_ADDR, MASTER_PORT  node 0 (default port 29500)
  GLOO_SOCKET_IFNAME            network interface, below MAX_RESTARTS        as --max-restarts
  NANOFINETUNE_MIXED_PRECISION  as --precision           NANOFINETUNE_DEVICE as --device

Several nodes: run it once on each, with NNODES, NODE_RANK and MASTER_ADDR. SLURM: `srun --ntasks-per-node=1 launch.sh`,
or one task for each process. Kubeflow's variables are read too. The interpreter is $PYTHON, else that of the active
environment, else .venv/bin/python beside this file, else python.

Who can connect: on one node nobody else, all listen on the loopback. On several nodes, node 0 listens at MASTER_ADDR's
address (it says so), and every rank at that of GLOO_SOCKET_IFNAME, else of the machine's name. There is no password:
use a network in which you trust everyone.
END
}

fail() { # one line, whatever it quotes: to bash's own UTF-8, what turns the text around is printable
    local LC_ALL=C
    printf 'launch.sh: %s\n' "${1//[![:print:]]/?}" >&2
    exit 2
}

# underneath: in (( )) and in [[ -gt ]] bash evaluates the text of a variable: x='a[$(rm -r ~)]' is run. So every value
# goes through `whole` before it is reckoned with.
whole() { # NAME VALUE LOWEST [HIGHEST]: print VALUE if it is a whole number from LOWEST to HIGHEST
    local highest=${4:-999999999}
    if [[ ! $2 =~ ^(0|[123456789][0123456789]{0,17})$ ]] || (($2 < $3 || $2 > highest)); then
        fail "$1 ${2:-is empty}: it must be a whole number from $3${4:+ to $4}"
    fi
    echo "$2"
}

host() { # NAME VALUE: print VALUE if it can be a machine's name or address
    [[ $2 =~ ^[A-Za-z0-9_:][A-Za-z0-9_.:%-]*$ ]] || fail "$1 $2: it must be one name or address"
    echo "$2"
}

first_host() { # SLURM's list of nodes, as in rack[2-3]n[07-09,11],login1: print the first, rack2n07
    local rest=$1 name=''
    while [[ $rest =~ ^([^][,]*)\[([^],-]+)[^]]*\](.*)$ ]]; do
        name+=${BASH_REMATCH[1]}${BASH_REMATCH[2]}
        rest=${BASH_REMATCH[3]}
    done
    echo "$name${rest%%,*}"
}

has() { # OPTION ARGUMENTS...: is OPTION, or OPTION=VALUE, among the arguments?
    local option=$1 argument
    shift
    for argument; do [[ $argument == "$option" || $argument == "$option="* ]] && return 0; done
    return 1
}

cores() { # physical ones, as torch counts, of those that this process may use
    local usable physical
    usable=$(nproc 2>/dev/null || sysctl -n hw.physicalcpu 2>/dev/null || true)
    [[ $usable =~ ^[123456789][0123456789]{0,8}$ ]] || usable=1
    physical=$(lscpu -p=core,socket 2>/dev/null | grep -v '^#' | sort -u | wc -l || true)
    echo $((physical > 0 && physical < usable ? physical : usable))
}

gpus() { # those that the processes will see
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -vc '^\(-1\)\?$' || true
    else
        nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true
    fi
}

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
script=${NANOFINETUNE_SCRIPT:-$root/train.py}
settings=${NANOFINETUNE_LAUNCH_ENV:-$root/launch.env}
if [[ -n ${PYTHON-} ]]; then
    python=$PYTHON
elif [[ -z ${VIRTUAL_ENV-}${CONDA_PREFIX-} && -x $root/.venv/bin/python ]]; then
    python=$root/.venv/bin/python
else
    python=$(command -v python || command -v python3) || fail "there is no python here; name one in PYTHON"
fi
[[ -n $(type -P -- "$python") ]] || fail "PYTHON $python: there is no such program"
# underneath: `python -m` looks for modules in the working folder first, also for torch; -P leaves that out.
start=("$python" -P -m nanofinetune.launch)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

# --- the command line ---
if [[ ${1-} == config ]]; then
    (($# == 1)) || fail "config takes no arguments: it asks"
    exec "${start[@]}" config "$settings"
fi
n='' restarts='' show=''
arguments=()
while (($#)); do
    case $1 in
        -h | --help) usage; exit ;;
        -n) n=$(whole -n "${2-}" 1); shift ;;
        -n[0-9]*) n=$(whole -n "${1#-n}" 1) ;;
        --max-restarts) restarts=$(whole --max-restarts "${2-}" 0); shift ;;
        --max-restarts=*) restarts=$(whole --max-restarts "${1#*=}" 0) ;;
        --print) show=1 ;;
        --) shift; arguments+=("$@"); break ;;
        *) arguments+=("$1") ;;
    esac
    shift
done

# --- the environment: NNODES and its like, else what SLURM or Kubeflow say in their own words ---
[[ -z ${LOCAL_RANK-} ]] ||
    fail "LOCAL_RANK=$LOCAL_RANK: a launcher has started this process already; run train.py itself"
worker=''
tasks=$(whole SLURM_NTASKS "${SLURM_NTASKS:-1}" 1)
slurm_nodes=$(whole SLURM_NNODES "${SLURM_NNODES:-1}" 1)
if [[ -n ${SLURM_STEP_ID-} ]] && ((tasks > 1)); then
    if ((tasks > slurm_nodes)); then # srun has started every process; this is one, and knows its rank
        [[ -z $n ]] || fail "-n $n: srun has started $tasks tasks; leave -n out, or use srun --ntasks-per-node=1"
        worker=1
    elif [[ -z ${NNODES-} ]]; then # one task for each node: this one starts the node's processes
        NNODES=$slurm_nodes
        NODE_RANK=${NODE_RANK:-$(whole SLURM_NODEID "${SLURM_NODEID-}" 0 $((slurm_nodes - 1)))}
        if [[ -z ${MASTER_PORT-} ]]; then # the same on all nodes, another one for another job
            job=$(whole SLURM_JOB_ID "${SLURM_JOB_ID-}" 0 99999999999)
            MASTER_PORT=$((15000 + job % 15000))
        fi
        if [[ -z ${MASTER_ADDR-} ]]; then
            list=${SLURM_STEP_NODELIST:-${SLURM_JOB_NODELIST-}}
            [[ $list =~ ^[][A-Za-z0-9_.,-]+$ && $list != -* ]] ||
                fail "SLURM_JOB_NODELIST ${list:-is empty}: set MASTER_ADDR to the first node's name"
            if command -v scontrol >/dev/null; then
                MASTER_ADDR=$(scontrol show hostnames "$list" 2>/dev/null) ||
                    fail "scontrol knows no nodes $list: set MASTER_ADDR to the first node's name"
                MASTER_ADDR=${MASTER_ADDR%%$'\n'*}
            else # a container without SLURM's programs
                MASTER_ADDR=$(first_host "$list")
            fi
        fi
    fi
elif [[ -z ${NNODES-} ]] && ((slurm_nodes > 1)); then
    fail "SLURM gave $slurm_nodes nodes and this is the shell of one: use srun --ntasks-per-node=1 launch.sh"
fi
for name in NNODES NODE_RANK NPROC_PER_NODE MASTER_ADDR MASTER_PORT MAX_RESTARTS; do # Kubeflow Trainer: torchrun's PET_*
    pet=PET_$name
    [[ -n ${!name-} || -z ${!pet-} ]] || printf -v "$name" %s "${!pet}"
done
if [[ -z ${NNODES-} && -n ${WORLD_SIZE-} && -n ${RANK-} ]]; then # in Kubeflow's PyTorchJob these two count pods
    NNODES=$WORLD_SIZE NODE_RANK=$RANK
fi

# --- launch.env: NAME=VALUE lines, read and never executed ---
if [[ -f $settings ]]; then
    [[ -r $settings ]] || fail "$settings: it cannot be read"
    while IFS='=' read -r name value || [[ -n $name ]]; do
        value=${value%$'\r'} # an editor on Windows leaves it
        case $name in
            '' | '#'* | $'\r') ;;
            NPROC_PER_NODE | NNODES | NODE_RANK | MASTER_ADDR | MASTER_PORT | MAX_RESTARTS) [[ -n ${!name-} ]] || printf -v "$name" %s "$value" ;;
            OMP_NUM_THREADS | GLOO_SOCKET_IFNAME | NANOFINETUNE_MIXED_PRECISION | NANOFINETUNE_DEVICE) [[ -n ${!name-} ]] || export "$name=$value" ;;
            *) fail "$settings: $name is not a setting; --help lists them" ;;
        esac
    done <"$settings"
fi

# --- what to start ---
[[ -f $script ]] || fail "$script: there is no such script"
[[ $script != -* ]] || script=./$script # or python would take it for an option
given=(${arguments[@]+"${arguments[@]}"}) # (an empty array is "unbound" in the bash of macOS)
if [[ -n ${NANOFINETUNE_DEVICE-} ]] && ! has --device ${given[@]+"${given[@]}"}; then
    arguments+=(--device "$NANOFINETUNE_DEVICE")
fi
if [[ -n ${NANOFINETUNE_MIXED_PRECISION-} ]] && ! has --precision ${given[@]+"${given[@]}"}; then
    arguments+=(--precision "$NANOFINETUNE_MIXED_PRECISION")
fi
restarts=${restarts:-$(whole MAX_RESTARTS "${MAX_RESTARTS:-0}" 0)}
nodes=$(whole NNODES "${NNODES:-1}" 1)
port=$(whole MASTER_PORT "${MASTER_PORT:-29500}" 1 65535)
if [[ -z $n && -n ${NPROC_PER_NODE-} && ! ${NPROC_PER_NODE-} =~ ^(auto|gpu)$ ]]; then
    n=$(whole NPROC_PER_NODE "$NPROC_PER_NODE" 1)
elif [[ -z $n && -z ${SLURM_STEP_ID-} ]] && ((tasks > 1)); then
    n=$tasks # the shell of an sbatch job on one node
elif [[ -z $n ]]; then
    n=1
    [[ " ${arguments[*]-} " =~ " --device cpu "|" --device=cpu " ]] || n=$(gpus)
    ((n > 0)) || n=1
fi

threads=''
if [[ -n $worker ]]; then
    command=("$python" "$script") # srun binds each task to its own cores
elif ((n == 1 && nodes == 1 && restarts == 0)) && [[ -z ${SLURM_PROCID-} ]]; then
    command=("$python" "$script") # one process needs no launcher, and torch takes all cores by itself
else
    if [[ -z ${OMP_NUM_THREADS-} ]]; then # underneath: torchrun would set 1
        threads=$(cores)
        threads=$((threads > n ? threads / n : 1))
    fi
    command=("${start[@]}" run)
    if ((nodes == 1)); then
        # underneath: torchrun's --standalone listens at all addresses of this machine, two ports that ask for no
        # password. nanofinetune/launch/rendezvous.py listens at 127.0.0.1 instead.
        command+=(--standalone)
    else
        [[ -n ${MASTER_ADDR-} ]] || fail "NNODES=$nodes: set MASTER_ADDR to the name or address of node 0, on all nodes"
        MASTER_ADDR=$(host MASTER_ADDR "$MASTER_ADDR")
        [[ -n ${NODE_RANK-} ]] || fail "NNODES=$nodes: set NODE_RANK to this node's number, from 0 to $((nodes - 1))"
        NODE_RANK=$(whole NODE_RANK "$NODE_RANK" 0)
        ((NODE_RANK < nodes)) || fail "NODE_RANK=$NODE_RANK: $nodes nodes are numbered from 0"
        # A static rendezvous: each node knows its number, and node 0 listens at an address that all know.
        command+=("--nnodes=$nodes" "--node-rank=$NODE_RANK" "--master-addr=$MASTER_ADDR" "--master-port=$port")
    fi
    command+=("--nproc-per-node=$n" "--max-restarts=$restarts" "$script")
fi
command+=(${arguments[@]+"${arguments[@]}"})
# torchrun reads PET_*, and train.py WORLD_SIZE; the command says it all now.
for name in "${!PET_@}"; do unset "$name"; done
[[ -n $worker ]] || unset RANK WORLD_SIZE
if [[ -n $show ]]; then
    [[ -z $threads ]] || printf 'OMP_NUM_THREADS=%s ' "$threads"
    LC_ALL=C printf '%q ' "${command[@]}"
    echo
    exit
fi
[[ -z $threads ]] || export OMP_NUM_THREADS=$threads
exec "${command[@]}"
