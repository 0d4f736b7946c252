"""An embedding whose gradient costs what the batch's rows cost, and not what the whole table costs.

>>> table = Embedding(1000, 2)
>>> table(torch.tensor([[7, 7, 9]])).sum().backward()
>>> table.weight.grad[7], int(table.weight.grad.count_nonzero())
(tensor([2., 2.]), 4)

Underneath: the backward of `torch.nn.functional.embedding` is `torch.ops.aten.embedding_dense_backward` (torch 2.13),
which allocates a tensor of the table's size, fills it with zeros and adds the few rows of the batch: of the 30,522
rows of BERT's vocabulary a batch of 8 pairs has some 250. `torch.nn.Embedding(sparse=True)` avoids that with sparse
gradients, which neither `torch.optim.AdamW` nor DistributedDataParallel takes. Here the gradient is a dense tensor too,
bit for bit torch's, but its memory is kept: a table of zeros in which each backward clears the rows of the one before
and writes its own. Autograd makes such a tensor `.grad` without a copy. The table is lent only while nobody else
holds the last gradient (during accumulation `.grad` does), and it is cleared as a whole if anyone has written into it
meanwhile, as clipping does, and our DDP, which reduces a large gradient where it lies. What autograd does not count it
cannot see: an optimizer must not write into `weight.grad.data` or `weight.grad.numpy()`, nor a collective alone.

Proof: test_gradients_match_torch_embedding, test_training_matches_torch_embedding,
test_two_ranks_match_torch_embedding, test_a_gradient_that_is_kept_stays_as_it_is,
test_what_others_write_into_the_gradient_does_not_stay and test_the_table_is_used_again in tests/test_embedding.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanofinetune.ranks.ddp import OWNER, holders


class ZeroTable:
    """Memory of a gradient of the weight's shape, zero but for the rows of the last one."""

    def __init__(self) -> None:
        self.table: Tensor | None = None
        self.rows: Tensor | None = None  # (rows,) int64, those that are not zero
        self.version = 0  # of the table when it was lent

    def is_lent(self) -> bool:
        """Whether the last gradient is alive, in `.grad` or elsewhere."""
        return self.table is not None and holders(self.table) > 1

    def holds(self, gradient: Tensor) -> bool:
        """Whether the gradient lies in the table."""
        return self.table is not None and self.table.data_ptr() == gradient.data_ptr()

    def __reduce__(self) -> tuple[type[ZeroTable], tuple[()]]:
        return ZeroTable, ()  # a copy, or a saved model, begins with no memory

    def with_rows(self, weight: Tensor, rows: Tensor, values: Tensor) -> Tensor:
        """A gradient of the weight: `values` (rows, width) in these rows, zero in all others."""
        table = self.table
        if table is None or (table.shape, table.dtype) != (weight.shape, weight.dtype):
            self.table = table = torch.zeros_like(weight, memory_format=torch.contiguous_format)
        elif table._version != self.version:  # aliases share the counter of what is written in place
            table.zero_()
        elif self.rows is not None:
            table.index_fill_(0, self.rows, 0)
        table.index_copy_(0, rows, values)
        self.rows, self.version = rows, table._version
        # underneath: AccumulateGrad takes over a gradient that nobody else holds: an alias of the table is such a one
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
        if torch.is_grad_enabled() or ctx.memory.is_lent():
            return backward(gradients[0], ids, len(weight), ctx.padding_idx, False), None, None, None
        rows, places = torch.unique(ids.long(), return_inverse=True)
        values = backward(gradients[0], places, len(rows), -1, False)  # (rows, width): adds in the same order
        values[rows == ctx.padding_idx] = 0
        return ctx.memory.with_rows(weight, rows, values), None, None, None


class Embedding(nn.Embedding):
    """torch.nn.Embedding, with this module's gradient where the table is on a CPU and much larger than the batch.

    `max_norm`, `scale_grad_by_freq` and `sparse` are torch's own, gradient included.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.memory = ZeroTable()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        small = self.num_embeddings < 4 * input.numel()  # zeros cost less than to look which rows there are
        options = self.max_norm is not None or self.scale_grad_by_freq or self.sparse
        if small or options or self.weight.device.type != "cpu":
            return super().forward(input)
        setattr(self.weight, OWNER, self.memory)  # in every forward: a copied parameter has lost it
        padding_idx = -1 if self.padding_idx is None else self.padding_idx
        return _Lookup.apply(self.weight, input, padding_idx, self.memory)


def use_row_gradients(model: nn.Module) -> None:
    """Replace each torch.nn.Embedding of a model by Embedding, in place; the weights are the same Parameters."""
    for module in model.modules():
        if type(module) is nn.Embedding:
            module.__class__ = Embedding  # keeps weight, hooks and mode, and whoever holds the module
            module.memory = ZeroTable()  # type: ignore[assignment]
