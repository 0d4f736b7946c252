"""A training step captured as a CUDA graph, for each of a few padded lengths, beside the same step run eagerly.

    python bench/captured.py --device cuda --precision bf16

With 8 rows a large GPU finishes an eager BERT step before Python has launched all its kernels one by one. A graph
launches them all at once; in return every tensor has a fixed address and shape. So batches are padded to the next of a
few lengths (little, since LengthGroupedBatchSampler puts rows of similar length together), inputs are copied into
tensors that stay, and gradients are zeroed and added to in place, inside the graph, so that all graphs share them.
AdamW's step stays outside: fused it is a handful of kernels. A batch with fewer rows runs eagerly.

Never measured: no GPU was at hand. tests/bench/test_captured.py shows what a CPU can: buckets, bookkeeping, and, with a
graph that runs its function again in place of replaying kernels, the losses of an eager run bit for bit.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pieces import BATCH, LR, SEED, STEPS, Job, Row, interleave, machine, model_of

from nanofinetune.data.job import collate_to_fixed_length
from nanofinetune.data.pretrained import length_limit
from nanofinetune.ground.cli import Parser, number, run_main
from nanofinetune.ground.device import choose_device
from nanofinetune.ground.errors import UsageError
from nanofinetune.ground.precision import PRECISIONS
from nanofinetune.ground.xla import fixed_lengths
from nanofinetune.ranks.loader import prepare_data_loader
from nanofinetune.step.optim import AdamW
from nanofinetune.step.order import LengthGroupedBatchSampler

Replay = Callable[[], None]
Capture = Callable[[Callable[[], None]], Replay]  # records what a function does -> what does it again


def capture_on_cuda(function: Callable[[], None]) -> Replay:
    """The function's kernels as a CUDA graph. It must not ask the device for a value, and must write in place."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries choose their algorithms, and allocate, in the first runs
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


class CapturedStep:
    """Forward and backward of one batch, captured once for each shape.

    Call it with a batch on the device -> the loss, a scalar that the next call with this shape overwrites. Afterwards
    the gradients are in `.grad`; step the optimizer, and do not zero them. A batch that has not `rows` rows runs
    eagerly, and so does a new shape once there are `most_shapes`: each graph keeps its memory.
    """

    def __init__(
        self, model: nn.Module, rows: int, capture: Capture, precision: str = "no", most_shapes: int = 8
    ) -> None:
        self.model, self.rows, self.capture, self.most_shapes = model, rows, capture, most_shapes
        self.dtype = PRECISIONS[precision]
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.gradients = [torch.zeros_like(p) for p in self.parameters]  # all graphs add into these, at their addresses
        for p, gradient in zip(self.parameters, self.gradients, strict=True):
            p.grad = gradient
        self.graphs: dict[tuple[int, ...], tuple[dict[str, Tensor], Tensor, Replay]] = {}
        self.eager = 0  # batches that no graph was used for

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        shape = tuple(batch["input_ids"].shape)
        if shape not in self.graphs and (shape[0] != self.rows or len(self.graphs) == self.most_shapes):
            self.eager += 1
            loss = torch.zeros((), device=batch["input_ids"].device)
            self._compute(batch, loss)
            return loss
        if shape not in self.graphs:
            self.graphs[shape] = self._record(batch)
        inputs, loss, replay = self.graphs[shape]
        if batch.keys() != inputs.keys():
            raise ValueError(f"the batch has {sorted(batch)}, and was captured with {sorted(inputs)}")
        for name, tensor in batch.items():
            inputs[name].copy_(tensor, non_blocking=True)
        replay()
        return loss

    def _record(self, batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor, Replay]:
        inputs = {name: tensor.clone() for name, tensor in batch.items()}
        loss = torch.zeros((), device=batch["input_ids"].device)
        return inputs, loss, self.capture(lambda: self._compute(inputs, loss))

    def _compute(self, inputs: Mapping[str, Tensor], loss: Tensor) -> None:
        """Gradients of one batch into `.grad`, its loss into `loss`."""
        torch._foreach_zero_(self.gradients)
        precision: AbstractContextManager[Any] = nullcontext()
        if self.dtype is not None:  # its cache of cast weights would outlive the capture
            precision = torch.autocast(loss.device.type, self.dtype, cache_enabled=False)
        with precision:
            found = self.model(**inputs).loss
        found.backward()
        loss.copy_(found.detach())


def batches(job: Job, device: torch.device, lengths: tuple[int, ...] | None = None) -> Iterator[Any]:
    """Endless batches of rows of similar length, padded to a bucket, pinned and copied ahead of the computation."""
    tokenizer = job.tokenizer()
    store = job.our_data()["train"]
    lengths = lengths or buckets(store.lengths.tolist(), length_limit(job.model, tokenizer))
    loader: Any = DataLoader(
        store, batch_sampler=LengthGroupedBatchSampler(store.lengths, BATCH, SEED),
        collate_fn=partial(collate_to_fixed_length, tokenizer, lengths),
    )  # fmt: skip
    loader = prepare_data_loader(loader, device, put_on_device=True, non_blocking=device.type == "cuda")
    while True:
        yield from loader


def buckets(lengths: list[int], limit: int, most: int = 8) -> tuple[int, ...]:
    """At most so many lengths to pad to, multiples of 8, which tensor cores like, with equally many rows in each.

    The last one is that of the longest row. Without rows, the powers of two of ground/xla.py::fixed_lengths.

    >>> buckets([5, 6, 7, 20, 21, 40], limit=512, most=3)
    (8, 24, 40)
    """
    if not lengths:
        return fixed_lengths(limit)
    ordered = sorted(lengths)
    ends = [ordered[(i + 1) * len(ordered) // most - 1] for i in range(most) if (i + 1) * len(ordered) // most]
    return tuple(sorted({min(limit, -(-length // 8) * 8) for length in ends}))


def main() -> None:
    parser = Parser(prog="captured.py", description=__doc__)
    add = parser.add_argument
    add("--model", metavar="DIR", help="a folder or a name on the Hub (default: the packaged checkpoint)")
    add("--data", metavar="DIR", default="stdlib-pairs", help="what train.py takes (default stdlib-pairs)")
    add("--device", default="cuda", help="cuda or cuda:N (default cuda)")
    add("--precision", choices=("no", "bf16"), default="bf16", help="no is fp32, TF32 where allowed (default bf16)")
    add("--repeats", metavar="N", type=number(int, 5), default=9, help="turns that count (default 9)")
    args = parser.parse_args()
    device = choose_device(args.device)
    if device.type != "cuda":
        raise UsageError(f"--device {args.device}: only CUDA has graphs; choose cuda")
    job = Job(model_of(args.model), args.data)
    job.check()

    def side(capture: bool) -> Callable[[], float]:
        classifier = job.classifier().to(device).train()
        optimizer = AdamW(classifier.parameters(), lr=LR)
        step = CapturedStep(classifier, BATCH, capture_on_cuda, args.precision, most_shapes=8 if capture else 0)
        endless = batches(job, device)

        def turn() -> float:
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            for _ in range(STEPS * 10):  # the first turn captures, and does not count
                step(next(endless))
                optimizer.step()
            ended.record()
            ended.synchronize()
            return began.elapsed_time(ended) / (STEPS * 10)

        return turn

    turns = interleave(side(False), side(True), args.repeats)
    row = Row("captured", f"training step, {BATCH} rows, {args.precision}", turns)
    print(row.line())
    here = machine() | {"gpu": torch.cuda.get_device_name(device)}
    print(json.dumps({"machine": here, "rows": [row.record()]}))


if __name__ == "__main__":
    sys.exit(run_main("captured.py", main))
