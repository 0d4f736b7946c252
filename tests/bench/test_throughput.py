"""bench/throughput.py: its gate, its arithmetic, its record and report; and, slowly, the real command. Never a time.

    python -m pytest tests/bench/test_throughput.py            with made-up runs in place of processes
    python -m pytest tests/bench/test_throughput.py -m slow    the two real programs on a tiny model

The gate is shown to refuse: a difference in the initial weights, and one in AdamW, end the command before any pair.
References: accelerate 1.15 and transformers 5.23 through bench/peer.py, bench/peer_trainer.py and
bench/peer_pipeline.py, lightning-fabric 2.6 through bench/peer_fabric.py.
"""

import json
import os
import re
import statistics
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from typing import Any

import pytest
from conftest import ROOT, write_job

sys.path.insert(0, str(ROOT / "bench"))

import faults
import fuzz
import made
import pieces
import throughput
from throughput import NotEqual, Place, Setup

from nanofinetune.ground.cli import run_main

PLACE = Place("model", "data", "cpu", ROOT)
LOSSES = [0.7, 0.6, 0.5, 0.4, 0.3]


def made_up(losses=LOSSES, **figures):
    base = {"step": 1.0, "ms a step": 1.0, "evaluation": 1.0, "first step": 1.0, "memory": 1.0, "scores": {}}
    base["tokens"] = [40, 50, 60, 70, 80]
    return base | figures | {"losses": losses}


def record_of(*found):
    names = ("python", "torch", "transformers", "accelerate", "datasets")
    here = {"cpu": "a CPU", "cores": 2, "threads": 2, "date": "2026-01-02"} | dict.fromkeys(names, "1.0")
    setups = {part["setup"]["name"]: part | {"measured": "2026-01-02 03:04"} for part in found}
    return {"what": "throughput", "machine": here, "model": "m", "data": "d", "device": "cpu", "setups": setups}


def taken(setup, pairs=3):
    speed = iter([3.0, 1.0, 8.0, 2.0, 5.0, 5.0] * 9)
    return throughput.compare(setup, PLACE, pairs, lambda *_: made_up(step=next(speed)))


# --- the gate ---------------------------------------------------------------------------------------------------------


def test_sides_take_strict_turns_after_the_gate():
    order = []

    def take(side, setup, place, steps):
        order.append((side, steps))
        return made_up()

    throughput.compare(Setup("fp32", "", steps=40), PLACE, 2, take)
    gate = [("library", throughput.GATE_STEPS), ("ours", throughput.GATE_STEPS)]
    assert order == gate + [("library", 40), ("ours", 40)] * 2


@pytest.mark.parametrize("same_work", [True, False])
@pytest.mark.parametrize("step", [1, 2, 5])
def test_a_difference_is_refused_before_any_pair(step, same_work):
    order = []

    def take(side, setup, place, steps):
        order.append(side)
        assert setup.same_work and not setup.ours and not setup.library, "the gate compares equal work"
        differing = [loss + 1e-4 * (side == "ours" and i + 1 == step) for i, loss in enumerate(LOSSES)]
        return made_up(differing)

    setup = Setup("x", "", same_work=same_work, ours=("--group-by-length",), library=("--fused",))
    with pytest.raises(NotEqual, match=f"x: the loss of step {step} is .* with Accelerate and .* with us"):
        throughput.compare(setup, PLACE, 5, take)
    assert order == ["library", "ours"]


def test_every_pair_of_equal_work_has_to_agree():
    def take(side, setup, place, steps):
        return made_up([0.9, *LOSSES[1:]] if side == "ours" and steps == 40 else LOSSES)

    with pytest.raises(NotEqual, match="the loss of step 1"):
        throughput.compare(Setup("x", "", steps=40), PLACE, 5, take)
    throughput.compare(Setup("x", "", steps=40, same_work=False), PLACE, 5, take)


def test_the_first_loss_is_compared_more_strictly_and_nan_never_agrees():
    cases = (("no", [0.7 + 5e-7, 0.600015], 0.700005), ("bf16", [0.700005, 0.602], 0.7002))
    for precision, rounded, first in cases:
        setup = Setup("x", "", precision)
        throughput.need_equal_work(setup, made_up(), made_up([*rounded, *LOSSES[2:]]))
        for wrong in ([first, *LOSSES[1:]], [*LOSSES[:4], float("nan")]):
            with pytest.raises(NotEqual):
                throughput.need_equal_work(setup, made_up(), made_up(wrong))
        with pytest.raises(NotEqual, match="no step was taken"):
            throughput.need_equal_work(setup, made_up([]), made_up([]))


def test_batches_of_other_sizes_are_not_equal_work():
    """Ours once counted the batch that is tried before the run; a time per token then has the wrong tokens."""
    shifted = made_up(tokens=[99, 40, 50, 60, 70])
    with pytest.raises(NotEqual, match=r"x: the first steps have \[40, .*\] tokens with Accelerate and \[99, "):
        throughput.need_equal_work(Setup("x", ""), made_up(), shifted)


def answers(*found, **figures):
    return {"whole": 2.0, "memory": 1.0, "answers": list(found)} | figures


SAME, OTHER = ("same", 0.9), ("other", 0.7)


def test_a_prediction_is_timed_only_where_all_labels_and_probabilities_agree():
    setup = Setup("predict", "", peer="pipeline")
    throughput.need_equal_work(setup, answers(SAME, OTHER), answers(SAME, ("other", 0.700009)))
    for wrong, why in (
        ([SAME, ("same", 0.7)], r"predict: row 2 is other \(0.700000\) with pipeline and same \(0.700000\) with us"),
        ([SAME, ("other", 0.70002)], "row 2 is"),
        ([("same", float("nan")), OTHER], "row 1 is"),
        ([SAME], "pipeline answers for 2 rows, and we for 1"),
    ):
        with pytest.raises(NotEqual, match=why):
            throughput.need_equal_work(setup, answers(SAME, OTHER), answers(*wrong))
    with pytest.raises(NotEqual, match="answers for 0 rows"):
        throughput.need_equal_work(setup, answers(), answers())


def test_a_record_of_a_prediction_counts_its_answers_and_has_two_rows():
    walls = iter([9.0, 9.0, 6.0, 2.0, 5.0, 2.0])
    setup = throughput.setups([1], ["no"], 40)["predict"]
    found = throughput.compare(setup, PLACE, 2, lambda *_: answers(SAME, OTHER, whole=next(walls)))
    assert [pair[side]["answers"] for pair in found["pairs"] for side in throughput.SIDES] == [2] * 4
    assert found["gate"] == {"library": [0.9, 0.7], "ours": [0.9, 0.7]}
    assert [(row["measure"], row["ratio"], row["target"]) for row in found["rows"]] == [
        ("whole", 2.75, ">= 1.6"), ("memory", 1.0, ""),
    ]  # fmt: skip


# --- the arithmetic ---------------------------------------------------------------------------------------------------


def test_ratio_is_the_median_over_pairs():
    found = {row["measure"]: row for row in taken(Setup("x", "", targets=(("step", ">= 1.25"),)))["rows"]}
    # the two runs of the gate took the first two speeds
    assert (found["step"]["ratio"], found["step"]["low"], found["step"]["high"]) == (3.0, 1.0, 4.0)
    assert found["step"]["library"] == statistics.median([8.0, 5.0, 3.0])
    assert throughput.reached(found["step"]) == "yes"
    assert throughput.reached(found["step"] | {"target": ">= 3.1"}) == "**no**"
    assert throughput.reached(found["evaluation"]) == ""


def test_memory_and_first_step_are_ours_over_the_library():
    pairs = [{"library": made_up(memory=400.0), "ours": made_up(memory=300.0, **{"first step": 0.5})}]
    found = {row["measure"]: row for row in throughput.rows(Setup("x", ""), pairs)}
    assert found["memory"]["ratio"] == 0.75 and found["first step"]["ratio"] == 0.5
    assert throughput.reached(found["memory"] | {"target": "<= 0.95"}) == "yes"
    pairs = [{"library": made_up(memory=0.0), "ours": made_up(memory=0.0)}]  # a system that does not tell
    assert "memory" not in {row["measure"] for row in throughput.rows(Setup("x", ""), pairs)}


def test_figures_leave_the_warm_up_out_and_count_from_the_command():
    times = [100.0, 103.0, 104.0, 105.0, 106.0, 106.5, 107.5]  # the loop began, then six steps
    trace = {"times": times, "tokens": [9, 9, 9, 9, 100, 200], "losses": LOSSES, "evaluation": 2.0}
    found = throughput.figures(trace | {"accuracy": 0.5, "f1": None}, began=98.0, peak=10.0)
    assert found["first step"] == 5.0
    assert found["ms a step"] == 1.5e3 / 2
    assert found["step"] == pytest.approx(1.5 / 300 * 1e6)  # ms for 1,000 tokens


def test_watch_adds_up_a_process_and_its_children(tmp_path):
    if not os.path.exists("/proc/self/status"):
        pytest.skip("only Linux tells another process's peak")
    child = "x = bytearray(60 << 20); import time; time.sleep(1.5)"
    parent = f"import subprocess, sys; x = bytearray(40 << 20); subprocess.run([sys.executable, '-c', {child!r}])"
    together = throughput.watch(subprocess.Popen([sys.executable, "-c", parent]))
    alone = throughput.watch(subprocess.Popen([sys.executable, "-c", child]))
    assert alone > 60 and together > alone + 40


# --- the command line and the record ----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def bf16_instructions(monkeypatch):
    """The setups of a CPU that has them, on any CPU."""
    monkeypatch.setattr(throughput, "has_bf16", lambda: True)


def test_without_bf16_instructions_the_best_is_fp32_and_bf16_is_measured_only_by_name(monkeypatch):
    monkeypatch.setattr(throughput, "has_bf16", lambda: False)
    known = throughput.setups([1], ["no", "bf16"], 40)
    best = [known[name] for name in ("best", "bestplain", "trainerbest", "fabricbest")]
    assert {setup.precision for setup in best} == {"no"} and all("fp32" in setup.what for setup in best)
    assert [name for name, setup in known.items() if throughput.slow(setup, "cpu")] == ["bf16"]
    on_gpu = throughput.setups([1], ["no", "bf16"], 40, "cuda")
    assert on_gpu["best"].precision == "bf16" and not any(throughput.slow(setup, "cuda") for setup in on_gpu.values())


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("flags : fpu avx512_bf16 sse", True), ("flags : amx_bf16", True), ("Features : fp asimd bf16", True),
        ("flags : fpu avx2", False),
    ],
)  # fmt: skip
def test_bf16_instructions_are_found_by_the_kernels_names(words, found, tmp_path):
    (tmp_path / "cpuinfo").write_text(f"processor : 0\n{words}\n")
    assert pieces.has_bf16(tmp_path / "cpuinfo") == found
    assert not pieces.has_bf16(tmp_path / "nothing")


def test_names_and_settings_of_the_setups():
    known = throughput.setups([1, 2, 4], ["no", "bf16"], 40)
    assert {"fp32", "bf16", "best", "ranks2", "ranks4", "batch32", "length256", "size12x768", "nproc4"} <= set(known)
    assert not {"ranks2", "nproc2", "bf16", "best"} & set(throughput.setups([1], ["no"], 40))
    line = throughput.command("library", known["ranks2"], PLACE, 40, ROOT / "t.json")
    assert "--nproc_per_node=2" in line and "--same-work" in line and "--cpu" in line
    line = throughput.command("ours", known["best"], PLACE, 40, ROOT / "t.json")
    assert line[line.index("--precision") + 1] == "bf16" and set(throughput.BEST) <= set(line)
    assert "--same-work" not in throughput.command("library", known["best"], PLACE, 40, ROOT / "t.json")


@pytest.mark.parametrize(
    ("name", "script", "options"),
    [
        ("trainer", "peer_trainer.py", {"--same-work", "--weight-decay"}),
        ("trainerbest", "peer_trainer.py", {"--group-by-length", "--eval-batch-size", "--weight-decay", "bf16"}),
        ("fabric", "peer_fabric.py", {"--same-work"}),
        ("fabricbest", "peer_fabric.py", {"--fused", "--eval-batch-size", "bf16"}),
        ("best", "peer.py", {"--fused", "--eval-batch-size", "bf16"}),
    ],
)
def test_each_peer_runs_its_own_script_with_its_best_options(name, script, options):
    setup = throughput.setups([1], ["no", "bf16"], 40)[name]
    line = throughput.command("library", setup, PLACE, 40, ROOT / "t.json")
    assert line[1] == str(ROOT / "bench" / script) and options <= set(line)
    assert ("--same-work" in line) == setup.same_work
    assert throughput.command("ours", setup, PLACE, 40, ROOT / "t.json")[1] == str(throughput.OURS)


def test_targets_of_the_peers():
    known = throughput.setups([1, 2], ["no", "bf16"], 40)
    steps = {name: dict(setup.targets).get("step", "") for name, setup in known.items()}
    assert [steps[name] for name in ("fp32", "bf16", "best", "trainerbest", "fabricbest", "ranks2")] == [
        ">= 1.8", ">= 2.1", ">= 2.2", ">= 1.5", ">= 1.5", ">= 1.8",
    ]  # fmt: skip
    encoders = ("distilbert", "roberta", "electra", "albert", "xlmroberta", "mpnet")
    assert {steps[name] for name in encoders} == {">= 1.4"}


def test_a_peer_that_is_not_installed_is_refused_by_name_and_left_out_of_all(monkeypatch, capsys):
    monkeypatch.setattr("pieces.Job.check", lambda job: None)
    monkeypatch.setattr(throughput, "find_spec", lambda name: None if name == "lightning_fabric" else name)
    monkeypatch.setattr(sys, "argv", ["throughput.py", "fabric", "--model", "m"])
    assert run_main("throughput.py", throughput.main) == 2
    why = "Fabric needs lightning-fabric: pip install lightning-fabric"
    assert capsys.readouterr() == ("", f"throughput.py: fabric: {why}\n")
    known = throughput.setups([1], ["no"], 40)
    few = {name: known[name] for name in ("fp32", "fabric")}
    monkeypatch.setattr(throughput, "setups", lambda *_: few)
    monkeypatch.setattr(throughput, "compare", lambda setup, *_: {"rows": [], "setup": {"peer": setup.peer}})
    monkeypatch.setattr(sys, "argv", ["throughput.py", "--model", "m"])
    assert run_main("throughput.py", throughput.main) == 0
    out, err = capsys.readouterr()
    assert err == f"fabric: left out; {why}\n" and list(json.loads(out.splitlines()[-1])["setups"]) == ["fp32"]


def test_prediction_gets_a_model_with_a_head_and_the_pairs_of_the_test_split(tmp_path, saved_model, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    for split, text in (("train", "a"), ("validation", "b"), ("test", "c")):
        row = {"sentence1": text, "sentence2": "the cat", "label": 0}
        (data / f"{split}.jsonl").write_text(2 * (json.dumps(row) + "\n"))
    place = Place(saved_model, str(data), "cpu", tmp_path)
    setup = throughput.setups([1], ["no"], 40)["predict"]
    theirs, ours = (throughput.command(side, setup, place, 9, tmp_path / "t.jsonl") for side in throughput.SIDES)
    assert theirs[1:5] == [
        str(ROOT / "bench" / "peer_pipeline.py"), str(tmp_path / "model-with-head"), str(tmp_path / "pairs.jsonl"),
        str(tmp_path / "t.jsonl"),
    ]  # fmt: skip
    assert ours[1:5] == ["-m", "nanofinetune.predict", theirs[2], theirs[3]]
    lines = (tmp_path / "pairs.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"sentence1": "c", "sentence2": "the cat"}] * 2
    monkeypatch.setattr(sys, "argv", ["predict", *ours[3:]])
    from nanofinetune import predict

    predict.parse_arguments()  # it knows every option


def test_data_without_pairs_are_refused_for_prediction(tmp_path):
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text('{"sentence": "the cat", "label": 1}\n')
    with pytest.raises(throughput.UsageError, match="predict needs the columns sentence1 and sentence2"):
        made.pairs_of(str(tmp_path), tmp_path)


@pytest.mark.parametrize("kind", list(made.ENCODERS))
def test_an_encoder_is_what_the_model_type_says_and_fits_its_tokenizer(kind, tmp_path, saved_model, monkeypatch):
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    from nanofinetune.cpu.lean import ENCODERS

    small = {name: 24 if "size" in name or "dim" in name else size for name, size in made.ENCODERS[kind].items()}
    fixed = {name: size for name, size in made.ENCODERS[kind].items() if name in made.SHIFTED}
    monkeypatch.setitem(made.ENCODERS, kind, small | fixed)
    folder = made.encoder_of(kind, saved_model, tmp_path)
    assert made.encoder_of(kind, "not looked at again", tmp_path) == folder
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert config.model_type == kind and config.pad_token_id == tokenizer.pad_token_id
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert type(model).__name__ in ENCODERS
    longest = tokenizer(["the " * 600], truncation=True, max_length=512, return_tensors="pt")
    assert ("token_type_ids" in longest) == (kind not in made.WITHOUT_SEGMENTS)
    assert model(**longest).logits.shape == (1, 2)


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory, tiny_tokenizer_dir):
    """A saved tiny BERT with its tokenizer."""
    from conftest import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("made") / "model", tiny_tokenizer_dir)


def test_trainer_is_told_to_do_nothing_but_train(tmp_path):
    """What a user sets who wants speed; the optimizer stays Trainer's default, torch's fused AdamW."""
    pytest.importorskip("accelerate", reason="Trainer needs it (extra `bench`)")
    import peer_trainer
    from transformers import TrainingArguments

    asked: dict[str, Any] = dict.fromkeys(("seed", "epochs", "batch_size", "eval_batch_size"), 3)
    asked |= {"lr": 1e-3, "weight_decay": 0.01, "max_steps": None, "cpu": True, "group_by_length": True}
    found = TrainingArguments(**peer_trainer.settings(Namespace(precision="bf16", **asked), str(tmp_path)))
    assert (found.optim, found.lr_scheduler_type, found.get_warmup_steps(9)) == ("adamw_torch_fused", "linear", 0)
    assert found.bf16 and not found.fp16 and found.max_grad_norm == 0 and found.max_steps == -1
    assert (found.save_strategy, found.logging_strategy, found.eval_strategy, found.report_to) == ("no", "no", "no", [])
    assert found.train_sampling_strategy == "group_by_length" and found.disable_tqdm


def test_train_py_takes_the_options_of_every_setup():
    from conftest import load_script

    train = load_script(ROOT / "train.py")
    for setup in throughput.setups([1, 2, 4], ["no", "bf16"], 40).values():
        plain = replace(setup, length=0, size="", encoder="")
        if setup.predicts:
            continue
        words = throughput.command("ours", plain, PLACE, 9, ROOT / "t.json")
        train.parse_arguments(words[words.index(str(throughput.OURS)) + 2 :])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fp31"], "fp31: there is no such setup; choose from fp32, trainer,"),
        (["--precision", "fp8"], "--precision fp8: choose no, bf16 or no,bf16"),
        (["--quick", "--record", "x"], "--record: a quick run is no measurement; leave --quick out"),
        (["--record", "a/b"], "--record a/b: a name of letters, digits and underscores"),
        (["--nproc", "0"], "--nproc: 0 is not a whole number from 1"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(args, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["throughput.py", *args])
    assert run_main("throughput.py", throughput.main) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"throughput.py: {message}") and err.count("\n") == 1


def test_a_record_is_merged_setup_by_setup_and_written_three_ways(tmp_path):
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib (extra `bench`)")
    base = tmp_path / "2026-01-02_cpu_speed"
    fp32 = taken(Setup("fp32", "the same work, fp32", targets=(("step", ">= 99"),)))
    throughput.write(throughput.merged(base, record_of(fp32)), base)
    other = taken(Setup("batch4", "batches of 4", length=64), pairs=5)
    throughput.write(throughput.merged(base, record_of(other)), base)
    record = json.loads((base.with_suffix(".json")).read_text())
    assert list(record["setups"]) == ["fp32", "batch4"]
    assert [len(found["pairs"]) for found in record["setups"].values()] == [3, 5]
    text = base.with_suffix(".md").read_text()
    assert text == throughput.markdown(record, "2026-01-02_cpu_speed.png")
    assert "| >= 99 | **no** | 3 |" in text, "where we lose, it stands there"
    assert "Gate: Accelerate 0.70000, 0.60000" in text
    assert base.with_suffix(".png").stat().st_size > 10_000
    with pytest.raises(throughput.UsageError, match="has another model"):
        throughput.merged(base, record_of(other) | {"model": "another"})


def test_a_report_names_the_peer_of_each_setup():
    parts = [taken(throughput.setups([1], ["no", "bf16"], 40)[name]) for name in ("fp32", "trainerbest", "fabric")]
    walls = iter([4.0, 2.0] * 3)
    predict = throughput.setups([1], ["no"], 40)["predict"]
    parts.append(throughput.compare(predict, PLACE, 2, lambda *_: answers(SAME, OTHER, whole=next(walls))))
    first = parts[0] | {"setup": {k: v for k, v in parts[0]["setup"].items() if k not in ("peer", "encoder")}}
    text = throughput.markdown(record_of(first, *parts[1:]), "x.png")
    assert text.startswith("# Throughput: Accelerate, Trainer, Fabric, pipeline and nanofinetune, 2026-01-02\n")
    assert "| Accelerate | the same work, fp32: 1,000 tokens of training | 5 ms | 2 ms |" in text, "an old record"
    assert "| Trainer | best against best, bf16: 1,000 tokens of training |" in text and ">= 1.5 | yes | 3 |" in text
    assert "| pipeline | prediction of a file of pairs: command to end | 4 s | 2 s | **2.00** (2.00 to 2.00)" in text
    assert "options: Trainer --group-by-length --eval-batch-size 64, ours --group-by-length --fast-dropout." in text
    assert "Gate: Fabric 0.70000" in text and "): 2 rows.\n  First probabilities: pipeline 0.90000, 0.70000;" in text
    assert throughput.line("Fabric", parts[2]["rows"][0]).startswith("Fabric      the same work, fp32: 1,000 tokens")


def test_readme_tells_of_the_other_peers_where_the_record_has_them():
    import readme

    known = throughput.setups([1], ["no", "bf16"], 40)
    older, newer = (record_of(taken(known[name])) for name in ("trainerbest", "fabricbest"))
    told = readme.others({"trainerbest": (ROOT, older), "fabricbest": (ROOT, newer)})
    one, two = "3.00 times the speed of transformers' Trainer", "3.00 times the speed of Lightning Fabric"
    assert told == f". Each side at its best, it has {one} and {two}"
    assert readme.others({"fp32": (ROOT, record_of(taken(known["fp32"])))}) == ""


def test_documents_show_each_setup_from_the_newest_record_that_has_it(tmp_path, monkeypatch):
    import readme

    known = throughput.setups([1], ["no", "bf16"], 40)
    days = {"2026-01-01": ("fp32", "bf16"), "2026-01-02": ("fp32",)}
    for day, names in days.items():
        record = record_of(*(taken(known[name]) for name in names))
        (tmp_path / f"{day}_cpu_speed.json").write_text(json.dumps(record))
    (tmp_path / "2026-01-03_cuda_speed.json").write_text(json.dumps(record_of(taken(known["fp32"]))))
    monkeypatch.setattr(readme, "RECORDS", tmp_path)
    sources = {name: path.name[:10] for name, (path, _) in readme.newest_setups().items()}
    assert sources == {"fp32": "2026-01-02", "bf16": "2026-01-01"}
    newest, earlier = readme.speed(tmp_path).split("Measured earlier, and not again. ")
    assert "fp32: 1,000 tokens" in newest and "bf16" not in newest and "2026-01-02_cpu_speed.png" in newest
    assert "bf16: 1,000 tokens" in earlier and "fp32:" not in earlier and "2026-01-01_cpu_speed.json" in earlier


def test_a_record_names_no_place(tmp_path):
    (tmp_path / "glue" / "mrpc").mkdir(parents=True)
    assert throughput.short(str(tmp_path / "glue" / "mrpc"), None) == "glue/mrpc"
    assert throughput.short("glue/mrpc", None) == "glue/mrpc"
    assert throughput.short("/somewhere", "/somewhere") == "the packaged checkpoint"


@pytest.mark.parametrize("path", sorted((ROOT / "bench" / "records").glob("*.md")), ids=lambda path: path.stem)
def test_reports_are_those_of_their_records(path):
    record = json.loads(path.with_suffix(".json").read_text())
    if record["what"] in ("faults", "fuzz"):
        assert path.read_text() == {"faults": faults, "fuzz": fuzz}[record["what"]].table_of(record) + "\n"
        return
    assert path.read_text() == throughput.markdown(record, path.with_suffix(".png").name)
    assert path.with_suffix(".png").is_file()
    for found in record["setups"].values():
        assert found["rows"] == json.loads(json.dumps(throughput.rows(setup_of(found), found["pairs"])))
        assert len(found["pairs"]) >= 5


def setup_of(found):
    values: dict[str, Any] = {key: tuple(map(tuple, v)) if key == "targets" else v for key, v in found["setup"].items()}
    return Setup(**values)


# --- the real programs ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory, tiny_tokenizer_dir):
    """A saved tiny BERT with its tokenizer, and a folder of pairs of its words."""
    folder = tmp_path_factory.mktemp("throughput")
    write_job(folder, tiny_tokenizer_dir, {"train": 160, "validation": 30})
    return folder


def quick(folder, *setups):
    script, model, data = ROOT / "bench" / "throughput.py", folder / "model", folder / "data"
    return [str(script), *setups, "--quick", "--model", str(model), "--data", str(data)]


@pytest.mark.first
@pytest.mark.slow
def test_the_command_measures_equal_and_best_work_on_one_and_two_processes(tiny_folder):
    pytest.importorskip("accelerate", reason="the course's side (extra `bench`)")
    pytest.importorskip("sklearn", reason="the course's side (extra `test`)")
    words = [sys.executable, *quick(tiny_folder, "bf16", "best", "ranks2")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(done.stdout.splitlines()[-1])
    assert list(record["setups"]) == ["bf16", "best", "ranks2"]
    for found in record["setups"].values():
        (pair,) = found["pairs"]
        for side in ("library", "ours"):
            assert len(pair[side]["losses"]) == throughput.GATE_STEPS + throughput.WARM_UP
            assert pair[side]["memory"] > 100
        assert {row["measure"] for row in found["rows"]} == set(throughput.MEASURES) - {"whole"}
    same = record["setups"]["bf16"]["pairs"][0]
    assert same["library"]["scores"].keys() == same["ours"]["scores"].keys()
    assert not re.search(r'"(?:\.\.)?/', done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(("setup", "needs"), [("trainerbest", "accelerate"), ("fabricbest", "lightning_fabric")])
def test_trainer_and_fabric_pass_the_gate(setup, needs, tiny_folder):
    """The gate of their best compares the same work, in bf16; then both sides run as they like."""
    pytest.importorskip(needs, reason="the peer (extra `bench`)")
    pytest.importorskip("sklearn", reason="the peer's metric (extra `bench`)")
    words = [sys.executable, *quick(tiny_folder, setup)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])["setups"][setup]
    assert len(found["gate"]["library"]) == throughput.GATE_STEPS
    assert found["gate"]["library"] == pytest.approx(found["gate"]["ours"], abs=throughput.TOLERANCE["bf16"])
    assert found["pairs"][0]["library"]["scores"].keys() == found["pairs"][0]["ours"]["scores"].keys()


@pytest.mark.slow
def test_the_pipeline_and_we_give_the_same_answers(tiny_folder):
    words = [sys.executable, *quick(tiny_folder, "predict")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])["setups"]["predict"]
    assert [found["pairs"][0][side]["answers"] for side in throughput.SIDES] == [30, 30]
    assert [row["measure"] for row in found["rows"]] == ["whole", "memory"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "step"),
    [
        (
            "class AdamW(train.AdamW):\n    def __init__(self, groups, lr): super().__init__(groups, lr=0.1)\n"
            "train.AdamW = AdamW",
            2,
        ),
        ("loop.manual_seed = lambda seed, device: torch.manual_seed(seed + 1)", 1),
        ("loop.mix = lambda *parts: 7", 1),
    ],
)
def test_the_command_refuses_an_injected_difference(change, step, tiny_folder, tmp_path):
    """bench/ours.py with one line changed: the learning rate, the dropout seed, and the key of that seed."""
    changed = tmp_path / "changed.py"
    changed.write_text(
        f"import runpy, sys\nsys.path[:0] = [{str(ROOT)!r}]\nimport torch, train\n"
        f"from nanofinetune.run import run as loop\n{change}\n"
        f"runpy.run_path({str(ROOT / 'bench' / 'ours.py')!r}, run_name='__main__')\n"
    )
    main = tmp_path / "main.py"
    main.write_text(
        f"import sys\nsys.path[:0] = [{str(ROOT / 'bench')!r}]\nimport throughput\n"
        f"throughput.OURS = {str(changed)!r}\nsys.argv = {quick(tiny_folder, 'fp32')!r}\n"
        "try:\n    throughput.main()\nexcept throughput.NotEqual as error:\n    sys.exit(f'refused: {error}')\n"
    )
    done = subprocess.run([sys.executable, main], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 1 and f"refused: fp32: the loss of step {step} is" in done.stderr, done.stderr[-2000:]
    assert "1,000 tokens" not in done.stdout, "timed before the gate refused"
