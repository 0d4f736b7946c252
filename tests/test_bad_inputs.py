"""What a user can get wrong, one case a line.

train.py and predict.py answer each with one line that names the thing, the value and the remedy, exit with 2 before the
first update, and leave every file as it was. There is no reference: the libraries answer with tracebacks.

    python -m pytest tests/test_bad_inputs.py

Most cases run in this process; a handful are real processes, which also prove that nothing else is on stderr. One of
those is not in offline mode: it finds a closed port where the Hub should be, and has to give up at once, where the
libraries (transformers 5.23, datasets 5.2) retry.
"""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, WORDS, load_script, tiny_bert
from programs import run_program

from nanofinetune import accelerator, predict
from nanofinetune.ground.cli import run_main


def lines(row: Callable[[int], str], header: str = "", rows: int = 20) -> str:
    """A text file: the header, and row(0) to row(19)."""
    return "".join(line + "\n" for line in ([header] if header else []) + [row(i) for i in range(rows)])


def labelled(label: Callable[[int], object]) -> str:
    """JSON lines of texts with label(0) to label(19); a NaN is written as Python's json writes it."""
    return lines(lambda i: json.dumps({"text": f"the cat {i}", "label": label(i)}))


GOOD = lines(lambda i: f"the cat {i},{i % 2}", "text,label")
PAIRED = lines(lambda i: f"the cat {i},a dog,it sat {i},{i % 2}", "a,b,c,label")

# --data's part of the yard. A name with a folder in it makes the folder.
DATA: dict[str, str | bytes] = {
    "good.csv": GOOD,
    "empty.csv": "",
    "header.csv": "text,label\n",
    "short.csv": lines(lambda i: f"the cat,{i % 2}", "text,label", rows=9),
    "notes.txt": GOOD,
    "three.csv": PAIRED,
    "two-labels.csv": lines(lambda i: f"the cat {i},{i % 2},{i % 3}", "text,one,other"),
    "no-label.csv": lines(lambda i: f"the cat {i}", "text"),
    "no-text.csv": lines(lambda i: f"{i},{i % 2}", "n,label"),
    "all-different.csv": lines(lambda i: f"the cat {i},the dog {i}", "text,label"),
    "pandas.csv": lines(lambda i: f"{i},the cat {i}", ",text"),
    "confidence.csv": lines(lambda i: f"the cat {i},{i / 20}", "text,confidence"),
    "topic.csv": lines(lambda i: f"the cat {i},{('new', 'old')[i % 2]},{i % 3}", "text,name,label"),
    "no-header.csv": lines(lambda i: f"the cat {i},{i % 2}"),
    "two-headers.csv": GOOD + GOOD,
    "deep.jsonl": '{"text": ' + "[" * 50_000 + "]" * 50_000 + ', "label": 1}\n',
    "long.csv": GOOD + "a" * 1_000_001 + ",1\n",
    "folder/parts/train-00000-of-00002.csv": GOOD,
    "folder/parts/validation.csv": GOOD,
    "folder/backup/train.csv": GOOD,
    "folder/backup/train.old.csv": GOOD,
    "folder/backup/validation.csv": GOOD,
    "unlabelled.csv": lines(lambda i: f"the cat {i},-1", "text,label"),
    "one-class.csv": lines(lambda i: f"the cat {i},0", "text,label"),
    "lost-label.csv": lines(lambda i: f"the cat {i},{'' if i == 3 else i % 2}", "text,label"),
    "nan.jsonl": labelled(lambda i: float("nan") if i == 3 else i / 2),
    "infinite.csv": lines(lambda i: f"the cat {i},{'inf' if i == 3 else i / 2}", "text,label"),
    "null-label.jsonl": labelled(lambda i: None if i == 3 else i % 2),
    "list-label.jsonl": labelled(lambda i: [i % 3, 1]),
    "mixed-label.jsonl": labelled(lambda i: "good" if i == 3 else i % 2),
    "null-text.jsonl": lines(lambda i: json.dumps({"text": None if i == 3 else "the cat", "label": i % 2})),
    "quotes.csv": lines(lambda i: f"{chr(34) * (i == 3)}the cat {i},{i % 2}", "text,label"),
    "fields.csv": lines(lambda i: f"the cat {i},{i % 2}" + ",and more" * (i == 3), "text,label"),
    "latin1.csv": GOOD.replace("cat 3", "caf\u00e9 3").encode("latin-1"),
    "terminal.csv": lines(lambda i: f"the cat {i},a dog", "te\x1b[2Jxt\x9b31m,lab\u202eel\x07"),
    "terminal-\x1b[2J.csv": "",
    "broken.jsonl": lines(lambda i: '{"text": "the cat", "label": ' + ("" if i == 3 else "1}")),
    "broken.parquet": b"PAR1 and nothing more",
    "folder/none/README.md": "no data",
    "folder/no-train/validation.csv": GOOD,
    "folder/no-validation/train.csv": GOOD,
    "folder/header/train.csv": GOOD,
    "folder/header/validation.csv": "text,label\n",
    "folder/two-kinds/train.csv": GOOD,
    "folder/two-kinds/train.jsonl": labelled(lambda i: i % 2),
    "folder/two-kinds/validation.csv": GOOD,
    "folder/two-validations/train.csv": GOOD,
    "folder/two-validations/validation.csv": GOOD,
    "folder/two-validations/dev.csv": GOOD,
    "folder/words/train.csv": GOOD,
    "folder/words/validation.csv": lines(lambda i: f"the cat,{'good' if i else 1}", "text,label"),
    "folder/float/train.csv": GOOD,
    "folder/float/validation.csv": lines(lambda i: f"the cat,{i / 8}", "text,label"),
    "folder/column/train.csv": GOOD,
    "folder/column/validation.csv": lines(lambda i: f"the cat,{i % 2}", "sentence,label"),
    "folder/number/train.csv": GOOD,
    "folder/number/validation.csv": lines(lambda i: f"{i},{i % 2}", "text,label"),
    "folder/null/train.csv": GOOD,
    "folder/null/validation.jsonl": labelled(lambda i: i % 2).replace('"the cat 3"', "null"),
    "used/result.json": '{"accuracy": 0.5}\n',
    "used/model/config.json": "{}\n",
    "lines.txt": "the cat\na dog\n",
    "pairs.txt": "the cat\tit sat\na dog\tit ran\tunder the tree\n",
    "long.txt": "the cat\n" + "a" * 1_000_001 + "\n",
    "folder/folders/train.csv/a": "",
    "folder/folders/validation.csv": GOOD,
    "latin1.txt": "the caf\u00e9\n".encode("latin-1"),
}


@pytest.fixture(scope="session")
def yard(tmp_path_factory, tiny_tokenizer_dir) -> Path:
    """A folder of everything that can be named wrongly, beside a model and data that are right."""
    from datasets import Dataset, Features, Value
    from tokenizers import Tokenizer, models
    from transformers import BertTokenizerFast, GPT2Config, GPT2ForSequenceClassification, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("yard")
    for name, content in DATA.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    model = folder / "model"
    shutil.copytree(tiny_tokenizer_dir, model)
    tiny_bert().save_pretrained(model)

    def copy(name: str, *without: str) -> Path:
        return Path(shutil.copytree(model, folder / "models" / name, ignore=shutil.ignore_patterns(*without)))

    copy("no-config", "config.json")
    copy("no-weights", "model.safetensors")
    copy("no-tokenizer", "tokenizer*", "vocab*", "special*")
    (copy("broken-config") / "config.json").write_text('{"model_type": "bert", ')
    (copy("broken-weights") / "model.safetensors").write_bytes(b"\x00" * 64)
    (copy("unknown-kind") / "config.json").write_text('{"model_type": "nosuchmodel"}')
    code = {"AutoConfig": "code.Config", "AutoModelForSequenceClassification": "code.Model"}
    for model_type in ("nosuchmodel", "vit"):  # one that needs the code for its config, one for the model alone
        hostile = copy(f"code-{model_type}")
        (hostile / "config.json").write_text(json.dumps({"model_type": model_type, "auto_map": code}))
        (hostile / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\n")
    gpt2 = GPT2Config(vocab_size=32, n_positions=64, n_embd=8, n_layer=1, n_head=1)
    GPT2ForSequenceClassification(gpt2).save_pretrained(folder / "models" / "no-padding")
    words = models.WordLevel({word: i for i, word in enumerate(["[UNK]", *WORDS])}, unk_token="[UNK]")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="[UNK]")
    tokenizer.save_pretrained(folder / "models" / "no-padding")

    bert = tiny_bert()
    bert.config.num_hidden_layers = 1
    type(bert)(bert.config).save_pretrained(copy("few-layers"))
    bert.config.num_hidden_layers = 2
    bert.config.save_pretrained(folder / "models" / "few-layers")  # the config promises a layer that the weights lack
    bert.config.max_position_embeddings = 3
    type(bert)(bert.config).save_pretrained(copy("no-room"))
    bert.config.max_position_embeddings = 64
    bert.config.problem_type = "multi_label_classification"
    type(bert)(bert.config).save_pretrained(copy("many-labels"))
    tiny_bert().bert.save_pretrained(copy("never-tuned"))  # the encoder alone

    other = copy("other-tokenizer", "tokenizer*", "vocab*", "special*")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(40))]
    (folder / "vocabulary.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(str(folder / "vocabulary.txt"), model_max_length=64).save_pretrained(other)

    def configured(name: str, **values: object) -> None:
        config = copy(name) / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | values))

    configured("huge", num_hidden_layers=10**7)
    configured("columns", text_columns=7)
    for name, number in (("nan", float("nan")), ("overflow", 3e38)):
        bert = tiny_bert()
        bert.classifier.weight.data.fill_(number)
        bert.bert.pooler.dense.bias.data.fill_(100)  # all that the classifier reads is 1
        bert.save_pretrained(copy(name))

    (folder / "folder" / "pipes").mkdir()
    for name in ("pipe.csv", "folder/pipes/train.csv", "folder/pipes/validation.csv"):
        os.mkfifo(folder / name)
    for name, target in (("loop.csv", "loop.csv"), ("zero.csv", "/dev/zero"), ("nothing", "nowhere")):
        (folder / name).symlink_to(target)

    features = Features({"text": Value("string"), "label": Value("int64")})
    Dataset.from_dict({"text": [], "label": []}, features).to_parquet(folder / "no-rows.parquet")
    return folder


def state_of(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Every path below the folder -> inode, size and time: what shows that a file was written, replaced or lost."""
    found = {str(path.relative_to(folder)): path.lstat() for path in folder.rglob("*")}
    return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}


@pytest.fixture(scope="session")
def train():
    """train.py, which is no part of the package, as a module."""
    return load_script(ROOT / "train.py")


# Command line -> what the one line says. Every {word} is a place in the yard; where neither --model nor --data is the
# matter, the good ones are added.
OPTIONS = {
    "--learning-rate 1e-5": r"unrecognized arguments: --learning-rate 1e-5 .*--help",
    "--batch 8": r"unrecognized arguments: --batch 8 .*--help",
    "glue/mrpc": r"unrecognized arguments: glue/mrpc .*--help",
    "--lr": r"--lr: expected one argument .*--help",
    "--lr -1": r"--lr: -1 is not a number above 0",
    "--lr 0": r"--lr: 0 is not a number above 0",
    "--lr nan": r"--lr: nan is not a number above 0",
    "--lr inf": r"--lr: inf is not a number above 0",
    "--lr small": r"--lr: small is not a number above 0",
    "--batch-size 0": r"--batch-size: 0 is not a whole number from 1",
    "--batch-size 2.5": r"--batch-size: 2.5 is not a whole number from 1",
    "--eval-batch-size 0": r"--eval-batch-size: 0 is not a whole number from 1",
    "--epochs 0": r"--epochs: 0 is not a whole number from 1",
    "--max-steps 0": r"--max-steps: 0 is not a whole number from 1",
    "--accumulate 0": r"--accumulate: 0 is not a whole number from 1",
    "--warmup-steps 1.5": r"--warmup-steps: 1.5 is neither a whole number of updates nor a ratio",
    "--warmup-steps -1": r"--warmup-steps: -1 is not a number from 0",
    "--max-steps 5 --warmup-steps 6": r"--warmup-steps 6: .* only 5 updates; choose fewer",
    "--weight-decay -0.1": r"--weight-decay: -0.1 is not a number from 0",
    "--clip-norm 0": r"--clip-norm: 0 is not a number above 0",
    "--seed -1": r"--seed: -1 is not a whole number from 0",
    "--precision fp8": r"--precision: invalid choice: 'fp8' \(choose from .*no.*bf16.*fp16",
    "--precision fp16 --device cpu": r"fp16.* a CPU has no half-precision training: choose bf16",
    "--device nosuch": r"--device nosuch: there is no such device; choose auto, cpu, cuda",
    "--device cuda": r"--device cuda: torch sees no CUDA device here; choose --device cpu",
    "--uneven drop": r"--uneven: invalid choice: 'drop' \(choose from .*mask.*wrap",
    "--output {good.csv}": r"--output \S+good.csv: .*cannot be written .*; name another folder",
    "--output {good.csv}/run": r"--output \S+run: .*cannot be written .*; name another folder",
    "--output /proc/nanofinetune": r"--output /proc/\S+: .*cannot be written",
    "--output {used}": r"--output \S+used: .* holds model, result.json of an earlier run; name",
    "--save-every 5": r"--save-every 5 needs --output: name the folder that holds the checkpoints",
    "--save-every 0": r"--save-every: 0 is not a whole number from 1",
    "--keep 0": r"--keep: 0 is not a whole number from 1",
    "--resume auto": r"--resume auto needs --output: name the folder that holds the checkpoints",
    "--resume {used}": r"--resume \S+used: there is no complete checkpoint; name a folder that holds one",
    "--resume /nowhere": r"--resume /nowhere: there is no complete checkpoint; name a folder that holds one",
    "--output {used} --resume auto": r"--output \S+used: this run is complete, there is nothing to resume",
    "--on-nan ignore": r"--on-nan: invalid choice: 'ignore'",
    "--timeout 0": r"--timeout: 0 is not a number from 1",
    "--text-columns sentence": r"--text-columns sentence: .*no such column; the data have text, label",
    "--label-column stars": r"--label-column stars: .*no such column; the data have text, label",
    "--text-columns label": r"--text-columns label: the column holds numbers, not text",
    "--text-columns text text": r"--text-columns text text: one column twice; name it once",
    "--label-column 'sta\nrs'": r"--label-column sta rs: there is no such column",
    "--output ''": r"--output is empty: name a file or folder",
    "--output a\0b": r"--output a\\x00b: no file can have this name",
    "--output ~nobody-here/x": r"--output ~nobody-here/x: this user has no home folder here; write the path in full",
    f"--output {'x' * 5000}": r"--output x+\.\.\.x+: it cannot be read|--output x+\.\.\.",
    "--output {nothing}": r"--output \S+nothing: \S+nothing is a link to nothing; name another folder",
    "--resume ''": r"--resume is empty: name a file or folder",
    "--resume a\0b": r"--resume a\\x00b: no file can have this name",
    "--resume=--": r"--resume: expected one argument .*--help",
    "--text-columns text --label-column text": r"--label-column text: it is also named as a text column",
}

MODELS = {
    "no-such-model": r"model no-such-model: the Hub is out of reach.*; name a local folder",
    "nobody/no-such-model": r"model nobody/no-such-model: the Hub is out of reach.*; name a local folder",
    "{models/nowhere}": r"model \S+nowhere: there is no such folder",
    "a@main": r"model a@main: there is no such file or folder, and no name on the Hub is like this; name a local one",
    "'$(id)'": r"model \$\(id\): there is no such file or folder, and no name on the Hub is like this; name",
    "~nobody-here": r"model ~nobody-here: this user has no home folder here; write the path in full",
    f"{'x' * 5000}": r"model x+\.\.\.x+",
    "a\0b": r"model a\\x00b: no file can have this name; name another one",
    "'a\nb'": r"model a b: there is no such file or folder, and no name on the Hub is like this",
    "''": r"model is empty: name a file or folder",
    ".": r"model \.: the folder holds no config.json; name the folder of a saved model",
    "{pipe.csv}": r"model \S+pipe.csv: this is a pipe; name the folder of a saved model",
    "/dev/null": r"model /dev/null: this is a device; name the folder of a saved model",
    "{good.csv}": r"model \S+good.csv: this is a file; name the folder of a saved model",
    "{models/no-config}": r"model \S+no-config: the folder holds no config.json; name the folder",
    "{models/no-weights}": r"model \S+no-weights: the model could not be loaded \(.*model.safetensors",
    "{models/no-tokenizer}": r"model \S+no-tokenizer: it has no tokenizer files; save the tokenizer beside the model",
    "{models/broken-config}": r"model \S+broken-config: .* could (not )?be loaded",
    "{models/broken-weights}": r"model \S+broken-weights: the model could not be loaded",
    "{models/unknown-kind}": r"model \S+unknown-kind: .* could (not )?be loaded .*nosuchmodel",
    "{models/code-nosuchmodel}": r"model \S+code-nosuchmodel: .*code of its own, which is never run here; choose",
    "{models/code-vit}": r"model \S+code-vit: .*code of its own, which is never run here; choose",
    "{models/no-padding}": r"model \S+no-padding: its tokenizer has neither a padding token.*; choose a BERT-like",
    "{models/few-layers}": r"model \S+few-layers: 16 encoder weights are missing .* bert.encoder.layer.1",
    "{models/no-room}": r"model \S+no-room: it takes 3 tokens at most, of which 3 are special: no room",
    "{models/huge}": r"model \S+huge: its config has num_hidden_layers 10000000, and the most is 1,000",
    "{models/nan}": r"model \S+nan: its weights hold NaN or infinity \(classifier.weight\); name another model",
    "{models/other-tokenizer}": r"model \S+other-tokenizer: .* 45 tokens and its embedding table 32 rows; save",
}

FILES = {
    "nobody/nothing": r"--data nobody/nothing: the Hub is out of reach .*; name a local file or folder",
    "glue/rte": r"--data glue/rte: the Hub is out of reach .*; name a local file or folder",
    "glue/nosuchtask": r"--data glue/nosuchtask: there is no such task; the GLUE tasks are .*mnli, .*mrpc",
    "a@main": r"--data a@main: there is no such file or folder, and no name on the Hub is like this; name a local one",
    "'$(id)'": r"--data \$\(id\): there is no such file or folder, and no name on the Hub is like this",
    "~nobody-here/x.csv": r"--data ~nobody-here/x.csv: this user has no home folder here; write the path in full",
    f"{'x' * 5000}": r"--data x+\.\.\.x+",
    "a\0b": r"--data a\\x00b: no file can have this name; name another one",
    "'stdlib-pairs\n'": r"--data stdlib-pairs : there is no such file or folder, and no name on the Hub is like this",
    "''": r"--data is empty: name a file or folder",
    "{pipe.csv}": r"--data \S+pipe.csv: it is a pipe, and data are read more than once; write them into a file",
    "/dev/zero": r"--data /dev/zero: it is a device, and data are read more than once; write them into a file",
    "{zero.csv}": r"--data \S+zero.csv: it is a device, and data are read more than once; write them into a file",
    "{loop.csv}": r"--data \S+loop.csv: there is no such file or folder",
    "{folder/pipes}": r"--data \S+train.csv: it is a pipe; put a plain file there",
    "{folder/folders}": r"--data \S+train.csv: it is a folder; put a plain file there",
    "{nowhere.csv}": r"--data \S+nowhere.csv: there is no such file or folder",
    "{nowhere}": r"--data \S+nowhere: there is no such file or folder",
    "{notes.txt}": r"--data \S+notes.txt: it is not a .csv, .* or .xlsx file, or one of .*; rename or convert it",
    "{empty.csv}": r"--data \S+empty.csv: the file is empty; write",
    "{header.csv}": r"--data \S+header.csv: the file has a header and no rows; add rows",
    "{no-rows.parquet}": r"--data \S+no-rows.parquet: the file has a header and no rows; add rows",
    "{short.csv}": r"--data \S+short.csv: 9 rows are too few to hold a tenth out; add some or",
    "{folder/none}": r"--data \S+none: the folder needs train.csv.*; it holds README.md",
    "{folder/no-train}": r"--data \S+no-train: the folder needs train.csv.*; it holds validation.csv",
    "{folder/no-validation}": r"--data \S+: no validation split; put validation.csv beside train.csv",
    "{folder/header}": r"--data \S+validation.csv: the file has a header and no rows",
    "{folder/two-kinds}": r"--data \S+two-kinds: train.csv and train.jsonl are one split twice; leave one",
    "{folder/two-validations}": r"--data \S+: dev.csv and validation.csv are one split twice; leave",
    "{three.csv}": r"3 text columns beside the label \(a, b, c\): name one or two with --text-columns",
    "{two-labels.csv}": r"which column is the label, one or other\? Name it with --label-column; .* text, one",
    "{no-label.csv}": r"which column is the label\? Name it with --label-column; the data have text",
    "{no-text.csv}": r"0 text columns beside the label \(none\): name one or two with --text-columns",
    "{all-different.csv}": r"--label-column label: 20 different labels in 20 rows are no classes; name another column",
    "{pandas.csv}": r"which column is the label\? Name it with --label-column; the data have Unnamed: 0, text",
    "{confidence.csv}": r"which column is the label\? Name it with --label-column; the data have text, confidence",
    "{topic.csv}": r"is name, of a few values many times, a text\? Name the text columns with .*: text name",
    "{no-header.csv}": r"--data \S+no-header.csv: is the first line a header\? It holds the number 0; write a line",
    "{two-headers.csv}": r"--data \S+two-headers.csv: line 22 is the header again; remove it",
    "{deep.jsonl}": r"--data \S+deep.jsonl: it could not be read \(line 1 has lists in lists in lists, too deep",
    "{long.csv}": r"--data \S+long.csv: .*line 22 holds a cell of more than 1,000,000 characters",
    "{folder/parts}": r"--data \S+parts: train-00000-of-00002.csv are not all parts of the split; put the others",
    "{folder/backup}": r"--data \S+backup: train.csv and train.old.csv are one split twice; leave one",
    "{unlabelled.csv}": r"--label-column label: every label is -1, the mark of a test set without labels",
    "{one-class.csv}": r"--label-column label: there is only one class \(0\) in the training split",
    "{lost-label.csv}": r"--label-column label: row 4 of the train split has no label \(1 in all\); fill it in",
    "{nan.jsonl}": r"--label-column label: row 4 of the train split has no label \(1 in all\); fill it in, or",
    "{infinite.csv}": r"--label-column label: row 4 of the train split is inf \(1 in all\); write a number",
    "{null-label.jsonl}": r"--label-column label: row 4 of the train split has no label \(1 in all\); fill it in",
    "{list-label.jsonl}": r"--label-column label: it holds lists; labels are words, whole numbers or floats",
    "{mixed-label.jsonl}": r"--label-column label: it holds mixed types .*row 4\); labels are words, whole numbers",
    "{null-text.jsonl}": r"--text-columns text: row 4 of the train split has no text \(1 in all\); fill it in",
    "{quotes.csv}": r"--data \S+quotes.csv: it could not be read \(.*unbalanced quotes\?",
    "{fields.csv}": r"--data \S+fields.csv: it could not be read \(line 5 has 3 fields and the header 2\); a text",
    "{latin1.csv}": r"--data \S+latin1.csv: it could not be read \(byte 0xe9 is not UTF-8\); name its encoding with",
    "{terminal.csv}": r"which column is the label\?.* te\\x1b\[2Jxt\\x9b31m, lab\\u202eel\\x07",
    "{terminal-\x1b[2J.csv}": r"--data \S+terminal-\\x1b\[2J.csv: the file is empty; write",
    "{broken.jsonl}": r"--data \S+broken.jsonl: it could not be read \(",
    "{broken.parquet}": r"--data \S+broken.parquet: it could not be read \(",
    "{folder/words}": r"--label-column label: the labels of the validation split are text \('1', 'good'\) and those of",
    "{folder/float}": r"--label-column label: the validation split holds floats and the training split whole",
    "{folder/column}": r"the validation split has no column text; it has sentence, label",
    "{folder/number}": r"--text-columns text: .*validation split holds numbers, not text",
    "{folder/null}": r"--text-columns text: row 4 of the validation split has no text",
}

TRAIN = {
    **OPTIONS,
    **{f"--model {model}": pattern for model, pattern in MODELS.items()},
    **{f"--data {data}": pattern for data, pattern in FILES.items()},
}

PREDICT = {
    "": r"following arguments are required: MODEL_DIR .*--help",
    "{models/nowhere}": r"model \S+nowhere: there is no such folder",
    "a@main {lines.txt}": r"model a@main: there is no such file or folder, and no name on the Hub is like this",
    "a\0b {lines.txt}": r"model a\\x00b: no file can have this name; name another one",
    "'' {lines.txt}": r"model is empty: name a file or folder",
    "{pipe.csv} {lines.txt}": r"model \S+pipe.csv: this is a pipe; name the folder of a saved model",
    f"{{model}} {'x' * 5000}": r"FILE x+\.\.\.x+",
    "{model} ''": r"FILE is empty: name a file or folder",
    "{models/huge} {lines.txt}": r"model \S+huge: its config has num_hidden_layers 10000000, and the most is 1,000",
    "{models/nan} {lines.txt}": r"model \S+nan: its weights hold NaN or infinity \(classifier.weight\); name another",
    "{models/overflow} {lines.txt}": r"model \S+overflow: it answers with NaN or infinity; name another model",
    "{models/columns} {lines.txt}": r"model \S+columns: its config has text_columns 7, which are not one or two names",
    "{model} {long.txt}": r"line 2 has more than 1,000,000 characters, the most that is read; cut it",
    "{good.csv} {lines.txt}": r"model \S+good.csv: this is a file; name the folder of a saved model",
    "{models/broken-weights} {lines.txt}": r"model \S+broken-weights: the model could not be loaded",
    "{models/never-tuned} {lines.txt}": r"never-tuned: never fine-tuned .*classifier.*; fine-tune it with train.py",
    "{models/code-nosuchmodel} {lines.txt}": r"model \S+code-nosuchmodel: .*code of its own, which is never run here",
    "{models/code-vit} {lines.txt}": r"model \S+code-vit: .*code of its own, which is never run here",
    "{model} {lines.txt} --threshold 0.3": r"--threshold: only for a model that gives a text any number of classes",
    "{models/many-labels} {lines.txt} --threshold x=0.3": r"--threshold x: the model has no such class; it has LABEL_0",
    "{models/many-labels} {lines.txt} --threshold 2": r"--threshold: 2 is not a number from 0 to 1",
    "{model} {lines.txt} --separator ;": r"--separator: \S+lines.txt holds lines by its ending, and no columns",
    "{model} {lines.txt} --output {good.csv}": r"--output \S+good.csv: it exists already, and is not written over",
    "{model} {lines.txt} --output {new.csv}": r"--output \S+new.csv: the input holds lines, not a table; name a .txt",
    "{model} {good.csv} --output {new.txt}": r"--output \S+new.txt: a table is written as .csv, .tsv, .jsonl, .parquet",
    "{model} {good.csv} --text-columns a b c": r"which columns are the texts\? Name one or two with --text-columns",
    "{model} {good.csv} --text-columns nosuch": r"--text-columns nosuch: the table has text, label; name another",
    "{model} {latin1.csv}": r"FILE \S+latin1.csv: it could not be read \(byte 0xe9 is not UTF-8\); name its encoding",
    "{model} {nowhere.txt}": r"nowhere.txt: there is no such file",
    "{model} {models}": r"models: it is a folder; name a file in it",
    "{model} {latin1.txt}": r"latin1.txt: byte 0xe9 is not UTF-8; name its encoding with --encoding",
    "{model} {pairs.txt}": r"line 2 has 2 tabs: the model takes two texts with one tab between them",
    "{model} {lines.txt} --batch-size 0": r"--batch-size: 0 is not a whole number from 1",
    "{model} {lines.txt} --device nosuch": r"--device nosuch: there is no such device; choose auto",
}


def arguments(yard: Path, command: str) -> list[str]:
    """The command line with {name} made a path of the yard."""
    return [re.sub(r"\{(.+?)\}", lambda match: str(yard / match[1]), word) for word in shlex.split(command)]


def with_the_rest(yard: Path, argv: list[str]) -> list[str]:
    """A model and data that are right, unless the case is about them."""
    for option, name in (("--model", "model"), ("--data", "good.csv")):
        argv = argv if option in argv else [option, str(yard / name), *argv]
    return argv


def assert_one_line(stderr: str, name: str, pattern: str) -> None:
    assert stderr.endswith("\n") and stderr.count("\n") == 1, stderr
    assert stderr.startswith(f"{name}: ") and re.search(pattern, stderr), stderr
    assert stderr[:-1].isprintable(), "a terminal obeys what it is sent"
    assert len(stderr) < 600, f"{len(stderr)} characters are not a line"


@pytest.mark.parametrize("command", TRAIN)
def test_every_bad_input_gives_one_line_and_exit_2(command, yard, train, monkeypatch, capfd):
    if command == "--device cuda" and torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    if command.startswith("--output /proc") and not Path("/proc/self").exists():
        pytest.skip("this system has no /proc, the one folder that root cannot write in")
    before = state_of(yard)
    monkeypatch.setattr(sys, "argv", ["train.py", *with_the_rest(yard, arguments(yard, command))])
    monkeypatch.setattr(accelerator.Accelerator, "prepare", lambda *args: pytest.fail("it began to train"))
    assert run_main("train.py", train.main) == 2
    assert_one_line(capfd.readouterr().err, "train.py", TRAIN[command])
    assert state_of(yard) == before


@pytest.mark.parametrize("command", PREDICT)
def test_every_bad_input_to_predict_gives_one_line_and_exit_2(command, yard, monkeypatch, capfd):
    before = state_of(yard)
    monkeypatch.setattr(sys, "argv", ["predict", *arguments(yard, command)])
    assert run_main("nanofinetune.predict", predict.main) == 2
    assert_one_line(capfd.readouterr().err, "nanofinetune.predict", PREDICT[command])
    assert state_of(yard) == before


def start(*argv: str, timeout: float = 120, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """A process in the repository's root; a variable that is given as "" is taken out of the environment."""
    changes = {name: value or None for name, value in environment.items()}
    return run_program(argv, env=changes, timeout=timeout, stdin=stdin)


@pytest.mark.parametrize("command", ["--lr -1", "--model {models/broken-weights}", "--data {quotes.csv}"])
def test_a_real_process_says_nothing_else(command, yard):
    done = start("train.py", *with_the_rest(yard, arguments(yard, command)))
    assert done.returncode == 2
    assert_one_line(done.stderr, "train.py", TRAIN[command])


def test_a_real_predict_process_says_nothing_else(yard):
    done = start("-m", "nanofinetune.predict", str(yard / "models" / "never-tuned"), str(yard / "lines.txt"))
    assert (done.returncode, done.stdout) == (2, "")
    assert_one_line(done.stderr, "nanofinetune.predict", "never fine-tuned")


@pytest.mark.parametrize("model_type", ["nosuchmodel", "vit"])
@pytest.mark.parametrize("program", ["train.py", "nanofinetune.predict"])
def test_a_yes_on_stdin_runs_no_code_of_the_model_folder(program, model_type, yard):
    """transformers asks on stdin whether to run it, and predict's texts are there: their first line was the answer."""
    before = state_of(yard)
    folder = str(yard / "models" / f"code-{model_type}")
    words = with_the_rest(yard, ["--model", folder]) if program == "train.py" else [folder]
    done = start(*(["train.py"] if program == "train.py" else ["-m", program]), *words, stdin="y\nthe cat\n")
    assert done.returncode == 2
    assert_one_line(done.stderr, program, "code of its own, which is never run here")
    assert state_of(yard) == before


def test_every_call_that_could_run_a_models_code_says_no():
    """from_pretrained and from_config ask on stdin where nothing is said: `from_config` of a config ran it once."""
    calls = []
    for path in sorted((ROOT / "nanofinetune").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr in ("from_pretrained", "from_config", "load_dataset", "pipeline"):
                said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                calls.append((path.name, node.func.attr, said.get("trust_remote_code")))
    assert len(calls) >= 4
    assert not [call for call in calls if call[1] != "load_dataset" and call[2] != "False"]


def test_the_code_of_a_data_folder_is_never_run(yard, tmp_path, train, monkeypatch, capfd):
    """`datasets` once ran a script named like its folder; 5.2 does not, and only files of data are given to it."""
    folder = tmp_path / "reviews"
    folder.mkdir()
    for name in ("train.csv", "validation.csv"):
        (folder / name).write_text(GOOD)
    for name in ("reviews.py", "train.py", "__init__.py", "dataset_infos.json", "train.pkl"):
        (folder / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    monkeypatch.setattr(sys, "argv", ["train.py", *with_the_rest(yard, ["--data", str(folder), "--dry-run"])])
    assert run_main("train.py", train.main) == 0
    assert not (tmp_path / "ran").exists() and "20 train" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", ["--model nobody/no-such-model", pytest.param("--data nobody/nothing", marks=pytest.mark.slow)]
)
def test_a_closed_port_for_a_hub_is_given_up_at_once(command, yard, tmp_path):
    """Without offline mode one connection is tried; the library retries for 23 seconds a file, with a line for each."""
    hub = {"HF_HUB_OFFLINE": "", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    proxies = dict.fromkeys(("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"), "")
    done = start("train.py", *with_the_rest(yard, arguments(yard, command)), **hub, **proxies, timeout=60)
    assert done.returncode == 2
    assert_one_line(done.stderr, "train.py", TRAIN[command])


def test_the_good_inputs_of_these_tests_are_good(yard, train, monkeypatch, capfd):
    """Else every case above might fail for the same reason: the same model and data train, and the result is a line."""
    before = state_of(yard)
    monkeypatch.setattr(sys, "argv", ["train.py", *with_the_rest(yard, ["--max-steps", "2", "--device", "cpu"])])
    assert run_main("train.py", train.main) == 0
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["steps"] == 2
    assert state_of(yard) == before


def test_the_plan_sends_nothing_to_the_terminal_but_text(yard, train, tmp_path, monkeypatch, capfd):
    """Names of files, columns and classes are a stranger's: none moves the cursor, clears the screen or ends a line."""
    import datasets

    features = datasets.Features(
        {"te\x1b[2Jxt": datasets.Value("string"), "label": datasets.ClassLabel(names=["go\nod", "b\x1b[31mad"])}
    )
    table = {"te\x1b[2Jxt": [f"the cat {i}" for i in range(20)], "label": [i % 2 for i in range(20)]}
    file = tmp_path / "re\x1b]0;views\x07.parquet"
    datasets.Dataset.from_dict(table, features).to_parquet(file)
    monkeypatch.setattr(sys, "argv", ["train.py", "--model", str(yard / "model"), "--data", str(file), "--dry-run"])
    assert run_main("train.py", train.main) == 0
    out = capfd.readouterr().out
    assert all(line.isprintable() for line in out.split("\n"))
    assert r"go\nod, b\x1b[31mad" in out and r"re\x1b]0;views\x07.parquet is one file" in out


def test_texts_beyond_the_models_limit_are_cut_and_the_plan_says_so(yard, train, tmp_path, monkeypatch, capfd):
    """3 of 18 rows have 80 words; the tiny model takes 64 tokens."""
    (tmp_path / "train.csv").write_text(
        lines(lambda i: " ".join(["the cat"] * (40 if i < 3 else 2)) + f",{i % 2}", "text,label")
    )
    (tmp_path / "validation.csv").write_text(GOOD)
    monkeypatch.setattr(sys, "argv", ["train.py", "--model", str(yard / "model"), "--data", str(tmp_path), "--dry-run"])
    assert run_main("train.py", train.main) == 0
    assert "3 rows fill the limit of 64 tokens" in capfd.readouterr().out
