"""ground/environment.py on tables of variables: torchrun's, srun's, mpirun's, Kubeflow's, and broken ones.

Run: python -m pytest tests/ground/test_environment.py
"""

import pytest

from nanofinetune.ground.environment import Launch, first_host, read_environment
from nanofinetune.ground.errors import UsageError

TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_PORT": "1",
    "MASTER_ADDR": "a",
}
SLURM = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "5", "SLURM_STEP_ID": "0", "SLURM_NODEID": "1",
         "SLURM_TASKS_PER_NODE": "2(x2),1", "SLURM_JOB_ID": "31234", "SLURM_JOB_NODELIST": "n[07-08],m1"}  # fmt: skip


def without(environ, name):
    return {key: value for key, value in environ.items() if key != name}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Launch()),
        (TORCHRUN, Launch("torchrun", 5, 1, 8, 4, "env://")),
        ({**SLURM, **TORCHRUN}, Launch("torchrun", 5, 1, 8, 4, "env://")),  # torchrun inside a SLURM job
        ({"LOCAL_RANK": "-1"}, Launch()),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Launch()),  # one pod
        (SLURM, Launch("slurm", 3, 1, 5, 2, "tcp://n07:16234")),
        ({**SLURM, "SLURM_NODEID": "2"}, Launch("slurm", 3, 1, 5, 1, "tcp://n07:16234")),
        ({**SLURM, "MASTER_ADDR": "h", "MASTER_PORT": "9"}, Launch("slurm", 3, 1, 5, 2, "tcp://h:9")),
        ({**without(SLURM, "SLURM_TASKS_PER_NODE"), "SLURM_NTASKS_PER_NODE": "4"},
         Launch("slurm", 3, 1, 5, 4, "tcp://n07:16234")),
        ({**SLURM, "SLURM_NTASKS": "1"}, Launch()),  # srun with one task, or an interactive shell
        (without(SLURM, "SLURM_PROCID"), Launch()),  # salloc's shell on the login node
    ],
)  # fmt: skip
def test_read_environment_table(environ, expected):
    assert read_environment(environ) == expected


@pytest.mark.parametrize(
    ("environ", "text"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE=2 without LOCAL_RANK counts pods or nodes, not processes"),
        ({"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1"}, "PET_NNODES=2 without LOCAL_RANK counts pods"),
        ({"PET_NPROC_PER_NODE": "auto"}, "PET_NPROC_PER_NODE=auto without LOCAL_RANK counts pods"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=2: mpirun is not supported; start with `launch.sh`"),
        (without(TORCHRUN, "RANK"), "LOCAL_RANK is set but RANK is not: start with `launch.sh` or `torchrun`"),
        (without(TORCHRUN, "MASTER_ADDR"), "MASTER_ADDR= do not fit together"),
        ({**TORCHRUN, "RANK": "8"}, "RANK=8 LOCAL_RANK=1 WORLD_SIZE=8 LOCAL_WORLD_SIZE=4 .* do not fit together"),
        ({**TORCHRUN, "RANK": "two"}, "RANK='two' is not a whole number"),
        (without(SLURM, "SLURM_STEP_ID"), "SLURM_NTASKS=5, but srun did not start this process: use `srun python ...`"),
        (without(SLURM, "SLURM_LOCALID"), "SLURM_PROCID is set but SLURM_LOCALID is not"),
        (without(SLURM, "SLURM_JOB_ID"), "SLURM_PROCID is set but SLURM_JOB_ID is not"),
        ({**SLURM, "SLURM_NTASKS": "2(x3)"}, r"^SLURM_NTASKS='2\(x3\)' is not a whole number$"),
        ({**SLURM, "SLURM_NODEID": "abc"}, "^SLURM_NODEID='abc' is not a whole number$"),
        ({**SLURM, "SLURM_PROCID": "9"}, "^SLURM_PROCID=9 SLURM_LOCALID=1 SLURM_NTASKS=5 .* do not fit together"),
        ({**SLURM, "SLURM_PROCID": "-1"}, "^SLURM_PROCID=-1 .* do not fit together"),
        ({**SLURM, "SLURM_TASKS_PER_NODE": "7(x999999999)"}, "SLURM_TASKS_PER_NODE=7.* do not fit together"),
        (
            {**without(SLURM, "SLURM_TASKS_PER_NODE"), "SLURM_NTASKS_PER_NODE": "two"},
            "SLURM_NTASKS_PER_NODE='two' is not",
        ),
        ({**SLURM, "MASTER_PORT": "99999"}, "^MASTER_PORT=99999 is not a port: choose one from 1 to 65535$"),
        ({**SLURM, "MASTER_PORT": "http"}, "^MASTER_PORT='http' is not a whole number$"),
        ({**TORCHRUN, "MASTER_PORT": "99999"}, "^MASTER_PORT=99999 is not a port: choose one from 1 to 65535$"),
        ({**TORCHRUN, "MASTER_PORT": "0"}, "^MASTER_PORT=0 is not a port: choose one from 1 to 65535$"),
        ({**TORCHRUN, "LOCAL_RANK": ""}, "^LOCAL_RANK='' is not a whole number$"),
        ({**TORCHRUN, "LOCAL_RANK": "1_0"}, "^LOCAL_RANK='1_0' is not a whole number$"),
        ({**TORCHRUN, "LOCAL_RANK": "-2"}, "LOCAL_RANK=-2 .* do not fit together"),
        ({**TORCHRUN, "WORLD_SIZE": "9" * 5000}, "WORLD_SIZE='9+\\.{3}9+' is not a whole number"),
        (without(SLURM, "SLURM_JOB_NODELIST"), "SLURM_JOB_NODELIST='' names no host: set MASTER_ADDR"),
    ],
)
def test_read_environment_refuses_what_would_be_silent_copies(environ, text):
    with pytest.raises(UsageError, match=text) as failure:
        read_environment(environ)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[3-5,9]", "node3"),
        ("node[007,009-011],other", "node007"),
        ("rack[2-3]n[07-09]-ib,x", "rack2n07-ib"),
    ],
)
def test_first_host(nodelist, host):
    assert first_host(nodelist) == host
