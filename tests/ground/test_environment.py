"""ground/environment.py on tables of variables: torchrun's, srun's, mpirun's, accelerate launch's, and broken ones.

Run: python -m pytest tests/ground/test_environment.py
"""

import pytest

from nanofinetune import Accelerator
from nanofinetune.ground.environment import Launch, Settings, first_host, read_environment, read_settings
from nanofinetune.ground.errors import UsageError
from nanofinetune.settings import GradientAccumulationPlugin

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


# ---- accelerate launch ----------------------------------------------------------------------------------------------


def launched_by_accelerate(*options):
    """The variables that `accelerate launch OPTIONS script.py` adds for one process, and for several."""
    launch = pytest.importorskip("accelerate.commands.launch", reason="what this is compared with")
    from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

    told = [
        "--num_processes",
        "1",
        "--num_machines",
        "1",
        "--dynamo_backend",
        "no",
        "--num_cpu_threads_per_process",
        "1",
    ]
    told += [] if "--mixed_precision" in options else ["--mixed_precision", "no"]
    args = launch.launch_command_parser().parse_args([*told, "--main_process_port", "0", *options, "script.py"])
    args.use_cpu = args.cpu  # as launch_command does
    environments = prepare_simple_launcher_cmd_env(args)[1], prepare_multi_gpu_env(args)
    return [{name: each[name] for name in each if name.startswith("ACCELERATE_")} for each in environments]


@pytest.fixture
def theirs():
    """Makes accelerate's Accelerator, each time with its global state new."""
    accelerate = pytest.importorskip("accelerate", reason="what this is compared with")
    from accelerate.state import AcceleratorState, GradientState, PartialState

    def make(**arguments):
        for kind in (GradientState, AcceleratorState, PartialState):
            kind._reset_state()
        return accelerate.Accelerator(**arguments)

    yield make
    for kind in (GradientState, AcceleratorState, PartialState):
        kind._reset_state()


def launch_settings(accelerator):
    return accelerator.mixed_precision, accelerator.gradient_accumulation_steps, accelerator.device.type


@pytest.mark.parametrize(
    "options", [[], ["--cpu"], ["--cpu", "--mixed_precision", "bf16"], ["--mixed_precision", "no"]]
)
def test_what_accelerate_launch_says_matches_accelerate(options, monkeypatch, theirs):
    for environ in launched_by_accelerate(*options):
        with monkeypatch.context() as patch:
            for name, value in environ.items():
                patch.setenv(name, value)
            assert launch_settings(Accelerator()) == launch_settings(theirs())
            # an argument overrules the launcher, as there
            assert launch_settings(Accelerator(mixed_precision="no")) == launch_settings(theirs(mixed_precision="no"))
            patch.setenv("NANOFINETUNE_MIXED_PRECISION", "no")
            assert Accelerator().mixed_precision == "no"


def test_accelerate_launchs_cpu_is_the_choice_of_auto(monkeypatch):
    asked = []
    monkeypatch.setattr("nanofinetune.settings.init_world", lambda device, timeout: asked.append(device))
    for value, device in (("1", "auto"), ("True", "auto"), ("1", "cuda"), ("no", "auto"), ("", "auto")):
        monkeypatch.setenv("ACCELERATE_USE_CPU", value)
        with pytest.raises(AttributeError):  # there is no world
            Accelerator(device=device)
    assert asked == ["cpu", "cpu", "cuda", "auto", "auto"]


def test_accumulation_from_the_environment_matches_accelerate_but_for_a_contradiction(monkeypatch, theirs):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    for steps in (1, 3):
        ours = Accelerator(cpu=True, gradient_accumulation_steps=steps)
        assert launch_settings(ours) == launch_settings(theirs(cpu=True, gradient_accumulation_steps=steps))
        assert ours.gradient_accumulation_steps == 3
    plugin = GradientAccumulationPlugin(num_steps=2)
    assert Accelerator(cpu=True, gradient_accumulation_plugin=plugin).gradient_accumulation_steps == 2
    assert theirs(cpu=True, gradient_accumulation_steps=4).gradient_accumulation_steps == 3  # not what the script says
    with pytest.raises(UsageError, match="gradient_accumulation_steps is 4 and ACCELERATE_GRADIENT_ACCUMULATION_STEPS"):
        Accelerator(cpu=True, gradient_accumulation_steps=4)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto")
    with pytest.raises(UsageError, match=r"^ACCELERATE_GRADIENT_ACCUMULATION_STEPS='auto' is not a whole number$"):
        Accelerator(cpu=True)


@pytest.mark.parametrize(
    ("environ", "text"),
    [
        *(
            (
                {f"ACCELERATE_USE_{name}": "true"},
                f"^ACCELERATE_USE_{name}=true is not supported here: launch without it",
            )
            for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")
        ),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "^ACCELERATE_DYNAMO_BACKEND=INDUCTOR is not supported here"),
        ({"ACCELERATE_USE_CPU": "perhaps"}, "^ACCELERATE_USE_CPU=perhaps is neither yes nor no"),
    ],
)
def test_what_accelerate_launch_asks_for_in_vain_is_refused(environ, text, monkeypatch):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=text):
        Accelerator()


def test_settings_that_change_nothing_are_taken():
    off = {"ACCELERATE_USE_FSDP": "false", "ACCELERATE_USE_CPU": "", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ""}
    assert read_settings({}) == read_settings(off) == Settings()
