"""Data parallelism: every rank works on rows of its own, and backward averages the gradients while it still runs.

>>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
>>> model = DistributedDataParallel(nn.Linear(2, 1))
>>> model(torch.ones(3, 2)).sum().backward()  # when this returns, gradients are the mean over the ranks
>>> list(model.state_dict()), model.module.weight.grad
(['module.weight', 'module.bias'], tensor([[3., 3.]]))
>>> dist.destroy_process_group()

Underneath: `torch.nn.parallel.DistributedDataParallel` (torch 2.13).
  - It hooks every parameter, copies gradients into flat buckets, starts an all-reduce when a bucket is full, and waits
    at backward's end. Kept, in Python: `_gradient_is_there`, `_send_full_buckets`, `_finish`.
  - A parameter without a gradient is named in the backward that left it out. There, the *next* forward raises, without
    names.
  - A synchronised forward decides that its backward averages, wherever that is called. A backward that comes from
    elsewhere, such as one through `model.module`, stays on its rank. Kept.
  - Every backward through its outputs averages. There, the first one only: not the second after two forwards.
  - A gradient that fills a bucket is reduced where it lies.
  - Refused: sparse gradients, double backward, reentrant checkpointing.

Proof: test_gradients_match_torch_ddp, test_which_backwards_average_matches_torch_ddp,
test_second_backward_is_synchronised_where_torch_is_silent in tests/ranks/test_ddp.py.
"""

from __future__ import annotations

import warnings
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
from torch.utils.weak import WeakIdKeyDictionary

MIB = 2**20


def bucket_plan(parameters: Sequence[torch.Tensor], *limits: int) -> list[list[int]]:
    """Indices of `parameters` by bucket, last parameters first: about the order in which backward produces gradients.

    Each dtype and device has buckets of its own. Its first is closed once it holds `limits[0]` bytes, its second at
    `limits[1]`, and so on; the last limit holds for all that follow. The first is small, so that communication starts
    early.
    Source: torch.distributed._compute_bucket_assignment_by_size.
    """
    plan: list[list[int]] = []
    open_buckets: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    closed: dict[tuple[torch.dtype, torch.device], int] = {}  # how many
    for index in reversed(range(len(parameters))):
        parameter = parameters[index]
        kind = (parameter.dtype, parameter.device)
        bucket = open_buckets.setdefault(kind, [])
        bucket.append(index)
        held = sum(parameters[i].numel() * parameters[i].element_size() for i in bucket)
        if held >= limits[min(closed.get(kind, 0), len(limits) - 1)]:
            plan.append(open_buckets.pop(kind))
            closed[kind] = closed.get(kind, 0) + 1
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

    parameters: dict[int, nn.Parameter]  # by index
    as_views: bool = True  # after backward, gradients are pieces of `flat`; else they have memory of their own
    waiting_for: set[int] = field(default_factory=set)
    unused: set[int] = field(default_factory=set)  # had no gradient in this backward
    flat: torch.Tensor | None = None  # (elements,)
    strides: list[tuple[int, ...]] = field(default_factory=list)  # of the views
    views: dict[int, torch.Tensor] = field(default_factory=dict)  # pieces of `flat`, shaped as the parameters
    work: Any = None  # dist.Work, or the Future of a communication hook

    @property
    def sizes(self) -> list[int]:
        """Elements of each parameter."""
        return [parameter.numel() for parameter in self.parameters.values()]

    def take(self, grad: torch.Tensor) -> bool:
        """Use the only parameter's gradient as the flat tensor -> False where that is impossible: it must be copied."""
        if len(self.parameters) > 1 or not grad.is_contiguous():
            return False
        # underneath: two parameters' gradients may be views of one buffer, as those of a.view(-1) + b.view(-1) are
        if holders(grad) > 1:
            return False
        (i,) = self.parameters
        self.flat, self.views = grad.view(-1), {i: grad}
        return True

    def open(self) -> None:
        """Make the flat tensor, or take the last backward's again, with a view of it for each parameter."""
        first = next(iter(self.parameters.values()))
        if self.flat is not None and self._is_kept(self.flat):
            # Somebody still has a gradient of the last backward (`g = p.grad`), which must not change now. Copy from
            # now on: otherwise each small gradient that is kept would keep a whole bucket.
            self.flat, self.as_views = None, False
        if self.flat is None or (self.flat.dtype, self.flat.device) != (first.dtype, first.device):
            self.flat = first.new_empty(sum(self.sizes))
            # empty_like keeps a dense layout (channels_last) and closes gaps, as autograd does for gradients.
            self.strides = [torch.empty_like(p, device="meta").stride() for p in self.parameters.values()]
        pieces = zip(self.parameters.items(), self.flat.split(self.sizes), self.strides, strict=True)
        self.views = {i: piece.as_strided(parameter.shape, stride) for (i, parameter), piece, stride in pieces}

    def _is_kept(self, flat: torch.Tensor) -> bool:
        """Whether anything but this bucket and its parameters' `.grad` holds the memory."""
        place = flat.untyped_storage().data_ptr()
        grads = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        own = {id(grad) for grad in grads if grad.untyped_storage().data_ptr() == place}
        return holders(flat) > 1 + len(own)

    def close(self) -> None:
        """Get ready for the next backward."""
        self.waiting_for, self.unused, self.views, self.work = set(self.parameters), set(), {}, None
        if len(self.parameters) == 1:  # it is a gradient, and the user may want to free it
            self.flat = None


class DistributedDataParallel(nn.Module):
    """Wrap `module`: same forward; after each backward outside `no_sync`, every `.grad` is the mean over the ranks.

    Args, as torch's; those that are not named here are refused unless they have torch's default:
        module: on its device, with the same parameters in the same order on all ranks. What its attribute
            `_ddp_params_and_buffers_to_ignore` names is left alone.
        device_ids, output_device: None, or the one GPU that the module is on. Inputs are not moved there.
        init_sync: check that the ranks' parameters match, and copy rank 0's to all.
        forward_sync_buffers: copy rank 0's buffers to all ranks before the first forward and each after a synchronised
            one.
        broadcast_buffers: its old name, which counts where the new one is not passed; False also leaves them out of
            `init_sync`.
        process_group, device_mesh: the ranks; None is the default group.
        bucket_cap_mb: size of a bucket in MiB. None: 25, and 1 for the first.
        bucket_cap_mb_list: sizes of the first buckets, one by one; the last of them holds for all others.
        find_unused_parameters: allow a parameter to get no gradient on some ranks (it counts as zero there) or on all
            (its `.grad` stays as it is). Costs one small all-reduce a backward.
        static_graph: the same, since that allows all that a graph that never changes does.
        gradient_as_bucket_view: True: gradients are views into buckets, and exist once. A gradient that somebody keeps
            still does not change: its bucket then gets other memory. False, torch's default: they are copied out.
        on_send: not torch's; is called with the name of each all-reduce when it starts, "all_reduce[bucket 2 of 7]".

    A copy (copy.deepcopy, pickle, torch.save) averages as well: it sets its hooks at its next forward.

    It is no instance of torch's class. What asks for that (`isinstance`, accelerate's `extract_model_from_parallel`,
    torch's `get_model_state_dict`) takes the wrapper for the model, whose names then begin with "module.": hand it
    `model.module`, or call `Accelerator.unwrap_model` or `Accelerator.get_state_dict`.

    Raises:
        RuntimeError: no process group; nothing to train; ranks whose parameters differ (on all ranks; names the first).
        NotImplementedError, ValueError: what is not supported.
    """

    def __init__(
        self, module: nn.Module, device_ids: Sequence[int | torch.device] | None = None,
        output_device: int | torch.device | None = None, dim: int = 0, broadcast_buffers: bool | None = None,
        init_sync: bool = True, process_group: dist.ProcessGroup | None = None, bucket_cap_mb: float | None = None,
        find_unused_parameters: bool = False, check_reduction: bool = False, gradient_as_bucket_view: bool = True,
        static_graph: bool = False, delay_all_reduce_named_params: Any = None, param_to_hook_all_reduce: Any = None,
        mixed_precision: Any = None, device_mesh: Any = None, skip_all_reduce_unused_params: bool = False,
        bucket_cap_mb_list: list[int] | None = None, batched_grad_copy: bool = False,
        forward_sync_buffers: bool | None = None, *, on_send: Callable[[str], object] = str,
    ) -> None:  # fmt: skip
        super().__init__()
        _refuse(
            dim=dim, check_reduction=check_reduction, mixed_precision=mixed_precision,
            delay_all_reduce_named_params=delay_all_reduce_named_params, batched_grad_copy=batched_grad_copy,
            param_to_hook_all_reduce=param_to_hook_all_reduce,
            skip_all_reduce_unused_params=skip_all_reduce_unused_params,
        )  # fmt: skip
        if not dist.is_initialized():
            raise RuntimeError(NO_GROUP)
        if broadcast_buffers is not None:
            warnings.warn(OLD_NAME, FutureWarning, stacklevel=2)
            broadcast_buffers = broadcast_buffers if forward_sync_buffers is None else None
        if device_mesh is not None:
            if process_group is not None:
                raise RuntimeError("Cannot specify both process_group and device_mesh arguments.")
            if device_mesh.ndim != 1:
                raise RuntimeError(f"Only 1D device mesh is supported, but got {device_mesh}.")
            process_group = device_mesh.get_group(mesh_dim=0)
        self.module, self.device_mesh = module, device_mesh
        self.process_group = None if process_group == dist.group.WORLD else process_group
        self.find_unused_parameters = find_unused_parameters or static_graph
        self.gradient_as_bucket_view = gradient_as_bucket_view
        self.forward_sync_buffers = forward_sync_buffers is not False and broadcast_buffers is not False
        self.require_backward_grad_sync = True
        self.parameters_to_ignore = set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
        self._bucket_cap_mb = bucket_cap_mb
        self.bucket_bytes_cap_list = [int(cap * MIB) for cap in bucket_cap_mb_list or ()]
        self._comm_hook: tuple[Any, Callable[..., Any]] | None = None
        self._on_send = on_send
        self._sync_buffers_next = self.forward_sync_buffers  # one may be replaced before the first forward
        # _expected: a synchronised forward awaits its backward; _came_through: the latest one through such outputs
        self._in_backward, self._triggered, self._expected, self._came_through = False, False, False, [-1]
        self._outputs_found = False  # of that forward: tensors that its backward may come through

        named = self._named_parameters()
        _check_devices(device_ids, output_device, [parameter for _, parameter in named])
        if init_sync:
            _check_same_parameters(named, self.process_group)
            self._copy_from(0, buffers=broadcast_buffers is not False)
        self._set_up()

    def _set_up(self) -> None:
        """Plan the buckets and hook the parameters: of a wrapped module, and of a copied or loaded wrapper."""
        if not dist.is_initialized():
            raise RuntimeError(NO_GROUP)
        trained = [(name, parameter) for name, parameter in self._named_parameters() if parameter.requires_grad]
        if not trained:
            raise RuntimeError("DistributedDataParallel: no parameter of the module requires a gradient")
        if early := [name for name, parameter in trained if hasattr(parameter, "_in_backward_optimizers")]:
            raise NotImplementedError(f"optimizers that step in backward are not supported: {early}")
        self._names = [name for name, _ in trained]
        self._trained = [parameter for _, parameter in trained]
        self._known = set(map(id, self._trained))
        other = int((25 if self._bucket_cap_mb is None else self._bucket_cap_mb) * MIB)
        limits = self.bucket_bytes_cap_list or [MIB if self._bucket_cap_mb is None else other, other]
        plan = large_alone(bucket_plan(self._trained, *limits), self._trained, max(limits))
        self._buckets = [Bucket({i: self._trained[i] for i in group}, self.gradient_as_bucket_view) for group in plan]
        self._bucket_of = {i: bucket for bucket in self._buckets for i in bucket.parameters}
        self._got_gradient = [0] * len(trained)  # since the last synchronised backward
        self._reset()
        # A weak reference: otherwise the parameters would keep this wrapper and its hooks alive after a second one.
        this = weakref.ref(self)
        for i, parameter in enumerate(self._trained):
            parameter.register_post_accumulate_grad_hook(partial(_hook, this, i))
        self._take_charge()

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """The module's own forward, after its buffers have been made rank 0's."""
        if torch.is_grad_enabled():
            self._get_ready()
        # underneath: what counts is whether the forward *before* was synchronised. So of the forwards whose gradients
        # add up, only the first one broadcasts.
        if self._sync_buffers_next:
            self._sync_buffers()
        self._sync_buffers_next = self._will_sync() and self.forward_sync_buffers
        outputs = self.module(*inputs, **kwargs)
        if self._will_sync():
            # underneath: torch knows only that a forward awaits its backward, and takes the next one for that
            nodes = {tensor.grad_fn for tensor in nn.parallel.distributed._find_tensors(outputs)} - {None}
            self._expected, self._outputs_found = True, bool(nodes)
            for node in nodes:
                node.register_prehook(partial(_note, self._came_through))
        return outputs

    def _sync_buffers(self) -> None:
        self._copy_from(0, parameters=False)

    def _get_ready(self) -> None:
        """Set up what this forward's backward needs."""
        if not self._buckets:
            self._set_up()
        if not self._in_charge:
            self._take_charge()
        if self._in_backward:
            self._reset(abandoned=True)  # the last backward raised half-way
        others = [pair for pair in self._named_parameters() if id(pair[1]) not in self._known]
        if new := [name for name, parameter in others if parameter.requires_grad]:
            raise RuntimeError(
                f"these were frozen, or not there, when the module was wrapped, so nothing would average them: {new};"
                " wrap the module again"
            )

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """A block whose forwards have backwards that only accumulate. The first forward after it averages the sum.

        As torch's: the block must hold the forward, or its backward averages. The backward alone does not matter.
        """
        before, self.require_backward_grad_sync = self.require_backward_grad_sync, False
        try:
            yield
        finally:
            self.require_backward_grad_sync = before

    # ---- One synchronised backward: _gradient_is_there for each parameter, then _finish -----------------------------

    def _gradient_is_there(self, i: int) -> None:
        self._got_gradient[i] = 1
        if not self._in_backward:
            if not self._expected and self._came_through != [torch._C._current_graph_task_id()]:
                return
            self._in_backward = True
            # The engine calls this once, when the backward that runs now has produced its last gradient.
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        bucket = self._bucket_of[i]
        if i not in bucket.waiting_for:
            raise RuntimeError(
                f"{self._names[i]} got its gradient twice in one backward: two copies of it were checkpointed"
            )
        if self._trained[i].grad is None:
            raise RuntimeError(TAKEN.format(self._names[i]))
        self._put_into(bucket, i)
        self._send_full_buckets()

    def _put_into(self, bucket: Bucket, i: int) -> None:
        """Move parameter i's gradient, divided by the number of ranks, into its bucket, and make it a view of that."""
        parameter = self._trained[i]
        grad = parameter.grad
        if grad is not None and (grad.requires_grad or grad.layout != torch.strided):
            raise NotImplementedError(f"{self._names[i]}: neither create_graph=True nor sparse gradients are supported")
        if not bucket.views and (grad is None or not bucket.take(grad)):
            bucket.open()
        view = bucket.views[i]
        if grad is None:  # not used on this rank
            view.zero_()
            bucket.unused.add(i)
        else:
            # underneath: torch multiplies; on 3 ranks a division would differ in the last bit
            torch.mul(grad, self._share, out=view)
            if bucket.as_views:
                parameter.grad = view
        bucket.waiting_for.discard(i)

    def _send_full_buckets(self) -> None:
        """Start the all-reduce of each full bucket, in bucket order: all ranks must start them in the same order."""
        while self._next < len(self._buckets) and not self._buckets[self._next].waiting_for:
            bucket = self._buckets[self._next]
            assert bucket.flat is not None
            self._next += 1
            self._on_send(f"all_reduce[bucket {self._next} of {len(self._buckets)}]")
            bucket.work = self._reduce(self._next - 1, bucket.flat)

    def _reduce(self, index: int, flat: torch.Tensor) -> Any:
        if self._comm_hook is None:
            return dist.all_reduce(flat, group=self.process_group, async_op=True)
        state, hook = self._comm_hook
        state = _default_group() if state is _default_group else state
        parameters = list(self._buckets[index].parameters.values())
        return hook(state, GradBucket(flat, index, parameters, index == len(self._buckets) - 1))

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
            self._got_gradient = self._tell(*self._got_gradient)  # on any rank
        gone = [self._names[i] for bucket in self._buckets for i in self._wait_for(bucket)]
        self._got_gradient = [0] * len(self._trained)
        self._reset()
        if gone:
            raise RuntimeError(TAKEN.format(", ".join(gone)))

    def _wait_for(self, bucket: Bucket) -> list[int]:
        """Let the parameters have the bucket's means -> those whose gradient is no longer where they go."""
        assert bucket.flat is not None
        result, gone = bucket.work.wait(), []
        if self._comm_hook is not None:
            _copy_result(result, bucket.flat)
        for i, parameter in bucket.parameters.items():
            view = bucket.views[i]
            if i in bucket.unused:
                if self._got_gradient[i]:
                    parameter.grad = view if bucket.as_views else view.clone()
            elif parameter.grad is None or (bucket.as_views and parameter.grad.data_ptr() != view.data_ptr()):
                gone.append(i)
            elif parameter.grad is not view and not bucket.as_views:
                parameter.grad.copy_(view)
        return gone

    def _reset(self, abandoned: bool = False) -> None:
        # _next: the first bucket that has not been sent
        self._in_backward, self._expected, self._next = False, self._triggered, 0
        # What a gradient is multiplied by; a communication hook divides by itself.
        self._share = 1.0 if self._comm_hook else 1 / dist.get_world_size(self.process_group)
        for bucket in self._buckets:
            if abandoned:  # an all-reduce may still write there
                bucket.flat = None
            bucket.close()

    # ---- Edge cases from here on ------------------------------------------------------------------------------------

    def join_after_failure(self) -> None:
        """Take part in the all-reduces of a backward that failed here (out of memory), so that no other rank waits.

        The gradients are then wrong on all ranks: throw them away.
        """
        self._in_backward = True
        for i in [i for bucket in self._buckets for i in sorted(bucket.waiting_for)]:
            self._put_into(self._bucket_of[i], i)
        self._finish()

    def __getstate__(self) -> dict[str, Any]:
        """What a copy takes along. Hooks stay with the old parameters, and buckets hold these: it sets up its own."""
        if self.process_group not in (None, dist.group.WORLD):
            raise RuntimeError("with a process_group of its own it cannot be copied or saved whole: copy its .module")
        fresh: dict[str, Any] = {name: [] for name in ("_buckets", "_trained", "_names", "_got_gradient")}
        fresh |= {"_bucket_of": {}, "_known": set(), "_in_charge": False, "_in_backward": False, "_on_send": str}
        hook_state = self._comm_hook[0] if self._comm_hook else None
        if self._comm_hook and isinstance(hook_state, dist.ProcessGroup) and hook_state == dist.group.WORLD:
            fresh["_comm_hook"] = (_default_group, self._comm_hook[1])  # a group itself cannot be copied
        return self.__dict__ | fresh

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._sync_buffers_next &= dist.is_initialized()  # a loaded one may be there to predict, alone

    def _take_charge(self) -> None:
        """Become the one wrapper that averages these gradients: a second one would average half-averaged ones."""
        for name, parameter in zip(self._names, self._trained, strict=True):
            other = _in_charge_of.get(parameter, lambda: None)()
            if other is not None and other is not self:
                if other.module is not self.module:
                    raise ValueError(f"another DistributedDataParallel, of another module, averages {name}: delete it")
                other._in_charge = False  # until its own next forward
            _in_charge_of[parameter] = weakref.ref(self)
        self._in_charge = True

    def _named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """All but the ignored; a tied one comes once."""
        return [pair for pair in self.module.named_parameters() if pair[0] not in self.parameters_to_ignore]

    def _copy_from(self, source: int, parameters: bool = True, buffers: bool = True) -> None:
        """Overwrite this rank's parameters or buffers, or both, with those of rank `source` of the group."""
        tensors: list[torch.Tensor] = [parameter for _, parameter in self._named_parameters()] if parameters else []
        if buffers:  # the module is asked each time: it may have replaced one, as `self.n = self.n + 1` does
            tensors += [b for name, b in self.module.named_buffers() if name not in self.parameters_to_ignore]
        broadcast_from_rank(tensors, self.process_group, source)

    def _will_sync(self) -> bool:
        return torch.is_grad_enabled() and self.require_backward_grad_sync

    # Communication hooks

    def register_comm_hook(self, state: Any, hook: Callable[..., Any]) -> None:
        """Let `hook(state, bucket) -> Future` average each bucket, in place of all_reduce (source: torch's method).

        `bucket` is a `GradBucket`; the future's value is a tensor of as many elements as its buffer. torch's own hooks
        fit, such as torch.distributed.algorithms.ddp_comm_hooks.default_hooks.fp16_compress_hook.
        """
        if not callable(hook):
            raise TypeError("a communication hook must be callable")
        if self._comm_hook is not None:
            raise RuntimeError("register_comm_hook can only be called once")
        self._comm_hook, self._share = (state, hook), 1.0

    def _tell(self, *numbers: int) -> list[int]:
        """The greatest of each number over the ranks."""
        greatest = torch.tensor(numbers, dtype=torch.int32, device=self._trained[0].device)
        dist.all_reduce(greatest, dist.ReduceOp.MAX, group=self.process_group)
        return greatest.tolist()


@dataclass
class GradBucket:
    """A bucket as a communication hook sees it (source: torch.distributed.GradBucket, which Python cannot make)."""

    _buffer: torch.Tensor
    _index: int
    _parameters: list[nn.Parameter]
    _last: bool

    def buffer(self) -> torch.Tensor:
        """The gradients in one flat tensor (elements,), not divided by the number of ranks."""
        return self._buffer

    def set_buffer(self, tensor: torch.Tensor) -> None:
        """Put another tensor of as many elements in the buffer's place."""
        self._buffer = tensor

    def gradients(self) -> list[torch.Tensor]:
        """Pieces of the buffer, shaped as the parameters."""
        pieces = self._buffer.split([parameter.numel() for parameter in self._parameters])
        return [piece.view(parameter.shape) for piece, parameter in zip(pieces, self._parameters, strict=True)]

    def parameters(self) -> list[nn.Parameter]:
        """Those whose gradients are in the buffer."""
        return self._parameters

    def index(self) -> int:
        """Its number, in the order in which buckets are sent."""
        return self._index

    def is_last(self) -> bool:
        """Whether it is the last bucket of a backward."""
        return self._last


def broadcast_from_rank(
    tensors: Sequence[torch.Tensor], group: dist.ProcessGroup | None = None, source: int = 0
) -> None:
    """Overwrite the tensors, in place, with those of a rank of the group: one broadcast for each dtype and device."""
    kinds: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor.detach())
    for same in kinds.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in same])
        dist.broadcast(flat.view(torch.uint8), group=group, group_src=source)  # bytes: gloo lacks int16 and float8
        for tensor, values in zip(same, flat.split([tensor.numel() for tensor in same]), strict=True):
            # `.data`: unseen by autograd, which holds BatchNorm's buffers of the forward before and would complain.
            tensor.data.copy_(values.view_as(tensor))


def holders(tensor: torch.Tensor) -> int:
    """How many tensors share the tensor's memory, itself included."""
    # underneath: a storage has no public count of its users; asking creates one more, which is subtracted
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) - 1


OLD_NAME = "broadcast_buffers is the old name of forward_sync_buffers, which comes first where both are passed"
NO_GROUP = "DistributedDataParallel needs a process group: call init_world first"
TAKEN = "{}: the gradient was taken or replaced before it was averaged; no optimizer can step in backward here"

# The wrapper that averages a parameter's gradient (parameter -> weak reference): never two of them at once.
_in_charge_of = WeakIdKeyDictionary()


def _hook(wrapper: weakref.ref[DistributedDataParallel], i: int, _: torch.Tensor) -> None:
    ddp = wrapper()
    if ddp is not None and ddp._in_charge:
        ddp._gradient_is_there(i)


def _note(came_through: list[int], _: Any) -> None:
    came_through[0] = torch._C._current_graph_task_id()


def _default_group() -> Any:
    return dist.group.WORLD


def _copy_result(result: Any, flat: torch.Tensor) -> None:
    """Put what a communication hook's future has given into the bucket."""
    if not isinstance(result, torch.Tensor) or result.numel() != flat.numel():
        raise RuntimeError(f"a communication hook's future must give a tensor of {flat.numel()} elements, not {result}")
    if result.data_ptr() != flat.data_ptr():
        flat.copy_(result.view(-1))


def _refuse(**arguments: Any) -> None:
    """Raise for what torch takes and this does not: every default here is None, False or 0."""
    for name, value in arguments.items():
        if value:
            raise NotImplementedError(f"{name}={value!r} is not supported: leave it out")


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
