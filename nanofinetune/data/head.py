"""Fit the head of a model that was fine-tuned before to the names of the data's classes.

>>> order_of(["no", "YES", "maybe"], ["maybe", "no", "yes"]), order_of(["LABEL_0", "LABEL_1"], ["bad", "good"])
([2, 0, 1], None)

Underneath: `transformers.AutoModelForSequenceClassification` (transformers 5.23): `from_pretrained`
  - takes any head of the right size, and writes the new names over the old ones: row k of the head is then another
    class than it has learned;
  - here rows are put in order by name; where the names are others the head is made anew, and both are said;
  - a head without names of its own (LABEL_0 ...) is kept, and that is said too.

Proof: test_a_head_is_put_in_the_order_of_the_datas_names, test_a_head_of_other_names_is_made_anew in
tests/data/test_head.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def order_of(old: Sequence[str], new: Sequence[str]) -> list[int] | None:
    """Where each new class stands among the old ones, capitals or not; None where the names are not the same ones."""
    places = {name.casefold(): i for i, name in enumerate(old)}
    order = [places.get(name.casefold(), -1) for name in new]
    return order if sorted(order) == list(range(len(old))) else None


def fit_head(model: Any, made_anew: list[str], old: Sequence[str], new: Sequence[str] | None) -> tuple[list[str], str]:
    """Put the rows of a loaded head in the new order, or make them anew -> (all parameters made anew, a note).

    Args:
        model: in whose head the names were replaced.
        made_anew: names of its parameters that were not loaded. If the head's are among them there is nothing to do.
        old: the names that its classes had, in order.
        new: those of the data; None for a regression.
    """
    layer, name = _last_layer(model, len(old))
    if layer is None or new is None or len(old) != len(new) or f"{name}.weight" in made_anew:
        return made_anew, ""
    order = order_of(old, new)
    if order == list(range(len(old))):
        return made_anew, ""
    if order is not None:
        with torch.no_grad():
            for parameter in layer.parameters():  # weight (classes, width), bias (classes,)
                parameter.copy_(parameter[order].clone())
        return made_anew, f"the model's classes {_listed(old)} are put in the data's order: {_listed(new)}"
    if all(re.fullmatch(r"LABEL_\d+", text) for text in old):
        if list(new) == [str(k) for k in range(len(new))]:
            return made_anew, ""  # neither has names, and both count from 0
        return made_anew, f"the model's classes had no names, and are taken for {_listed(new)} in this order"
    anew = [f"{name}.{part}" for part, _ in layer.named_parameters()]
    for parameter in layer.parameters():
        vars(parameter)["_is_hf_initialized"] = False  # underneath: what was loaded has this mark, and is passed over
    model._init_weights(layer)  # as transformers makes a new one
    note = f"the model's head is made anew: its classes were {_listed(old)}, and the data's are {_listed(new)}"
    return sorted({*made_anew, *anew}), note


def _last_layer(model: Any, classes: int) -> tuple[nn.Linear | None, str]:
    """The last linear layer outside of the encoder, if it has one output a class, and its name."""
    found: tuple[nn.Linear | None, str] = (None, "")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.startswith(f"{model.base_model_prefix}."):
            found = module, name
    return found if found[0] is not None and found[0].out_features == classes else (None, "")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (" ..." if len(names) > 6 else "")
