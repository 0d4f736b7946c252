"""An embedding whose gradient costs what the batch's rows cost, and not what the whole table costs.

>>> table = Embedding(1000, 2)
>>> table(torch.tensor([[7, 7, 9]])).sum().backward()
>>> table.weight.grad[7], int(table.weight.grad.count_nonzero())
(tensor([2., 2.]), 4)

Underneath: `torch.ops.aten.embedding_dense_backward` (torch 2.13), the backward of `torch.nn.functional.embedding`
  - fills a new table with zeros, 30,522 rows for BERT, and adds the batch's few hundred;
  - here one table of zeros is kept: each backward clears the rows of the last one and writes its own;
  - kept: a dense gradient, bit for bit torch's, that any optimizer and DDP take;
  - not allowed: writing into `weight.grad.data` or `weight.grad.numpy()`, which autograd does not see.

Proof: test_gradients_match_torch_embedding, test_what_others_write_into_the_gradient_does_not_stay in
tests/cpu/test_embedding.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanofinetune.cpu.dropout import recorded
from nanofinetune.ranks.ddp import OWNER, holders


class ZeroTable:
    """Reused memory for a gradient of the weight's shape: zero, except in the rows of the last batch."""

    def __init__(self) -> None:
        self.table: Tensor | None = None
        self.rows: Tensor | None = None  # (rows,) int64: those that may not be zero
        self.version = 0  # of the table when it was handed out: autograd counts the writes since

    def in_use(self) -> bool:
        """Whether the last gradient is alive, in `.grad` or elsewhere."""
        return self.table is not None and holders(self.table) > 1

    def holds(self, gradient: Tensor) -> bool:
        """Whether the gradient lies in the table."""
        return self.table is not None and self.table.data_ptr() == gradient.data_ptr()

    def __reduce__(self) -> tuple[type[ZeroTable], tuple[()]]:
        return ZeroTable, ()  # a copied or saved model starts without a table

    def with_rows(self, weight: Tensor, rows: Tensor, values: Tensor) -> Tensor:
        """A gradient for the weight: `values` (rows, width) in these rows, zero in all others."""
        table = self.table
        if table is None or (table.shape, table.dtype) != (weight.shape, weight.dtype):
            self.table = table = torch.zeros_like(weight, memory_format=torch.contiguous_format)
        elif table._version != self.version:  # someone wrote into it (aliases share the counter)
            table.zero_()
        elif self.rows is not None:
            table.index_fill_(0, self.rows, 0)
        table.index_copy_(0, rows, values)
        self.rows, self.version = rows, table._version
        # underneath: AccumulateGrad keeps a gradient that nobody else holds, without a copy; an alias counts as one
        return table.detach()


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding_idx: int, memory: ZeroTable) -> Tensor:
        ctx.save_for_backward(weight, ids)
        ctx.padding_idx, ctx.memory = padding_idx, memory
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        weight, ids = ctx.saved_tensors
        backward = torch.ops.aten.embedding_dense_backward
        # With create_graph=True, gradient mode is on here: someone may differentiate again.
        if torch.is_grad_enabled() or ctx.memory.in_use():
            return backward(gradients[0], ids, len(weight), ctx.padding_idx, False), None, None, None
        rows, places = torch.unique(ids.long(), return_inverse=True)
        values = backward(gradients[0], places, len(rows), -1, False)  # (rows, width), added in torch's order
        values[rows == ctx.padding_idx] = 0
        return ctx.memory.with_rows(weight, rows, values), None, None, None


class Embedding(nn.Embedding):
    """torch.nn.Embedding, with this module's gradient where the table is on a CPU and much larger than the batch.

    With `max_norm`, `scale_grad_by_freq` or `sparse`, or where torch records operations, the gradient is torch's own.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.memory = ZeroTable()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        small = self.num_embeddings < 4 * input.numel()  # then zeros cost less than finding the rows
        options = self.max_norm is not None or self.scale_grad_by_freq or self.sparse
        if small or options or self.weight.device.type != "cpu" or recorded(self.weight):
            return super().forward(input)
        setattr(self.weight, OWNER, self.memory)  # in every forward, since a copied parameter has lost it
        padding_idx = -1 if self.padding_idx is None else self.padding_idx
        return _Lookup.apply(self.weight, input, padding_idx, self.memory)


def use_row_gradients(model: nn.Module) -> None:
    """Replace each torch.nn.Embedding of a model by Embedding, in place; the Parameters stay the same objects."""
    for module in model.modules():
        if type(module) is nn.Embedding:
            module.__class__ = Embedding  # keeps weight, hooks and mode, and references to the module stay valid
            module.memory = ZeroTable()  # type: ignore[assignment]
