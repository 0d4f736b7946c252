"""The rest of torch's DistributedDataParallel: uneven inputs, hooks for buffers, names that libraries reach for.

>>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
>>> model = DistributedDataParallel(nn.Linear(2, 1))
>>> with model.join():  # ranks may have different numbers of batches in this block
...     model(torch.ones(3, 2)).sum().backward()
>>> model.module.weight.grad
tensor([[3., 3.]])
>>> dist.destroy_process_group()

Underneath: `torch.nn.parallel.DistributedDataParallel`, `torch.distributed.algorithms.Join` (torch 2.13).
  - A rank without batches shadows the others' collectives, with zeros. Kept.
  - A hook for buffers stands in for the broadcast. Kept; not inside `join`.
  - A backward that comes from elsewhere, between a forward and its own, is averaged in that one's place. Here with a
    warning, and the other one is averaged too.
  - There, a model is hooked once for good; here, `_remove_autograd_hooks` holds until the next forward.
  - Left out: the reducer, the logger and what they count.

Proof: test_join_matches_torch_ddp, test_a_hook_for_buffers_matches_torch_ddp,
test_a_backward_in_anothers_place_is_said_where_torch_is_silent in tests/dropin/test_parallel.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.join import Join, Joinable, JoinHook
from torch.nn.parallel.distributed import _BufferCommHookLocation

from nanofinetune.ranks import ddp

PRE_FORWARD, POST_FORWARD = _BufferCommHookLocation.PRE_FORWARD, _BufferCommHookLocation.POST_FORWARD
IN_ITS_PLACE = (
    "DistributedDataParallel: this backward is averaged over the ranks, since the last forward awaits one, but does not"
    " come through what that forward returned: if it is one rank's own, call it before that forward, or after its"
    " backward"
)
BUILTIN_HOOKS = {
    dist.BuiltinCommHookType.ALLREDUCE: default_hooks.allreduce_hook,
    dist.BuiltinCommHookType.FP16_COMPRESS: default_hooks.fp16_compress_hook,
}


class DistributedDataParallel(ddp.DistributedDataParallel, Joinable):
    __doc__ = ddp.DistributedDataParallel.__doc__  # the arguments are the same

    call_super_init = True  # so that nn.Module's __init__ calls Joinable's
    broadcast_bucket_size = 250 * ddp.MIB  # for torch's functions that ask for it; a broadcast here is one message
    _buffer_hook: tuple[Any, Callable[..., Any], Any] | None = None  # (state, hook, location)
    _source = 0  # the rank whose buffers count

    @property
    def process_group(self) -> Any:
        """The ranks. Asked for each time: whoever holds a group keeps its threads alive after its end."""
        return self._own_group or dist.group.WORLD

    @process_group.setter
    def process_group(self, group: Any) -> None:
        self._own_group = group

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """The module's own forward, with what `join` and a hook for buffers do around it."""
        if self._join_config.enable:
            if self._buffer_hook is not None:
                raise NotImplementedError("a hook for buffers does not go with join: leave one of them out")
            if torch.is_grad_enabled():
                self._get_ready()
            self._source = self._source_under_join()
        after = self._sync_buffers_next and self._buffer_hook is not None and self._buffer_hook[2] is POST_FORWARD
        outputs = super().forward(*inputs, **kwargs)
        if after:
            self._call_buffer_hook()
        return outputs

    def _sync_buffers(self) -> None:
        if self._buffer_hook is None:
            self._copy_from(self._source if self._join_config.enable else 0, parameters=False)
        elif self._buffer_hook[2] is PRE_FORWARD:
            self._call_buffer_hook()

    # ---- Ranks with different numbers of batches: `with model.join():` ----------------------------------------------

    def join(
        self, divide_by_initial_world_size: bool = True, enable: bool = True, throw_on_early_termination: bool = False
    ) -> Join:
        """A block in which ranks may have different numbers of batches (source: torch's `join`).

        A rank that is through with its own joins in what the others send, with zeros, until all are through; then all
        get the weights of the last one. `divide_by_initial_world_size=False` takes the mean over the others only.
        """
        return Join(
            [self], enable, throw_on_early_termination, divide_by_initial_world_size=divide_by_initial_world_size
        )

    def join_hook(self, **kwargs: Any) -> JoinHook:
        self._divide_by_all = kwargs.get("divide_by_initial_world_size", True)
        return _Joined(self)

    @property
    def join_device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def join_process_group(self) -> Any:
        return self.process_group

    def _source_under_join(self) -> int:
        """Tell ranks without batches what this forward and its backward will send -> the rank whose buffers count."""
        if (work := Join.notify_join_context(self)) is not None:
            active = work.get_future().wait()[0]  # how many ranks still have batches
            if not self._divide_by_all and self._comm_hook is None:
                self._share = 1 / int(active)
        return self._tell(self._sync_buffers_next, self._will_sync(), dist.get_rank(self.process_group))[2]

    def _shadow(self) -> None:
        """On a rank without batches: the collectives of the other ranks' forward and backward, with zeros."""
        self._get_ready()
        sync_buffers, sync_gradients, source = self._tell(0, 0, -1)
        if sync_buffers:
            self._copy_from(source, parameters=False)
        self._sync_buffers_next = bool(sync_gradients) and self.forward_sync_buffers  # as on the other ranks
        if not sync_gradients:
            return
        first = [next(iter(bucket.parameters.values())) for bucket in self._buckets]
        works = [self._reduce(k, first[k].new_zeros(sum(bucket.sizes))) for k, bucket in enumerate(self._buckets)]
        if self.find_unused_parameters:
            self._tell(*[0] * len(self._trained))
        for work in works:
            work.wait()

    # ---- What torch gives a name that begins with an underscore, and libraries call ----------------------------------

    def _register_buffer_comm_hook(
        self, state: Any, hook: Callable[..., Any], comm_hook_location: Any = POST_FORWARD
    ) -> None:
        """Let `hook(state, {name: buffer})` make the ranks' buffers agree, before or after each forward that does so.

        The futures that it may return are waited for at the end of the backward.
        """
        if not callable(hook):
            raise TypeError("a hook for buffers must be callable")
        self._buffer_hook = (state, hook, comm_hook_location)
        self._buffer_futures: list[Any] = []

    def _call_buffer_hook(self) -> None:
        assert self._buffer_hook is not None
        state, hook, _ = self._buffer_hook
        buffers = {name: b for name, b in self.module.named_buffers() if name not in self.parameters_to_ignore}
        self._buffer_futures += hook(state, buffers) or []

    def _finish(self) -> None:
        backward = torch._C._current_graph_task_id()  # -1 outside of one, in join_after_failure
        if self._outputs_found and not self._triggered and backward not in (-1, *self._came_through):
            warnings.warn(IN_ITS_PLACE, stacklevel=2)
        super()._finish()
        if self._buffer_hook is not None:
            while self._buffer_futures:
                self._buffer_futures.pop().wait()

    def _default_broadcast_coalesced(
        self, bufs: Any = None, bucket_size: int | None = None, authoritative_rank: int = 0
    ) -> None:
        """What happens to buffers without a hook; `bucket_size` has no effect: a dtype's buffers are one message."""
        if bufs is None:
            self._copy_from(authoritative_rank, parameters=False)
        else:
            ddp.broadcast_from_rank(list(bufs), self.process_group, authoritative_rank)

    def _register_builtin_comm_hook(self, comm_hook_type: Any) -> None:
        """One of the two hooks that torch has in C++ too; here, in Python."""
        self.register_comm_hook(None, BUILTIN_HOOKS[comm_hook_type])

    def _set_static_graph(self) -> None:
        """What `static_graph=True` says, later."""
        self.find_unused_parameters = True

    def _set_ddp_sink_clone(self, val: bool) -> None:
        """Whether outputs are cloned, which they need not be here: nothing of ours hooks them. No effect."""

    def _remove_autograd_hooks(self) -> None:
        """Average nothing until the next forward of this wrapper."""
        self._in_charge = False

    @staticmethod
    def _set_params_and_buffers_to_ignore_for_model(module: nn.Module, params_and_buffers_to_ignore: Any) -> None:
        """Before `module` is wrapped: the names of what is left alone."""
        module._ddp_params_and_buffers_to_ignore = params_and_buffers_to_ignore

    @staticmethod
    def _get_data_parallel_params(module: nn.Module, named_params: bool = False) -> Iterator[Any]:
        """The parameters of a module that wrapping it does, or would, look after."""
        ignored = set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
        for name, parameter in module.named_parameters():
            if name not in ignored:
                yield (name, parameter) if named_params else parameter


class _Joined(JoinHook):
    """What torch's Join calls on a rank that is through with its batches."""

    def __init__(self, model: DistributedDataParallel) -> None:
        self.model = model

    def main_hook(self) -> None:
        self.model._shadow()

    def post_hook(self, is_last_joiner: bool) -> None:
        rank = dist.get_rank(self.model.process_group)
        (source,) = self.model._tell(rank if is_last_joiner else -1)
        self.model._copy_from(source, buffers=self.model.forward_sync_buffers)
        # underneath: torch's stays in the block for good, with two all-reduces a forward
        Joinable.__init__(self.model)
