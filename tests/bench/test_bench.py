"""bench/pieces.py: its arithmetic, its table, its gate, and its whole command line on a tiny model. Never a time.

    python -m pytest tests/bench/test_bench.py              the arithmetic and the gate
    python -m pytest tests/bench/test_bench.py -m slow      the command line, with all processes of the pieces

The gate is shown to refuse: each piece is given a deliberate difference, a padding value or a learning rate, and must
name it before it takes the first time. References: the pieces' own, transformers 5.23 and torch 2.13.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from conftest import ROOT, write_job

sys.path.insert(0, str(ROOT / "bench"))

import pieces

ACCELERATE_IS_ABSENT = "it is compared with accelerate, which is not installed (pip install accelerate)"


@pytest.fixture(scope="module")
def tiny_job(tmp_path_factory, tiny_tokenizer_dir):
    """A saved tiny BERT with its tokenizer, and a folder of pairs of its words."""
    folder = tmp_path_factory.mktemp("bench")
    return pieces.Job(*write_job(folder, tiny_tokenizer_dir, {"train": 60, "validation": 30}))


@pytest.fixture
def no_clock(monkeypatch):
    """A gate that lets a difference through would fail here, rather than take times."""
    monkeypatch.setattr(pieces, "interleave", lambda *_, **__: pytest.fail("timed before the gate had refused"))


@pytest.fixture(autouse=True)
def malloc_stays_as_it_is(monkeypatch):
    """What the pieces tell malloc would hold for the whole test session."""
    monkeypatch.setattr(pieces, "keep_freed_memory", lambda: None)


# --- the arithmetic and the table -------------------------------------------------------------------------------------


def test_ratio_is_the_median_over_turns_and_not_the_ratio_of_medians():
    turns = [(10.0, 1.0), (20.0, 10.0), (30.0, 6.0), (40.0, 5.0), (50.0, 50.0)]
    found = pieces.Row("step", "a step", turns, ">= 2").record()
    ratios = [library / ours for library, ours in turns]
    assert found["ratio"] == statistics.median(ratios) == 5.0
    assert (found["low"], found["high"]) == (min(ratios), max(ratios))
    assert (found["library"], found["ours"]) == (30.0, 6.0)
    assert found["turns"] == turns
    library, ours = (statistics.median(side) for side in zip(*[(9.0, 1.0), (1.0, 2.0), (8.0, 8.0)], strict=True))
    other = pieces.Row("step", "a step", [(9.0, 1.0), (1.0, 2.0), (8.0, 8.0)]).record()
    assert other["ratio"] == 1.0 != library / ours


def test_ratio_of_memory_is_ours_over_the_library():
    found = pieces.Row("ddp", "peak", [(400.0, 300.0), (400.0, 200.0), (400.0, 380.0)], "<= 0.95", "MiB").record()
    assert (found["ratio"], found["low"], found["high"]) == (0.75, 0.5, 0.95)


def test_lines_of_the_table_stand_under_their_header():
    row = pieces.Row("collate", "fetch and collate 8 rows", [(2.0, 0.1), (2.2, 0.1), (2.4, 0.1)], ">= 10")
    line, header = row.line(), pieces.HEADER
    assert " ".join(line.split()) == "collate fetch and collate 8 rows 2.2 ms 0.1 ms 22.00 (20.00 to 24.00) >= 10"
    assert line.index("fetch") == header.index("what")
    for value, name in ((" 2.2 ", "library"), (" 0.1 ", "ours")):  # numbers end where their names end
        assert line.index(value) + len(value) - 1 == header.index(name) + len(name)
    assert line.index(">= 10") == header.index("target")
    assert pieces.Row("ddp", "peak", [(400.0, 300.0)], unit="MiB").line().endswith("0.75 (0.75 to 0.75)")  # no target


def test_sides_take_turns_and_the_first_turn_does_not_count():
    order: list[str] = []

    def side(name, values):
        def turn():
            order.append(name)
            return next(values)

        return turn

    turns = pieces.interleave(side("library", iter([9.0, 1.0, 2.0])), side("ours", iter([9.0, 3.0, 4.0])), 2)
    assert order == ["library", "ours"] * 3
    assert turns == [(1.0, 3.0), (2.0, 4.0)]
    assert pieces.interleave(lambda: 1.0, lambda: 2.0, 1, warm_up=False) == [(1.0, 2.0)]


def test_clock_divides_by_what_was_done(monkeypatch):
    seconds = iter([100.0, 103.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(seconds))
    done: list[int] = []
    assert pieces.clock(lambda: done.append(1), per=5, times=2)() == 300.0  # 3 s for 2 x 5 things
    assert len(done) == 2


# --- the gate ---------------------------------------------------------------------------------------------------------


def test_collate_refuses_another_pad_value(tiny_job, no_clock, monkeypatch):
    class WrongPad(pieces.DataCollatorWithPadding):
        def _pad_values(self):
            return super()._pad_values() | {"token_type_ids": 1}

    monkeypatch.setattr(pieces, "DataCollatorWithPadding", WrongPad)
    with pytest.raises(pieces.NotEqual, match=r"token_type_ids of batch 0 is .* from the library and .* from us"):
        next(pieces.collate(tiny_job, 5))


def test_adamw_refuses_another_learning_rate(tiny_job, no_clock, monkeypatch):
    def other_rate(parameters, lr, **options):
        return torch.optim.AdamW(parameters, lr=lr * 1.1, **options)

    monkeypatch.setattr(pieces, "AdamW", other_rate)
    with pytest.raises(pieces.NotEqual, match="torch's default, our default: parameter 0 differs by up to"):
        next(pieces.adamw(tiny_job, 5))


@pytest.mark.slow
def test_equal_sides_pass_the_gate(tiny_job, monkeypatch):
    monkeypatch.setattr(pieces, "interleave", lambda *_, **__: [(1.0, 1.0)])
    assert [row.what for row in pieces.collate(tiny_job, 5)] == [
        "fetch and collate 8 rows", "collator alone, rows of tensors", "collator alone, rows of lists"
    ]  # fmt: skip
    assert len([*pieces.adamw(tiny_job, 5)]) == 6


def test_batches_must_have_equal_columns_dtypes_and_numbers():
    batch = {"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([1])}
    pieces.need_equal_batches([batch], [dict(reversed(batch.items()))])
    with pytest.raises(pieces.NotEqual, match=r"batch 0 has columns \['input_ids', 'labels'\] .* and \['labels'\]"):
        pieces.need_equal_batches([batch], [{"labels": torch.tensor([1])}])
    with pytest.raises(pieces.NotEqual, match=r"labels of batch 0 is \(1,\) torch.int64 .* and \(1,\) torch.int32"):
        pieces.need_equal_batches([batch], [batch | {"labels": torch.tensor([1], dtype=torch.int32)}])
    with pytest.raises(ValueError, match="shorter"):
        pieces.need_equal_batches([batch, batch], [batch])


def test_losses_must_agree_to_five_decimals():
    pieces.need_equal_losses("step", [0.5, 0.25], [0.500009, 0.25])
    with pytest.raises(pieces.NotEqual, match=r"step: the loss of step 2 is 0\.2500000 .* and 0\.2500200 with us"):
        pieces.need_equal_losses("step", [0.5, 0.25], [0.5, 0.25002])
    with pytest.raises(pieces.NotEqual, match="nan with us"):
        pieces.need_equal_losses("step", [0.5], [float("nan")])


def test_step_refuses_another_learning_rate(tiny_job, monkeypatch):
    """The two loops as they are timed, here in one process, with a learning rate that is a tenth too high."""
    pytest.importorskip("accelerate", reason="the course's side of a step")
    monkeypatch.setattr(pieces, "LR", 0.01)  # on a model so small the default's losses move by too little in five steps
    library = pieces.library_step(tiny_job)(5, True)[1]
    pieces.need_equal_losses("step", library, pieces.our_step(tiny_job)(5, True)[1])
    monkeypatch.setattr(pieces, "AdamW", partial(_faster, pieces.AdamW))
    with pytest.raises(pieces.NotEqual, match="step: the loss of step 2 is"):
        pieces.need_equal_losses("step", library, pieces.our_step(tiny_job)(5, True)[1])


def _faster(kind, parameters, lr):
    return kind(parameters, lr=lr * 1.1)


def test_scores_must_be_the_same():
    pieces.need_equal_scores({"accuracy": 0.5, "f1": 2 / 3}, {"accuracy": 0.5, "f1": 1 - 1 / 3})
    with pytest.raises(pieces.NotEqual, match=r"evaluate: f1 is 0\.5 with the library and None with us"):
        pieces.need_equal_scores({"f1": 0.5}, {"f1": None})  # what `evaluate` gives for NaN


# --- what is not there, and the command line --------------------------------------------------------------------------


def test_a_piece_without_its_library_is_skipped_with_the_reason(monkeypatch):
    monkeypatch.setattr(pieces, "find_spec", lambda name: None)
    assert pieces.missing("step", "a model") == ACCELERATE_IS_ABSENT
    assert pieces.missing("evaluate", "a model").endswith("(pip install accelerate scikit-learn)")
    assert pieces.missing("collate", "a model") == pieces.missing("adamw", "a model") == ""


@pytest.mark.slow
def test_a_worker_says_why_it_failed():
    with pieces.Worker(_unwilling, "tiny") as worker, pytest.raises(RuntimeError, match="ValueError: not ready: tiny"):
        worker()
    with pieces.Worker(_doubling, 2) as worker:
        assert [worker(n) for n in (1, 5)] == [2, 10]


def _unwilling(name):
    raise ValueError(f"not ready: {name}")


def _doubling(factor):
    return lambda n: factor * n


def command(*args):
    return subprocess.run(
        [sys.executable, str(ROOT / "bench" / "pieces.py"), *map(str, args)],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["adam"],
            f"pieces.py: adam: there is no such piece; choose from {', '.join(pieces.PIECES)}",
        ),
        (["--repeats", "4"], "pieces.py: --repeats: 4 is not a whole number from 5 (--help lists the options)"),
        (["--json", "./no/such/file.json"], "pieces.py: --json ./no/such/file.json: there is no such folder"),
        (["--model", "./no-model"], "pieces.py: model ./no-model: there is no such folder"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(args, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pieces.py", *args])
    assert pieces.run_main("pieces.py", pieces.main) == 2
    assert capsys.readouterr() == ("", f"{message}\n")


def test_without_the_packaged_checkpoint_every_piece_is_skipped_with_the_reason(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pieces.py"])
    monkeypatch.setattr(pieces, "packaged_model", lambda: None)
    assert pieces.run_main("pieces.py", pieces.main) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["rows"] == [] and record["skipped"].keys() == pieces.PIECES.keys()
    assert all("pip install 'nanofinetune[offline]'" in reason for reason in record["skipped"].values())


@pytest.mark.slow
def test_a_difference_ends_the_command_with_1(tiny_job, tmp_path):
    """The command itself, with an AdamW that doubles its learning rate."""
    script = tmp_path / "differs.py"
    script.write_text(
        f"import runpy, sys\nsys.path[:0] = [{str(ROOT / 'bench')!r}, {str(ROOT)!r}]\n"
        "import nanofinetune.step.optim as optim, torch\n"
        "optim.AdamW = lambda parameters, lr, **options: torch.optim.AdamW(parameters, lr=2 * lr, **options)\n"
        f"runpy.run_path({str(ROOT / 'bench' / 'pieces.py')!r}, run_name='__main__')\n"
    )
    args = [sys.executable, script, "adamw", "--model", tiny_job.model, "--data", tiny_job.data]
    done = subprocess.run(args, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("pieces.py: torch's default, our default: parameter 0 differs by")
    assert "Traceback" not in done.stderr and ">= 4" not in done.stdout


def test_rate_is_the_work_over_our_time_against_the_limit():
    row = pieces.Row("adamw", "an update", [(20.0, 10.0), (20.0, 10.0)], work=1e9, kind="copy")
    assert row.record()["rate"] == 1e11
    assert row.against({"copy": 4e11, "gemm": 1.0}) == "  [100 GB/s, 25% of copy]"
    plain = pieces.Row("adamw", "an update", [(20.0, 10.0)])
    assert plain.against({}) == "" and "rate" not in plain.record()


def test_model_passes_its_gate(tiny_job, monkeypatch):
    monkeypatch.setattr(pieces, "interleave", lambda *_, **__: [(1.0, 1.0)])
    rows = list(pieces.model(tiny_job, 5))
    assert [row.what.partition(", ")[2] for row in rows] == [
        "dropout's masks", "and nothing unread",
    ]  # fmt: skip


def test_model_refuses_another_noise(tiny_job, no_clock, monkeypatch):
    monkeypatch.setattr(pieces, "use_exact_dropout", lambda model: model.apply(_no_dropout))
    with pytest.raises(pieces.NotEqual, match="model dropout's masks: the loss of step 1 is"):
        next(pieces.model(tiny_job, 5))


def _no_dropout(module):
    if isinstance(module, torch.nn.Dropout):
        module.p = 0.0


def test_metrics_and_data_pass_their_gates(tiny_job, monkeypatch):
    pytest.importorskip("evaluate", reason="one of the sides")
    monkeypatch.setattr(pieces, "interleave", lambda *_, **__: [(1.0, 1.0)])
    assert [row.what for row in pieces.metrics(tiny_job, 5)] == ["lists and scikit-learn", "evaluate"]
    assert len([*pieces.data(tiny_job, 5)]) == 1


def test_metrics_and_data_refuse_other_results(tiny_job, no_clock, monkeypatch):
    pytest.importorskip("sklearn", reason="one of the sides")
    monkeypatch.setattr(pieces.Metric, "compute", lambda self: {"accuracy": 0.25, "f1": 0.25})
    with pytest.raises(pieces.NotEqual, match="accuracy is"):
        next(pieces.metrics(tiny_job, 5))
    original = pieces.load_tokens

    def shifted(*args):
        data, stores = original(*args)
        stores["train"].ragged["input_ids"][0][0] += 1
        return data, stores

    monkeypatch.setattr(pieces, "load_tokens", shifted)
    with pytest.raises(pieces.NotEqual, match="data: row 0 has other tokens"):
        next(pieces.data(tiny_job, 5))


def test_counted_operations_are_those_of_the_matrix_products():
    model = torch.nn.Sequential(torch.nn.Linear(8, 4, bias=False))

    class Loss(torch.nn.Module):
        def forward(self, x):
            from types import SimpleNamespace

            return SimpleNamespace(loss=model(x).sum())

    # forward 2·3·8·4; backward the weight's gradient, as many, and none for the input
    assert pieces.count_operations(Loss(), {"x": torch.ones(3, 8)}) == 2 * 2 * 3 * 8 * 4


@pytest.mark.slow
def test_ranks_agree_and_tell_their_memory(tiny_job):
    with pieces.ranks(tiny_job, ("library", "ours")) as both:
        library, ours = both("library", 5), both("ours", 5)
    for (_, losses, memory), (_, our_losses, _) in zip(library, ours, strict=True):
        pieces.need_equal_losses("ddp", losses, our_losses)
        assert memory > 0
    assert library[0][1] != library[1][1]  # each rank has rows of its own
    with pytest.raises(pieces.NotEqual, match="ddp: the loss of step 1 is"):
        pieces.need_equal_losses("ddp", library[0][1], ours[1][1])


@pytest.mark.slow
def test_ddp_passes_its_gates(tiny_job, monkeypatch):
    """Losses of both wrappers beside the library's on two ranks; what is timed afterwards is left out."""
    monkeypatch.setattr(pieces, "interleave", lambda *_, **__: [(1.0, 1.0)])
    rows = list(pieces.ddp(tiny_job, 5))
    assert [row.unit for row in rows] == ["ms", "ms", "MiB", "MiB"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chosen", "rows"),
    [
        (["adamw", "collate"], {"collate": 3, "adamw": 6}),
        (["step", "evaluate"], {"step": 1, "evaluate": 1}),
        (["gather", "metrics", "data"], {"gather": 1, "metrics": 2, "data": 1}),
    ],
)
def test_the_command_writes_a_table_and_a_record(chosen, rows, tiny_job, tmp_path):
    file = tmp_path / "pieces.json"
    done = command(*chosen, "--repeats", 5, "--json", file, "--model", tiny_job.model, "--data", tiny_job.data)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert record == json.loads(file.read_text())
    assert set(record) == {"machine", "model", "data", "repeats", "limits", "rows", "skipped"}
    assert set(record["machine"]) >= {"cpu", "cores", "threads", "python", "torch", "transformers", "datasets", "date"}
    assert record["machine"]["torch"] == torch.__version__
    found = [row["piece"] for row in record["rows"]]
    assert {piece: found.count(piece) for piece in found} == {
        piece: count for piece, count in rows.items() if piece not in record["skipped"]
    }
    assert {*found, *record["skipped"]} == set(chosen)
    for row in record["rows"]:
        ratios = [b / a if row["unit"] == "MiB" else a / b for a, b in row["turns"]]
        assert len(ratios) == 5 and all(ratio > 0 for ratio in ratios)
        assert (row["low"], row["ratio"], row["high"]) == (min(ratios), statistics.median(ratios), max(ratios))
        assert any(line.startswith(row["piece"]) and row["what"] in line for line in done.stdout.splitlines())
