"""bench/limit.py: its count of operations, its parts of a trace, its record; and train.py, watched. Never a time.

    python -m pytest tests/bench/test_limit.py

References: torch.utils.flop_counter.FlopCounterMode on transformers' own model and on the lean one; for the parts of a
trace, made-up traces of whole numbers, counted moment by moment.
"""

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, load_script, write_job
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

sys.path.insert(0, str(ROOT / "bench"))

import limit
from limit import ADAMW, ATTENTION, DATA, DROPOUT, NORMS, OTHER, PARTS, PRODUCTS, REST, Event
from pieces import on_a_cpu


def bert(layers: int, classes: int = 3) -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60, hidden_size=24, num_hidden_layers=layers, num_attention_heads=3, intermediate_size=40,
        max_position_embeddings=32, num_labels=classes,
    )  # fmt: skip
    return BertForSequenceClassification(config).train()


def counted(model, lengths) -> int:
    """What torch counts of a step on rows of these lengths, padded to the longest."""
    real = torch.arange(max(lengths)).unsqueeze(0) < torch.tensor(lengths).unsqueeze(1)
    ids = torch.randint(5, 60, real.shape)
    with FlopCounterMode(display=False) as counter:
        model(
            input_ids=ids, attention_mask=real.long(), labels=torch.zeros(len(lengths), dtype=torch.long)
        ).loss.backward()
    return counter.get_total_flops()


# --- the operations that must be computed -----------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[7, 7, 7], [1], [32] * 5])
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_operations_match_torchs_flop_counter_on_rows_without_padding(layers, lengths):
    model = bert(layers)
    shape = limit.shape_of(model)
    assert shape == limit.Shape(layers, 24, 40, 3)
    assert limit.operations(shape, lengths, all_read=True) == counted(model, lengths)
    on_a_cpu(model)
    assert limit.operations(shape, lengths) == counted(model, lengths)


def test_rows_with_padding_are_counted_as_if_each_were_alone():
    """Rows have only the layers' parts in common, so their operations add up; and no model computes less than that."""
    shape, lengths = limit.shape_of(bert(2)), [3, 32, 9, 17]
    alone = [limit.operations(shape, [n]) for n in lengths]
    assert limit.operations(shape, lengths) == sum(alone)
    lean = bert(2)
    on_a_cpu(lean)
    assert sum(alone) < counted(lean, lengths) < counted(bert(2), lengths)


@pytest.mark.parametrize("name", limit.SETUPS)
def test_train_py_computes_in_every_setup_what_must_be_computed_and_no_more(name):
    """Its model as `prepare` returns it: in bf16 that has a forward of its own, around the class's."""
    from nanofinetune import Accelerator

    train, setup, lengths = load_script(ROOT / "train.py"), limit.SETUPS[name], [9, 9, 9]
    args, model = train.parse_arguments(list(setup.options)), bert(3)
    shape = limit.shape_of(model)
    accelerator = Accelerator(mixed_precision=args.precision, device="cpu")
    train.compute_faster(model, args, accelerator.device)
    model = accelerator.prepare(model)
    assert counted(model, lengths) == limit.operations(shape, lengths)
    whole = model.forward
    model.forward = lambda **inputs: whole(**inputs)  # might read any token
    assert counted(model, lengths) == limit.operations(shape, lengths, all_read=True)


def test_another_build_is_refused():
    tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    other = RobertaForSequenceClassification(RobertaConfig(vocab_size=9, **tiny))
    with pytest.raises(limit.UsageError, match="a RobertaForSequenceClassification; name a BertFor"):
        limit.shape_of(other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rates_are_of_the_products_that_a_step_computes(dtype):
    """Their shapes are those of torch.mm and torch.addmm in a step of the model itself, and so is their work."""
    seen = []

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                left, right = args[-2:]
                seen.append((*left.shape, right.shape[1], left.is_contiguous(), right.is_contiguous()))
            return func(*args, **(kwargs or {}))

    found = list(limit.products(limit.shape_of(bert(2)), 4 * 6, dtype))
    with Seen():
        for _, action, _ in found:
            assert action().dtype == dtype
    ours, seen[:] = list(seen), []
    assert len({name for name, _, _ in found}) == len(found) == 9
    for (rows, inner, columns, *_), (_, _, work) in zip(ours, found, strict=True):
        assert work == 2 * rows * inner * columns
    with Seen():
        bert(2)(input_ids=torch.randint(5, 60, (4, 6)), labels=torch.zeros(4, dtype=torch.long)).loss.backward()
    assert set(ours) <= set(seen)


def test_the_rate_is_that_of_the_fastest_time(monkeypatch):
    clock = iter([0.0, 0.0, 4.0, 4.0, 4.0, 6.0, 6.0, 6.0, 9.0, 9.0])  # the start; then began, ended, over? thrice
    monkeypatch.setattr(limit.time, "perf_counter", lambda: next(clock))
    done = []
    assert limit.rates([("a", lambda: done.append(1), 100)], seconds=7.0) == {"a": 50.0}
    assert len(done) == 4, "the first time does not count"


# --- where the time goes ----------------------------------------------------------------------------------------------

ENGINE = limit.ENGINE + ": "


def test_a_made_up_trace_gives_each_moment_to_one_part():
    """Two threads: the second one runs backward, while the first waits inside an operator of its own."""
    events = [
        Event("enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__", 0, 10),
        Event("aten::to", 2, 3),  # inside of the loader
        Event("aten::linear", 12, 30, sequence=4),
        Event("aten::t", 12, 13, sequence=4),
        Event("aten::addmm", 14, 28, sequence=5),
        Event("aten::copy_", 15, 20),  # inside of addmm
        Event("attention", 30, 60),  # a named range, with Python of its own
        Event("aten::bmm", 31, 40, sequence=6),
        Event("aten::mul", 40, 44, sequence=7),
        Event("dropout", 44, 52),
        Event("aten::mul", 50, 52, sequence=8),
        Event("aten::mul", 60, 63, sequence=9),  # of nothing that has a name
        Event("aten::gelu", 63, 64, sequence=10),
        Event("waiting", 65, 100),
        Event(ENGINE + "GeluBackward0", 66, 70, 2, 10),
        Event("GeluBackward0", 66, 70, 2, 10),
        Event("aten::gelu_backward", 67, 70, 2),
        Event(ENGINE + "MulBackward0", 70, 73, 2, 9),
        Event("aten::mul", 71, 73, 2, 7),  # a number that forward has, too: only the node's counts
        Event(ENGINE + "MulBackward0", 73, 75, 2, 8),
        Event("aten::mul", 73, 75, 2),
        Event(ENGINE + "MulBackward0", 75, 79, 2, 7),
        Event("aten::mul", 76, 78, 2),
        Event(ENGINE + "AddmmBackward0", 79, 95, 2, 5),
        Event("aten::mm", 80, 90, 2),
        Event("aten::sum", 90, 94, 2),  # the bias's gradient
        Event(ENGINE + "AccumulateGrad", 95, 96, 2),
        Event("Optimizer.step#AdamW.step", 101, 110),
        Event("aten::_fused_adamw_", 103, 109),
    ]
    found, by_name = limit.breakdown(events, wall=120)
    assert found == {
        PRODUCTS: 18 + 16, ATTENTION: 30 - 8 + 4, DROPOUT: 8 + 2, NORMS: 1 + 4, limit.EMBEDDING: 0, limit.PACKING: 0,
        ADAMW: 9, DATA: 10, OTHER: 3 + 3 + 1 + 1 + 4, REST: 2 + 1 + 1 + 10,
    }  # fmt: skip
    assert sum(found.values()) == 120
    assert list(found) == list(PARTS)
    assert by_name[ATTENTION] == {
        "attention": 30 - 9 - 4 - 8,
        "aten::bmm": 9,
        "aten::mul": 4 + 2,
        ENGINE + "MulBackward0": 2,
    }
    assert by_name[OTHER]["waiting"] == 1 + 4
    assert by_name[DATA] == {"enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__": 9, "aten::to": 1}


NAMES = ("aten::mm", "aten::bmm", "aten::mul", "dropout", "Optimizer.step#AdamW.step", ENGINE + "MulBackward0")
EVENTS = st.builds(
    lambda name, start, length, thread, sequence: Event(name, start, start + length, thread, sequence),
    st.sampled_from(NAMES), st.integers(0, 40), st.integers(0, 12), st.integers(1, 3), st.integers(-1, 5),
)  # fmt: skip


@given(st.lists(EVENTS, max_size=25))
def test_any_trace_is_counted_moment_by_moment(events):
    """Also where threads overlap: each unit of time in which something runs is in one event, the latest of them."""
    found = [0.0] * len(events)
    for i, took in limit.spent(events):
        found[i] += took
    expected = [0] * len(events)
    for moment in range(60):
        running = [i for i, event in enumerate(events) if event.start <= moment < event.end]
        if running:
            expected[max(running, key=lambda i: (events[i].start, -events[i].end, i))] += 1
    assert found == expected
    parts, by_name = limit.breakdown(events, wall=60)
    assert sum(parts.values()) == 60 and parts[REST] == 60 - sum(expected)
    assert all(sum(by_name[part].values()) == parts[part] for part in PARTS if part != REST)


# --- the record -------------------------------------------------------------------------------------------------------


def turn(seconds: float, rate: float, **parts: float) -> limit.Turn:
    profiled = dict.fromkeys(PARTS, 0.0) | {PRODUCTS: 20.0, REST: 10.0} | parts
    operators: dict[str, dict[str, float]] = {part: {} for part in PARTS} | {PRODUCTS: {"aten::mm": 20.0}}
    return limit.Turn(seconds, 2, 800, 10 * 10**9, {"a": rate / 2, "b": rate}, rate * 2, 3, profiled, operators)


def made_up_record(**setups) -> dict:
    versions = dict.fromkeys(("python", "torch", "transformers", "accelerate", "datasets"), "1.0")
    here = {"cpu": "a CPU", "cores": 2, "threads": 2, "date": "2026-01-02"} | versions
    return {"what": "limit", "machine": here, "model": "m", "data": "d", "device": "cpu",
            "setups": limit.summaries(setups)}  # fmt: skip


def test_distance_is_time_over_operations_at_the_highest_rate_of_any_turn(monkeypatch):
    monkeypatch.setitem(limit.SETUPS, "best", replace(limit.SETUPS["best"], precision="bf16"))  # on any CPU
    found = made_up_record(
        fp32=[turn(0.2, 100e9), turn(0.4, 80e9), turn(0.3, 50e9)], bf16=[turn(0.2, 200e9)], best=[turn(0.1, 400e9)]
    )["setups"]
    assert found["fp32"]["limit"] == 100e9, "neither half nor the square's"
    assert found["bf16"]["limit"] == found["best"]["limit"] == 400e9, "one limit for a precision"
    assert found["fp32"]["floor"] == pytest.approx(50.0) and found["fp32"]["ms"] == pytest.approx(150.0)
    assert [found["fp32"][key] for key in ("distance", "low", "high")] == pytest.approx([3.0, 2.0, 4.0])
    assert found["fp32"]["rates"] == {"a": 50e9, "b": 100e9} and found["fp32"]["square"] == 200e9
    assert found["fp32"]["parts"][PRODUCTS] == pytest.approx(100.0), "20 of 30 ms of the trace, of 150 ms"
    assert sum(found["fp32"]["parts"].values()) == pytest.approx(found["fp32"]["ms"])
    assert found["fp32"]["profiled"] == pytest.approx(10.0), "30 ms of three steps"


def test_the_document_is_made_from_the_newest_record_and_says_nothing_without_one(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib (extra `bench`)")
    tables = load_script(ROOT / "bench" / "readme.py")
    monkeypatch.setattr(tables, "RECORDS", tmp_path)
    block = "<!-- generated by bench/readme.py: limit -->\nold\n<!-- end -->"
    assert tables.render(block, tmp_path) == block.replace("old", "")
    older, newer = made_up_record(bf16=[turn(0.4, 50e9)]), made_up_record(fp32=[turn(0.1, 100e9)])
    for day, record in ((1, older), (2, newer)):
        limit.write(record, tmp_path / f"2026-01-0{day}_cpu_limit")
    text = tables.render(block, tmp_path)
    assert text == tables.render(text, tmp_path)
    row = "| fp32 | 50 ms | 5 Gflop | 100 Gflop/s (200) | 50 ms | **1.00** (1.00 to 1.00) | <= 1.4 | yes |"
    assert row in text and "| products | 33.3 ms |" in text and "a CPU, 2 threads" not in text
    assert "![where a step's time goes](2026-01-02_cpu_limit.png)" in text
    assert (tmp_path / "2026-01-02_cpu_limit.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "2026-01-02_cpu_limit.json").read_text()) == json.loads(json.dumps(newer))


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fp31"], "fp31: there is no such setup; choose from fp32, bf16, best"),
        (["--record", "a/b"], "--record a/b: a name of letters, digits and underscores"),
        (["--repeats", "0"], "--repeats: 0 is not a whole number from 1"),
        (["--bogus"], "unrecognized arguments: --bogus"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(words, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["limit.py", *words])
    assert limit.run_main("limit.py", limit.main) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"limit.py: {said}") and err.count("\n") == 1


def test_options_are_train_pys():
    train = load_script(ROOT / "train.py")
    for setup in limit.SETUPS.values():
        args = train.parse_arguments(list(setup.options))
        assert args.precision == setup.precision
    assert args.group_by_length and args.fast_dropout


@pytest.mark.slow
def test_train_py_is_watched_on_a_tiny_model(tmp_path, tiny_tokenizer_dir, monkeypatch):
    """Turns end in other epochs than they began in, every part is seen, and a mistake is train.py's own line."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("NANOFINETUNE_CACHE", "TOKENIZERS_PARALLELISM"):  # what `measure` sets
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(limit, "SQUARE", 16)
    model, data = write_job(tmp_path, tiny_tokenizer_dir, {"train": 40, "validation": 8})
    found = limit.measure(["fp32", "best"], model, data, 2, 7)
    for name, setup in found.items():
        assert len(setup["turns"]) == 2 and setup["distance"] > 0 and setup["operations"] > 0, name
        assert all(turn["steps"] == 7 and 7 * 8 < turn["tokens"] <= 7 * 8 * 25 for turn in setup["turns"])
        assert sum(setup["parts"].values()) == pytest.approx(setup["ms"])
        assert min(setup["parts"].values()) > 0, (name, setup["parts"])
    with pytest.raises(limit.UsageError, match="no/such/data"):
        limit.measure(["fp32"], model, "no/such/data", 1, 1)
    shutil.rmtree(model)
    with pytest.raises(limit.UsageError, match="model"):
        limit.measure(["fp32"], model, data, 1, 1)
