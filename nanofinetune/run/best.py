"""Which epoch's model is kept, and when there is no use in going on: --keep-best and --patience.

>>> found = [{"epoch": 1, "f1": 0.5}, {"epoch": 2, "f1": 0.7}, {"epoch": 3, "f1": None}, {"epoch": 4, "f1": 0.7}]
>>> best(found, "f1")["epoch"], waited(found, "f1")  # the first of equals; two epochs have passed since
(2, 2)

Underneath: `transformers.TrainingArguments` with `load_best_model_at_end`, and `transformers.EarlyStoppingCallback`
(transformers 5.23)
  - write a checkpoint at each evaluation, and look up the best one's folder at the end; a resumed run of another folder
    does not find it.
  - Here the best weights are a copy in memory, saved with each checkpoint. All else follows from the evaluations, which
    are saved as well, and are the same on all ranks.

Proof: test_the_saved_model_is_the_best_epochs, test_a_resumed_run_keeps_the_best_of_before in tests/run/test_best.py.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from nanofinetune.ground.cli import MOST, number
from nanofinetune.ground.errors import UsageError
from nanofinetune.ground.xla import state_on_host
from nanofinetune.run import schema


def best(evaluations: Sequence[Mapping[str, Any]], metric: str) -> Mapping[str, Any]:
    """The first evaluation in which the metric is greatest; one without a value is the least."""
    return max(evaluations, key=lambda found: -math.inf if found[metric] is None else found[metric])


def waited(evaluations: Sequence[Mapping[str, Any]], metric: str) -> int:
    """How many epochs have passed since the best one."""
    return len(evaluations) - best(evaluations, metric)["epoch"]


def best_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say which epoch's model is saved, and when a run is over."""
    add = parser.add_argument_group("which epoch").add_argument
    add(
        "--keep-best", metavar="METRIC", nargs="?", const="",
        help="save the model of the epoch with the greatest METRIC (default: the task's first; off: the last epoch's)",
    )  # fmt: skip
    add(
        "--patience", metavar="EPOCHS", type=number(int, 1, MOST),
        help="stop when so many epochs have brought nothing better (default: never)",
    )  # fmt: skip


def check_metric(args: Any, metrics: Sequence[str], classes: Any) -> None:
    """Raises UsageError if --keep-best names what no evaluation computes. `classes`: None where there are numbers."""
    known = [*metrics, *(["macro_f1"] if classes is not None else [])]
    if args.keep_best and args.keep_best not in known:
        raise UsageError(f"--keep-best {args.keep_best}: there is no such metric here; choose {' or '.join(known)}")


class Best:
    """The weights of the best epoch so far, on rank 0, where --keep-best asks for them.

    Args:
        args: the command line, of which keep_best and patience are read.
        model: unwrapped; its weights are copied, and in the end replaced.
        keeps: whether this rank keeps them.
        answers: run/answers.py's Answers, of the latest evaluation; in the end those of the best epoch.
    """

    def __init__(self, args: Any, model: Any, keeps: bool, answers: Any = None) -> None:
        self.args, self.model, self.keeps, self.answers = args, model, keeps, answers
        self.wanted = args.keep_best is not None
        self.epoch = 0  # of the weights; 0: none yet
        self.logits: torch.Tensor | None = None
        self.weights: dict[str, torch.Tensor] = {}

    def metric(self, evaluations: Sequence[Mapping[str, Any]]) -> str:
        """By what epochs are compared, greater being better: what --keep-best names, or the task's first metric."""
        return self.args.keep_best or next((name for name in evaluations[0] if name not in ("epoch", "loss")), "loss")

    def end_epoch(self, evaluations: Sequence[Mapping[str, Any]]) -> None:
        """Copy the weights if the latest evaluation is the best one."""
        if self.wanted and waited(evaluations, self.metric(evaluations)) == 0:
            self.epoch = len(evaluations)
            if self.keeps:
                self.weights = {name: tensor.clone() for name, tensor in state_on_host(self.model).items()}
                self.logits = None if self.answers is None else self.answers.logits

    def is_over(self, evaluations: Sequence[Mapping[str, Any]]) -> bool:
        """Whether --patience has run out."""
        patience = self.args.patience
        return bool(patience and evaluations) and waited(evaluations, self.metric(evaluations)) >= patience

    def take(self) -> None:
        """Give the model the best epoch's weights, on the rank that has them."""
        if self.weights:
            self.model.load_state_dict(self.weights)
            if self.answers is not None:
                self.answers.logits = self.logits

    def saved(self, evaluations: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], str]:
        """The evaluation of the model that is saved, and a line that says which one that is."""
        metric = self.metric(evaluations)
        top, last = best(evaluations, metric), evaluations[-1]
        if self.wanted:
            return top, f"epoch {top['epoch']} of {last['epoch']}, the best by {metric}"
        hint = "" if top is last else f"; {metric} was best in epoch {top['epoch']}, which --keep-best saves"
        return last, f"epoch {last['epoch']}, the last{hint}"

    def state_dict(self) -> dict[str, Any]:
        kept = {} if self.logits is None else {"logits": self.logits}
        return {"epoch": self.epoch, "weights": self.weights, **kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch, self.weights = state["epoch"], dict(state["weights"]) if self.keeps else {}
        self.logits = state.get("logits") if self.keeps else None

    def misfit(self, state: Mapping[str, Any]) -> str:
        """Why a state cannot be one of these, "" if it can."""
        if {*state, "logits"} != {"epoch", "weights", "logits"} or not schema.whole(state["epoch"], high=MOST):
            return "it is not what --keep-best saves"
        if (state["epoch"] > 0) != bool(state["weights"]):
            return f"its epoch is {state['epoch']}, and it has {len(state['weights'])} weights"
        if "logits" in state and self.answers is not None and (reason := self.answers.misfit(state["logits"])):
            return f"the best epoch's {reason}"
        reason = schema.misfit("model", self.model, state["weights"]) if state["epoch"] else ""
        return f"the best epoch's {reason}" if reason else ""
