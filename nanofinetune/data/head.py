"""A head that was trained before, for the classes of this data: by their names, not by their numbers.

>>> model = SimpleNamespace(base_model_prefix="bert", config=SimpleNamespace(num_labels=2))
>>> model.named_modules = lambda: [("classifier", torch.nn.Linear(1, 2, bias=False))]
>>> with torch.no_grad():
...     _ = last_layer(model)[1].weight.copy_(torch.tensor([[1.0], [2.0]]))
>>> rows_of(["yes", "no"], ["no", "yes"])  # row 1 of the head is the class that the data count as 0
[1, 0]

Underneath: `transformers.PreTrainedModel.from_pretrained` (transformers 5.23)
  - with `num_labels` and `id2label` keeps a head of the right size and writes the new names over its own: a head for
    (no, yes) trained on (yes, no) begins with every answer wrong.
  - Here rows are put into the data's order. For other names the last layer is made anew; without names it stays, and a
    note says so.

Proof: test_a_head_for_the_same_names_is_put_into_their_order, test_a_head_for_other_names_is_made_anew in
tests/data/test_head.py.
"""

from __future__ import annotations

from types import SimpleNamespace  # noqa: F401 (the example above)
from typing import Any

import torch


def names_of(config: Any) -> list[str] | None:
    """The names of the classes of a config; None where nobody has named them (LABEL_0, LABEL_1, ...)."""
    names = [str(config.id2label[i]) for i in sorted(config.id2label)]
    return None if names == [f"LABEL_{i}" for i in range(len(names))] else names


def rows_of(own: list[str], wanted: list[str]) -> list[int] | None:
    """Which row of the head is which class of the data, whatever its capitals; None where the names are others."""
    place = {name.casefold(): i for i, name in enumerate(own)}
    folded = [name.casefold() for name in wanted]
    same = len(place) == len(own) and len(set(folded)) == len(folded) and set(folded) == set(place)
    return [place[name] for name in folded] if same else None


def last_layer(model: Any) -> tuple[str, torch.nn.Linear] | None:
    """The layer behind the encoder that has an output for each class, with its name."""
    linear = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module.out_features == model.config.num_labels
    ]
    return next((found for found in reversed(linear) if not found[0].startswith(model.base_model_prefix + ".")), None)


def match_head(model: Any, own: list[str] | None, wanted: list[str], notes: list[str]) -> list[str]:
    """Make a trained head, of as many classes as the data have, one for `wanted` -> the parameters that are new.

    `own`: the names that it was trained for. `notes` gets a line where it is changed, or kept by number.
    """
    layer = last_layer(model)
    if own == wanted or layer is None or (own is None and wanted == [str(i) for i in range(len(wanted))]):
        return []  # the same names; or neither has any, and both count from 0
    name, linear = layer
    if own is None:
        ours = ", ".join(wanted[:6])
        notes.append(f"the model's head is kept, and its classes have no names: they are taken for {ours}, by number")
        return []
    rows = rows_of(own, wanted)
    if rows is None:
        for parameter in linear.parameters():
            parameter._is_hf_initialized = False  # underneath: what was loaded has this mark, and is passed over
        model._init_weights(linear)  # as transformers makes a new one
        notes.append(f"the model's head is for other classes ({', '.join(own[:6])}): its last layer is made anew")
        return sorted(f"{name}.{parameter}" for parameter, _ in linear.named_parameters())
    if rows != list(range(len(rows))):
        with torch.no_grad():
            for parameter in linear.parameters():
                parameter.copy_(parameter[rows].clone())
        notes.append(
            f"the model's head has the data's classes in another order ({', '.join(own[:6])}): put into theirs"
        )
    return []
