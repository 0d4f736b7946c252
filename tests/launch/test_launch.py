"""What launch.sh decides to start, and what it refuses: read with torchrun's own parser (torch 2.13), nothing is run.

Run: python -m pytest tests/launch/test_launch.py
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from launching import LAUNCH, launch_sh

from nanofinetune.ground.environment import first_host
from nanofinetune.launch.config import QUESTIONS

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="launch.sh needs bash")


@pytest.fixture
def eight_cores_four_gpus(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine with 8 cores of two threads and 4 GPUs, as far as launch.sh asks."""
    programs = {
        "nproc": "echo 16",
        "lscpu": "echo '# Core,Socket'; for core in 0 1 2 3 4 5 6 7; do echo $core,0; echo $core,0; done",
        "scontrol": "[ \"$*\" = 'show hostnames rack2n[07-08]' ] && printf 'rack2n07\\nrack2n08\\n'",
        "nvidia-smi": "for gpu in 0 1 2 3; do echo GPU $gpu: H100; echo '  MIG 1g.10gb'; done",
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}"}


ALONE: dict[str, object] = {}  # python train.py, no launcher
NODES = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0"}
SRUN = {"SLURM_STEP_ID": "0", "SLURM_JOB_ID": "31234", "SLURM_JOB_NODELIST": "rack2n[07-08]", "SLURM_NNODES": "2"}
TABLE: dict[str, tuple[str, dict[str, str], str, dict[str, object], str]] = {
    # name: (arguments, environment, launch.env, what torchrun understands, train.py's arguments)
    "gpus": ("", {}, "", {"standalone": True, "nproc_per_node": "4", "omp": "2", "max_restarts": 0}, ""),
    "gpus that are visible": ("", {"CUDA_VISIBLE_DEVICES": "2,3"}, "", {"nproc_per_node": "2", "omp": "4"}, ""),
    "no gpu is visible": ("", {"CUDA_VISIBLE_DEVICES": ""}, "", ALONE, ""),
    "gpu number -1": ("", {"CUDA_VISIBLE_DEVICES": "-1"}, "", ALONE, ""),
    "cpu": ("--device cpu --lr 1", {}, "", ALONE, "--device cpu --lr 1"),
    "one": ("-n 1 --lr 1", {}, "", ALONE, "--lr 1"),
    "n": ("-n 2 --lr 1", {}, "", {"standalone": True, "nproc_per_node": "2", "omp": "4"}, "--lr 1"),
    "n anywhere": ("--lr 1 -n2", {}, "", {"nproc_per_node": "2"}, "--lr 1"),
    "more processes than cores": ("-n 20", {}, "", {"nproc_per_node": "20", "omp": "1"}, ""),
    "after --": ("-n 2 -- -n 3 --print", {}, "", {"nproc_per_node": "2"}, "-n 3 --print"),
    "threads of the user": ("-n 2", {"OMP_NUM_THREADS": "3"}, "", {"nproc_per_node": "2", "omp": None}, ""),
    "one that restarts": ("-n 1 --max-restarts 3", {}, "", {"nproc_per_node": "1", "max_restarts": 3}, ""),
    "restarts, joined": ("-n 2 --max-restarts=3", {}, "", {"nproc_per_node": "2", "max_restarts": 3}, ""),
    "nodes": (
        "-n 2", NODES, "",
        {"standalone": False, "nnodes": "2", "node_rank": 1, "master_addr": "node0", "master_port": 29500}, "",
    ),
    "nodes, one process each": ("-n 1", NODES, "", {"nnodes": "2", "nproc_per_node": "1", "omp": "8"}, ""),
    "port": ("-n 2", {**NODES, "MASTER_PORT": "1234"}, "", {"master_port": 1234}, ""),
    "launch.env": (
        "", {}, "# two\nNPROC_PER_NODE=2\nNNODES=3\nNODE_RANK=2\nMASTER_ADDR=a\nMAX_RESTARTS=1\n",
        {"nproc_per_node": "2", "nnodes": "3", "node_rank": 2, "master_addr": "a", "max_restarts": 1}, "",
    ),
    "environment > launch.env": ("", {"NPROC_PER_NODE": "2"}, "NPROC_PER_NODE=3\n", {"nproc_per_node": "2"}, ""),
    "command line > environment": ("-n 5", {"NPROC_PER_NODE": "2"}, "NPROC_PER_NODE=3\n", {"nproc_per_node": "5"}, ""),
    "no last newline": ("", {}, "NPROC_PER_NODE=3", {"nproc_per_node": "3"}, ""),
    "never executed": ("-n 1", {}, "MASTER_ADDR=$(touch /nonexistent/x); `false`\n", ALONE, ""),
    "precision and device": (
        "", {}, "NANOFINETUNE_MIXED_PRECISION=bf16\nNANOFINETUNE_DEVICE=cpu\n", ALONE, "--device cpu --precision bf16",
    ),
    "precision of the command line": (
        "-n 1 --precision=no", {"NANOFINETUNE_MIXED_PRECISION": "bf16"}, "", ALONE, "--precision=no",
    ),
    "srun, a task for each node": (
        "-n 2", {**SRUN, "SLURM_NTASKS": "2", "SLURM_NODEID": "1"}, "",
        {"nnodes": "2", "node_rank": 1, "master_addr": "rack2n07", "master_port": 15000 + 31234 % 15000}, "",
    ),
    "srun, a task for each process": ("--lr 1", {**SRUN, "SLURM_NTASKS": "8"}, "", ALONE, "--lr 1"),
    "srun, one task": (
        "-n 2", {**SRUN, "SLURM_NNODES": "1", "SLURM_NTASKS": "1"}, "", {"standalone": True, "nproc_per_node": "2"}, "",
    ),
    "the shell of sbatch": ("", {"SLURM_NTASKS": "3", "SLURM_PROCID": "0"}, "", {"nproc_per_node": "3"}, ""),
    "one in the shell of sbatch": ("-n 1", {"SLURM_NTASKS": "3", "SLURM_PROCID": "0"}, "", {"nproc_per_node": "1"}, ""),
    "kubeflow's pods": (
        "-n 2", {"WORLD_SIZE": "3", "RANK": "2", "MASTER_ADDR": "pod0", "MASTER_PORT": "23456"}, "",
        {"nnodes": "3", "node_rank": 2, "master_addr": "pod0", "master_port": 23456, "nproc_per_node": "2"}, "",
    ),
    "kubeflow's trainer": (
        "", {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "gpu", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "pod0"}, "",
        {"nnodes": "2", "node_rank": 1, "master_addr": "pod0", "nproc_per_node": "4"}, "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLE)
def test_launch_sh_table(case: str, tmp_path: Path, eight_cores_four_gpus: dict[str, str]) -> None:
    """What `launch.sh --print` says, read by torchrun's own parser."""
    from torch.distributed.run import parse_args

    args, env, settings, expected, rest = TABLE[case]
    (tmp_path / "launch.env").write_text(settings)
    env = {**eight_cores_four_gpus, "NANOFINETUNE_LAUNCH_ENV": str(tmp_path / "launch.env"), **env}
    result = launch_sh("--print", *args.split(), env=env)
    assert (result.returncode, result.stderr) == (0, "")
    words = shlex.split(result.stdout)
    threads = words.pop(0).removeprefix("OMP_NUM_THREADS=") if words[0].startswith("OMP_") else None
    assert words.pop(0) == sys.executable
    script = str(ROOT / "train.py")
    if expected is ALONE:
        assert words == [script, *rest.split()] and threads is None
        return
    torchrun = words[words.index("run") + 1 :]
    assert words[: words.index("run")] == ["-P", "-m", "nanofinetune.launch"]
    understood = vars(parse_args(torchrun)) | {"omp": threads}
    assert (understood["training_script"], understood["training_script_args"]) == (script, rest.split())
    assert {name: understood[name] for name in expected} == expected


def test_master_is_found_without_slurms_programs() -> None:
    env = {**SRUN, "SLURM_NTASKS": "2", "SLURM_NODEID": "0"}
    if shutil.which("scontrol"):
        pytest.skip("scontrol is here, and is asked first")
    assert "--master-addr=rack2n07 " in launch_sh("-n", "1", "--print", env=env).stdout


@pytest.mark.parametrize(
    ("args", "env", "settings", "message"),
    [
        ("-n 0", {}, "", "-n 0: it must be a whole number from 1"),
        ("-n", {}, "", "-n is empty: it must be a whole number from 1"),
        ("-n x --lr 1", {}, "", "-n x: it must be a whole number from 1"),
        ("--max-restarts -1", {}, "", "--max-restarts -1: it must be a whole number from 0"),
        ("", {"NPROC_PER_NODE": "two"}, "", "NPROC_PER_NODE two: it must be a whole number from 1"),
        ("", {}, "NPROCS=2\n", "launch.env: NPROCS is not a setting; --help lists them"),
        ("", {"NNODES": "2"}, "", "NNODES=2: set MASTER_ADDR to the name or address of node 0, on all nodes"),
        (
            "", {"NNODES": "2", "MASTER_ADDR": "a"}, "",
            "NNODES=2: set NODE_RANK to this node's number, from 0 to 1",
        ),
        ("", {**NODES, "NODE_RANK": "2"}, "", "NODE_RANK=2: 2 nodes are numbered from 0"),
        ("", {**NODES, "NODE_RANK": "x"}, "", "NODE_RANK x: it must be a whole number from 0"),
        ("", {"LOCAL_RANK": "1"}, "", "LOCAL_RANK=1: a launcher has started this process already; run train.py itself"),
        (
            "-n 2", {**SRUN, "SLURM_NTASKS": "8"}, "",
            "-n 2: srun has started 8 tasks; leave -n out, or use srun --ntasks-per-node=1",
        ),
        (
            "", {"SLURM_NNODES": "2", "SLURM_NTASKS": "2"}, "",
            "SLURM gave 2 nodes and this is the shell of one: use srun --ntasks-per-node=1 launch.sh",
        ),
        ("config x", {}, "", "config takes no arguments: it asks"),
    ],
)  # fmt: skip
def test_launch_sh_errors_are_one_line_and_exit_2(
    args: str, env: dict[str, str], settings: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "launch.env").write_text(settings)
    settings_file = {"NANOFINETUNE_LAUNCH_ENV": str(tmp_path / "launch.env")}
    result = launch_sh(*args.split(), env={**settings_file, **env})
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.replace(f"{tmp_path}/", "") == f"launch.sh: {message}\n"


def test_help_names_every_setting() -> None:
    result = launch_sh("--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert [question.name for question in QUESTIONS if question.name not in result.stdout] == []
    assert all(len(line) <= 120 for line in result.stdout.splitlines())


def test_launch_sh_is_clean_by_shellcheck() -> None:
    if not (shellcheck := shutil.which("shellcheck")):
        pytest.skip("shellcheck is not installed")
    result = subprocess.run([shellcheck, str(LAUNCH)], text=True, capture_output=True)
    assert result.stdout == ""


# ---- values that come from a stranger --------------------------------------------------------------------------------

READ = (
    "NPROC_PER_NODE", "OMP_NUM_THREADS", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME",
    "MAX_RESTARTS", "NANOFINETUNE_MIXED_PRECISION", "NANOFINETUNE_DEVICE", "CUDA_VISIBLE_DEVICES", "LOCAL_RANK", "RANK",
    "WORLD_SIZE", "SLURM_STEP_ID", "SLURM_NTASKS", "SLURM_NNODES", "SLURM_NODEID", "SLURM_JOB_ID", "SLURM_JOB_NODELIST",
    "SLURM_STEP_NODELIST", "SLURM_PROCID", "PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR",
    "PET_MASTER_PORT", "PET_MAX_RESTARTS",
)  # fmt: skip
TOUCH = (
    "$(touch {})",
    "`touch {}`",
    "a[$(touch {})]",
    "x[0`touch {}`]",
    "1+a[$(touch {})]",
    "';touch {};'",
    "|touch {}",
)
WORTHY = (
    "",
    "0",
    "1",
    "2",
    "3",
    "08",
    "2(x3)",
    "-1",
    "99999",
    "1e3",
    "auto",
    "gpu",
    "node0",
    "rack2n[07-08]",
    "a b",
    "-x",
)
values = st.one_of(
    st.sampled_from(WORTHY),
    st.sampled_from(TOUCH),
    st.builds("{}{}".format, st.sampled_from(WORTHY), st.sampled_from(TOUCH)),
    st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=12),
)
arguments = st.lists(
    st.one_of(
        st.sampled_from(["-n", "--max-restarts", "--", "--device", "cpu", "--lr", "-n2", "--max-restarts=1"]), values
    ),
    max_size=5,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(env=st.dictionaries(st.sampled_from(READ), values, max_size=8), args=arguments, file=values)
@example(env={"SLURM_STEP_ID": "0", "SLURM_NTASKS": "a[$(touch {})]"}, args=[], file="")
@example(env={"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_NNODES": "a[$(touch {})]"}, args=[], file="")
@example(
    env={"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_NNODES": "2", "SLURM_JOB_ID": "a[$(touch {})]"},
    args=[],
    file="",
)
@example(env={"SLURM_NTASKS": "1+a[$(touch {})]", "SLURM_PROCID": "0"}, args=[], file="")
@example(env={}, args=["-n", "a[$(touch {})]"], file="")
def test_no_value_is_ever_run(env, args, file, tmp_path: Path) -> None:
    """Not from the environment, launch.env or the command line: one line, exit code 0 or 2, and no file appears."""
    canary = tmp_path / "canary"
    (tmp_path / "launch.env").write_text(f"MASTER_ADDR={file}\nNPROC_PER_NODE=2\n".replace("{}", str(canary)))
    filled = {name: value.replace("{}", str(canary)) for name, value in env.items()}
    filled["NANOFINETUNE_LAUNCH_ENV"] = str(tmp_path / "launch.env")
    words = [word.replace("{}", str(canary)) for word in args]
    if {"-h", "--help", "config"} & set(words[:1]):
        return
    result = launch_sh("--print", *words, env=filled)
    assert not canary.exists()
    assert result.returncode in (0, 2), result.stderr
    said, nothing = (result.stdout, result.stderr) if result.returncode == 0 else (result.stderr, result.stdout)
    assert said.count("\n") == 1 and nothing == "", (result.stdout, result.stderr)
    assert said.startswith("launch.sh: ") == (result.returncode == 2)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", said), "a terminal's control characters"


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"SLURM_NTASKS": "2(x3)"}, "SLURM_NTASKS 2(x3): it must be a whole number from 1"),
        ({"SLURM_NNODES": "two"}, "SLURM_NNODES two: it must be a whole number from 1"),
        ({**SRUN, "SLURM_NTASKS": "2", "SLURM_NODEID": "ab"}, "SLURM_NODEID ab: it must be a whole number from 0 to 1"),
        ({**SRUN, "SLURM_NTASKS": "2", "SLURM_NODEID": "2"}, "SLURM_NODEID 2: it must be a whole number from 0 to 1"),
        ({**SRUN, "SLURM_NTASKS": "2"}, "SLURM_NODEID is empty: it must be a whole number from 0 to 1"),
        (
            {**SRUN, "SLURM_NTASKS": "2", "SLURM_NODEID": "0", "SLURM_JOB_ID": "x"},
            "SLURM_JOB_ID x: it must be a whole number from 0 to 99999999999",
        ),
        (
            {**SRUN, "SLURM_NTASKS": "2", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "a;b"},
            "SLURM_JOB_NODELIST a;b: set MASTER_ADDR to the first node's name",
        ),
        ({**NODES, "MASTER_PORT": "99999"}, "MASTER_PORT 99999: it must be a whole number from 1 to 65535"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT 99999: it must be a whole number from 1 to 65535"),
        ({**NODES, "MASTER_ADDR": "a b"}, "MASTER_ADDR a b: it must be one name or address"),
        ({**NODES, "MASTER_ADDR": "-x"}, "MASTER_ADDR -x: it must be one name or address"),
        (
            {"LOCAL_RANK": "x\n\x1b[31m"},
            "LOCAL_RANK=x??[31m: a launcher has started this process already; run train.py itself",
        ),
        ({"NANOFINETUNE_SCRIPT": "-c"}, "-c: there is no such script"),
        ({"PYTHON": "no such python"}, "PYTHON no such python: there is no such program"),
    ],
)  # fmt: skip
def test_an_odd_variable_is_one_line_and_exit_2(env: dict[str, str], said: str) -> None:
    result = launch_sh("-n", "2", env=env)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", f"launch.sh: {said}\n")


@pytest.mark.parametrize(
    "nodes", ["node7", "rack[2-3]n[07-09,11],login1", "a,b", "n[3,5-7]", "n-1-[10-12]-x,y[1]", "[4-5]"]
)
def test_the_first_node_is_that_of_the_ranks_own_reading(nodes: str) -> None:
    env = {**SRUN, "SLURM_NTASKS": "2", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": nodes, "PATH": "/usr/bin:/bin"}
    if shutil.which("scontrol", path=env["PATH"]):
        pytest.skip("scontrol is here, and is asked first")
    assert f"--master-addr={first_host(nodes)} " in launch_sh("-n", "1", "--print", env=env).stdout


@pytest.mark.slow
def test_modules_never_come_from_the_working_folder(tmp_path: Path) -> None:
    """`python -m` alone looks there first, for our package and for torch."""
    canary = tmp_path / "canary"
    for name in ("nanofinetune.py", "torch.py", "argparse.py", "json.py"):
        (tmp_path / name).write_text(f"open({str(canary)!r}, 'w').close()\n")
    (tmp_path / "elsewhere").mkdir()
    script = tmp_path / "elsewhere" / "script.py"
    script.write_text("import json, torch, nanofinetune\nprint('fine\\n', end='')\n")
    env = {
        **os.environ,
        "PYTHON": sys.executable,
        "NANOFINETUNE_LAUNCH_ENV": "/nonexistent",
        "NANOFINETUNE_SCRIPT": str(script),
    }
    for n in ("1", "2"):
        command = ["bash", str(LAUNCH), "-n", n]
        result = subprocess.run(command, env=env, cwd=tmp_path, text=True, capture_output=True, timeout=90)
        assert (result.returncode, result.stdout) == (0, "fine\n" * int(n)), result.stderr
    command = ["bash", str(LAUNCH), "config"]
    result = subprocess.run(command, env=env, cwd=tmp_path, text=True, capture_output=True, timeout=90, input="")
    assert result.returncode == 2, result.stderr
    assert not canary.exists()


def test_cdpath_does_not_lead_elsewhere(tmp_path: Path) -> None:
    """`cd` looks for a relative folder in CDPATH, and says where it went."""
    for place in ("here", "there"):
        (tmp_path / place / "nano").mkdir(parents=True)
        shutil.copy(LAUNCH, tmp_path / place / "nano" / "launch.sh")
        (tmp_path / place / "nano" / "train.py").touch()
    env = {**os.environ, "PYTHON": sys.executable, "CDPATH": str(tmp_path / "there")}
    command = ["bash", "nano/launch.sh", "--print", "-n", "1"]
    result = subprocess.run(command, env=env, cwd=tmp_path / "here", text=True, capture_output=True, timeout=30)
    assert result.stdout.split()[1] == str(tmp_path / "here" / "nano" / "train.py"), result.stderr


def test_an_editor_on_windows_may_have_written_launch_env(tmp_path: Path) -> None:
    (tmp_path / "launch.env").write_bytes(b"# two\r\n\r\nNPROC_PER_NODE=2\r\n")
    result = launch_sh("--print", env={"NANOFINETUNE_LAUNCH_ENV": str(tmp_path / "launch.env")})
    assert "--nproc-per-node=2 " in result.stdout, result.stderr
