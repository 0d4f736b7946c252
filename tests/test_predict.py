"""Prediction, against the text-classification pipeline of transformers 5.23.

python -m pytest tests/test_predict.py
"""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, WORDS, calls, tiny_bert

from nanofinetune import predict
from nanofinetune.cpu import lean
from nanofinetune.data import rows as predict_rows
from nanofinetune.ground.cli import run_main
from nanofinetune.ground.errors import UsageError
from nanofinetune.predict import read_lines, split_line

TOLERANCE = 1e-5  # the pipeline runs one text at a time, unpadded; ours is a row of a padded batch
PRINTED = 5e-5  # four digits are printed


def save_model(folder: Path, tokenizer_dir: str, columns: list[str] | None, labels: int = 3) -> str:
    """A model of large weights, which does decide, as train.py saves it."""
    shutil.copytree(tokenizer_dir, folder)
    model = tiny_bert(labels)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    model.config.id2label = {i: f"class {i}" for i in range(labels)} if labels > 1 else {0: "LABEL_0"}
    model.config.problem_type = "single_label_classification" if labels > 1 else "regression"
    if columns:
        model.config.text_columns = columns
    model.save_pretrained(folder)
    return str(folder)


def sentences(n: int, seed: int = 0, shortest: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(shortest, 12))) for _ in range(n)]  # an empty line is a text too


def lines(n: int, pairs: bool) -> list[tuple[str, ...]]:
    """n texts or pairs; a pair's second text is not empty."""
    columns = [sentences(n), sentences(n, seed=1, shortest=1)]
    return list(zip(*columns[: 1 + pairs], strict=True))


def predicted(content: list[str], model: str, capsys, monkeypatch, tmp_path, *options: str) -> list[list[str]]:
    """What the command prints for a file of the lines: a list of columns each."""
    (tmp_path / "lines.txt").write_text("".join(line + "\n" for line in content), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["predict", model, str(tmp_path / "lines.txt"), *options])
    assert run_main("predict", predict.main) == 0
    return [line.split("\t") for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_predict_matches_the_transformers_pipeline(pairs, batch_size, tmp_path, tiny_tokenizer_dir):
    """Labels, probabilities and order, before anything is rounded for printing."""
    from transformers import pipeline

    folder = save_model(tmp_path / "model", tiny_tokenizer_dir, ["a", "b"] if pairs else ["a"])
    texts = lines(30, pairs)
    reference = pipeline("text-classification", model=folder, device="cpu")
    expected = [reference({"text": text[0], "text_pair": text[1]} if pairs else text[0]) for text in texts]
    expected = [found[0] if isinstance(found, list) else found for found in expected]
    mine = predict.predict(texts, predict.load_trained(folder), predict.load_tokenizer(folder), 64, batch_size)
    assert [label for label, _ in mine] == [found["label"] for found in expected]
    assert len({label for label, _ in mine}) > 1
    np.testing.assert_allclose([p for _, p in mine], [found["score"] for found in expected], rtol=0, atol=TOLERANCE)


def test_an_empty_second_text_is_what_it_was_in_training(tmp_path, tiny_tokenizer_dir):
    """The library drops the second [SEP] of such a pair alone, as its pipeline asks, and keeps it in a batch."""
    folder = save_model(tmp_path / "model", tiny_tokenizer_dir, ["a", "b"])
    model, tokenizer = predict.load_trained(folder), predict.load_tokenizer(folder)
    alone, batch = tokenizer("the cat", ""), tokenizer(["the cat"], [""])
    assert len(alone["input_ids"]) == 4 and len(batch["input_ids"][0]) == 5
    expected = torch.softmax(model(**batch.convert_to_tensors("pt")).logits, -1).max().item()
    ((_, mine),) = predict.predict([("the cat", "")], model, tokenizer, 64, 8)
    assert abs(mine - expected) < TOLERANCE


@pytest.mark.parametrize("pairs", [False, True])
def test_the_command_prints_label_probability_and_line(pairs, tmp_path, tiny_tokenizer_dir, capsys, monkeypatch):
    folder = save_model(tmp_path / "model", tiny_tokenizer_dir, ["a", "b"] if pairs else ["a"])
    texts = lines(9, pairs)
    mine = predict.predict(texts, predict.load_trained(folder), predict.load_tokenizer(folder), 64, 64)
    shown = predicted(["\t".join(text) for text in texts], folder, capsys, monkeypatch, tmp_path)
    assert [tuple(line[2:]) for line in shown] == texts
    assert [line[0] for line in shown] == [label for label, _ in mine]
    np.testing.assert_allclose(
        [float(line[1]) for line in shown], [p for _, p in mine], rtol=0, atol=PRINTED + TOLERANCE
    )


def test_a_class_name_is_printed_as_text(tmp_path, tiny_tokenizer_dir, capsys, monkeypatch):
    """A name with a tab or a line end in it would shift the columns, and one with an escape moves the cursor."""
    folder = save_model(tmp_path / "model", tiny_tokenizer_dir, ["a"])
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["id2label"] = {i: f"\x1b[31mclass\t{i}\n" for i in range(3)}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    ((label, _, text),) = predicted(["the cat"], folder, capsys, monkeypatch, tmp_path)
    assert label[:-3] == r"\x1b[31mclass\t" and label.endswith(r"\n") and text == "the cat"


def test_a_regression_model_matches_the_pipelines_score(tmp_path, tiny_tokenizer_dir):
    from transformers import pipeline

    folder = save_model(tmp_path / "model", tiny_tokenizer_dir, ["a"], labels=1)
    texts = sentences(8)
    expected = [found["score"] for found in pipeline("text-classification", model=folder, device="cpu")(texts)]
    mine = predict.predict(
        [(text,) for text in texts], predict.load_trained(folder), predict.load_tokenizer(folder), 64, 3
    )
    assert {label for label, _ in mine} == {"score"}
    np.testing.assert_allclose([value for _, value in mine], expected, rtol=0, atol=TOLERANCE)


def change(folder: Path, **settings: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


def test_one_output_is_a_number_where_the_pipeline_may_give_a_sigmoid(tmp_path, tiny_tokenizer_dir):
    """A config that names no problem: the library trains such a head with a squared error."""
    from transformers import pipeline

    folder = save_model(tmp_path / "model", tiny_tokenizer_dir, ["a"], labels=1)
    change(tmp_path / "model", problem_type=None)
    (found,) = pipeline("text-classification", model=folder, device="cpu")("the cat")
    model, tokenizer = predict.load_trained(folder), predict.load_tokenizer(folder)
    ((name, mine),) = predict.predict([("the cat",)], model, tokenizer, 64, 8)
    assert name == "score" and abs(1 / (1 + np.exp(-mine)) - found["score"]) < TOLERANCE
    assert model(**tokenizer(["a"], return_tensors="pt"), labels=torch.ones(1, 1)).loss > 0
    assert model.config.problem_type == "regression"  # underneath: the loss writes what it has taken it for


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"id2label": {"1": "neg", "2": "pos", "3": "new"}},
            "its id2label names the classes 1, 2, 3, and its head has those from 0 to 2; number them from 0 in its",
        ),
        ({"id2label": {"0": "a", "2": "b", "3": "c"}}, "names the classes 0, 2, 3, and its head has those from 0 to 2"),
        ({"problem_type": "regression"}, "it predicts 3 numbers for a text, and only one can be told; name another"),
        ({"text_columns": [1, 2]}, r"its config has text_columns [1, 2], which are not one or two names"),
    ],
    ids=str,
)
def test_a_config_that_does_not_say_what_an_output_is_gets_one_line(
    settings, said, tmp_path, tiny_tokenizer_dir, capsys, monkeypatch
):
    """The library's pipeline raises KeyError for the first class, and calls the second one by the first one's name."""
    folder = save_model(tmp_path / "model", tiny_tokenizer_dir, ["text"])
    change(tmp_path / "model", **settings)
    (tmp_path / "a.csv").write_text("text\nthe cat\n")
    assert run(monkeypatch, folder, tmp_path / "a.csv", "--text-columns", "text") == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_the_pipeline_is_off_by_one_where_classes_are_numbered_from_1(tmp_path, tiny_tokenizer_dir):
    from transformers import pipeline

    folder = save_model(tmp_path / "model", tiny_tokenizer_dir, ["text"])
    change(tmp_path / "model", id2label={"1": "one", "2": "two", "3": "three"})
    reference = pipeline("text-classification", model=folder, device="cpu", function_to_apply="none")
    logits = torch.tensor([[0.0, 1.0, 0.0]])
    assert reference.postprocess({"logits": logits})["label"] == "one"
    with pytest.raises(KeyError):
        reference.postprocess({"logits": logits.flip(1).roll(-1)})


def test_two_classes_of_one_name_are_no_two_columns(tmp_path, tiny_tokenizer_dir, capsys, monkeypatch):
    folder = save_model(tmp_path / "model", tiny_tokenizer_dir, ["text"])
    change(tmp_path / "model", id2label={"0": "a", "1": "b", "2": "a"})
    (tmp_path / "a.csv").write_text("text\nthe cat\n")
    assert run(monkeypatch, folder, tmp_path / "a.csv") == 0
    capsys.readouterr()
    assert run(monkeypatch, folder, tmp_path / "a.csv", "--all") == 2
    assert "--all: two of the model's classes are named a; leave it out" in capsys.readouterr().err


@pytest.mark.parametrize("block", [1, 4, 5])
def test_blocks_change_nothing(block, tmp_path, tiny_tokenizer_dir, capsys, monkeypatch):
    folder = save_model(tmp_path / "model", tiny_tokenizer_dir, ["a"])
    whole = predicted(sentences(13), folder, capsys, monkeypatch, tmp_path)
    monkeypatch.setattr(predict, "BLOCK", block)
    parts = predicted(sentences(13), folder, capsys, monkeypatch, tmp_path)
    assert [(line[0], *line[2:]) for line in parts] == [(line[0], *line[2:]) for line in whole]
    np.testing.assert_allclose([float(a[1]) for a in parts], [float(b[1]) for b in whole], rtol=0, atol=2 * PRINTED)


def test_texts_beyond_the_limit_are_cut_as_the_tokenizer_cuts_them(tmp_path, tiny_tokenizer_dir, capsys, monkeypatch):
    folder = save_model(tmp_path / "model", tiny_tokenizer_dir, ["a"])
    long, cut = " ".join(["the cat"] * 100), " ".join(["the cat"] * 31)  # 62 words and two special tokens are 64
    first, second = predicted([long, cut], folder, capsys, monkeypatch, tmp_path)
    assert first[:2] == second[:2]


def test_lines_are_held_by_their_size_and_one_without_an_end_is_read_no_further(monkeypatch):
    monkeypatch.setattr(predict, "CHARACTERS", 1_000)
    source = io.StringIO("a" * 400 + "\n" + "b\n" * 4000 + "c" * 2_000 + "\n" + "d\n")
    blocks = list(read_lines(source, 1))
    assert max(sum(len(text) + 1 for (text,) in block) for block in blocks) < 1_000 + 2_001
    assert [len(text) for block in blocks for (text,) in block] == [400, *[1] * 4000, 2000, 1]
    endless = io.StringIO("the cat\n" + "a" * 30_000_000)
    with pytest.raises(UsageError, match=r"line 2 has more than 1,000,000 characters, the most that is read; cut it"):
        list(read_lines(endless, 1))
    assert endless.tell() < 1_000_100
    longest = "a" * 1_000_000
    assert list(read_lines(io.StringIO(longest + "\n" + longest), 1)) == [[(longest,)], [(longest,)]]


@pytest.mark.parametrize("labels", [1, 3])
def test_an_answer_that_is_no_number_is_refused_where_the_pipeline_gives_a_label(
    labels, tmp_path, tiny_tokenizer_dir, capsys, monkeypatch
):
    """Weights as large as floats go: their products are infinite, and of two of them the softmax is NaN."""
    from transformers import pipeline

    folder = save_model(tmp_path / "model", tiny_tokenizer_dir, ["a"], labels)
    model = predict.load_trained(folder)
    model.classifier.weight.data.fill_(3e38)
    model.bert.pooler.dense.bias.data.fill_(100)
    model.save_pretrained(folder)
    reference = pipeline("text-classification", model=folder, device="cpu", function_to_apply="softmax")
    with np.errstate(invalid="ignore"):
        (answer,) = reference("the cat")
    assert answer["label"] and np.isnan(answer["score"])
    monkeypatch.setattr(sys, "argv", ["predict", folder, str(tmp_path / "lines.txt")])
    (tmp_path / "lines.txt").write_text("the cat\n")
    assert run_main("predict", predict.main) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.endswith("it answers with NaN or infinity; name another model\n") and err.count("\n") == 1


def test_a_model_that_fails_on_a_batch_is_one_line(tmp_path, tiny_tokenizer_dir, capsys, monkeypatch):
    """Whatever its code raises there is about the model, and the library's traceback says it to nobody."""
    from transformers import BertForSequenceClassification as Bert

    def failing(*_, **__):
        raise ValueError("The embedded tensor is 3 long\nand some more")

    folder = save_model(tmp_path / "model", tiny_tokenizer_dir, ["a"], 2)
    (tmp_path / "lines.txt").write_text("the cat\nit sat\n")
    monkeypatch.setattr(Bert, "forward", failing)
    monkeypatch.setattr(predict, "use_lean_encoder", lambda model: None)
    monkeypatch.setattr(sys, "argv", ["predict", folder, str(tmp_path / "lines.txt")])
    assert run_main("predict", predict.main) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert f"model {folder}: it fails on a batch of 2 rows (The embedded tensor is 3 long" in err


def test_no_lines_are_no_output(tmp_path, tiny_tokenizer_dir, capsys, monkeypatch):
    folder = save_model(tmp_path / "model", tiny_tokenizer_dir, ["a"])
    assert predicted([], folder, capsys, monkeypatch, tmp_path) == []


@pytest.mark.slow
def test_stdin_is_utf8_in_the_c_locale(tmp_path, tiny_tokenizer_dir):
    """Where Python's own stdin lets any byte pass, as half a surrogate pair that no tokenizer takes."""
    folder = save_model(tmp_path / "model", tiny_tokenizer_dir, None)
    command = [sys.executable, "-m", "nanofinetune.predict", folder]
    environment = {"LC_ALL": "C", "PATH": "", "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    texts = "the caf\u00e9\nthe \u732b\u2028sat\n"
    done = subprocess.run(command, cwd=ROOT, env=environment, input=texts.encode(), capture_output=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")
    assert [line.split("\t")[2] for line in done.stdout.decode().split("\n")[:-1]] == texts.split("\n")[:-1]
    broken = subprocess.run(
        command, cwd=ROOT, env=environment, input=b"the caf\xe9\n", capture_output=True, timeout=120
    )
    assert broken.returncode == 2
    assert broken.stderr == b"nanofinetune.predict: stdin: byte 0xe9 is not UTF-8; name its encoding with --encoding\n"


HOMELESS = [{"HOME": "/proc/1/nobody"}, {"HOME": "/nonexistent"}, {"HOME": None}, {"HF_HOME": "/dev/null/x"}]
HOMELESS += [{"TMPDIR": "/nonexistent"}, {"NANOFINETUNE_CACHE": "/dev/null/x"}, {"HF_DATASETS_CACHE": "/dev/null/x"}]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX's variables")
@pytest.mark.parametrize("changes", HOMELESS, ids=str)
def test_without_a_home_or_a_cache_that_can_be_written_all_works(changes, tmp_path, tiny_tokenizer_dir):
    """A cache saves time, and nothing depends on it: a run, and a prediction with what it has trained."""
    folder = save_model(tmp_path / "model", tiny_tokenizer_dir, ["text"], labels=2)
    (tmp_path / "x.csv").write_text("text,label\n" + "".join(f"the cat {i},{i % 2}\n" for i in range(20)))
    (tmp_path / "lines.txt").write_text("the cat\n")
    dropped = ("HF_HOME", "HF_DATASETS_CACHE", "NANOFINETUNE_CACHE", "XDG_CACHE_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in dropped} | {"HF_HUB_OFFLINE": "1"}
    environment = {name: value for name, value in (environment | changes).items() if value is not None}
    train = [sys.executable, "train.py", "--model", folder, "--data", str(tmp_path / "x.csv"), "--max-steps", "1"]
    for command in (
        [*train, "--device", "cpu", "--output", str(tmp_path / "run")],
        [sys.executable, "-m", "nanofinetune.predict", str(tmp_path / "run" / "model"), str(tmp_path / "lines.txt")],
    ):
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stderr


def test_a_wrong_number_of_tabs_names_the_line(monkeypatch):
    monkeypatch.setattr(predict, "BLOCK", 2)
    for texts, content, message in (
        (1, "a\nb\nc\td\n", r"line 3 has 1 tabs: the model takes one text and no tab"),
        (2, "a\tb\nc\td\ne\tf\ng\n", r"line 4 has 0 tabs: the model takes two texts with one tab between them"),
        (2, "a\tb\tc\n", r"line 1 has 2 tabs: the model takes two texts with one tab between them"),
        (None, "a\tb\nc\n", r"line 2 has 0 tabs: the model takes two texts with one tab between them"),
    ):
        with pytest.raises(UsageError, match=message):
            list(read_lines(io.StringIO(content), texts))
    assert list(read_lines(io.StringIO("a\tb\nc\td\ne\t\n"), None)) == [[("a", "b"), ("c", "d")], [("e", "")]]
    assert split_line("", 1, 1) == ("",)


# --- tables -----------------------------------------------------------------------------------------------------------


def run(monkeypatch, *argv: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["predict", *map(str, argv)])
    return run_main("predict", predict.main)


def many_labels(folder: Path, tokenizer_dir: str) -> str:
    """A model of which a text has any number of three classes."""
    name = save_model(folder, tokenizer_dir, ["text"])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"problem_type": "multi_label_classification"}))
    return name


TABLES = {
    "csv": lambda file, rows: rows.to_csv(file, index=False),
    "tsv": lambda file, rows: rows.to_csv(file, index=False, sep="\t"),
    "jsonl": lambda file, rows: rows.to_json(file, orient="records", lines=True),
    "parquet": lambda file, rows: rows.to_parquet(file),
}


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("kind", TABLES)
def test_a_table_gets_the_pipelines_answers_as_columns(kind, pairs, tmp_path, tiny_tokenizer_dir, monkeypatch):
    """The same rows in the same order, whatever the blocks, and every class where --all asks for them."""
    import pandas
    from transformers import pipeline

    monkeypatch.setattr(predict_rows, "BLOCK", 7)
    columns = ["a", "b"][: 1 + pairs]
    folder = save_model(tmp_path / "model", tiny_tokenizer_dir, columns)
    before = pandas.DataFrame(lines(20, pairs), columns=columns).assign(n=range(20))
    before.loc[before.a == "", "a"] = "the"  # an empty cell of a csv file is NaN to pandas
    TABLES[kind](tmp_path / f"in.{kind}", before)
    out = tmp_path / f"out.{kind}"
    assert run(monkeypatch, folder, tmp_path / f"in.{kind}", "--output", out, "--all") == 0
    readers = {"csv": pandas.read_csv, "parquet": pandas.read_parquet}
    readers |= {
        "tsv": lambda file: pandas.read_csv(file, sep="\t"),
        "jsonl": lambda file: pandas.read_json(file, lines=True),
    }
    after = readers[kind](out)
    assert list(after)[: len(columns) + 1] == [*columns, "n"]
    pandas.testing.assert_frame_equal(after[list(before)], before, check_dtype=False)
    texts = [{"text": row.a, "text_pair": row.b} if pairs else row.a for row in before.itertuples()]
    expected = pipeline("text-classification", model=folder, device="cpu", top_k=None)(texts)
    for row, scores in zip(after.to_dict("records"), expected, strict=True):
        best = max(scores, key=lambda found: found["score"])
        assert (row["label"], row["probability"]) == (best["label"], pytest.approx(best["score"], abs=TOLERANCE))
        for found in scores:
            assert row[f"probability_{found['label']}"] == pytest.approx(found["score"], abs=TOLERANCE)


def test_a_table_on_stdout_has_the_form_of_the_input(tmp_path, tiny_tokenizer_dir, capsys, monkeypatch):
    folder = save_model(tmp_path / "model", tiny_tokenizer_dir, ["text"])
    (tmp_path / "a.csv").write_text('id;text;label\n01;"the; cat";x\n02;the dog;y\n')
    assert run(monkeypatch, folder, tmp_path / "a.csv") == 0
    shown = capsys.readouterr()
    assert shown.err == "note: the table has a column label; the model's is predicted_label\n"
    header, first, second = shown.out.splitlines()
    assert header == "id;text;label;predicted_label;probability"
    assert first.startswith('01;"the; cat";x;class ') and second.startswith("02;the dog;y;class ")


def test_a_table_without_rows_gets_the_columns_of_one_with_rows(tmp_path, tiny_tokenizer_dir, capsys, monkeypatch):
    folder = save_model(tmp_path / "model", tiny_tokenizer_dir, ["text"])
    for options in ([], ["--all"]):
        headers = []
        for rows in ("", "the cat,x\n"):
            (tmp_path / "a.csv").write_text(f"text,label\n{rows}")
            assert run(monkeypatch, folder, tmp_path / "a.csv", *options) == 0
            headers.append(capsys.readouterr().out.splitlines()[0])
        assert headers[0] == headers[1] and headers[0].startswith("text,label,predicted_label,probability")


@pytest.mark.parametrize("by_name", [False, True], ids=["stdin", "a pipe's name"])
@pytest.mark.parametrize("kind", TABLES)
def test_a_table_from_a_pipe_is_answered_as_from_its_file(
    kind, by_name, tmp_path, tiny_tokenizer_dir, capsysbinary, monkeypatch
):
    import pandas

    folder = save_model(tmp_path / "model", tiny_tokenizer_dir, ["text"])
    file = tmp_path / f"a.{kind}"
    TABLES[kind](file, pandas.DataFrame({"n": [1, 2], "text": ["the cat", "the dog"]}))
    assert run(monkeypatch, folder, file) == 0
    expected = capsysbinary.readouterr().out
    assert b"the dog" in expected
    if by_name:
        os.mkfifo(tmp_path / "pipe")
        writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(file.read_bytes()))
        writer.start()
        assert run(monkeypatch, folder, tmp_path / "pipe", "--format", kind) == 0
        writer.join()
    else:
        with file.open() as source:
            monkeypatch.setattr(sys, "stdin", source)
            assert run(monkeypatch, folder, "--format", kind) == 0
    assert capsysbinary.readouterr().out == expected


def test_format_is_for_what_has_no_ending_and_errors_name_what_the_user_named(
    tmp_path, tiny_tokenizer_dir, capsys, monkeypatch
):
    folder = save_model(tmp_path / "model", tiny_tokenizer_dir, ["text"])
    (tmp_path / "a.csv").write_text("text\nthe cat\n")
    assert run(monkeypatch, folder, tmp_path / "a.csv", "--format", "csv") == 2
    assert "a.csv says by its ending what it is; leave it out" in capsys.readouterr().err
    (tmp_path / "a.data").write_text("text,n\nthe cat,1\n")
    assert run(monkeypatch, folder, tmp_path / "a.data", "--format", "csv") == 0
    assert capsys.readouterr().out.startswith("text,n,label,probability\nthe cat,1,class ")
    (tmp_path / "odd").write_text("text,n\nthe cat,1,2\n")
    with (tmp_path / "odd").open() as source:
        monkeypatch.setattr(sys, "stdin", source)
        assert run(monkeypatch, folder, "-", "--format", "csv") == 2
    assert "predict: FILE stdin: " in (said := capsys.readouterr().err) and "line 2" in said
    assert run(monkeypatch, folder, tmp_path / "odd", "--format", "csv") == 2
    assert f"predict: FILE {tmp_path / 'odd'}: " in capsys.readouterr().err


def test_a_regression_model_writes_a_score(tmp_path, tiny_tokenizer_dir, capsys, monkeypatch):
    folder = save_model(tmp_path / "model", tiny_tokenizer_dir, ["text"], labels=1)
    (tmp_path / "a.jsonl").write_text('{"text": "the cat"}\n{"text": "\\ud83d\\ude00"}\n')
    assert run(monkeypatch, folder, tmp_path / "a.jsonl") == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (first, second) = predict.predict(
        [("the cat",), ("\U0001f600",)], predict.load_trained(folder), predict.load_tokenizer(folder), 64, 8
    )
    assert [row["score"] for row in found] == pytest.approx([first[1], second[1]], abs=TOLERANCE)
    assert [set(row) for row in found] == [{"text", "score"}] * 2
    assert run(monkeypatch, folder, tmp_path / "a.jsonl", "--all") == 2
    assert "--all: the model predicts a number, and has no classes" in capsys.readouterr().err


def test_several_labels_are_those_above_their_thresholds(tmp_path, tiny_tokenizer_dir, capsys, monkeypatch):
    """Against the pipeline, which gives sigmoids for such a model."""
    from transformers import pipeline

    folder = many_labels(tmp_path / "model", tiny_tokenizer_dir)
    texts = sentences(12, shortest=1)
    expected = pipeline("text-classification", model=folder, device="cpu", top_k=None)(texts)
    chances = [{found["label"]: found["score"] for found in scores} for scores in expected]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for options, limits in (
        ([], {}),
        (["--threshold", "0.9"], {"": 0.9}),
        (["--threshold", "0.2", "class 1=0.95"], {"": 0.2, "class 1": 0.95}),
    ):
        assert run(monkeypatch, folder, tmp_path / "a.jsonl", *options) == 0
        found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        named = [[name for name in sorted(row) if row[name] > limits.get(name, limits.get("", 0.5))] for row in chances]
        assert [row["label"] for row in found] == named and 0 < sum(map(len, named)) < 36
        for row, scores in zip(found, chances, strict=True):
            assert row["probability"] == pytest.approx([scores[name] for name in row["label"]], abs=TOLERANCE)
    (tmp_path / "a.csv").write_text("text\n" + "".join(f"{text}\n" for text in texts))
    assert run(monkeypatch, folder, tmp_path / "a.csv") == 0
    assert capsys.readouterr().out.splitlines()[0] == "text,label,probability"


@pytest.mark.parametrize(
    ("columns", "options", "content", "said"),
    [
        (
            ["text"],
            [],
            "review,n\na,1\n",
            r"the model was trained on the column text: the table has review, n; name the t",
        ),
        (
            None,
            [],
            "review,n\na,1\n",
            r"which columns are the texts\? Name one or two with --text-columns; the table has",
        ),
        (
            ["text"],
            ["--text-columns", "a", "b"],
            "a,b\nx,y\n",
            r"--text-columns a b: the model was trained on 1 \(text\)",
        ),
        (
            ["text"],
            [],
            "text,label,predicted_label\na,b,c\n",
            r"has the columns label and predicted_label already; ren",
        ),
        (["text"], ["--separator", ";;"], "text\na\n", r"--separator ;;: name one character"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(
    columns, options, content, said, tmp_path, tiny_tokenizer_dir, capsys, monkeypatch
):
    folder = save_model(tmp_path / "model", tiny_tokenizer_dir, columns)
    (tmp_path / "a.csv").write_text(content)
    assert run(monkeypatch, folder, tmp_path / "a.csv", *options, "--output", tmp_path / "b.csv") == 2
    assert re.search(said, capsys.readouterr().err) and not (tmp_path / "b.csv").exists()


def test_a_row_without_a_text_is_named_and_nothing_is_left(tmp_path, tiny_tokenizer_dir, capsys, monkeypatch):
    monkeypatch.setattr(predict_rows, "BLOCK", 2)
    folder = save_model(tmp_path / "model", tiny_tokenizer_dir, ["text"])
    for value, said in (
        ("null", "row 4 has no text in the column text"),
        ("7", "row 4 has no text but 7 in the column"),
    ):
        (tmp_path / "a.jsonl").write_text('{"text": "the"}\n' * 3 + f'{{"text": {value}}}\n')
        assert run(monkeypatch, folder, tmp_path / "a.jsonl", "--output", tmp_path / "b.jsonl") == 2
        assert said in capsys.readouterr().err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "model"]


def test_the_columns_that_the_user_names_are_read(tmp_path, tiny_tokenizer_dir, capsys, monkeypatch):
    folder = save_model(tmp_path / "model", tiny_tokenizer_dir, ["text"])
    (tmp_path / "a.csv").write_text("other,review\nx,the cat\n")
    assert run(monkeypatch, folder, tmp_path / "a.csv", "--text-columns", "review") == 0
    mine = predict.predict([("the cat",)], predict.load_trained(folder), predict.load_tokenizer(folder), 64, 64)
    assert capsys.readouterr().out.splitlines()[1].split(",")[2] == mine[0][0]


@pytest.mark.parametrize("block", [1, 4096])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_cell_of_a_later_row_is_never_written_over(kind, block, tmp_path, tiny_tokenizer_dir, capsys, monkeypatch):
    """A gold label that the first row lacks: the answer is called predicted_label in every row."""
    import pandas

    monkeypatch.setattr(predict_rows, "BLOCK", block)
    folder = save_model(tmp_path / "model", tiny_tokenizer_dir, ["text"])
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b", "label": "gold", "n": 1}\n')
    assert run(monkeypatch, folder, tmp_path / "a.jsonl", "--output", tmp_path / f"b.{kind}") == 0
    assert capsys.readouterr().err == "note: the table has a column label; the model's is predicted_label\n"
    readers = {"csv": pandas.read_csv, "parquet": pandas.read_parquet, "jsonl": partial(pandas.read_json, lines=True)}
    after = readers[kind](tmp_path / f"b.{kind}")
    assert after.label.dropna().tolist() == ["gold"] and after.n.dropna().tolist() == [1]
    assert after.predicted_label.str.startswith("class ").all() and after.probability.between(0, 1).all()


def test_half_a_surrogate_pair_is_refused_in_a_text_and_kept_elsewhere(
    tmp_path, tiny_tokenizer_dir, capsys, monkeypatch
):
    """Training refuses such a text too; the library's tokenizer raises TypeError."""
    folder = save_model(tmp_path / "model", tiny_tokenizer_dir, ["text"])
    with pytest.raises((TypeError, UnicodeEncodeError)):
        predict.load_tokenizer(folder)(["nice \ud83d"])
    (tmp_path / "a.jsonl").write_text('{"text": "the cat"}\n{"text": "nice \\ud83d"}\n')
    assert run(monkeypatch, folder, tmp_path / "a.jsonl") == 2
    said = capsys.readouterr()
    what = "holds half of a surrogate pair, which is no character; correct it\n"
    assert (said.out, said.err) == ("", f"predict: row 2, column text, {what}")
    (tmp_path / "a.txt").write_bytes(b"the cat\nnice +2D0-\n")
    assert run(monkeypatch, folder, tmp_path / "a.txt", "--encoding", "utf-7") == 2
    assert capsys.readouterr().err == f"predict: line 2 {what}"
    (tmp_path / "b.jsonl").write_text('{"text": "the cat", "by": "nice \\ud83d"}\n')
    assert run(monkeypatch, folder, tmp_path / "b.jsonl") == 0
    shown = capsys.readouterr().out
    assert '"by": "nice \\ud83d"' in shown and json.loads(shown)["by"] == "nice \ud83d"


def test_types_of_several_labels_are_known_before_a_row_has_one(tmp_path, tiny_tokenizer_dir, monkeypatch):
    """A first block without any class was a column of empty lists, which holds no later one."""
    from pyarrow import parquet

    monkeypatch.setattr(predict_rows, "BLOCK", 1)
    folder = many_labels(tmp_path / "model", tiny_tokenizer_dir)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(12, shortest=1)))
    schemas = set()
    for limit in ("0.5", "1"):
        out = tmp_path / f"{limit}.parquet"
        assert run(monkeypatch, folder, tmp_path / "a.jsonl", "--output", out, "--threshold", limit) == 0
        schemas.add(str(parquet.read_schema(out)))
    assert len(schemas) == 1 and "label: list<element: string>" in schemas.pop()


# --- lines from anywhere ----------------------------------------------------------------------------------------------


def test_a_lone_carriage_return_starts_no_line_and_a_mark_is_no_text(tmp_path, tiny_tokenizer_dir, capsys, monkeypatch):
    """As many answers as `wc -l` counts lines; the library's own tokenizer makes a token of U+FEFF."""
    folder = save_model(tmp_path / "model", tiny_tokenizer_dir, ["text"])
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfthe cat\nthe\rdog\nthe mat\r\n")
    assert run(monkeypatch, folder, tmp_path / "a.txt") == 0
    shown = capsys.readouterr().out.split("\n")[:-1]
    assert [line.split("\t")[2] for line in shown] == ["the cat", "the\rdog", "the mat"]


def test_a_pipe_is_read_by_name(tmp_path, tiny_tokenizer_dir, capsys, monkeypatch):
    folder = save_model(tmp_path / "model", tiny_tokenizer_dir, ["text"])
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text("the cat\nthe dog\n"))
    writer.start()
    assert run(monkeypatch, folder, tmp_path / "pipe") == 0
    writer.join()
    assert [line.split("\t")[2] for line in capsys.readouterr().out.splitlines()] == ["the cat", "the dog"]
    os.mkfifo(tmp_path / "pipe.csv")
    assert run(monkeypatch, folder, tmp_path / "pipe.csv") == 2
    assert "a table is read more than once; for a pipe say which it is with --format" in capsys.readouterr().err


@pytest.mark.slow
def test_emoji_are_written_on_a_stdout_that_is_not_utf8(tmp_path, tiny_tokenizer_dir):
    """/dev/stdin by name, too: Python's own print raises UnicodeEncodeError there."""
    folder = save_model(tmp_path / "model", tiny_tokenizer_dir, None)
    environment = {
        "PYTHONIOENCODING": "latin-1",
        "PATH": "",
        "HF_HUB_OFFLINE": "1",
        "HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "nanofinetune.predict", folder, "/dev/stdin", "--all"], cwd=ROOT, env=environment,
        input="the \U0001f600 cat\n".encode(), capture_output=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    fields = done.stdout.decode().rstrip("\n").split("\t")
    assert fields[-1] == "the \U0001f600 cat"
    assert [field.split("=")[0] for field in fields[2:-1]] == ["class 0", "class 1", "class 2"]
    assert sum(float(field.split("=")[1]) for field in fields[2:-1]) == pytest.approx(1, abs=3 * PRINTED)


def test_lines_are_written_into_a_new_file(tmp_path, tiny_tokenizer_dir, capsys, monkeypatch):
    folder = save_model(tmp_path / "model", tiny_tokenizer_dir, ["text"])
    (tmp_path / "a.txt").write_text("the cat\n")
    assert run(monkeypatch, folder, tmp_path / "a.txt") == 0
    shown = capsys.readouterr().out
    assert run(monkeypatch, folder, tmp_path / "a.txt", "--output", tmp_path / "b.txt") == 0
    assert (tmp_path / "b.txt").read_text() == shown and capsys.readouterr().out == ""
    assert run(monkeypatch, folder, tmp_path / "a.txt", "--output", tmp_path / "b.txt") == 2
    assert (tmp_path / "b.txt").read_text() == shown


def test_a_model_that_answers_with_nan_is_an_error(tmp_path, tiny_tokenizer_dir, capsys, monkeypatch):
    folder = save_model(tmp_path / "model", tiny_tokenizer_dir, ["text"])
    model = predict.load_trained(folder)
    torch.nn.init.constant_(model.classifier.bias, 3e38)  # finite, and the largest sum is not
    torch.nn.init.constant_(model.bert.pooler.dense.bias, 1e9)  # every pooled value is 1
    torch.nn.init.constant_(model.classifier.weight, 3e38)
    model.save_pretrained(folder)
    (tmp_path / "a.txt").write_text("the cat\n")
    assert run(monkeypatch, folder, tmp_path / "a.txt") == 2
    assert re.search(r"model \S+: it answers with NaN or infinity; name another model", capsys.readouterr().err)


def test_a_line_of_more_characters_than_are_read_is_refused(monkeypatch):
    monkeypatch.setattr(predict, "LONGEST", 5)
    with pytest.raises(UsageError, match="line 2 has more than 5 characters, the most that is read; cut it"):
        list(read_lines(io.StringIO("12345\n123456\n"), 1))


def test_a_bar_is_shown_on_a_terminal_alone(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = {}
    for out, err in ((io.StringIO, Terminal), (Terminal, Terminal), (io.StringIO, io.StringIO)):
        monkeypatch.setattr(sys, "stdout", out())
        monkeypatch.setattr(sys, "stderr", err())
        shown[out, err] = [not predict._bar(output, 9).disable for output in (None, "a.csv")]
    monkeypatch.undo()
    assert list(shown.values()) == [[True, True], [False, True], [False, False]]


def test_prediction_leaves_out_what_training_leaves_out(tmp_path, tiny_tokenizer_dir, capsys, monkeypatch):
    """The lean encoder, as train.py uses it on a CPU, with the whole one's answers."""
    folder = save_model(tmp_path / "model", tiny_tokenizer_dir, ["text"])
    layouts = []

    def noted(*args):
        layouts.append(layout_of(*args))
        return layouts[-1]

    layout_of = lean.layout_of
    monkeypatch.setattr(lean, "layout_of", noted)
    texts = sentences(20, shortest=1)
    shown = predicted(texts, folder, capsys, monkeypatch, tmp_path)
    whole = predict.predict(
        [(text,) for text in texts], predict.load_trained(folder), predict.load_tokenizer(folder), 64, 64
    )
    assert len(layouts) == 1 and layouts[0] is not None  # of predict's one batch, and none of the whole model's
    assert [line[0] for line in shown] == [label for label, _ in whole]
    np.testing.assert_allclose([float(line[1]) for line in shown], [p for _, p in whole], atol=PRINTED + TOLERANCE)


@pytest.mark.parametrize("problem", ["single", "multi"])
def test_a_row_costs_what_is_told_of_it_and_not_a_call_for_each_class(problem):
    def answers(classes: int, every: bool = False) -> predict.Answers:
        names = {k: f"class {k}" for k in range(classes)}
        kind = f"{problem}_label_classification"
        config = SimpleNamespace(num_labels=classes, problem_type=kind, id2label=names)
        return predict.Answers(SimpleNamespace(config=config), every)

    work = []
    for classes in (10, 1000):
        one, row = answers(classes), np.zeros(classes, np.float32)
        row[7] = 0.7000004
        told = {"label": "class 7", "probability": 0.7}
        assert one.columns(row) == (told if problem == "single" else {name: [value] for name, value in told.items()})
        assert one.fields(row) == ["class 7", "0.7000"]
        assert len(answers(classes, every=True).fields(row)) == 2 + classes
        work.append(calls(partial(one.columns, row)) + calls(partial(one.fields, row)))
    assert work[0] == work[1]
