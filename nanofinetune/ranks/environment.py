"""The world of one run: which rank this process is, the process group, and what the ranks say to each other.

>>> read_environment({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
...                   "MASTER_ADDR": "node1", "MASTER_PORT": "29500"})
Launch(launcher='torchrun', rank=3, local_rank=1, size=4, local_size=2, init_method='env://')
>>> first_host("rack[2-3]n[07-09,11],login1")
'rack2n07'

Underneath: `accelerate.state.PartialState`, `accelerate.utils.operations.gather`, `accelerate.utils.operations.reduce`,
`accelerate.utils.operations.broadcast`, `accelerate.utils.operations.pad_across_processes`,
`accelerate.utils.operations.gather_object`, `accelerate.utils.operations.broadcast_object_list` and
`accelerate.utils.set_seed` (accelerate 1.15). `PartialState` is one dictionary shared by all its instances and picks
among a dozen backends. Its collectives walk a nested container and call `torch.distributed` leaf by leaf; where the
ranks disagree about a shape they hang or return garbage. Kept: names, arguments, results, the early return at one
process. Left out: XLA, NPU and the rest. Different on purpose: (1) torchrun on a machine without a GPU is real training
over gloo, where Accelerate runs N silent copies; (2) before each collective the ranks exchange one small header (which
call, shapes, dtypes; it costs two short all-gathers), so that a disagreement raises on all ranks and says who holds
what; (3) ranks wait 5 minutes for each other, not gloo's 30; (4) a failure inside `main_process_first` reaches all
ranks at once; (5) the state is a `World` that is passed around, not a global; (6) the ranks of a restart meet each
other, and not what torchrun's store still knows of the dead ones.

Proof: test_read_environment_table, test_collectives_match_accelerate, test_single_process_matches_accelerate,
test_disagreement_raises_on_all_ranks, test_main_process_first_failure_reaches_all_ranks,
test_set_seed_matches_accelerate, test_torchrun_on_cpu_is_one_world_where_accelerate_runs_copies and
test_an_attempt_never_meets_the_dead in tests/test_distributed.py; test_restarted_ranks_meet_each_other in
tests/test_launch.py; test_two_nodes_restart_together in tests/test_nodes.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from nanofinetune.ground.errors import UsageError

START = "start with `launch.sh` or `torchrun`"


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
    """torchrun's, SLURM's or no launcher's variables -> the place of this process. Pure: `environ` is all it reads.

    In this order: LOCAL_RANK (torchrun's worker), SLURM_PROCID with SLURM_NTASKS > 1 (srun's task), else one process.

    Raises:
        UsageError: the variables are incomplete, or promise several processes without making this one of them.
    """
    if environ.get("LOCAL_RANK", "-1") != "-1":
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
        rank, local_rank, size, local_size, _ = (_integer(environ, name) for name in names)
        if not (0 <= local_rank <= rank < size and local_rank < local_size <= size and environ.get("MASTER_ADDR")):
            values = " ".join(f"{name}={environ.get(name, '')}" for name in (*names, "MASTER_ADDR"))
            raise UsageError(f"{values} do not fit together: {START}, which set them")
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


def first_host(nodelist: str) -> str:
    """The first line of `scontrol show hostnames NODELIST`, without calling it."""
    first = re.match(r"(?:[^,\[]|\[[^]]*\])+", nodelist)
    if first is None:
        raise UsageError(f"SLURM_JOB_NODELIST={nodelist!r} names no host: set MASTER_ADDR to the first node's name")
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", first[0])


def _read_slurm(environ: Mapping[str, str]) -> Launch:
    size = _integer(environ, "SLURM_NTASKS")
    if "SLURM_STEP_ID" not in environ:  # the shell of sbatch has SLURM_PROCID=0 and the job's SLURM_NTASKS too
        raise UsageError(f"SLURM_NTASKS={size}, but srun did not start this process: use `srun python ...`, or {START}")
    rank, local_rank = _integer(environ, "SLURM_PROCID"), _integer(environ, "SLURM_LOCALID")
    tasks: list[int] = []  # of each node: "4(x2),1" is three nodes with 4, 4 and 1
    for count, repeat in re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_TASKS_PER_NODE", "")):
        tasks += [int(count)] * int(repeat or 1)
    node = int(environ.get("SLURM_NODEID", "0"))
    local_size = tasks[node] if node < len(tasks) else int(environ.get("SLURM_NTASKS_PER_NODE", "1"))
    host = environ.get("MASTER_ADDR") or first_host(environ.get("SLURM_JOB_NODELIST", ""))
    # The same for all tasks, mostly another one for another job, and below the ports that Linux hands out (32768 up).
    port = environ.get("MASTER_PORT") or 15000 + _integer(environ, "SLURM_JOB_ID") % 15000
    return Launch("slurm", rank, local_rank, size, local_size, f"tcp://{host}:{port}")


def _integer(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except KeyError:
        known = "SLURM_PROCID" if name.startswith("SLURM") else "LOCAL_RANK"
        raise UsageError(f"{known} is set but {name} is not: {START}, which set both") from None
    except ValueError:
        raise UsageError(f"{name}={environ[name]!r} is not a whole number") from None
