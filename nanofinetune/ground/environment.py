"""What a launcher says in environment variables: which rank this process is, and how it shall train. Nothing else.

>>> read_environment({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
...                   "MASTER_ADDR": "node1", "MASTER_PORT": "29500"})
Launch(launcher='torchrun', rank=3, local_rank=1, size=4, local_size=2, init_method='env://')
>>> first_host("rack[2-3]n[07-09,11],login1")
'rack2n07'
>>> read_settings({"ACCELERATE_USE_CPU": "True", "ACCELERATE_DYNAMO_BACKEND": "NO"})
Settings(cpu=True, accumulation=None)

Underneath: `accelerate.state.PartialState`, `accelerate.state.AcceleratorState` (accelerate 1.15).
  - It looks for LOCAL_RANK, and on a CPU for mpirun's variables. What is missing gets a default.
  - Kept: torchrun's variables. SLURM's are read as well, so `srun python train.py` needs no launcher.
  - Left out: mpirun, which is refused.
  - Variables that promise several processes, but do not say which of them this is, raise: each process would train a
    model of its own, and nothing would look wrong.
  - What `accelerate launch` says beyond that is kept too, or refused by name. There
    ACCELERATE_GRADIENT_ACCUMULATION_STEPS overrules even the argument; here the two must agree.

Proof: test_read_environment_table, test_read_environment_refuses_what_would_be_silent_copies,
test_what_accelerate_launch_says_matches_accelerate in tests/ground/test_environment.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from nanofinetune.ground.errors import UsageError

START = "start with `launch.sh` or `torchrun`"
YES, NO = ("y", "yes", "t", "true", "on", "1"), ("n", "no", "f", "false", "off", "0")  # as accelerate reads them


@dataclass(frozen=True)
class Launch:
    """What the environment says about this process. `launcher` is torchrun, slurm or none."""

    launcher: str = "none"
    rank: int = 0
    local_rank: int = 0
    size: int = 1
    local_size: int = 1
    init_method: str = "env://"


def read_environment(environ: Mapping[str, str]) -> Launch:
    """The variables of torchrun, of SLURM or of no launcher -> the place of this process. Reads nothing but `environ`.

    In this order: LOCAL_RANK (a worker of torchrun), SLURM_PROCID with SLURM_NTASKS > 1 (a task of srun), else one
    process. Source: accelerate.state.PartialState.

    Raises:
        UsageError: the variables are incomplete, or promise several processes without saying which one this is.
    """
    if environ.get("LOCAL_RANK", "-1") != "-1":
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
        rank, local_rank, size, local_size, port = (whole_number(environ, name) for name in names)
        if not (0 <= local_rank <= rank < size and local_rank < local_size <= size and environ.get("MASTER_ADDR")):
            values = " ".join(f"{name}={environ.get(name, '')}" for name in (*names, "MASTER_ADDR"))
            raise UsageError(f"{values} do not fit together: {START}, which set them")
        _check_port(port)
        return Launch("torchrun", rank, local_rank, size, local_size)
    if "SLURM_PROCID" in environ and environ.get("SLURM_NTASKS", "1") != "1":
        return _read_slurm(environ)
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"):
        if environ.get(name, "1") != "1":
            raise UsageError(f"{name}={environ[name]}: mpirun is not supported; {START}")
    # underneath: Kubeflow's PyTorchJob counts pods in RANK and WORLD_SIZE; Trainer v2 sets torchrun's PET_* options.
    for name in ("WORLD_SIZE", "PET_NNODES", "PET_NPROC_PER_NODE"):
        if environ.get(name, "1") != "1":
            raise UsageError(
                f"{name}={environ[name]} without LOCAL_RANK counts pods or nodes, not processes:"
                " start each of them with `launch.sh` or `torchrun`, which start the processes"
            )
    return Launch()


@dataclass(frozen=True)
class Settings:
    """What `accelerate launch` says about the training, apart from the precision (ground/precision.py)."""

    cpu: bool = False
    accumulation: int | None = None  # micro-batches of a window


def read_settings(environ: Mapping[str, str]) -> Settings:
    """The variables of `accelerate launch` that change a training. Source: accelerate.state.AcceleratorState.

    Raises:
        UsageError: they ask for what is not here, or cannot be read.
    """
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true":
            raise UsageError(f"ACCELERATE_USE_{name}=true is not supported here: launch without it, or use accelerate")
    if (compiler := environ.get("ACCELERATE_DYNAMO_BACKEND") or "no").lower() != "no":
        raise UsageError(f"ACCELERATE_DYNAMO_BACKEND={compiler} is not supported here: launch with no")
    cpu, steps = environ.get("ACCELERATE_USE_CPU") or "no", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
    if cpu.lower() not in YES + NO:
        raise UsageError(f"ACCELERATE_USE_CPU={cpu} is neither yes nor no: use true or false")
    return Settings(cpu.lower() in YES, whole_number(environ, steps) if environ.get(steps) else None)


def first_host(nodelist: str) -> str:
    """The first line of `scontrol show hostnames NODELIST`, without calling it."""
    first = re.match(r"(?:[^,\[]|\[[^]]*\])+", nodelist)
    if first is None:
        raise UsageError(f"SLURM_JOB_NODELIST={nodelist!r} names no host: set MASTER_ADDR to the first node's name")
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", first[0])


def whole_number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    """The value of a variable, or the default where it is not set.

    Raises UsageError for anything else than an optional sign and digits, or where it is not set and must be.
    """
    value = environ.get(name)
    if value is None and default is not None:
        return default
    if value is None:
        known = "SLURM_PROCID" if name.startswith("SLURM") else "LOCAL_RANK"
        raise UsageError(f"{known} is set but {name} is not: {START}, which set both")
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", value.strip()):  # int() takes 1_0 too
        raise UsageError(f"{name}={value!r} is not a whole number")
    return int(value)


def _read_slurm(environ: Mapping[str, str]) -> Launch:
    size = whole_number(environ, "SLURM_NTASKS")
    if "SLURM_STEP_ID" not in environ:  # the shell of sbatch has SLURM_PROCID=0 and the job's SLURM_NTASKS too
        raise UsageError(f"SLURM_NTASKS={size}, but srun did not start this process: use `srun python ...`, or {START}")
    rank, local_rank = whole_number(environ, "SLURM_PROCID"), whole_number(environ, "SLURM_LOCALID")
    node = whole_number(environ, "SLURM_NODEID", 0)
    local_size = _tasks_of_node(environ.get("SLURM_TASKS_PER_NODE", ""), node)
    local_size = local_size or whole_number(environ, "SLURM_NTASKS_PER_NODE", 1)
    if not (0 <= local_rank <= rank < size and 0 < local_size <= size):
        names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_NODEID", "SLURM_TASKS_PER_NODE")
        values = " ".join(f"{name}={environ.get(name, '')}" for name in names)
        raise UsageError(f"{values} do not fit together: start with `srun python ...`, which sets them")
    host = environ.get("MASTER_ADDR") or first_host(environ.get("SLURM_JOB_NODELIST", ""))
    # The same for all tasks, usually different for another job, and below the ports that Linux hands out (32768 up).
    given = bool(environ.get("MASTER_PORT"))
    port = whole_number(environ, "MASTER_PORT") if given else 15000 + whole_number(environ, "SLURM_JOB_ID") % 15000
    _check_port(port)
    return Launch("slurm", rank, local_rank, size, local_size, f"tcp://{host}:{port}")


def _tasks_of_node(counts: str, node: int) -> int:
    """How many tasks the node has: "4(x2),1" is three nodes with 4, 4 and 1. 0 where that is not said."""
    for count, repeat in re.findall(r"([0-9]{1,9})(?:\(x([0-9]{1,9})\))?", counts):
        if node < int(repeat or 1):
            return int(count)
        node -= int(repeat or 1)
    return 0


def _check_port(port: int) -> None:
    if not 0 < port < 2**16:
        raise UsageError(f"MASTER_PORT={port} is not a port: choose one from 1 to 65535")
