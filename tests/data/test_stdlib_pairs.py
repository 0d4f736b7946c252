"""The embedded data set: MRPC's form, no leak, no false negative, nothing to guess from one side.

Nothing builds the same rows, so these are properties of them, checked against GLUE MRPC's own files where they are
present (columns, sizes), `inspect.getdoc` (positives) and scikit-learn (guessing the label from one side).

    python -m pytest tests/data/test_stdlib_pairs.py
"""

import ast
import copy
import json
import os
import subprocess
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanofinetune.data import stdlib_pairs
from nanofinetune.ground.errors import UsageError

SPLITS = ["train", "validation"]


@pytest.fixture(scope="module")
def parsed() -> dict[str, list[stdlib_pairs.Documented]]:
    return stdlib_pairs.functions_by_module(Path(sysconfig.get_path("stdlib")))


@pytest.fixture(scope="module")
def parsed_once(parsed) -> Iterator[None]:
    """Parsing the library takes seconds: the tests in this process that load from it do so once."""
    whole = stdlib_pairs.functions_by_module

    def functions_by_module(folder: Path) -> dict[str, list[stdlib_pairs.Documented]]:
        return copy.deepcopy(parsed) if folder == Path(sysconfig.get_path("stdlib")) else whole(folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stdlib_pairs, "functions_by_module", functions_by_module)
        yield


@pytest.fixture(scope="module")
def splits(parsed_once) -> dict[str, list[stdlib_pairs.Pair]]:
    return stdlib_pairs.load()


@pytest.fixture(scope="module")
def module_of(parsed) -> dict[str, str]:
    """Signature -> module, from the source files: a dotted signature does not say where its module ends."""
    return {signature: module for module, functions in parsed.items() for signature, _ in functions}


def test_sizes_and_columns_are_as_stated(splits):
    assert {split: len(rows) for split, rows in splits.items()} == stdlib_pairs.SIZES
    for rows in splits.values():
        assert all(list(row) == ["sentence1", "sentence2", "label", "idx"] for row in rows)
        assert [row["idx"] for row in rows] == list(range(len(rows)))
        assert {row["label"] for row in rows} == set(range(len(stdlib_pairs.LABEL_NAMES)))


def test_sizes_and_columns_are_those_of_mrpc(splits, glue_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="reads the real MRPC")
    for split in SPLITS:
        real = parquet.read_table(glue_path / "mrpc" / f"{split}.parquet")
        assert len(splits[split]) == real.num_rows
        assert set(splits[split][0]) == set(real.column_names)


@pytest.mark.slow
def test_another_process_builds_the_same(splits):
    code = "import json; from nanofinetune.data import stdlib_pairs; print(json.dumps(stdlib_pairs.load()))"
    for hash_seed in ["1", "2"]:  # the order of a set of strings changes with it
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        output = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        assert json.loads(output.stdout) == splits


def test_another_seed_gives_other_pairs(splits):
    other = stdlib_pairs.load(seed=1)
    assert [len(rows) for rows in other.values()] == [len(rows) for rows in splits.values()]
    assert other["train"] != splits["train"]


def test_no_text_is_in_both_splits(splits):
    signatures = [{row["sentence1"] for row in splits[split]} for split in SPLITS]
    summaries = [{stdlib_pairs.normalised(row["sentence2"]) for row in splits[split]} for split in SPLITS]
    assert signatures[0].isdisjoint(signatures[1])
    assert summaries[0].isdisjoint(summaries[1])


@pytest.mark.parametrize("split", SPLITS)
def test_no_pair_comes_twice(splits, split):
    pairs = {(row["sentence1"], stdlib_pairs.normalised(row["sentence2"])) for row in splits[split]}
    assert len(pairs) == len(splits[split])


@pytest.mark.parametrize("split", SPLITS)
def test_a_negative_is_another_one_of_the_same_module(splits, module_of, split):
    own = {row["sentence1"]: row["sentence2"] for row in splits[split] if row["label"] == 1}
    owner = {summary: signature for signature, summary in own.items()}
    assert len(owner) == len(own)  # a summary belongs to one signature
    negatives = [row for row in splits[split] if row["label"] == 0]
    assert len(negatives) == len(own)
    for row in negatives:
        rightful = owner[row["sentence2"]]
        assert module_of[rightful] == module_of[row["sentence1"]]
        assert stdlib_pairs.normalised(row["sentence2"]) != stdlib_pairs.normalised(own[row["sentence1"]])
        assert stdlib_pairs.method_name((rightful, "")) != stdlib_pairs.method_name((row["sentence1"], ""))


def test_positives_are_what_the_documentation_says(splits):
    """Against `inspect.getdoc` of functions that really are imported, for modules that are safe to import."""
    import ftplib
    import inspect
    import shutil
    import textwrap

    modules = {module.__name__: module for module in (ftplib, inspect, shutil, textwrap)}
    rows = [row for split in SPLITS for row in splits[split] if row["label"] == 1]
    checked = 0
    for row in rows:
        module, *names = row["sentence1"].split("(")[0].split(".")
        if module in modules:
            thing: Any = modules[module]
            for name in names:
                thing = inspect.getattr_static(thing, name)
            if inspect.unwrap(thing).__module__ != module:
                continue  # torch.package puts a function of its own in place of inspect.getfile
            documentation = inspect.getdoc(thing)
            assert documentation is not None
            assert " ".join(documentation.split()).startswith(row["sentence2"])
            checked += 1
    assert checked > 10


@pytest.mark.parametrize("side", ["sentence1", "sentence2"])
@pytest.mark.parametrize("split", SPLITS)
def test_each_text_is_once_same_and_once_other(splits, split, side):
    labels = defaultdict(list)
    for row in splits[split]:
        labels[row[side]].append(row["label"])
    assert all(sorted(seen) == [0, 1] for seen in labels.values())


@pytest.mark.parametrize("side", ["sentence1", "sentence2"])
def test_one_side_alone_says_nothing_about_the_label(splits, side):
    """A bag of words and pairs of words over one side: chance on the training rows themselves, and so on any others."""
    pytest.importorskip("sklearn", reason="the one-sided guesser is scikit-learn's")
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    words = CountVectorizer(ngram_range=(1, 2), token_pattern=r"[A-Za-z]+", binary=True)
    train, validation = ([row[side] for row in splits[split]] for split in SPLITS)
    features = words.fit_transform(train)
    guesser = LogisticRegression().fit(features, [row["label"] for row in splits["train"]])
    # Any function of one side answers a text's two rows alike and is right on one of them: exactly one half.
    for split, x in zip(SPLITS, [features, words.transform(validation)], strict=True):
        assert guesser.score(x, [row["label"] for row in splits[split]]) == 0.5


def test_both_sides_together_say_something(splits):
    """The task can be learnt: shared words alone beat chance, and leave much to learn."""

    def shared(row: stdlib_pairs.Pair) -> int:
        words = [
            set(stdlib_pairs.normalised(text.replace("_", " ")).split())
            for text in (row["sentence1"], row["sentence2"])
        ]
        return len(words[0] & words[1])

    right = sum((shared(row) >= 1) == row["label"] for row in splits["train"]) / len(splits["train"])
    assert 0.55 < right < 0.8


@pytest.mark.parametrize(
    ("docstring", "summary"),
    [
        ("Close the open file.", "Close the open file."),
        ("Close the\n    open file. Then\nstop.\n\nMore.", "Close the open file."),
        ("Return, e.g. for the root, the path.", "Return, e.g. for the root, the path."),
        ("", None),
        ("Close it.", None),  # too short
        ("word " * 41, None),  # too long
        (">>> add(1, 2) == 3 and so on", None),
        ("Call like this: >>> add(1, 2)", None),
        ("D.get(k[,d]) -> the value of k in D", None),  # the signature over again
        ("-- deprecated and not to be used", None),
    ],
)
def test_usable_summaries_only(docstring, summary):
    assert stdlib_pairs.summarise(docstring) == summary


@pytest.mark.parametrize(
    ("source", "signature"),
    [
        ("def f(a, /, b=1, *args, c, **kwargs):", "m.f(a, b, *args, c, **kwargs)"),
        ("async def f(a: int = 3) -> int:", "m.f(a)"),
        ("class C:\n @classmethod\n def f(cls, a):", "m.C.f(a)"),
        ("class C:\n @functools.cached_property\n def f(self):", "m.C.f"),
        ("class C:\n @f.setter\n def f(self, value):", "m.C.f"),
        ("class C:\n class D:\n  def f(self):", "m.C.D.f()"),
        ("def _f():", None),
        ("class _C:\n def f(self):", None),
        ("class C:\n def __len__(self):", None),
    ],
)
def test_signatures_are_what_a_caller_writes(source, signature):
    found = list(stdlib_pairs.documented("m", ast.parse(f"{source} 'Do what it says.'")))
    assert found == ([] if signature is None else [(signature, "Do what it says.")])


def test_a_summary_that_fits_two_functions_stays_with_the_first(tmp_path):
    source = 'def f():\n "Close the open file."\ndef g():\n "Close the open file"\ndef h():\n "Open the closed file."\n'
    (tmp_path / "shutil.py").write_text(source)
    assert stdlib_pairs.functions_by_module(tmp_path) == {
        "shutil": [("shutil.f()", "Close the open file."), ("shutil.h()", "Open the closed file.")]
    }


def test_only_public_modules_of_the_library_are_read(tmp_path):
    for name in [
        "json/__init__.py",
        "json/tool.py",
        "json/_hidden.py",
        "json/tests/x.py",
        "site-packages/json.py",
        "mine.py",
    ]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [module for module, _ in stdlib_pairs._modules(tmp_path)] == ["json", "json.tool"]


def test_too_few_docstrings_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError) as empty:
        stdlib_pairs.load(stdlib=tmp_path)
    assert str(empty.value) == (
        f"stdlib-pairs: {tmp_path} gives 0 couples of documented functions and 1019 are needed "
        "(is this Python installed without its library's sources?): name other data with --data"
    )
    with pytest.raises(UsageError, match="gives 0 couples"):
        stdlib_pairs.load(stdlib=tmp_path / "absent")
