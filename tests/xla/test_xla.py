"""Training on XLA is training on the CPU: five steps of a tiny BERT with our AdamW on 1, 2 and 4 XLA devices, against
eager torch. Reference: torch 2.9.1 on the CPU; XLA: torch_xla 2.9.0 with PJRT_DEVICE=CPU. No TPU was used.

    bash tests/xla/environment.sh            makes the environment (7 GB) and runs this file in it
    python -m pytest tests/xla               elsewhere: skipped, since torch_xla 2.9 fits torch 2.9 only

torch_xla counts its devices once a process, so that each case is a process of its own: this file, run as a script.
"""

import bisect
import functools
import json
import os
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from nanofinetune.ground.device import choose_device
from nanofinetune.ground.xla import end_step, fixed_lengths, manual_seed, spread_rows, state_on_host
from nanofinetune.step.optim import AdamW, decay_groups

pytestmark = pytest.mark.skipif(
    find_spec("torch_xla") is None, reason="torch_xla is not installed (bash tests/xla/environment.sh installs it)"
)
ROOT = Path(__file__).resolve().parent.parent.parent
COUNTS = (1, 2, 4)
FORMS: dict[str, bool | None] = {"loop": None, "foreach": True}  # form on XLA -> AdamW's `foreach`
STEPS, ROWS, LENGTH, LIMIT = 5, 8, 24, 64


# --- what runs in a process of its own --------------------------------------------------------------------------------


def make_batch(seed: int, length: int = LENGTH) -> dict[str, torch.Tensor]:
    """(ROWS, length) random ids; the second half of each row is partly padding."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(length // 2, length + 1, (ROWS, 1), generator=generator)
    mask = (torch.arange(length) < lengths).long()
    ids = torch.randint(5, 32, (ROWS, length), generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(0, 2, (ROWS,), generator=generator)}


def compilations() -> int:
    """How many graphs this process has compiled so far."""
    from torch_xla.debug import metrics

    found = metrics.metric_data("CompileTime")
    return found[0] if found else 0


class Run:
    """A tiny BERT and its AdamW on one device."""

    def __init__(self, device: torch.device, form: str) -> None:
        from conftest import tiny_bert

        self.device = device
        self.model = tiny_bert(dropout=0.0).to(device)
        self.optimizer = AdamW(decay_groups(self.model, 0.01), lr=1e-3, foreach=FORMS[form])

    def step(self, batch: dict[str, torch.Tensor]) -> float:
        self.batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        spread_rows(self.batch, self.device)
        loss = self.model(**self.batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        end_step(self.device)
        return loss.item()


def train(device: torch.device, form: str) -> dict[str, Any]:
    """STEPS steps on the CPU and on XLA -> the losses of both, and what else there is to see."""
    import torch_xla

    eager, xla = Run(torch.device("cpu"), form), Run(device, form)
    losses, compiled = [], []
    for step in range(STEPS):
        losses.append((eager.step(make_batch(step)), xla.step(make_batch(step))))
        compiled.append(compilations())
    ours, theirs = state_on_host(xla.model), state_on_host(eager.model)
    tensors = [*xla.batch.values(), *xla.model.parameters()]
    shardings = [torch_xla._XLAC._get_xla_sharding_spec(tensor) for tensor in tensors]
    return {
        "losses": losses,
        "compiled": compiled,
        "form": xla.optimizer.form(xla.optimizer.param_groups[0]),
        "devices": sorted({str(tensor.device) for tensor in ours.values()}),
        "difference": max((ours[name] - theirs[name]).abs().max().item() for name in theirs),
        "batch": shardings[: len(xla.batch)],
        "parameters": sorted(set(shardings[len(xla.batch) :])),
    }


def vary_lengths(device: torch.device) -> dict[str, int]:
    """How many graphs eight lengths compile, padded to fixed lengths and as they are."""
    run, widths, rng = Run(device, "loop"), fixed_lengths(LIMIT), random.Random(0)
    lengths = [rng.randrange(8, LIMIT) for _ in range(8)]
    for width in 2 * widths:
        run.step(make_batch(0, width))
    counts = [compilations()]
    for pad in (True, False):
        for length in lengths:
            run.step(make_batch(1, widths[bisect.bisect_left(widths, length)] if pad else length))
        counts.append(compilations())
    return {"distinct": len({*lengths} - {*widths}), "padded": counts[1] - counts[0], "as is": counts[2] - counts[1]}


def drop(device: torch.device, seed: Any) -> list[float]:
    """What dropout leaves of 32 ones after `seed()`."""
    seed()
    kept = torch.nn.functional.dropout(torch.ones(32, device=device))
    end_step(device)
    return kept.tolist()


def one_device(device: torch.device) -> dict[str, Any]:
    """What needs no more than one device."""
    tied = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    tied.to(device)
    torn = tied[1].weight is not tied[0].weight
    tied[1].weight = tied[0].weight
    state = state_on_host(tied)
    try:
        AdamW([torch.nn.Parameter(torch.ones(3, device=device))], fused=True)
        refusal = ""
    except RuntimeError as error:
        refusal = str(error)
    return {
        "lengths": vary_lengths(device),
        "torch's seed": [drop(device, lambda: torch.manual_seed(7)) for _ in range(2)],
        "our seed": [drop(device, lambda: manual_seed(7, device)) for _ in range(2)],
        "another seed": drop(device, lambda: manual_seed(8, device)),
        "torn by to": torn,
        "tied on the host": state["0.weight"] is state["1.weight"],
        "fused": refusal,
    }


def main() -> None:
    device = choose_device("xla")  # before any backward pass on the CPU
    from torch_xla import runtime

    seen: dict[str, Any] = {"count": runtime.global_runtime_device_count()}
    seen |= {form: train(device, form) for form in FORMS}
    if seen["count"] == 1:
        seen |= one_device(device)
    print(json.dumps(seen))


def run_python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A Python that finds the package and tests/, with PJRT_DEVICE only where it is given."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PJRT_", "CPU_NUM", "XLA_"))}
    return subprocess.run(
        [sys.executable, *arguments], text=True, capture_output=True, timeout=900,
        env={**kept, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))), **variables},
    )  # fmt: skip


@functools.cache
def seen_on(count: int) -> dict[str, Any]:
    """What `main` printed in a process with so many XLA devices."""
    finished = run_python(__file__, PJRT_DEVICE="CPU", CPU_NUM_DEVICES=str(count))
    assert finished.returncode == 0, finished.stderr[-4000:]
    seen = json.loads(finished.stdout.splitlines()[-1])
    assert seen["count"] == count
    return seen


# --- the tests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", COUNTS)
def test_steps_on_xla_match_the_cpu(count, form):
    seen = seen_on(count)[form]
    print(f"{count} XLA devices, {form}: losses {seen['losses']}, parameters differ by {seen['difference']:.2e}")
    assert len(seen["losses"]) == STEPS
    for eager, xla in seen["losses"]:
        assert xla == pytest.approx(eager, abs=1e-6)  # float32 losses near 0.7, whose spacing is 6e-8
    # Five updates of at most 1e-3 each. Adam divides by the gradient's own size, and so magnifies its rounding.
    assert seen["difference"] < 1e-5
    assert seen["devices"] == ["cpu"]  # of the state that is to be saved
    assert seen["form"] == form  # the fused form has no kernel there, and is not chosen


@pytest.mark.parametrize("count", COUNTS)
def test_rows_are_spread_and_parameters_are_whole(count):
    ids = ",".join(map(str, range(count)))
    rows, labels = (f"{{devices=[{shape}]{ids}}}" for shape in (f"{count},1", count))
    for form in FORMS:
        assert seen_on(count)[form]["batch"] == ([rows, rows, labels] if count > 1 else 3 * ["{replicated}"])
        assert seen_on(count)[form]["parameters"] == ["{replicated}"]


@pytest.mark.parametrize("count", COUNTS)
def test_later_steps_compile_nothing(count):
    # The second step still does: from then on, there are moments. Learning rate and bias corrections are no constants.
    for form in FORMS:
        compiled = seen_on(count)[form]["compiled"]
        assert compiled[1:] == [compiled[1]] * (STEPS - 1)


def test_fixed_lengths_bound_the_compilations():
    seen = seen_on(1)["lengths"]
    print("graphs compiled for lengths", seen)
    assert seen["padded"] == 0  # every one of them was compiled by then
    assert seen["as is"] >= seen["distinct"] > 2


def test_torch_manual_seed_does_not_reach_xla():
    first, second = seen_on(1)["torch's seed"]
    assert first != second
    first, second = seen_on(1)["our seed"]
    assert first == second != seen_on(1)["another seed"]


def test_tied_parameters_stay_tied_on_the_host():
    # torch makes new parameters where a device has other storages, and so unties: call tie_weights() after to("xla").
    assert seen_on(1)["torn by to"]
    assert seen_on(1)["tied on the host"]


def test_fused_is_refused_on_xla():
    assert seen_on(1)["fused"].startswith("fused=True has no kernel for a parameter of torch.float32 on xla")


def test_xla_on_the_cpu_has_to_be_asked_for():
    code = "from nanofinetune.device import choose_device; choose_device('xla')"
    last_line = run_python("-c", code).stderr.splitlines()[-1]
    expected = "--device xla: no TPU here: torch_xla finds none; set PJRT_DEVICE=CPU to try XLA on the CPU"
    assert last_line == f"nanofinetune.ground.errors.UsageError: {expected}"
    assert run_python("-c", code, PJRT_DEVICE="CPU").returncode == 0


@pytest.mark.parametrize("first", ["xla", "cpu"])
def test_a_backward_pass_on_the_cpu_before_xla_breaks_torch(first):
    code = f"""
import torch
from nanofinetune.ground.device import choose_device
if {first!r} == "cpu":
    torch.ones(1, requires_grad=True).sum().backward()
device = choose_device("xla")
torch.ones(1, requires_grad=True).sum().backward()
torch.ones(1, requires_grad=True, device=device).sum().backward()
"""
    finished = run_python("-c", code, PJRT_DEVICE="CPU")
    assert (finished.returncode == 0) == (first == "xla")
    assert ("INTERNAL ASSERT FAILED" in finished.stderr) == (first == "cpu")


if __name__ == "__main__":
    main()
