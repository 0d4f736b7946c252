"""Before the first update: one forward and backward of the longest batch, so that what cannot work fails at once.

>>> longest(np.array([3, 9, 4, 9]), rows=2).tolist()
[1, 3]

Underneath: `transformers.Trainer.train` (transformers 5.23) meets a row whose tokens the model does not have, a batch
that memory does not hold, and a config that cannot be saved where they come: in the middle, or after the end.
  - Here each is one line, on all ranks, before any work.
  - The run stays what it would have been: random states and buffers are put back, gradients are dropped, and no
    optimizer has seen them.
  - Memory for one row is enough, since a run makes its batches smaller.

Proof: test_a_trial_changes_no_bit_of_the_run, test_what_fails_in_the_trial_is_one_line in tests/run/test_trial.py.
"""

from __future__ import annotations

import random
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from nanofinetune.data.job import Job
from nanofinetune.ground.errors import UsageError, first_line
from nanofinetune.ground.progress import plural
from nanofinetune.ranks.collectives import gather_object
from nanofinetune.run.run import out_of_memory


def longest(lengths: Any, rows: int) -> Any:
    """The numbers of the `rows` longest rows, in tokens; the first ones of equal length."""
    return np.argsort(-lengths, kind="stable")[:rows]


def trial(accelerator: Any, job: Job, rows_per_step: int) -> None:
    """Try the model of `job` on this rank's share of a step, of the longest rows. Before `prepare`; a collective.

    Raises UsageError on all ranks if it fails on one.
    """
    reason = misfit(job) or _unsaved(job)
    if not reason and accelerator.device.type != "xla":  # there a length is a program more to compile
        with unchanged(job.model, accelerator.device):
            for rows in dict.fromkeys((-(-rows_per_step // accelerator.num_processes), 1)):
                reason, smaller = _train_once(accelerator, job, rows)
                if not smaller:
                    break
    for rank, why in enumerate(gather_object([reason], accelerator.world)):
        if why:
            where = "" if accelerator.num_processes == 1 else f" (rank {rank})"
            raise UsageError(f"model {job.model_name}: {why}{where}")


def misfit(job: Job) -> str:
    """Why the tokens of the data cannot be the model's, "" if they can."""
    sizes = {"input_ids": getattr(job.model.get_input_embeddings(), "num_embeddings", None)}
    sizes["token_type_ids"] = getattr(job.model.config, "type_vocab_size", None) or None
    for split, store in (("train", job.train), *job.validation.items()):
        for name, size in sizes.items():
            flat = store.ragged[name][0] if name in store.ragged else np.zeros(0)
            if size is not None and len(flat) and flat.max() >= size:
                return (
                    f"its tokenizer gives {name} up to {flat.max():,} ({split}), and the table has {size:,} rows;"
                    " save a model and a tokenizer that belong together"
                )
    return ""


@contextmanager
def unchanged(model: Any, device: torch.device) -> Iterator[None]:
    """A `with` block after which random states, buffers and mode are what they were, and there are no gradients."""
    training, buffers = model.training, {name: buffer.clone() for name, buffer in model.named_buffers()}
    states = random.getstate(), np.random.get_state()
    devices = [] if device.type == "cpu" else [device]
    try:
        with torch.random.fork_rng(devices=devices, device_type="cuda" if not devices else device.type):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        model.train(training)
        for parameter in model.parameters():
            parameter.grad = None
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])


def _train_once(accelerator: Any, job: Job, rows: int) -> tuple[str, bool]:
    """Forward and backward of the longest `rows` rows -> (what went wrong, whether fewer rows may help)."""
    chosen = longest(job.train.lengths, rows).tolist()
    tokens = int(job.train.lengths[chosen[0]])
    try:
        model = job.model.to(accelerator.device).train()
        batch = job.collator(job.train.__getitems__(chosen)).to(accelerator.device)
        with accelerator.autocast():
            output = model(**batch)
        if not isinstance(getattr(output, "loss", None), torch.Tensor):
            return "it computes no loss from labels; choose a model for classification", False
        output.loss.backward()
        return "", False
    except Exception as error:
        if not out_of_memory(error):
            what = f"{plural(len(chosen), 'row')} of up to {plural(tokens, 'token')}"
            why = f"{type(error).__name__}: {first_line(error)}"
            return f"it cannot be trained on {what} ({why}); choose another model, or another --max-length", False
        traceback.clear_frames(error.__traceback__)  # whose variables hold the activations
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return f"out of memory with one row of {tokens} tokens; choose a smaller --max-length, or a smaller model", True


def _unsaved(job: Job) -> str:
    """Why the model's config cannot be saved, "" if it can."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            job.model.config.save_pretrained(folder)
    except OSError:  # the disk's fault, not the model's
        return ""
    except Exception as error:
        return f"its config cannot be saved ({first_line(error)}); correct its config.json"
    return ""
