"""nanofinetune.dropin.parallel beside torch 2.13's `DistributedDataParallel`, on two gloo ranks and bit for bit.

OMP_NUM_THREADS=1 python -m pytest tests/dropin/test_parallel.py
"""

import copy
import threading
import warnings
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ddp_pairs import SMALL, TorchDDP, assert_same, batch, convolution, differs_between_ranks, pair, step
from helpers import run_world
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.nn.functional import cross_entropy

from nanofinetune import Accelerator, DistributedDataParallel
from nanofinetune.dropin.parallel import POST_FORWARD, PRE_FORWARD

MANY_BUCKETS = partial(DistributedDataParallel, bucket_cap_mb=SMALL)


# ---- ranks with different numbers of batches -------------------------------------------------------------------------


class Sometimes(nn.Module):
    """Uses one of its layers on even rows only."""

    def __init__(self):
        super().__init__()
        self.always, self.sometimes = nn.Linear(3, 11), nn.Linear(3, 11)
        self.norm = nn.BatchNorm1d(11)

    def forward(self, x):  # (rows, 3, 7, 7) -> (rows, 11)
        x, even = x.mean((2, 3)), x[0, 0, 0, 0] > 0
        return self.norm(self.always(x) + (self.sometimes(x) if even else 0))


def uneven(world):
    for make, options in ((convolution, {}), (Sometimes, {"find_unused_parameters": True})):
        for divide in (True, False):
            mine, reference = pair(world.rank, DistributedDataParallel, make, **options)
            for model in (mine, reference):
                optimizer = torch.optim.SGD(model.parameters(), 0.05)
                with model.join(divide_by_initial_world_size=divide):
                    for seed in range(2 + 3 * world.rank):
                        rows, labels = batch(2 * seed + world.rank)
                        optimizer.zero_grad()
                        if seed == 1:
                            with model.no_sync():
                                cross_entropy(model(rows), labels).backward()
                        cross_entropy(model(rows), labels).backward()
                        optimizer.step()
                assert not differs_between_ranks(model.parameters())
            assert_same(mine.state_dict().values(), reference.state_dict().values(), (make, divide))
            for seed in (0, 2) if make is convolution else ():  # and on after the block
                grads = [step(model, *batch(seed + world.rank)) for model in (mine, reference)]
                assert_same(grads[0], grads[1], (make, divide))
    mine, reference = pair(world.rank, DistributedDataParallel)
    texts = []
    for model in (mine, reference):
        with pytest.raises(RuntimeError) as failure, model.join(throw_on_early_termination=True):
            for seed in range(1 + world.rank):
                step(model, *batch(seed))
        texts.append(str(failure.value))
        with model.join(enable=False):
            step(model, *batch(world.rank))
    assert texts[0] == texts[1]
    return texts[0]


def test_join_matches_torch_ddp():
    zero, one = run_world(uneven, 2)
    assert zero == "Rank 0 exhausted all inputs."
    assert one.startswith("Detected at least one rank that exhausted inputs.")


def hooked_and_uneven(world):
    mine, reference = pair(world.rank, MANY_BUCKETS)
    for model in (mine, reference):
        model.register_comm_hook(None, default_hooks.fp16_compress_hook)
        with model.join():
            for seed in range(1 + 2 * world.rank):
                step(model, *batch(2 * seed + world.rank))
        with model.join():  # the other one has more now
            for seed in range(3 - 2 * world.rank):
                step(model, *batch(2 * seed + world.rank))
    assert_same(mine.state_dict().values(), reference.state_dict().values())


def test_join_with_a_hook_matches_torch_ddp():
    run_world(hooked_and_uneven, 2)


# ---- buckets of sizes of one's own -----------------------------------------------------------------------------------


def listed(world):
    for caps in ([1e-4, 2e-4], [2e-4, 1e-4, 4e-4], [1.0]):
        mine, reference = pair(world.rank, DistributedDataParallel, bucket_cap_mb_list=caps)
        assert mine.bucket_bytes_cap_list == reference.bucket_bytes_cap_list
        for seed in (0, 2):
            assert_same(*(step(model, *batch(seed + world.rank)) for model in (mine, reference)))
    return len(mine._buckets)


def test_a_list_of_bucket_sizes_matches_torch_ddp():
    assert run_world(listed, 2) == [1, 1]


# ---- backwards that come from elsewhere ------------------------------------------------------------------------------


class Hidden(nn.Module):
    """Returns nothing that its backward could come through: the loss is an attribute."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x):
        self.loss = self.layer(x).square().mean()


def probe(world):
    """What rank 0 has after a backward of its own between forwards and backwards, and the ranks' common gradients."""
    rows = torch.full((2, 3), 1.0 + world.rank)
    seen = []
    for wrapper in (DistributedDataParallel, TorchDDP):
        model: Any = wrapper(nn.Linear(3, 1))
        model(rows).square().mean().backward()
        model.zero_grad()
        if world.rank == 0:
            model.module(rows).sum().backward()
            seen.append(model.module.weight.grad.tolist())
            model.zero_grad()
        model(rows).sum().backward()  # the other rank's backward, and not the next
        seen.append(model.module.weight.grad.tolist())
    mine, theirs = pair(world.rank, DistributedDataParallel, Hidden)
    for model in (mine, theirs):
        model(rows)
        model.module.loss.backward()
    assert_same(*([p.grad for p in model.parameters()] for model in (mine, theirs)))
    return seen


def test_a_probe_of_one_rank_stays_there_as_in_torch():
    zero, one = run_world(probe, 2)
    assert zero == [[[2.0] * 3], [[3.0] * 3]] * 2
    assert one == [[[3.0] * 3]] * 2


def in_its_place(world):
    rows, seen = torch.full((2, 3), 1.0 + world.rank), []
    for wrapper in (DistributedDataParallel, TorchDDP):
        model: Any = wrapper(nn.Linear(3, 1))
        loss = model(rows).sum()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            (model.module(rows).sum() * 2).backward()
        for backward in (loss.backward, lambda: None):
            seen.append(model.module.weight.grad.tolist()[0][0])
            backward()
        seen.append([str(warning.message) for warning in said])
    return seen


def test_a_backward_in_anothers_place_is_said_where_torch_is_silent():
    """Its gradient is 4 and 8, the forward's own 2 and 4: torch leaves that one to each rank."""
    (probed, mean, (text,), *torchs), other = run_world(in_its_place, 2)
    assert other == [6.0, 9.0, [text], 6.0, 10.0, []]
    assert (probed, mean, torchs) == (6.0, 9.0, [6.0, 8.0, []])
    assert "does not come through what that forward returned" in text


# ---- hooks for buffers -----------------------------------------------------------------------------------------------


def floats_of(buffers):
    """All but counts; `.data`, since backward holds the running statistics."""
    return [buffer.data for buffer in buffers.values() if buffer.is_floating_point()]


def total(model, buffers):
    for buffer in floats_of(buffers):
        dist.all_reduce(buffer, group=model.process_group)


def total_later(model, buffers):
    floats = floats_of(buffers)
    return [dist.all_reduce(buffer, group=model.process_group, async_op=True).get_future() for buffer in floats]


def as_without(model, buffers):
    model._default_broadcast_coalesced(list(buffers.values()))


def hooked_buffers(world):
    seen = []
    for hook in (total, total_later, as_without):
        for place in (PRE_FORWARD, POST_FORWARD):
            if (hook, place) == (total_later, PRE_FORWARD):
                continue  # forward writes to the buffers while they travel
            mine, reference = pair(world.rank, DistributedDataParallel)
            for model in (mine, reference):
                model._register_buffer_comm_hook(model, hook, place)
            for seed in (0, 2, 4):
                grads = [step(model, *batch(seed + world.rank)) for model in (mine, reference)]
                assert_same(*grads)
                assert_same(mine.module.buffers(), reference.module.buffers(), (hook, place))
            seen.append(differs_between_ranks(mine.module.buffers()))
    return seen


def test_a_hook_for_buffers_matches_torch_ddp():
    """Before and after forward, with futures, and with the broadcast that it stands in for."""
    for differs in run_world(hooked_buffers, 2):
        assert differs == [True, False, False, True, False]  # before forward: each rank's batch then makes them differ


def test_backward_waits_for_a_hook_for_buffers_as_torch_ddp_does(group_of_one):
    """For the futures that it returns, however late they are done."""
    for wrapper in (DistributedDataParallel, TorchDDP):
        late: list[torch.futures.Future] = []

        def hook(state, buffers, late=late):
            late.append(torch.futures.Future())
            threading.Timer(0.5, late[-1].set_result, (None,)).start()
            return late

        model = wrapper(convolution())
        model._register_buffer_comm_hook(None, hook)
        step(model, *batch(0))
        assert len(late) == 1 and late[0].done()


def test_a_hook_for_buffers_must_be_callable_and_does_not_go_with_join(group_of_one):
    model = DistributedDataParallel(convolution())
    with pytest.raises(TypeError, match="must be callable"):
        model._register_buffer_comm_hook(None, {})  # type: ignore[arg-type]
    model._register_buffer_comm_hook(model, total)
    with model.join(enable=False):
        model(batch(0)[0])
    with pytest.raises(NotImplementedError, match="a hook for buffers does not go with join"), model.join():
        model(batch(0)[0])


# ---- the names with an underscore ------------------------------------------------------------------------------------


def test_the_process_group_is_the_group_as_in_torch(group_of_one):
    ours, theirs = DistributedDataParallel(nn.Linear(2, 1)), TorchDDP(nn.Linear(2, 1))
    assert ours.process_group == theirs.process_group == dist.group.WORLD
    assert copy.deepcopy(ours).process_group == dist.group.WORLD


def test_the_wrapper_is_not_unwrapped_by_its_class_as_torchs_is(group_of_one):
    """The class's docstring says so, and what to call in place of it."""
    ours, theirs = DistributedDataParallel(nn.Linear(2, 1)), TorchDDP(nn.Linear(2, 1))
    assert not isinstance(ours, TorchDDP)
    names = [list(get_model_state_dict(model)) for model in (ours, theirs, ours.module)]
    assert names == [["module.weight", "module.bias"], ["weight", "bias"], ["weight", "bias"]]
    accelerator: Any = Accelerator(cpu=True)
    assert accelerator.unwrap_model(ours) is ours.module and list(accelerator.get_state_dict(ours)) == names[1]
    utils = pytest.importorskip("accelerate.utils", reason="accelerate (extra `test`) is what this is compared with")
    assert [utils.extract_model_from_parallel(model) is model for model in (ours, theirs)] == [True, False]


def test_the_parameters_that_are_looked_after_are_torchs(group_of_one):
    """Asked for them with their names, torch leaves no ignored one out: it looks for its mark on a tuple."""
    names, counts = [], []
    for kind in (DistributedDataParallel, TorchDDP):
        module = convolution()
        kind._set_params_and_buffers_to_ignore_for_model(module, ["0.weight", "1.running_mean"])
        assert kind(module).parameters_to_ignore == {"0.weight", "1.running_mean"}
        names.append({name for name, _ in kind._get_data_parallel_params(module, named_params=True)})
        counts.append(len(list(kind._get_data_parallel_params(module))))
    assert counts == [5, 5] and len(names[0]) == 5
    assert names[1] - names[0] == {"0.weight"}


def test_hooks_that_are_removed_average_nothing(group_of_one):
    sent: list[str] = []
    model = DistributedDataParallel(nn.Linear(2, 1), on_send=sent.append)
    loss = model(torch.ones(1, 2)).sum()
    model._remove_autograd_hooks()
    loss.backward()
    assert not sent
    model(torch.ones(1, 2)).sum().backward()
    assert sent == ["all_reduce[bucket 1 of 1]"]


def built_in(world):
    for kind in (dist.BuiltinCommHookType.ALLREDUCE, dist.BuiltinCommHookType.FP16_COMPRESS):
        mine, reference = pair(world.rank, DistributedDataParallel)
        for model in (mine, reference):
            model._register_builtin_comm_hook(kind)
        assert_same(*(step(model, *batch(world.rank)) for model in (mine, reference)))


def test_the_hooks_that_torch_has_in_cpp_match_it():
    run_world(built_in, 2)


def test_a_graph_can_be_called_static_afterwards(group_of_one):
    module = Sometimes()
    model = DistributedDataParallel(module)
    model._set_static_graph()
    rows = -batch(0)[0].abs()  # one of the layers is not used
    model(rows).sum().backward()
    assert module.sometimes.weight.grad is None and module.always.weight.grad is not None
