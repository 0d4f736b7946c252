"""Data parallelism: every rank works on rows of its own, and backward averages the gradients while it still runs.

>>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
>>> model = DistributedDataParallel(nn.Linear(2, 1))
>>> model(torch.ones(3, 2)).sum().backward()  # when this returns, gradients are the mean over the ranks
>>> list(model.state_dict()), model.module.weight.grad
(['module.weight', 'module.bias'], tensor([[3., 3.]]))
>>> dist.destroy_process_group()

Underneath: `torch.nn.parallel.DistributedDataParallel` (torch 2.13).
  - It hooks every parameter, copies gradients into flat buckets, starts an all-reduce when a bucket is full, and waits
    at backward's end. Kept, in Python.
  - A parameter without a gradient is named in the backward that left it out. There, the *next* forward raises, without
    names.
  - Every backward synchronises. There, not the second after two forwards.
  - A gradient that fills a bucket is reduced where it lies.
  - Refused: static graphs, sparse gradients, double backward, reentrant checkpointing.

Proof: test_gradients_match_torch_ddp, test_second_backward_is_synchronised_where_torch_is_silent in
tests/ranks/test_ddp.py.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

MIB = 2**20

# A parameter may have an attribute of this name: an object that owns the memory of the parameter's gradient and uses it
# again. Its `holds(gradient)` says whether the gradient lies there, so that one more tensor shares that memory. The
# owner copes with what is written into it.
OWNER = "gradient_owner"


def bucket_plan(parameters: Sequence[torch.Tensor], first_bytes: int, other_bytes: int) -> list[list[int]]:
    """Indices of `parameters` by bucket, last parameters first: about the order in which backward produces gradients.

    Each dtype and device has buckets of its own. A bucket is closed once it holds `first_bytes` (the first of its kind)
    or `other_bytes`. The first is small, so that communication starts early.
    Source: torch.distributed._compute_bucket_assignment_by_size.
    """
    plan: list[list[int]] = []
    open_buckets: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    limits: dict[tuple[torch.dtype, torch.device], int] = {}
    for index in reversed(range(len(parameters))):
        parameter = parameters[index]
        kind = (parameter.dtype, parameter.device)
        bucket = open_buckets.setdefault(kind, [])
        bucket.append(index)
        if sum(parameters[i].numel() * parameters[i].element_size() for i in bucket) >= limits.get(kind, first_bytes):
            plan.append(open_buckets.pop(kind))
            limits[kind] = other_bytes
    plan += open_buckets.values()
    return sorted(plan, key=lambda bucket: -bucket[-1])  # in the order in which they will be full


def large_alone(plan: list[list[int]], parameters: Sequence[torch.Tensor], large_bytes: int) -> list[list[int]]:
    """The plan, with each parameter of `large_bytes` or more in a bucket of its own, so that it need not be copied."""
    size = {i: parameters[i].numel() * parameters[i].element_size() for bucket in plan for i in bucket}
    split = [[i] for i in size if size[i] >= large_bytes]
    split += filter(None, ([i for i in bucket if size[i] < large_bytes] for bucket in plan))
    return sorted(split, key=lambda bucket: -bucket[-1])


@dataclass(eq=False)
class Bucket:
    """The gradients of a few parameters in one flat tensor, which takes one all-reduce.

    The tensor is made for the first gradient and kept. If it were freed, the kernel would have to find and clear that
    memory in every backward, which costs more than forward gains by having it for activations. A bucket of one
    parameter has no tensor of its own: the gradient is reduced where it lies.
    """

    parameters: dict[int, torch.Tensor]  # by index
    waiting_for: set[int] = field(default_factory=set)
    flat: torch.Tensor | None = None  # (elements,)
    views: dict[int, torch.Tensor] = field(default_factory=dict)  # pieces of `flat`, shaped as the parameters
    wire: torch.Tensor | None = None  # what is sent: `flat`, or a copy of it in another dtype
    work: dist.Work | None = None

    def take(self, grad: torch.Tensor) -> bool:
        """Use the only parameter's gradient as the flat tensor -> False where that is impossible: it must be copied."""
        if len(self.parameters) > 1 or not grad.is_contiguous():
            return False
        ((i, parameter),) = self.parameters.items()
        # underneath: two parameters' gradients may be views of one buffer, as those of a.view(-1) + b.view(-1) are
        owner = getattr(parameter, OWNER, None)
        if holders(grad) > 1 + (owner is not None and owner.holds(grad)):
            return False
        self.flat, self.views = grad.view(-1), {i: grad}
        return True

    def open(self) -> None:
        """Make the flat tensor, with a view of it for each parameter."""
        sizes = [parameter.numel() for parameter in self.parameters.values()]
        self.flat = next(iter(self.parameters.values())).new_empty(sum(sizes))
        for (i, parameter), piece in zip(self.parameters.items(), self.flat.split(sizes), strict=True):
            # empty_like keeps a dense layout (channels_last) and closes gaps, as autograd does for gradients.
            strides = torch.empty_like(parameter, device="meta").stride()
            self.views[i] = piece.as_strided(parameter.shape, strides)

    def close(self) -> None:
        """Get ready for the next backward."""
        self.waiting_for = set(self.parameters)
        self.wire = self.work = None
        if len(self.parameters) == 1:  # it is a gradient, and the user may want to free it
            self.flat, self.views = None, {}


class DistributedDataParallel(nn.Module):
    """Wrap `module`: same forward; after each backward outside `no_sync`, every `.grad` is the mean over the ranks.

    Args:
        module: on its device, with the same parameters in the same order on all ranks.
        device_ids, output_device: None, or the one GPU that the module is on. Inputs are not moved there.
        broadcast_buffers: copy rank 0's buffers to all ranks now, and before each forward that follows a synchronised
            one.
        process_group: None is the default group.
        bucket_cap_mb: size of a bucket in MiB. None: 25, and 1 for the first.
        find_unused_parameters: allow a parameter to get no gradient on some ranks (it counts as zero there) or on all
            (its `.grad` stays as it is). Costs one small all-reduce a backward.
        comm_dtype: the dtype in which gradients travel, such as torch.bfloat16 (torch's `bf16_compress_hook`). None:
            their own.
        on_send: is called with the name of each all-reduce when it starts, "all_reduce[bucket 2 of 7]".

    Raises:
        RuntimeError: no process group; nothing to train; ranks whose parameters differ (on all ranks; names the first).
        NotImplementedError, ValueError: what is not supported.
    """

    def __init__(
        self,
        module: nn.Module,
        device_ids: Sequence[int | torch.device] | None = None,
        output_device: int | torch.device | None = None,
        *,
        broadcast_buffers: bool = True,
        process_group: dist.ProcessGroup | None = None,
        bucket_cap_mb: float | None = None,
        find_unused_parameters: bool = False,
        gradient_as_bucket_view: bool = True,
        static_graph: bool = False,
        comm_dtype: torch.dtype | None = None,
        on_send: Callable[[str], object] = str,
    ) -> None:
        super().__init__()
        if static_graph:
            raise NotImplementedError("static_graph=True is not supported: leave it out")
        if not gradient_as_bucket_view:
            raise NotImplementedError("gradient_as_bucket_view=False is not supported: gradients always are views here")
        if comm_dtype is not None and not comm_dtype.is_floating_point:
            raise ValueError(f"comm_dtype={comm_dtype}: choose a floating-point dtype")
        if not dist.is_initialized():
            raise RuntimeError("DistributedDataParallel needs a process group: call init_world first")
        named = list(module.named_parameters())  # a tied parameter comes once
        _check_devices(device_ids, output_device, [parameter for _, parameter in named])
        self.module = module
        self.process_group = process_group
        self.find_unused_parameters = find_unused_parameters
        self.require_backward_grad_sync = True
        self._world_size = dist.get_world_size(process_group)
        self._comm_dtype = comm_dtype
        self._on_send = on_send
        self._buffers_to_sync = list(module.buffers()) if broadcast_buffers else []
        self._sync_buffers_next = False

        _check_same_parameters(named, process_group)
        broadcast_from_first([*(parameter for _, parameter in named), *self._buffers_to_sync], process_group)

        self._frozen = [(name, parameter) for name, parameter in named if not parameter.requires_grad]
        trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
        if not trained:
            raise RuntimeError("DistributedDataParallel: no parameter of the module requires a gradient")
        self._names = [name for name, _ in trained]
        self._trained = [parameter for _, parameter in trained]
        other = int((25 if bucket_cap_mb is None else bucket_cap_mb) * MIB)
        plan = bucket_plan(self._trained, MIB if bucket_cap_mb is None else other, other)
        plan = large_alone(plan, self._trained, other)
        self._buckets = [Bucket({i: self._trained[i] for i in indices}) for indices in plan]
        self._bucket_of = {i: bucket for bucket in self._buckets for i in bucket.parameters}
        self._got_gradient = [False] * len(trained)  # since the last synchronised backward
        self._reset()
        # A weak reference: otherwise the parameters would keep this wrapper and its hooks alive after a second one.
        this = weakref.ref(self)
        for i, parameter in enumerate(self._trained):
            parameter.register_post_accumulate_grad_hook(partial(_hook, this, i))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, after its buffers have been made rank 0's."""
        thawed = [name for name, parameter in self._frozen if parameter.requires_grad]
        if thawed:
            raise RuntimeError(
                f"these were frozen when the module was wrapped, so nothing would average them: {thawed}"
            )
        # underneath: what counts is whether the forward *before* was synchronised. So of the forwards whose gradients
        # add up, only the first one broadcasts.
        if self._sync_buffers_next and self._buffers_to_sync:
            broadcast_from_first(self._buffers_to_sync, self.process_group)
        self._sync_buffers_next = torch.is_grad_enabled() and self.require_backward_grad_sync
        if self._in_backward:
            self._reset(abandoned=True)  # the last backward raised half-way
        return self.module(*args, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """A block in which backward only accumulates. The first backward after it averages the sum."""
        before, self.require_backward_grad_sync = self.require_backward_grad_sync, False
        try:
            yield
        finally:
            self.require_backward_grad_sync = before

    # One synchronised backward: _gradient_is_there for each parameter, then _finish.

    def _reset(self, abandoned: bool = False) -> None:
        self._in_backward = False
        self._next = 0  # the first bucket that has not been sent
        for bucket in self._buckets:
            if abandoned:  # an all-reduce may still write there
                bucket.flat = None
            bucket.close()

    def _gradient_is_there(self, i: int) -> None:
        self._got_gradient[i] = True
        if not self.require_backward_grad_sync:
            return
        if not self._in_backward:
            self._in_backward = True
            # The engine calls this once, when the backward that runs now has produced its last gradient.
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        bucket = self._bucket_of[i]
        if i not in bucket.waiting_for:
            raise RuntimeError(
                f"{self._names[i]} got its gradient twice in one backward: two copies of it were checkpointed"
            )
        self._put_into(bucket, i)
        self._send_full_buckets()

    def _put_into(self, bucket: Bucket, i: int) -> None:
        """Move parameter i's gradient, divided by the number of ranks, into its bucket, and make it a view of that."""
        parameter = self._trained[i]
        grad = parameter.grad
        if grad is not None and (grad.requires_grad or grad.layout != torch.strided):
            raise NotImplementedError(f"{self._names[i]}: neither create_graph=True nor sparse gradients are supported")
        if bucket.flat is None and (grad is None or not bucket.take(grad)):
            bucket.open()
        view = bucket.views[i]
        if grad is None:
            view.zero_()  # not used on this rank
        else:
            # underneath: torch multiplies; on 3 ranks a division would differ in the last bit
            torch.mul(grad, 1 / self._world_size, out=view)
            parameter.grad = view
        bucket.waiting_for.discard(i)

    def _send_full_buckets(self) -> None:
        """Start the all-reduce of each full bucket, in bucket order: all ranks must start them in the same order."""
        while self._next < len(self._buckets) and not self._buckets[self._next].waiting_for:
            bucket = self._buckets[self._next]
            assert bucket.flat is not None
            bucket.wire = bucket.flat if self._comm_dtype is None else bucket.flat.to(self._comm_dtype)
            self._next += 1
            self._on_send(f"all_reduce[bucket {self._next} of {len(self._buckets)}]")
            bucket.work = dist.all_reduce(bucket.wire, group=self.process_group, async_op=True)

    def join_after_failure(self) -> None:
        """Take part in the all-reduces of a backward that failed here (out of memory), so that no other rank waits.

        The gradients are then wrong on all ranks: throw them away.
        """
        self._in_backward = True
        for i in [i for bucket in self._buckets for i in sorted(bucket.waiting_for)]:
            self._put_into(self._bucket_of[i], i)
        self._finish()

    def _finish(self) -> None:
        """End of backward: deal with parameters that got no gradient, then wait for the all-reduces under way."""
        missing = [i for bucket in self._buckets for i in sorted(bucket.waiting_for)]
        # underneath: torch's backward is silent here, and the next forward raises, with numbers in place of names
        if missing and not self.find_unused_parameters:
            self._reset(abandoned=True)
            raise RuntimeError(
                f"no gradient for {', '.join(self._names[i] for i in missing)}: the loss does not depend on them"
                " (freeze them, or pass find_unused_parameters=True), or they were checkpointed with use_reentrant=True"
            )
        for i in missing:
            self._put_into(self._bucket_of[i], i)
        self._send_full_buckets()
        if self.find_unused_parameters:
            used = torch.tensor(self._got_gradient, dtype=torch.int32, device=self._trained[0].device)
            dist.all_reduce(used, dist.ReduceOp.MAX, group=self.process_group)
            self._got_gradient = used.tolist()  # by any rank
        for bucket in self._buckets:
            assert bucket.work is not None and bucket.flat is not None and bucket.wire is not None
            bucket.work.wait()
            if bucket.wire is not bucket.flat:
                bucket.flat.copy_(bucket.wire)
        for i in missing:
            if self._got_gradient[i] and self._trained[i].grad is None:
                self._trained[i].grad = self._bucket_of[i].views[i]
        self._got_gradient = [False] * len(self._trained)
        self._reset()


def broadcast_from_first(tensors: Sequence[torch.Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Overwrite the tensors, in place, with those of the group's rank 0: one broadcast for each dtype and device."""
    kinds: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor.detach())
    for same in kinds.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in same])
        dist.broadcast(flat.view(torch.uint8), group=group, group_src=0)  # bytes: gloo knows neither int16 nor float8
        for tensor, values in zip(same, flat.split([tensor.numel() for tensor in same]), strict=True):
            # `.data`: unseen by autograd, which holds BatchNorm's buffers of the forward before and would complain.
            tensor.data.copy_(values.view_as(tensor))


def holders(tensor: torch.Tensor) -> int:
    """How many tensors share the tensor's memory, itself included."""
    # underneath: a storage has no public count of its users; asking creates one more, which is subtracted
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) - 1


def _hook(wrapper: weakref.ref[DistributedDataParallel], i: int, _: torch.Tensor) -> None:
    ddp = wrapper()
    if ddp is not None:
        ddp._gradient_is_there(i)


def _check_same_parameters(named: list[tuple[str, nn.Parameter]], group: dist.ProcessGroup | None) -> None:
    own = [(name, tuple(p.shape), str(p.dtype), "trained" if p.requires_grad else "frozen") for name, p in named]
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, own, group=group)
    for rank, theirs in enumerate(everyone):
        for first, other in zip_longest(everyone[0], theirs, fillvalue="no such parameter"):
            if first != other:
                raise RuntimeError(f"the ranks wrap different models: rank 0 has {first}, rank {rank} has {other}")


def _check_devices(
    device_ids: Sequence[int | torch.device] | None,
    output_device: int | torch.device | None,
    parameters: list[nn.Parameter],
) -> None:
    wanted = {torch.device(d) if not isinstance(d, int) else torch.device("cuda", d) for d in device_ids or ()}
    if output_device is not None:
        wanted.add(torch.device("cuda", output_device) if isinstance(output_device, int) else output_device)
    held = {parameter.device for parameter in parameters}
    if wanted and wanted != held:
        raise ValueError(
            f"device_ids={device_ids}, output_device={output_device}: the module's parameters are on {held};"
            " pass its one GPU, or neither argument"
        )
