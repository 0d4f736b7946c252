"""The device seam: the choice of a device is torch's own (torch 2.13) and Accelerate's (accelerate 1.15); what is asked
of the operating system is checked in processes of their own, against its own counters. TPUs are played by stand-ins
here: which calls are made, and the errors; tests/xla runs the real torch_xla.

    python -m pytest tests/test_device.py
"""

import bisect
import math
import os
import platform
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from nanofinetune.device import (
    backend_for,
    choose_device,
    end_step,
    fixed_lengths,
    keep_freed_memory,
    manual_seed,
    peak_rss_mb,
    seconds_since_start,
    spread_rows,
    state_on_host,
)  # fmt: skip

from nanofinetune import device
from nanofinetune.ground.errors import UsageError
from nanofinetune.step.optim import FUSED_DEVICES

ROOT = Path(__file__).resolve().parent.parent
ON_LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's counters are in /proc: Linux")
ON_GLIBC = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="keep_freed_memory is a setting of glibc's malloc: Linux with glibc"
)


def run_python(code: str, *arguments: str) -> list[float]:
    """Run `code` in a fresh interpreter -> the numbers that it printed."""
    # glibc reads its own settings from the environment too
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        env={**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, text=True, capture_output=True, timeout=180,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    return [float(word) for word in finished.stdout.split()]


# --- which device -----------------------------------------------------------------------------------------------------


def test_choose_device_matches_torch():
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    chosen = accelerator if accelerator and accelerator.type in ("cuda", "mps", "tpu") else torch.device("cpu")
    assert choose_device("auto") == choose_device() == chosen
    assert choose_device(chosen.type) == chosen
    assert choose_device("cpu") == torch.device("cpu")
    if torch.cuda.is_available():
        assert choose_device("cuda:0") == torch.device("cuda:0")


def test_auto_matches_accelerate_partial_state():
    state = pytest.importorskip("accelerate.state", reason="the extra `test` (accelerate) is not installed")
    state.PartialState._reset_state()
    try:
        assert choose_device("auto").type == state.PartialState().device.type
    finally:
        state.PartialState._reset_state()


@pytest.mark.parametrize(("cuda", "mps", "chosen"), [(1, 0, "cuda"), (1, 1, "cuda"), (0, 1, "mps"), (0, 0, "cpu")])
def test_auto_takes_cuda_before_mps_before_cpu(monkeypatch, cuda, mps, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cuda))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: bool(mps))
    monkeypatch.setattr(device, "_sees_tpu", lambda: False)
    assert choose_device() == torch.device(chosen)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "mps:1", "tpu:0", "xla:1", "", "CUDA"])
def test_what_is_no_kind_of_device_is_refused(name):
    with pytest.raises(UsageError) as error:
        choose_device(name)
    assert str(error.value).startswith(
        f"--device {name}: there is no such device; choose auto, cpu, cuda, cuda:N, mps, tpu or xla"
    )


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UsageError, match=r"--device cuda: torch sees no CUDA device here; choose --device cpu"):
        choose_device("cuda")
    with pytest.raises(UsageError, match=r"--device mps: torch sees no Apple GPU here; choose --device cpu"):
        choose_device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UsageError, match=r"--device cuda:2: there are 2 CUDA devices, numbered from 0"):
        choose_device("cuda:2")


def test_no_tpu_here_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    monkeypatch.setattr(device, "find_spec", lambda name: None)
    assert refusal("tpu") == (
        "--device tpu: no TPU here: pip install torch-tpu on a machine that has one, or choose --device cpu"
    )
    monkeypatch.setattr(device, "find_spec", lambda name: name)
    assert refusal("tpu") == "--device tpu: no TPU here: torch_tpu finds none, or choose --device cpu"
    monkeypatch.setitem(sys.modules, "torch_xla", None)  # what cannot be imported
    assert re.fullmatch(
        r"--device xla: no TPU here: torch_xla does not load \(.+\); pip install torch==2.9.1 torch-xla==2.9.0,"
        " or choose --device cpu",
        refusal("xla"),
    )


def refusal(name: str) -> str:
    with pytest.raises(UsageError) as error:
        choose_device(name)
    return str(error.value)


def test_tpu_is_taken_where_torch_has_one_as_its_accelerator():
    code = """
        import torch
        torch.utils.rename_privateuse1_backend("tpu")  # for good, as torch_tpu does it: so in a process of its own
        from nanofinetune.ground.device import backend_for, choose_device
        seen = []
        def current_accelerator(check_available=False):
            seen.append(check_available)
            return torch.device("tpu")
        torch.accelerator.current_accelerator = current_accelerator
        torch.cuda.is_available = torch.backends.mps.is_available = lambda: False
        assert choose_device("tpu") == choose_device("auto") == torch.device("tpu")
        assert all(seen)  # a TPU that was compiled for and is not there does not count
        assert backend_for(torch.device("tpu")) == "tpu_dist"
    """
    run_python(code)


@pytest.fixture
def fake_xla(monkeypatch):
    """A torch_xla with one host and four TPU devices; the names of what was called, in order, are in its `calls`."""
    calls: list[str] = []

    def first_device() -> torch.device:
        calls.append("device")
        return torch.device("xla:0")

    runtime = SimpleNamespace(
        device_type=lambda: "TPU",
        process_count=lambda: 1,
        is_spmd=lambda: "use_spmd" in calls,
        use_spmd=lambda: calls.append("use_spmd"),
    )
    package = SimpleNamespace(
        runtime=runtime,
        device=first_device,
        sync=lambda: calls.append("sync"),
        manual_seed=lambda seed: calls.append(f"seed {seed}"),
        calls=calls,
    )
    monkeypatch.setitem(sys.modules, "torch_xla", package)
    monkeypatch.setitem(sys.modules, "torch_xla.runtime", runtime)
    return package


def test_xla_is_one_process_for_all_devices(fake_xla, monkeypatch):
    xla = choose_device("xla")
    assert xla == torch.device("xla:0")
    assert fake_xla.calls == ["use_spmd", "device"]  # in this order, else torch_xla warns and copies
    choose_device("xla")
    assert fake_xla.calls.count("use_spmd") == 1
    with pytest.raises(UsageError, match=r"^--device xla: one process drives all XLA devices; start it with python, w"):
        backend_for(xla)
    monkeypatch.setattr(fake_xla.runtime, "process_count", lambda: 2)
    assert refusal("xla") == "--device xla: 2 hosts share this TPU; use a TPU of one host"


def test_xla_on_the_cpu_has_to_be_asked_for(fake_xla, monkeypatch):
    monkeypatch.setattr(fake_xla.runtime, "device_type", lambda: "CPU")
    monkeypatch.delenv("PJRT_DEVICE", raising=False)
    assert refusal("xla") == (
        "--device xla: no TPU here: torch_xla finds none; set PJRT_DEVICE=CPU to try XLA on the CPU"
    )
    monkeypatch.setenv("PJRT_DEVICE", "CPU")
    assert choose_device("xla") == torch.device("xla:0")


def test_steps_end_and_seeds_are_set_on_xla_only(fake_xla):
    for kind, calls in (("cpu", []), ("xla", ["sync", "seed 3"])):
        end_step(torch.device(kind))
        manual_seed(3, torch.device(kind))
        drawn = torch.rand(4)
        assert torch.equal(drawn, torch.rand(4, generator=torch.Generator().manual_seed(3)))
        assert fake_xla.calls == calls
    spread_rows({"labels": torch.ones(3)}, torch.device("cpu"))  # would need torch_xla.distributed, which is not there


def test_backend_for_several_processes():
    assert backend_for(torch.device("cpu")) == "gloo"
    assert backend_for(torch.device("cuda:1")) == "nccl"
    with pytest.raises(
        UsageError, match=r"^--device mps is one device for one process: choose --device cpu for several$"
    ):
        backend_for(torch.device("mps"))
    for backend in ("gloo", "nccl"):
        assert backend in torch.distributed.Backend.backend_list


def test_the_fused_adamw_is_not_for_tpus():
    assert not FUSED_DEVICES & {"tpu", "xla"}


def test_state_on_host_matches_state_dict():
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 3))
    module[2].weight = module[0].weight
    expected, state = module.state_dict(), state_on_host(module)
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor)
        assert not state[name].requires_grad
    assert state["0.weight"] is state["2.weight"]


@pytest.mark.parametrize("limit", [1, 31, 32, 33, 64, 65, 100, 128, 511, 512, 513])
def test_fixed_lengths_at_most_double_a_length(limit):
    lengths = fixed_lengths(limit)
    assert list(lengths) == sorted(set(lengths))
    assert lengths[-1] == limit
    assert len(lengths) <= max(1, math.ceil(math.log2(limit)) - 4)  # so many shapes, and so many compilations
    for longest in range(1, limit + 1):
        padded = lengths[bisect.bisect_left(lengths, longest)]
        assert longest <= padded <= max(32, 2 * longest - 1)


def test_fixed_lengths_need_a_limit():
    with pytest.raises(ValueError, match=r"^limit is 0: it is the most tokens that a row may have, at least 1$"):
        fixed_lengths(0)


# --- the operating system ---------------------------------------------------------------------------------------------

FAULTS = """
    import resource, statistics, sys, torch
    from nanofinetune.cpu.memory import keep_freed_memory
    if sys.argv[1] == "keep":
        assert keep_freed_memory()
    def faults_of_one_step():  # two blocks of 64 MiB, written to and freed
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(16 * 2**20).add(1)[0].item()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    print(statistics.median(faults_of_one_step() for _ in range(15)))
    torch.empty(3 * 2**30, dtype=torch.uint8)[-1] = 1  # larger than any of the settings: it still is to be had
"""


@ON_GLIBC
def test_keep_freed_memory_stops_page_faults():
    (kept,), (returned,) = run_python(FAULTS, "keep"), run_python(FAULTS, "return")
    # Each step touches 128 MiB: 32,768 pages of 4 KiB, or 64 of 2 MiB where the kernel hands out huge ones. Blocks of
    # more than 32 MiB, since smaller ones glibc may keep by itself: its thresholds rise with what is freed. The median,
    # since the heap takes a few steps to reach its size.
    assert returned >= 64
    assert kept <= 5


def test_keep_freed_memory_says_so_where_there_is_no_glibc(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_freed_memory() is False


RSS = """
    import resource, sys, torch
    from nanofinetune.ground.process import peak_rss_mb
    block = torch.ones(300 * 2**18)  # 300 MiB
    del block
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(peak_rss_mb(), usage / (2**20 if sys.platform == "darwin" else 2**10))
"""
PARENT = """
    import subprocess, sys
    block = b"x" * (int(sys.argv[1]) * 2**20)
    sys.exit(subprocess.run([sys.executable, "-c", sys.argv[2]]).returncode)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no resource usage")
def test_peak_rss_matches_resource_usage():
    own, by_usage = run_python(PARENT, "1", textwrap.dedent(RSS))
    assert own > 300  # the block is gone, the peak is not
    assert by_usage == pytest.approx(own, rel=0.02)  # the kernel adds up its per-CPU counters at different times
    if sys.platform.startswith(
        "linux"
    ):  # of a small process that a large one started, `resource` tells the large one's
        own, by_usage = run_python(PARENT, "1500", textwrap.dedent(RSS))
        assert own < 1500 <= by_usage
    assert peak_rss_mb() > 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of another process")
def test_peak_rss_of_another_process_matches_its_own():
    code = "import sys; from nanofinetune.device import peak_rss_mb; print(peak_rss_mb(), flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None and child.stdin is not None
        own = float(child.stdout.readline())
        assert own <= peak_rss_mb(child.pid) < own + 8  # MiB, for the printing
        child.stdin.close()
        child.wait()
        assert peak_rss_mb(child.pid) == 0.0


START = """
    import sys, time
    time.sleep(0.6)  # what came before our import
    from nanofinetune.ground.process import seconds_since_start
    first = seconds_since_start()
    time.sleep(0.2)
    print(first, seconds_since_start() - first)
"""


@ON_LINUX
def test_seconds_since_start_includes_what_came_before_the_import():
    since_start, slept = run_python(START)
    assert 0.6 <= since_start < 180
    assert 0.19 <= slept < 180  # the kernel counts in hundredths


def test_seconds_since_start_counts_from_the_import_where_the_kernel_does_not_tell(monkeypatch):
    monkeypatch.setattr(device, "_read", lambda path: "")
    monkeypatch.setattr(device, "_IMPORTED", device.time.monotonic() - 5)
    assert 5 <= seconds_since_start() < 65
