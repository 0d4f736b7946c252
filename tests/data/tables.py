"""Tables for the tests of data/: random rows, and a file of each kind that holds them."""

import json
from pathlib import Path

import numpy as np
from conftest import WORDS


def rows(n: int, seed: int = 0, pair: bool = True) -> list[dict]:
    """n rows of random words, labels 0 and 1."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(n):
        texts = {
            name: " ".join(rng.choice(WORDS, rng.integers(1, 12))) for name in ("sentence1", "sentence2")[: 1 + pair]
        }
        made.append({**texts, "label": int(i % 2), "idx": i})
    return made


def write(folder: Path, kind: str, split: str, content: list[dict]) -> None:
    import datasets

    table = datasets.Dataset.from_list(content)
    path = folder / f"{split}.{kind}"
    with path.open("wb") as file:  # given a name, the library takes it as an address
        if kind in ("csv", "tsv"):
            table.to_csv(file, sep="\t" if kind == "tsv" else ",")
        elif kind == "parquet":
            table.to_parquet(file)
        else:
            file.write("".join(json.dumps(row) + "\n" for row in content).encode())
