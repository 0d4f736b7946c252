"""Refuse a model whose config asks for more than its weights can hold, before it costs memory or time.

>>> check_counts("mine", {"model_type": "bert", "num_hidden_layers": 10**7})
Traceback (most recent call last):
nanofinetune.ground.errors.UsageError: model mine: its config has num_hidden_layers 10000000, and the most is 1,000; ...
>>> with built_within("mine", lambda: 100), torch.device("meta"):
...     _ = torch.nn.Linear(10**6, 10**6)
Traceback (most recent call last):
nanofinetune.ground.errors.UsageError: model mine: its config asks for over 67,108,964 numbers, more than its ...

Underneath: `transformers.PreTrainedConfig`, `transformers.PreTrainedModel` (5.23)
  - A config makes lists of its layers and labels, as many as it says. `from_pretrained` builds all layers, without
    their numbers (torch's meta device), and only then compares them with the file.
  - Here counts have a limit each. What the model registers while it is built is added up, and ends it where it exceeds
    the file's bytes: a number takes one or more.

Proof: test_a_config_that_asks_for_too_much_is_refused, test_every_kind_of_model_is_built_within_its_file in
tests/data/test_limits.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules import module as registrations

from nanofinetune.ground.errors import UsageError

MOST_LAYERS = 1_000
MOST_LABELS = 100_000
MOST_MODULES = 100_000  # building them takes some seconds
NEW = 2**26  # numbers that need not be in the file: a new head, a pooler, masks


def check_counts(name: str, config: Mapping[str, Any]) -> None:
    """Look at a config.json, as it was read, before transformers does.

    Raises:
        UsageError: more layers or labels than anything has, or a number of them that is none.
    """
    for key, value in config.items():
        if isinstance(value, Mapping):  # of a model in the model
            check_counts(name, value)
            continue
        most = MOST_LABELS if key == "num_labels" else MOST_LAYERS if key.endswith(("layer", "layers")) else None
        if most is None and not key.endswith(("heads", "_head")):
            continue
        counts = key.startswith(("num_", "n_", "encoder_", "decoder_"))  # others number one layer: -2, "last"
        least = 1 if key in ("num_labels", "num_hidden_layers", "num_layers", "n_layers", "n_layer") else 0
        if counts and (isinstance(value, str) or (isinstance(value, (int, float)) and value < least)):
            raise UsageError(
                f"model {name}: its config has {key} {value!r}, which is no count; correct its config.json"
            )
        if most is not None and isinstance(value, (int, float)) and value > most:
            raise UsageError(
                f"model {name}: its config has {key} {value}, and the most is {most:,}; correct its config.json"
            )


@contextmanager
def built_within(name: str, size: Callable[[], int], device: str = "meta") -> Iterator[None]:
    """A `with` block in which no model is built that has more numbers than its weights file has bytes, and `NEW` more.

    Args:
        size: the bytes of the file, asked for at the first parameter: by then it has been downloaded.
        device: whose tensors count. transformers builds on meta; what it reads from the file takes their place.

    Raises:
        UsageError: from within the model's own constructor.
    """
    numbers, modules, most = 0, 0, -1

    def count(_: torch.nn.Module, __: str, tensor: torch.Tensor | None) -> None:
        nonlocal numbers, most
        if tensor is None or tensor.device.type != device:
            return
        most = size() + NEW if most < 0 else most
        numbers += tensor.numel()
        if numbers > most:
            why = f"asks for over {most:,} numbers, more than its weights can hold"
            raise UsageError(f"model {name}: its config {why}; name a model and weights that belong together")

    def count_module(*_: Any) -> None:
        nonlocal modules
        modules += 1
        if modules > MOST_MODULES:
            raise UsageError(f"model {name}: its config asks for over {MOST_MODULES:,} modules, the most that is built")

    hooks = [
        registrations.register_module_parameter_registration_hook(count),
        registrations.register_module_buffer_registration_hook(count),
        registrations.register_module_module_registration_hook(count_module),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
