"""`launch.sh config`: its questions and the file it writes, beside accelerate's own questionnaire (accelerate 1.15).

Run: python -m pytest tests/launch/test_config.py
"""

import dataclasses
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launching import launch_sh

from nanofinetune.ground.errors import UsageError
from nanofinetune.launch.config import QUESTIONS, command_after, configure

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="launch.sh needs bash")


def test_config_asks_and_launch_sh_reads(tmp_path: Path) -> None:
    """Wrong answers are asked again, what is there is not written over unasked, and launch.sh takes it from there."""
    env = {"NANOFINETUNE_LAUNCH_ENV": str(tmp_path / "launch.env")}
    answers = ["zero", "2", "2", "1", "a b", "node0", "", "eth0", "tpu", "cpu", "4", "3", "bf16", "1"]
    result = launch_sh("config", env=env, stdin="\n".join(answers) + "\n")
    assert (result.returncode, result.stderr) == (0, "")
    for complaint in ("zero is not a whole number from 1", "2 is not a whole number from 0 to 1", "tpu is not one of"):
        assert complaint in result.stdout
    written = (tmp_path / "launch.env").read_text()
    assert written.splitlines()[1:] == [
        "NNODES=2", "NODE_RANK=1", "MASTER_ADDR=node0", "GLOO_SOCKET_IFNAME=eth0", "NANOFINETUNE_DEVICE=cpu",
        "NPROC_PER_NODE=4", "OMP_NUM_THREADS=3", "NANOFINETUNE_MIXED_PRECISION=bf16", "MAX_RESTARTS=1",
    ]  # fmt: skip
    nodes, following = result.stdout.splitlines()[-2:]
    assert nodes == "on each of the 2 nodes, which have a launch.env of their own:"
    # What to type next is the last line, and works as it stands; --print shows what it starts.
    assert following.startswith("next: ") and following.endswith("launch.sh --output runs/first")
    command, clean = (
        f"{following.removeprefix('next: ')} --print",
        {"PATH": os.environ["PATH"], "PYTHON": sys.executable},
    )
    typed = subprocess.run(command, shell=True, env=clean, capture_output=True, text=True, timeout=90)
    assert typed.returncode == 0 and "--output runs/first" in typed.stdout, typed.stderr
    printed = launch_sh("--print", env=env).stdout
    assert typed.stdout == printed.replace("--device", "--output runs/first --device")
    for word in ("--nnodes=2", "--node-rank=1", "--master-addr=node0", "--nproc-per-node=4", "--precision bf16"):
        assert word in printed


def test_an_answer_is_escaped_before_it_is_shown_again(tmp_path, monkeypatch, capsys) -> None:
    """It may have been piped in, and a terminal obeys what it is sent."""
    monkeypatch.setattr("sys.stdin", io.StringIO("1\n\x1b[2J\n"))
    with pytest.raises(UsageError, match="the answers ended"):
        configure(tmp_path / "launch.env")
    assert "\\x1b[2J is not one of auto, cpu, cuda, mps\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ("", "is as it was"),
        ("no", "is as it was"),
        ("yes 1", "the answers ended before the questions did; nothing was written"),
        ("yes" + " default" * 6, "wrote"),
    ],
)
def test_config_never_writes_over_a_file_unasked(answers: str, said: str, tmp_path, monkeypatch, capsys) -> None:
    settings = tmp_path / "launch.env"
    settings.write_text("NNODES=2\n")
    monkeypatch.setattr("sys.stdin", io.StringIO(answers.replace(" ", "\n").replace("default", "") + "\n"))
    try:
        configure(settings)
    except UsageError as error:
        print(error)
    assert said in capsys.readouterr().out
    lines = [line for line in settings.read_text().splitlines() if not line.startswith("#")]
    assert lines == ([] if said == "wrote" else ["NNODES=2"])


@pytest.mark.parametrize(
    ("inside", "settings", "typed"),
    [
        (".", "launch.env", "./launch.sh --output runs/first"),
        ("..", "launch.env", "clone/launch.sh --output runs/first"),
        ("docs", "launch.env", "{root}/launch.sh --output runs/first"),
        (".", "my settings", "NANOFINETUNE_LAUNCH_ENV='{root}/my settings' ./launch.sh --output runs/first"),
    ],
)
def test_the_command_to_type_next_is_as_seen_from_here(inside, settings, typed, tmp_path, monkeypatch) -> None:
    root = tmp_path / "clone"
    (root / "docs").mkdir(parents=True)
    monkeypatch.setattr("nanofinetune.launch.config.__file__", str(root / "nanofinetune" / "launch" / "config.py"))
    monkeypatch.chdir(root / inside)
    assert command_after(root / settings) == typed.format(root=root)


def test_accelerate_config_fields_are_asked_or_left_out() -> None:
    """Every field of accelerate's configuration file has its question here, or is named as left out."""
    reason = "accelerate is an optional extra: its configuration is the reference"
    config_args = pytest.importorskip("accelerate.commands.config.config_args", reason=reason)
    asked = {
        "num_machines": "NNODES", "machine_rank": "NODE_RANK", "main_process_ip": "MASTER_ADDR",
        "main_process_port": "MASTER_PORT", "use_cpu": "NANOFINETUNE_DEVICE", "num_processes": "NPROC_PER_NODE",
        "mixed_precision": "NANOFINETUNE_MIXED_PRECISION",
    }  # fmt: skip
    left_out = {
        "compute_environment", "distributed_type", "debug", "gpu_ids", "rdzv_backend", "same_network",
        "main_training_function", "enable_cpu_affinity", "fp8_config", "deepspeed_config", "fsdp_config",
        "parallelism_config", "megatron_lm_config", "mpirun_config", "downcast_bf16", "tpu_name", "tpu_zone",
        "tpu_use_cluster", "tpu_use_sudo", "command_file", "commands", "tpu_vm", "tpu_env", "dynamo_config",
    }  # fmt: skip
    fields = {field.name for field in dataclasses.fields(config_args.ClusterConfig)}
    assert fields == asked.keys() | left_out
    assert set(asked.values()) <= {question.name for question in QUESTIONS}
