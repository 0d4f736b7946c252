"""Reading what a run has left: any bytes in any of its files give a page or one line, in bounded memory.

python -m pytest tests/report/test_read.py
"""

import json
import os

import numpy as np
import pytest
from runs import write_log, write_run

from nanofinetune.ground.errors import UsageError
from nanofinetune.report import read
from nanofinetune.report.page import page
from nanofinetune.report.read import FILES, LOSS, LR, ROWS, SPEED, STEP, TOOK, names_of, read_run

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


def test_the_columns_are_those_of_the_log(tmp_path):
    write_log(tmp_path, 50, seconds=True)
    run = read_run(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for column, key in ((STEP, "step"), (LR, "lr"), (LOSS, "loss"), (ROWS, "rows")):
        assert run.log.mean[:, column].tolist() == [line[key] for line in lines]
    assert run.log.mean[:, TOOK].tolist() == [0.25] * 50 and run.log.mean[:, SPEED].tolist() == [32.0] * 50
    assert run.epochs == [1, 18, 35] and run.updates == 50


def test_one_time_for_many_updates_is_that_of_all_their_rows(tmp_path):
    """A clock that is read once in 10 updates, as one that waits for a device is."""
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for k in range(1, 41):
            line = {"step": k, "epoch": 1, "lr": 0.1, "loss": 1.0, "rows": 8, "seconds": 2.0 * ((k + 9) // 10)}
            file.write(json.dumps(line) + "\n")
    run = read_run(tmp_path)
    known = run.log.mean[:, SPEED][~np.isnan(run.log.mean[:, SPEED])]
    assert np.nansum(run.log.total[:, TOOK]) == 8.0 and len(known) == 4
    assert known[1:].tolist() == [40.0] * 3, "80 rows in 2 seconds; the first time comes before 9 of its rows"


def test_a_log_in_blocks_is_the_log_at_once(tmp_path, monkeypatch):
    write_log(tmp_path, 100, seconds=True)
    whole = read_run(tmp_path)
    for size in (1, 70, 999):
        monkeypatch.setattr(read, "BLOCK", size)
        run = read_run(tmp_path)
        for one, other in zip(run.log, whole.log, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9)
        assert (run.epochs, run.updates) == (whole.epochs, whole.updates)


def test_updates_without_a_finite_loss_are_counted(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "epoch": 1, "lr": 0.1, "loss": 0.5, "rows": 8}\n'
        '{"step": 2, "epoch": 1, "lr": 0.1, "loss": null, "rows": 0}\n'
    )
    run = read_run(tmp_path)
    assert (run.updates, run.left_out) == (2, 1) and "1 update(s) without a finite loss" in page([run])


@pytest.mark.parametrize("size", [2**19, 30])
def test_updates_that_are_missing_are_counted(size, tmp_path, monkeypatch):
    """As after a disk that was full; a log that begins late, after --resume into another folder, lacks nothing."""
    monkeypatch.setattr(read, "BLOCK", size)
    write_log(tmp_path, 40)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    for kept, missing in (([*lines[9:20], *lines[23:30], *lines[31:]], 4), (lines[9:], 0), (lines, 0)):
        (tmp_path / "metrics.jsonl").write_text("\n".join(kept))
        remark = f"metrics.jsonl: {missing} update(s) between its lines are missing"
        remarks = [text for text in read_run(tmp_path).remarks if text.startswith("metrics")]
        assert remarks == ([remark] if missing else [])
        assert not missing or remark in page([read_run(tmp_path)])


LINE = '{"step": 3, "epoch": 1, "lr": 1, "loss": 1, "rows": 8}'
STRANGE = [
    "null", "[]", "{}", "7", '"text"', "{", '{"step": 1}', "[" * 100_000, "1" * 5000, LINE[:-9], LINE + LINE,
    LINE.replace("3", "NaN"), LINE.replace("3", '"3"'), LINE.replace("3", "true"),
    LINE.replace('"lr": 1', '"lr": 1e999'),
    LINE.replace('"loss": 1', '"loss": 1e300'), LINE.replace('"loss": 1', '"loss": NaN'),
    LINE.replace("8}", '8, "seconds": -1}'),
]  # fmt: skip


@pytest.mark.parametrize("line", STRANGE, ids=lambda line: line[:30])
def test_a_line_of_no_log_is_left_out_and_said(line, tmp_path):
    write_log(tmp_path, 20)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines[:10], line, *lines[10:]]))
    run = read_run(tmp_path)
    assert run.updates == 20 and run.log.mean[:, STEP].tolist() == list(range(1, 21))
    assert "metrics.jsonl: 1 line(s) are not of a log and are left out" in run.remarks


def test_a_line_without_end_is_one_strange_line(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "LONGEST", 200)
    write_log(tmp_path, 5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("x" * 10_000 + "\n" + LINE[:-1].replace("3", "6") + " " * 200 + "}\n")
    for size in (2**19, 30):
        monkeypatch.setattr(read, "BLOCK", size)
        run = read_run(tmp_path)
        assert "metrics.jsonl: 2 line(s) are not of a log and are left out" in run.remarks and run.updates == 5


# any bytes, and JSON of any form, which comes further
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(
    ["step", "epoch", "lr", "loss", "rows", "seconds", "row", "text", "text_pair", "label", "prediction",
     "probabilities", "classes", "confusion_matrix", "evaluations", "arguments", "plan", "versions", "machine", "notes",
     "speed", "model", "accuracy", "precision", "recall", "f1", "predicted"]
)  # fmt: skip
OBJECTS = st.recursive(
    VALUES, lambda inner: st.dictionaries(KEYS, inner, max_size=9) | st.lists(inner, max_size=3), max_leaves=12
)
CONTENTS = st.binary(max_size=200) | st.lists(OBJECTS, max_size=4).map(
    lambda values: "\n".join(json.dumps(value) for value in values).encode()
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.none() | CONTENTS, min_size=3, max_size=3), st.booleans())
def test_any_files_give_a_page_or_one_line(tmp_path, contents, others_good):
    write_run(tmp_path / "run", updates=6, rows=4)
    for name, content in zip(FILES, contents, strict=True):
        if content is not None:
            (tmp_path / "run" / name).write_bytes(content)
        elif not others_good:
            (tmp_path / "run" / name).unlink()
    try:
        text = page([read_run(tmp_path / "run")])
    except UsageError as error:
        assert contents == [None] * 3 and "\n" not in str(error)
        return
    assert text.startswith("<!doctype html>") and text.endswith("</html>\n")
    text.encode()


def test_what_is_no_plain_file_is_said_and_not_waited_for(tmp_path):
    write_run(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    os.mkfifo(tmp_path / "metrics.jsonl")
    (tmp_path / "validation.jsonl").unlink()
    (tmp_path / "validation.jsonl").mkdir()
    run = read_run(tmp_path)
    assert run.remarks == ["metrics.jsonl: it is not a plain file", "validation.jsonl: it is not a plain file"]
    assert run.result["accuracy"] == 0.75


def test_too_large_a_result_is_not_read(tmp_path, monkeypatch):
    write_run(tmp_path)
    monkeypatch.setattr(read, "LARGEST", 2**9)
    run = read_run(tmp_path)
    assert run.result == {} and any("result.json: it has more than" in remark for remark in run.remarks)


def test_rows_after_the_ten_thousandth_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "MOST_ROWS", 30)
    run = read_run(write_run(tmp_path, rows=40))
    assert run.judged.rows == 30
    assert "validation.jsonl: it goes on after 30 rows, which are what is shown" in run.remarks


def test_a_folder_without_a_run_is_one_line(tmp_path):
    with pytest.raises(UsageError, match=r"holds no metrics\.jsonl, result\.json or validation\.jsonl; name a folder"):
        read_run(tmp_path)
    with pytest.raises(UsageError, match="there is no such folder"):
        read_run(tmp_path / "nowhere")


def test_names_of_runs_are_short_and_different(tmp_path):
    (tmp_path / "a" / "x").mkdir(parents=True)
    assert names_of([tmp_path / "a" / "x", tmp_path / "a"]) == ["x", "a"]
    assert names_of([tmp_path / "a" / "x", tmp_path / "b" / "x"])[0].endswith("/a/x")
