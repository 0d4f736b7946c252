"""train.py as a person runs it: the result line, the plan, the output folder, one process and several.

Most runs call `main` in this process with a tiny model; what concerns the process itself starts a real one.

    python -m pytest tests/test_train.py            the slow ones, with the packaged checkpoint: -m slow
"""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, load_script, save_tiny_model, tiny_bert
from helpers import run_ranks, run_torchrun

from nanofinetune.data import job
from nanofinetune.ranks import loader
from nanofinetune.run import run as loop
from nanofinetune.step.collate import DataCollatorWithPadding

RESULT_KEYS = {
    "model", "data", "world", "steps", "seconds", "examples_per_second", "first_step_seconds", "peak_rss_mb", "padding",
    "loss",
}  # fmt: skip


train = load_script(ROOT / "train.py")


@pytest.fixture
def run(call_main):
    """Call train.py's main with arguments -> (exit code, stdout lines, stderr lines)."""

    def call(*arguments):
        code, out, err = call_main(train, *arguments)
        return code, out.splitlines(), err.splitlines()

    return call


def lines_of(path):
    return path.read_text().splitlines()


def result_of(outcome):
    code, out, err = outcome
    assert code == 0, err
    return json.loads(out[-1])


def test_the_last_line_is_the_result(run, tiny_model, pairs):
    code, out, _ = run("--model", tiny_model, "--data", pairs)
    result = json.loads(out[-1])
    assert code == 0 and not RESULT_KEYS - result.keys()
    assert (result["steps"], result["world"], result["model"], result["data"]) == (3 * 8, 1, tiny_model, pairs)
    assert 0 <= result["accuracy"] <= 1 and 0 <= result["f1"] <= 1 and 0 < result["padding"] < 1
    assert result["best"]["accuracy"] >= result["accuracy"]
    assert sum(line.startswith("epoch ") for line in out) == 3


def test_the_same_seed_gives_the_same_run_and_another_seed_another(run, tiny_model, pairs, tmp_path):
    def losses(seed, name):
        assert run("--model", tiny_model, "--data", pairs, "--seed", seed, "--output", tmp_path / name)[0] == 0
        return [json.loads(line)["loss"] for line in lines_of(tmp_path / name / "metrics.jsonl")]

    first, again, other = losses(1, "a"), losses(1, "b"), losses(2, "c")
    assert first == again
    assert first != other


def test_every_batch_ends_its_step(run, tiny_model, pairs, monkeypatch):
    """XLA records until a step ends: 5 updates, and 23 rows to evaluate in batches of 8."""
    ended: list[torch.device] = []
    monkeypatch.setattr(train, "end_step", ended.append)  # evaluation's
    monkeypatch.setattr(loop, "end_step", ended.append)
    result_of(run("--model", tiny_model, "--data", pairs, "--max-steps", 5, "--eval-batch-size", 8))
    assert ended == [torch.device("cpu")] * (5 + 3)


def test_batches_may_be_copied_ahead(run, tiny_model, pairs, monkeypatch):
    """Training and evaluation ask for copies beside the computation, which a CUDA device makes."""
    asked = []
    original = loader._Copies.__init__

    def listen(copies, device, non_blocking):
        asked.append((device, non_blocking))
        original(copies, device, non_blocking)

    monkeypatch.setattr(loader._Copies, "__init__", listen)
    result_of(run("--model", tiny_model, "--data", pairs, "--epochs", 1))
    assert asked == [(torch.device("cpu"), True)] * 2


@pytest.mark.slow
def test_training_learns(run, tiny_model, pairs):
    """The loss after many epochs on 61 rows is far below chance's 0.693."""
    result = result_of(run("--model", tiny_model, "--data", pairs, "--epochs", 40, "--lr", "2e-3"))
    assert result["loss"] < 0.3


def test_a_window_of_small_batches_equals_one_big_batch(run, pairs, tiny_model, tmp_path, tiny_tokenizer_dir):
    """4 x 4 rows give the losses and the weights of 16 rows, in the short last window too (61 = 3 x 16 + 13)."""
    from safetensors.torch import load_file

    still = save_tiny_model(tmp_path / "no-dropout", tiny_tokenizer_dir, dropout=0.0)
    weights = {}
    for name, sizes in (("big", ("--batch-size", 16)), ("small", ("--batch-size", 4, "--accumulate", 4))):
        outcome = run("--model", still, "--data", pairs, "--epochs", 2, *sizes, "--output", tmp_path / name)
        assert result_of(outcome)["steps"] == 2 * 4
        weights[name] = load_file(tmp_path / name / "model" / "model.safetensors")
    before = tiny_bert(dropout=0.0).state_dict()
    # All weights as one vector: a key's bias has no gradient but rounding, and AdamW makes steps of that.
    moved, apart = (
        torch.cat([(weights["big"][key] - other[key]).flatten() for key in before]).norm()
        for other in (before, weights["small"])
    )
    assert apart <= 1e-3 * moved


def test_the_plan_says_what_will_happen(run, tiny_model, pairs):
    code, out, _ = run("--model", tiny_model, "--data", pairs, "--accumulate", 2, "--warmup-steps", 0.25, "--dry-run")
    plan = {line.split()[0]: line for line in out if not line.startswith(("note: ", " "))}
    assert code == 0 and list(plan) == [
        "model", "data", "columns", "label", "row", "device", "batch", "updates", "lr", "optimizer", "padding",
        "precision", "output",
    ]  # fmt: skip
    assert plan["model"].split(None, 1)[1] == (
        f"{Path(tiny_model).name}, {tiny_bert().num_parameters():,} parameters, new: none"
    )
    assert plan["data"].split(None, 1)[1] == f"{Path(pairs).name}: 61 train, 23 validation rows"
    assert "sentence1 + sentence2 -> label" in plan["columns"] and "2 classes: 0, 1" in plan["label"]
    assert "8 per process x 1 process x 2 accumulated = 16 rows an update" in plan["batch"]
    assert "nothing is kept: give --output DIR" in plan["output"]
    assert all(len(line) <= 80 for line in out)
    assert plan["updates"].split()[1] == str(3 * 4)
    assert "0 first, 5e-05 peak" in plan["lr"] and "warm-up 3 updates" in plan["lr"]
    assert "AdamW (fused)" in plan["optimizer"]


@pytest.mark.parametrize("count", [1, 2])
def test_the_plan_counts_in_singular_and_plural(count, run, tiny_model, tmp_path):
    for split in ("train", "validation"):
        rows = [json.dumps({"text": f"the cat {i}", "label": i}) + "\n" for i in range(2)]
        (tmp_path / f"{split}.jsonl").write_text("".join(rows))
    _, out, _ = run(
        "--model", tiny_model, "--data", tmp_path, "--batch-size", 2 // count, "--warmup-steps", count,
        "--max-steps", count, "--output", tmp_path / "out", "--max-length", 4, "--dry-run",
    )  # fmt: skip
    plan = {line.split()[0]: line.split(None, 1)[1] for line in out if not line.startswith(("note: ", " "))}
    batches = {1: "1 (1 batch an epoch)", 2: "2 (2 batches an epoch)"}
    assert plan["updates"] == batches[count] and plan["output"] == str(tmp_path / "out")
    assert plan["lr"].endswith({1: "warm-up 1 update", 2: "warm-up 2 updates"}[count])
    assert plan["batch"].endswith({1: "= 2 rows an update", 2: "= 1 row an update"}[count])


def test_the_plan_shows_the_beginnings_of_both_texts_of_a_pair(run, tiny_model, tmp_path):
    """And a long line of it goes on below, at the same column."""
    rows = [json.dumps({"one": "the cat " * 30, "two": "a dog " * 30, "label": i % 2}) + "\n" for i in range(10)]
    (tmp_path / "a.jsonl").write_text("".join(rows))
    _, out, _ = run("--model", tiny_model, "--data", tmp_path / "a.jsonl", "--text-columns", "one", "two", "--dry-run")
    first = out.index(next(line for line in out if line.startswith("row 1 ")))
    assert out[first].startswith("row 1      [CLS] the cat") and out[first + 1].startswith(" " * 11)
    assert "... [SEP] a dog" in " ".join(line[11:] for line in out[first : first + 2])
    assert out[first + 1].endswith("... [SEP] -> 0") and all(len(line) <= 80 for line in out[first:])


def test_the_plan_shows_two_rows_as_the_model_gets_them(run, tiny_model, tmp_path):
    """With special tokens and what the tokenizer makes of the text, and one label each."""
    content = [{"text": f"The CAT {'sat ' * (i % 3)}", "mood": ("sad", "glad")[i % 4 > 1]} for i in range(12)]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    _, out, _ = run("--model", tiny_model, "--data", tmp_path, "--dry-run")
    assert [line for line in out if line.startswith("row ")] == [
        "row 1      [CLS] the cat [SEP] -> sad", "row 3      [CLS] the cat sat sat [SEP] -> glad",
    ]  # fmt: skip
    assert any("12 of 12 validation texts are in the training split too" in line for line in out)


def test_several_labels_a_row_are_trained_and_scored(run, tiny_model, tmp_path):
    """BCE through transformers' problem_type; the saved model answers for each class by itself."""
    from transformers import pipeline

    header, rows = (
        "text,toxic,rude,n",
        [f"the cat {'sat ' * (i % 7)}{i},{i % 2},{int(i % 3 == 0)},{i}" for i in range(60)],
    )
    (tmp_path / "a.csv").write_text("\n".join([header, *rows]) + "\n")
    outcome = run(
        "--model", tiny_model, "--data", tmp_path / "a.csv", "--label-column", "toxic", "rude", "--epochs", 1,
        "--output", tmp_path / "out",
    )  # fmt: skip
    result = result_of(outcome)
    assert {"micro_f1", "macro_f1", "exact_match"} <= set(result) and "accuracy" not in result
    assert "columns    text -> labels" in outcome[1] and "label      any number of 2 classes: toxic, rude" in outcome[1]
    config = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification" and config["id2label"] == {"0": "toxic", "1": "rude"}
    classify = pipeline("text-classification", model=str(tmp_path / "out" / "model"), device="cpu", top_k=None)
    assert {found["label"] for found in classify(["the cat"])[0]} == {"toxic", "rude"}


def test_stars_can_be_a_number(run, tiny_model, tmp_path):
    (tmp_path / "a.csv").write_text("text;stars\n" + "".join(f"the cat {i};{i % 5 + 1}\n" for i in range(40)))
    shown = {}
    for task in ("auto", "regression"):
        _, out, _ = run("--model", tiny_model, "--data", tmp_path / "a.csv", "--dry-run", "--task", task)
        shown[task] = next(line for line in out if line.startswith("label "))
    assert shown == {"auto": "label      5 classes: 1, 2, 3, 4, 5", "regression": "label      a number"}


def test_the_output_folder_loads_in_the_transformers_pipeline(run, tiny_model, pairs, tmp_path):
    from transformers import pipeline

    output = tmp_path / "out"
    result = result_of(run("--model", tiny_model, "--data", pairs, "--output", output))
    steps = [json.loads(line) for line in lines_of(output / "metrics.jsonl")]
    assert [step["step"] for step in steps] == list(range(1, result["steps"] + 1))
    assert [step["rows"] for step in steps] == [8, 8, 8, 8, 8, 8, 8, 5] * 3
    assert steps[0]["lr"] == 5e-5 and steps[-1]["lr"] == pytest.approx(5e-5 / 24)
    saved = json.loads((output / "result.json").read_text())
    assert saved["arguments"]["lr"] == 5e-5 and len(saved["evaluations"]) == 3
    assert {key: saved[key] for key in result} == result
    last_epoch = steps[-8:]
    mean = sum(step["loss"] * step["rows"] for step in last_epoch) / 61
    assert result["loss"] == pytest.approx(mean, rel=1e-6)
    classify = pipeline("text-classification", model=str(output / "model"), device="cpu")
    assert classify({"text": "the cat", "text_pair": "the dog"})["label"] in ("0", "1")


@pytest.mark.parametrize(
    "options",
    [
        ("--group-by-length",),
        ("--precision", "bf16"),
        ("--clip-norm", "0.5", "--weight-decay", "0.01"),
        ("--uneven", "wrap"),
        ("--max-steps", "3"),
        ("--max-steps", "11", "--epochs", "1"),
        ("--batch-size", "100"),
        ("--eval-batch-size", "1"),
    ],
    ids=" ".join,
)
def test_every_option_runs(options, run, tiny_model, pairs):
    result = result_of(run("--model", tiny_model, "--data", pairs, *options))
    steps = int(options[1]) if options[0] == "--max-steps" else 3 if "100" in options else 24
    assert result["steps"] == steps


def test_grouping_by_length_pads_less(run, tiny_model, pairs):
    plain, grouped = (
        result_of(run("--model", tiny_model, "--data", pairs, "--max-steps", 1, *option))["padding"]
        for option in ((), ("--group-by-length",))
    )
    assert grouped < plain


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_grouped_batches_in_low_precision_have_few_lengths(precision, run, tiny_model, pairs, monkeypatch):
    """Steps of 8; and the padding that is reported is that of the batches as they are."""
    made = []

    class Noted(DataCollatorWithPadding):
        def __call__(self, features):
            batch = super().__call__(features)
            made.append(batch["attention_mask"])
            return batch

    monkeypatch.setattr(job, "DataCollatorWithPadding", Noted)
    options = "--max-steps", 8, "--group-by-length", "--precision", precision
    found = result_of(run("--model", tiny_model, "--data", pairs, *options))["padding"]
    epoch = made[1:9]  # the trial comes before, evaluation follows
    assert all(mask.shape[1] % 8 == 0 for mask in epoch) == (precision == "bf16")
    assert found == pytest.approx(
        1 - sum(int(mask.sum()) for mask in epoch) / sum(mask.numel() for mask in epoch), abs=1e-4
    )


def test_regression_reports_correlations(run, tiny_model, scored_pairs, tmp_path):
    result = result_of(run("--model", tiny_model, "--data", scored_pairs, "--output", tmp_path / "out"))
    assert {"pearson", "spearmanr"} <= result.keys()
    assert json.loads((tmp_path / "out" / "model" / "config.json").read_text())["problem_type"] == "regression"


def test_an_undefined_metric_is_reported_not_hidden(run, tiny_model, pairs):
    """One update of nothing: every prediction is one class, and F1's 0/0 is named in the result where it happens."""
    for seed in range(6):
        result = result_of(
            run("--model", tiny_model, "--data", pairs, "--max-steps", 1, "--lr", "1e-12", "--seed", seed)
        )
        assert ("undefined" in result) <= (result["f1"] == 0.0)


def on_rank(arguments):
    """train.py in one rank -> (exit code, stdout)."""
    sys.argv = ["train.py", *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = train.run_main("train.py", train.main)
    return code, out.getvalue()


@pytest.mark.parametrize("world", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))])
def test_ranks_score_every_row_once_and_print_one_result(world, run, pairs, tmp_path, tiny_tokenizer_dir):
    """23 validation rows on real ranks; one result line; the same global batch trains to the same losses and scores."""
    output = tmp_path / "out"
    still = save_tiny_model(tmp_path / "no-dropout", tiny_tokenizer_dir, dropout=0.0)
    job = ["--model", still, "--data", pairs, "--lr", "1e-3"]
    alone = result_of(run(*job, "--batch-size", 2 * world, "--output", tmp_path / "alone"))
    arguments = [*job, "--batch-size", "2", "--output", str(output)]
    if world == 2:  # once as a person starts it
        done = run_torchrun([str(ROOT / "train.py"), *arguments], world, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
        out = done.stdout
    else:
        codes, outs = zip(*run_ranks(on_rank, world, arguments, timeout=240), strict=True)
        assert not any(codes)
        out = "".join(outs)
    results = [line for line in out.splitlines() if line.startswith("{")]
    assert len(results) == 1 and out.splitlines()[-1] == results[0]
    result = json.loads(results[0])
    assert result["world"] == world
    assert result["steps"] == 3 * -(-61 // (2 * world))
    steps, alone_steps = (
        [json.loads(line) for line in lines_of(folder / "metrics.jsonl")] for folder in (output, tmp_path / "alone")
    )
    assert sum(step["rows"] for step in steps) == 3 * 61  # mask: no row twice
    for name in ("step", "rows", "lr"):
        assert [step[name] for step in steps] == [step[name] for step in alone_steps], name
    losses = [step["loss"] for step in alone_steps]
    assert [step["loss"] for step in steps] == pytest.approx(losses, abs=1e-5, rel=0)
    assert (result["accuracy"], result["f1"]) == (alone["accuracy"], alone["f1"])
    assert result["loss"] == pytest.approx(alone["loss"], abs=1e-5, rel=0)
    assert max(losses) - min(losses) > 0.01  # it has moved


def test_under_torchrun_a_mistake_is_said_once(tiny_model, tmp_path):
    """Rank 0 finds no data inside main_process_first; every rank ends with 2, and one of them says why."""
    missing = str(tmp_path / "nothing.csv")
    done = run_torchrun([str(ROOT / "train.py"), "--model", tiny_model, "--data", missing], 2, timeout=120)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if "no such file" in line]
    assert said == [f"train.py: --data {missing}: there is no such file or folder"]
    assert "exitcode  : 2" in done.stderr


@pytest.mark.slow
def test_ctrl_c_is_not_a_traceback(tiny_model, pairs):
    import signal
    import time

    process = subprocess.Popen(
        [sys.executable, "train.py", "--model", tiny_model, "--data", pairs, "--epochs", "10000"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 1"):
            break
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err


@pytest.mark.parametrize("options", [[], ["--precision", "bf16"], ["--precision", "bf16", "--fast-dropout"]], ids=str)
def test_every_forward_of_a_run_leaves_out_what_the_loss_does_not_read(options, run, tiny_model, pairs, monkeypatch):
    """Training and evaluation, in each precision: a shortcut that falls back gives no error and no wrong number."""
    from nanofinetune.cpu import lean

    encode, layout_of, calls = lean.encode, lean.layout_of, {"encode": 0, "layout_of": 0}

    def counted(function):
        def call(*args, **kwargs):
            calls[function.__name__] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(lean, "encode", counted(encode))
    monkeypatch.setattr(lean, "layout_of", counted(layout_of))  # which `encode` asks when it computes the tokens alone
    code, _, err = run("--model", tiny_model, "--data", pairs, "--max-steps", 2, *options)
    assert code == 0, err
    assert calls["encode"] == calls["layout_of"] > 3


@pytest.mark.first
@pytest.mark.slow
def test_the_default_run_falls_back_and_beats_the_majority_class(packaged_model, tmp_path):
    """README's first command, offline: a fallback that is announced, 1,377 updates, far above the majority."""
    done = subprocess.run(
        [sys.executable, "train.py", "--output", str(tmp_path / "out")],
        cwd=ROOT, capture_output=True, text=True, timeout=3000, check=False,
        env=os.environ | {"OMP_NUM_THREADS": str(os.cpu_count())},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "using the packaged checkpoint instead" in done.stdout and "using stdlib-pairs instead" in done.stdout
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["steps"] == 1377 and len(result["notes"]) == 2
    # Half of the pairs are positive: always "same" has accuracy 0.5 and F1 0.667.
    assert result["accuracy"] > 0.7 and result["f1"] > 0.72


def test_a_job_keeps_no_texts(run, tiny_model, pairs, monkeypatch):
    """Only how many rows there are: a table of a million texts would stay in memory to the end."""
    jobs, load = [], job.load

    def kept(*args, **kwargs):
        jobs.append(load(*args, **kwargs))
        return jobs[-1]

    monkeypatch.setattr(train, "load", kept)
    code, _, err = run("--model", tiny_model, "--data", pairs, "--dry-run")
    assert code == 0, err
    sizes = {split: len(rows) for split, rows in jobs[0].data.splits.items() if type(rows) is range}
    assert sizes == {"train": len(jobs[0].train)} | {name: len(store) for name, store in jobs[0].validation.items()}


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_the_default_run_starts_under_torchrun(world, packaged_model, tmp_path):
    done = run_torchrun([str(ROOT / "train.py"), "--max-steps", "2"], world, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "408 validation rows" in done.stdout
    (result,) = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert (result["world"], result["steps"]) == (world, 2)


def test_fixed_lengths_pad_to_the_next_one(tiny_tokenizer):
    """What --device xla collates with: the rows of the ordinary collator, wider."""
    rows = [{"input_ids": [2, *range(5, 5 + n), 3], "label": 1} for n in (4, 9)]
    plain = DataCollatorWithPadding(tiny_tokenizer)(rows)
    fixed = job.collate_to_fixed_length(tiny_tokenizer, (8, 16, 64), rows)
    assert fixed["input_ids"].shape == (2, 16) and plain["input_ids"].shape == (2, 11)
    for name in ("input_ids", "attention_mask"):
        assert fixed[name][:, :11].equal(plain[name]) and not fixed[name][:, 11:].any()


@pytest.mark.parametrize("name", ["constant_with_warmup", "cosine", "polynomial", "inverse_sqrt"])
def test_schedule_option_gives_the_rates_of_transformers_get_scheduler(name, run, tiny_model, pairs, tmp_path):
    """What metrics.jsonl says of each update, `==` the library's rate at that step."""
    import transformers

    output = tmp_path / "out"
    code, _, err = run(
        "--model", tiny_model, "--data", pairs, "--schedule", name, "--warmup-steps", 3, "--max-steps", 9,
        "--output", output,
    )  # fmt: skip
    assert code == 0, err
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=5e-5)
    theirs = transformers.get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=9)
    for line in map(json.loads, lines_of(output / "metrics.jsonl")):
        assert line["lr"] == theirs.get_last_lr()[0]
        optimizer.step()
        theirs.step()


def test_a_warm_up_of_the_constant_schedule_is_refused(run):
    code, _, err = run("--schedule", "constant", "--warmup-steps", 3)
    assert code == 2 and err == [
        "train.py: --warmup-steps 3: constant has none; choose --schedule constant_with_warmup"
    ]


@pytest.mark.parametrize("name", ["linear", "constant", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt"])
def test_a_tiny_rate_is_taken_or_refused_before_any_work(name, run, tiny_model, pairs):
    """transformers' polynomial schedule raises an error from its middle for a rate that is not above its end."""
    import transformers

    code, _, err = run("--model", tiny_model, "--data", pairs, "--schedule", name, "--lr", "1e-7", "--dry-run")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-7)
    if name != "polynomial":
        assert code == 0, err
        return
    assert code == 2
    assert err == ["train.py: --lr 1e-07: polynomial ends at 1e-07; choose a greater rate, or another --schedule"]
    with pytest.raises(ValueError, match="must be smaller than initial lr"):
        transformers.get_scheduler(name, optimizer, num_warmup_steps=0, num_training_steps=9)
