"""ranks/ddp.py and ranks/naive_ddp.py beside torch 2.13's `DistributedDataParallel`, on real gloo ranks.

On 2 ranks everything is compared bit for bit (a + b is b + a); on 3 ranks to 2 units in the last place of the largest
gradient, since the order of a sum of three depends on where in a bucket it stands.

    OMP_NUM_THREADS=1 python -m pytest tests/ranks/test_ddp.py
"""

import copy
from collections import Counter
from contextlib import ExitStack
from functools import partial

import pytest
import torch
import torch.distributed as dist
from helpers import run_world
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from nanofinetune.ranks.ddp import DistributedDataParallel, broadcast_from_rank, bucket_plan, large_alone
from nanofinetune.ranks.naive_ddp import NaiveDDP

TorchDDP = nn.parallel.DistributedDataParallel
MANY_BUCKETS = partial(DistributedDataParallel, bucket_cap_mb=1e-4)  # 104 bytes: nearly one bucket a parameter


class Tied(nn.Module):
    """A token classifier whose output layer is its embedding, with a frozen layer and a LayerNorm between."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.norm = nn.LayerNorm(8)
        self.output = nn.Linear(8, 11)
        self.output.weight = self.embedding.weight

    def forward(self, tokens):  # (rows, length) -> (rows, 11)
        return self.output(self.norm(self.frozen(self.embedding(tokens)))).mean(1)


class TwoDtypes(nn.Module):
    """Parameters of two dtypes, one of them with a gap between its rows in memory."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 5, dtype=torch.float64)
        self.gap = nn.Parameter(torch.randn(11, 10)[:, ::2])
        self.last = nn.Linear(11, 11)

    def forward(self, x):  # (rows, 6) -> (rows, 11)
        return self.last(self.first(x.double()).float() @ self.gap.t())


def convolution():
    """Buffers (running statistics and an int64 count) and a channels_last weight."""
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 11)
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs


CASES = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 300), nn.Tanh(), nn.Linear(300, 11)), lambda: torch.randn(4, 6)),
    "convolution": (convolution, lambda: torch.randn(4, 3, 7, 7)),
    "tied": (Tied, lambda: torch.randint(0, 11, (4, 5))),
    "two dtypes": (TwoDtypes, lambda: torch.randn(4, 6)),
}


def pair(make, rank, ours, **torch_options):
    """The same module, with other weights on each rank, wrapped by us and by torch."""
    modules = []
    for _ in range(2):
        torch.manual_seed(1000 + rank)
        modules.append(make())  # not deepcopy, which closes the gaps in a tensor's memory
    return ours(modules[0]), TorchDDP(modules[1], **torch_options)


def grads(wrapped):
    return {name: None if p.grad is None else p.grad.clone() for name, p in wrapped.named_parameters()}


def assert_same(ours, theirs, world=2):
    assert ours.keys() == theirs.keys()
    floats = [t for t in theirs.values() if t is not None and t.is_floating_point()]
    largest = max((t.abs().max().item() for t in floats), default=0.0)
    for name, expected in theirs.items():
        got = ours[name]
        assert (got is None) == (expected is None), (name, got, expected)
        if expected is None:
            continue
        assert got.dtype == expected.dtype and got.shape == expected.shape
        if world == 2:
            assert torch.equal(got, expected), (name, (got - expected).abs().max())
        else:
            atol = 4 * torch.finfo(torch.float32).eps * largest if expected.is_floating_point() else 0
            assert (got - expected).abs().max().item() <= atol, (name, got, expected)


def equal_on_all_ranks(tensors):
    tensors = list(tensors)
    first = [tensor.detach().clone() for tensor in tensors]
    broadcast_from_rank(first)
    same = torch.tensor(all(torch.equal(a, b) for a, b in zip(first, tensors, strict=True))).int()
    dist.all_reduce(same, dist.ReduceOp.MIN)  # rank 0 always agrees with itself
    return bool(same)


# ---- gradients -------------------------------------------------------------------------------------------------------


def train_beside_torch(world, ours):
    for make, batch in CASES.values():
        for set_to_none in (True, False):
            mine, reference = pair(make, world.rank, ours)
            assert mine.state_dict().keys() == reference.state_dict().keys()
            optimizers = [torch.optim.SGD(m.parameters(), 0.05, momentum=0.9) for m in (mine, reference)]
            torch.manual_seed(world.rank)
            for _ in range(3):
                x, y = batch(), torch.randint(0, 11, (4,))
                for model, optimizer in zip((mine, reference), optimizers, strict=True):
                    optimizer.zero_grad(set_to_none=set_to_none)
                    cross_entropy(model(x), y).backward()
                    assert equal_on_all_ranks(p.grad for p in model.parameters() if p.grad is not None)
                assert_same(grads(mine), grads(reference), world.size)
                for optimizer in optimizers:
                    optimizer.step()
            assert_same(mine.state_dict(), reference.state_dict(), world.size)


@pytest.mark.parametrize("ours", [NaiveDDP, DistributedDataParallel, MANY_BUCKETS], ids=["naive", "one", "many"])
@pytest.mark.parametrize("world", [2, 3])
def test_gradients_match_torch_ddp(ours, world):
    run_world(train_beside_torch, world, ours)


def one_gradient_of_three(world, ours):
    mine, reference = pair(partial(nn.Linear, 300, 1, bias=False), world.rank, ours)
    torch.manual_seed(0)
    x = torch.randn(1, 300)
    for model in (mine, reference):
        (model(x).sum() * (world.rank == 0)).backward()
    mean, expected = (next(iter(grads(model).values())) for model in (mine, reference))
    assert torch.equal(mean, expected) and torch.equal(mean, x * (1 / 3))
    assert not torch.equal(mean, x / 3)


def test_gradients_are_multiplied_by_a_third_as_in_torch():
    """One rank's gradient is not zero, so that no order of a sum matters: it comes back bit for bit as torch's."""
    run_world(one_gradient_of_three, 3, DistributedDataParallel)


def shard_beside_whole(world, ours):
    torch.manual_seed(0)
    whole, y = torch.randn(4 * world.size, 6), torch.randint(0, 11, (4 * world.size,))
    model = nn.Sequential(nn.Linear(6, 30), nn.Tanh(), nn.Linear(30, 11))
    mine = ours(copy.deepcopy(model))
    cross_entropy(model(whole), y).backward()
    rows = slice(4 * world.rank, 4 * world.rank + 4)

    def distance():
        mine.zero_grad()
        cross_entropy(mine(whole[rows]), y[rows]).backward()
        return max(
            (a.grad - b.grad).abs().max().item() for a, b in zip(mine.parameters(), model.parameters(), strict=True)
        )

    synced = distance()
    with mine.no_sync():
        alone = distance()
    return synced, alone


@pytest.mark.parametrize("ours", [NaiveDDP, DistributedDataParallel])
def test_gradients_match_one_process_on_the_whole_batch(ours):
    """Gradients are about 0.1; float32 sums over 12 rows in another order move them by some 1e-8."""
    for synced, alone in run_world(shard_beside_whole, 3, ours):
        assert synced < 1e-6
        assert alone > 1e-2  # and each rank's own gradient is something else


def accumulate_beside_torch(world, ours):
    for set_to_none in (True, False):
        make, batch = CASES["convolution"]
        mine, reference = pair(make, world.rank, ours)
        torch.manual_seed(world.rank)
        for _ in range(2):  # windows of two silent micro-batches and one that averages their sum
            xs, ys = [batch() for _ in range(3)], torch.randint(0, 11, (3, 4))
            for model in (mine, reference):
                model.zero_grad(set_to_none=set_to_none)
                with model.no_sync():
                    for x, y in zip(xs[:2], ys[:2], strict=True):
                        cross_entropy(model(x), y).backward()
                    assert not equal_on_all_ranks(p.grad for p in model.parameters())
                cross_entropy(model(xs[2]), ys[2]).backward()
                assert equal_on_all_ranks(p.grad for p in model.parameters())
            assert_same(grads(mine), grads(reference))
            if ours is DistributedDataParallel:  # the naive one brings buffers up to date more often
                assert_same(mine.state_dict(), reference.state_dict())
    with pytest.raises(KeyError), mine.no_sync():
        raise KeyError
    assert mine.require_backward_grad_sync
    for model in (mine, reference):  # two forwards, one backward
        model.zero_grad()
        cross_entropy(model(xs[0]) + model(xs[1]), ys[0]).backward()
    assert_same(grads(mine), grads(reference))


@pytest.mark.parametrize("ours", [NaiveDDP, DistributedDataParallel])
def test_no_sync_matches_torch_ddp(ours):
    run_world(accumulate_beside_torch, 2, ours)


def two_backwards(world):
    make, batch = CASES["mlp"]
    mine, reference = pair(make, world.rank, DistributedDataParallel)
    torch.manual_seed(world.rank)
    x, y = batch(), torch.randint(0, 11, (4,))
    for model in (mine, reference):
        losses = [cross_entropy(model(x), y), cross_entropy(model(-x), y)]
        for loss in losses:
            loss.backward()
    alone = copy.deepcopy(mine.module)
    alone.zero_grad()
    (cross_entropy(alone(x), y) + cross_entropy(alone(-x), y)).backward()
    for p in alone.parameters():
        dist.all_reduce(p.grad.div_(world.size))
    for p, expected in zip(mine.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad, expected.grad)
    return [equal_on_all_ranks(p.grad for p in model.parameters()) for model in (mine, reference)]


def test_second_backward_is_synchronised_where_torch_is_silent():
    """Two forwards, then two backwards: torch leaves the second one's gradients unaveraged, and says nothing."""
    assert run_world(two_backwards, 2) == [[True, False]] * 2


# ---- which backwards average -----------------------------------------------------------------------------------------


def everything():
    return nn.Sequential(nn.Linear(6, 30), nn.Tanh(), nn.Linear(30, 11))


def random_loop(world, ours, seeds, as_torch):
    """Forwards and backwards in a random order, and what every gradient is after each -> how often each came.

    Where ours averages a second backward, and torch does not (`as_torch` is False), torch's gradients are averaged
    here.
    """
    seen: Counter[str] = Counter()
    for seed in seeds:
        mine, reference = pair(everything, world.rank, ours)
        own, common = torch.Generator().manual_seed(2 * seed + world.rank), torch.Generator().manual_seed(seed)
        losses: list[tuple[list[torch.Tensor], bool]] = []  # of both models; whether its forward was synchronised
        awaited = False  # a synchronised forward has had no backward

        def draw(options, generator=common):
            return options[int(torch.randint(len(options), (), generator=generator))]

        for _ in range(30):
            kinds = ["forward", "forward in no_sync", "evaluation", "inner", *["one rank's"] * (not awaited)]
            kind = draw([*kinds, *["backward", "backward in no_sync", "sum", "again"] * bool(losses)])
            x = torch.randn(4, 6, generator=own)
            both, average = (mine, reference), False
            if kind == "evaluation":
                with torch.no_grad():
                    [model(x) for model in both]
            elif kind.startswith("forward"):
                with ExitStack() as stack:
                    if kind.endswith("no_sync"):
                        [stack.enter_context(model.no_sync()) for model in both]
                    losses.append(([model(x).square().mean() for model in both], kind == "forward"))
                awaited |= kind == "forward"
            elif kind in ("inner", "one rank's"):
                for model in both if kind == "inner" or world.rank == 0 else ():
                    (model.module if awaited else model.module[0])(x).square().mean().backward()
                kind += " where torch averages" * awaited
                awaited = False
            else:
                chosen = losses if kind == "sum" else [draw(losses)]
                average = not (as_torch or awaited) and any(synchronised for _, synchronised in chosen)
                with ExitStack() as stack:
                    if kind.endswith("no_sync"):
                        [stack.enter_context(model.no_sync()) for model in both]
                    for k in range(2):
                        torch.stack([each[k] for each, _ in chosen]).sum().backward(retain_graph=kind == "again")
                losses = [each for each in losses if kind == "again" or not any(each is one for one in chosen)]
                awaited = False
            if average:
                kind += " where torch does not average"
                for parameter in reference.parameters():
                    dist.all_reduce(parameter.grad.div_(2))
            assert_same(grads(mine), grads(reference))
            seen[kind] += 1
    return seen


@pytest.mark.parametrize("ours", [NaiveDDP, MANY_BUCKETS], ids=["naive", "many"])
def test_which_backwards_average_matches_torch_ddp(ours):
    """The naive one's always; the other one averages four kinds more, those after the first through a forward."""
    zero, one = run_world(random_loop, 2, ours, range(8), ours is NaiveDDP)
    assert zero == one
    assert len(zero) == (10 if ours is NaiveDDP else 14) and sum(zero.values()) == 240, zero


def compressed(world):
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

    make, batch = CASES["mlp"]
    mine, reference = pair(make, world.rank, DistributedDataParallel)
    exact = DistributedDataParallel(copy.deepcopy(mine.module))

    # Under its own name torch's DDP refuses it on a CPU.
    def hook(state, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        return bf16_compress_hook(state, bucket)

    mine.register_comm_hook(dist.group.WORLD, bf16_compress_hook)
    reference.register_comm_hook(dist.group.WORLD, hook)
    torch.manual_seed(world.rank)
    for _ in range(2):
        x, y = batch(), torch.randint(0, 11, (4,))
        for model in (mine, reference, exact):
            model.zero_grad()
            cross_entropy(model(x), y).backward()
        assert_same(grads(mine), grads(reference))
        for got, full in zip(grads(mine).values(), grads(exact).values(), strict=True):
            assert got.dtype == torch.float32 and not torch.equal(got, full)
            torch.testing.assert_close(got, full, rtol=2e-2, atol=2e-3)  # bfloat16 keeps 8 bits


def test_bf16_gradients_match_torch_ddp_with_its_bf16_hook():
    run_world(compressed, 2)


# ---- unused parameters -----------------------------------------------------------------------------------------------


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.always, self.sometimes, self.never = (nn.Linear(6, 11) for _ in range(3))

    def forward(self, x, sometimes):
        return self.always(x) + (self.sometimes(x) if sometimes else 0)


def unused_beside_torch(world):
    for set_to_none in (True, False):
        mine, reference = pair(
            Branches,
            world.rank,
            partial(MANY_BUCKETS, find_unused_parameters=True),
            find_unused_parameters=True,
        )
        torch.manual_seed(world.rank)
        #                 nobody, rank 0, both,  rank 1, nobody
        for users in [(), (0,), (0, 1), (1,), ()]:
            x, y = torch.randn(4, 6), torch.randint(0, 11, (4,))
            for model in (mine, reference):
                model.zero_grad(set_to_none=set_to_none)
                cross_entropy(model(x, world.rank in users), y).backward()
            assert_same(grads(mine), grads(reference))
            assert mine.module.never.weight.grad is None
            if users:
                assert mine.module.sometimes.weight.grad.abs().sum() > 0
        for model in (mine, reference):  # used in a silent micro-batch of one rank only
            model.zero_grad()
            with model.no_sync():
                cross_entropy(model(x, world.rank == 1), y).backward()
            cross_entropy(model(x, False), y).backward()
        assert_same(grads(mine), grads(reference))
        assert mine.module.sometimes.weight.grad is not None


def test_unused_parameters_match_torch_ddp():
    run_world(unused_beside_torch, 2)


def unused_by_mistake(world):
    mine, reference = pair(Branches, world.rank, DistributedDataParallel)
    x = torch.randn(4, 6)
    with pytest.raises(RuntimeError) as ours:
        mine(x, True).sum().backward()
    reference(x, True).sum().backward()  # torch says nothing yet
    with pytest.raises(RuntimeError) as theirs:
        reference(x, True)
    dist.barrier()  # nobody hangs
    return str(ours.value), str(theirs.value)


def test_unused_parameter_is_named():
    for ours, theirs in run_world(unused_by_mistake, 2):
        assert ours.startswith("no gradient for never.weight, never.bias: the loss does not depend on them")
        assert "find_unused_parameters=True" in ours and "use_reentrant=True" in ours
        assert "Parameter indices which did not receive grad for rank" in theirs and "never" not in theirs


# ---- the ranks must hold the same model ------------------------------------------------------------------------------


def differing_models(world):
    texts = []
    for make in (
        lambda: nn.Linear(6, 2 + world.rank),
        lambda: nn.Linear(6, 2, dtype=torch.float64 if world.rank else torch.float32),
        lambda: nn.Linear(6, 2, bias=not world.rank),
        lambda: nn.Linear(6, 2).requires_grad_(not world.rank),
    ):
        with pytest.raises(RuntimeError) as failure:
            DistributedDataParallel(make())
        texts.append(str(failure.value))
    return texts


def test_differing_models_are_named_on_all_ranks():
    first, second = run_world(differing_models, 2)
    assert first == second
    shape, dtype, missing, frozen = first
    assert shape == (
        "the ranks wrap different models: rank 0 has ('weight', (2, 6), 'torch.float32', 'trained'),"
        " rank 1 has ('weight', (3, 6), 'torch.float32', 'trained')"
    )
    assert "torch.float64" in dtype and "no such parameter" in missing and "'frozen'" in frozen


# ---- one process is enough for these ---------------------------------------------------------------------------------


def test_bucket_plan_matches_torch():
    """torch assigns from the first parameter on; from the last on is our one difference, so hand it the reverse."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        count = int(torch.randint(1, 30, (1,), generator=generator))
        sizes = torch.randint(1, 200, (count,), generator=generator).tolist()
        kinds = torch.randint(0, 3, (count,), generator=generator).tolist()
        dtypes = [torch.float32, torch.float32, torch.bfloat16]
        parameters = [torch.empty(size, dtype=dtypes[kind]) for size, kind in zip(sizes, kinds, strict=True)]
        plan = bucket_plan(parameters, 256, 1024)
        theirs, _ = dist._compute_bucket_assignment_by_size(parameters[::-1], [256, 1024])
        assert sorted(plan) == sorted([[count - 1 - i for i in bucket] for bucket in theirs])
        assert [bucket[-1] for bucket in plan] == sorted((bucket[-1] for bucket in plan), reverse=True)


def test_the_default_buckets_are_of_1_and_25_mib(group_of_one):
    ours = DistributedDataParallel(nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(60))))  # 1 MiB each
    assert [len(bucket.parameters) for bucket in ours._buckets] == [1, 25, 25, 9]


def test_gradients_are_views_that_exist_once_and_stay(group_of_one):
    layers = nn.Linear(6, 300), nn.Linear(300, 300), nn.Linear(300, 9)
    model = DistributedDataParallel(nn.Sequential(*layers), bucket_cap_mb=0.1)
    assert [sorted(bucket.parameters) for bucket in model._buckets] == [[3, 4, 5], [2], [0, 1]]
    seen = []
    for _ in range(2):
        model(torch.ones(2, 6)).sum().backward()
        storages = [p.grad.untyped_storage() for p in model.parameters() if p.grad is not None]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        assert len(sizes) == len(model._buckets)
        assert sum(sizes.values()) == sum(p.numel() * 4 for p in model.parameters())
        seen.append([storages[0].data_ptr(), storages[-1].data_ptr()])  # not the large one's
        model.zero_grad()
    assert seen[0] == seen[1]


def test_a_large_gradient_is_reduced_where_it_lies(group_of_one):
    """A bucket of one parameter has no memory of its own: nothing is copied, and nothing is kept."""
    layer = nn.Linear(300, 300)
    model = DistributedDataParallel(layer, bucket_cap_mb=0.1)
    places: list[int] = []
    handle = layer.weight.register_hook(lambda grad: places.append(grad.data_ptr()))
    model(torch.ones(2, 300)).sum().backward()
    handle.remove()
    assert layer.weight.grad is not None and places == [layer.weight.grad.data_ptr()]
    (large,) = (bucket for bucket in model._buckets if 0 in bucket.parameters)
    assert large.flat is None and not large.views


class Shared(nn.Module):
    """Two parameters whose gradients autograd makes as views of one buffer."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(300, 300)), nn.Parameter(torch.randn(300, 300))

    def forward(self, x):  # (90_000,)
        return ((self.a.view(-1) + self.b.view(-1)) * x).sum()


def _shared(world):
    ours, theirs = pair(Shared, world.rank, partial(DistributedDataParallel, bucket_cap_mb=0.1))
    for step in range(3):
        torch.manual_seed(10 * world.rank + step)
        x = torch.randn(90_000)
        for model in (ours, theirs):
            model.zero_grad()
            model(x).backward()
        assert_same(grads(ours), grads(theirs))


def test_gradients_that_share_memory_match_torch_ddp():
    run_world(_shared, 2)


@pytest.mark.parametrize("large", [1, 400, 1024, 10**9])
def test_large_parameters_get_buckets_of_their_own(large):
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        sizes = torch.randint(1, 400, (12,), generator=generator).tolist()
        parameters = [torch.empty(size) for size in sizes]
        before = bucket_plan(parameters, 256, 1024)
        plan = large_alone(before, parameters, large)
        assert sorted(i for bucket in plan for i in bucket) == list(range(12))
        assert [bucket[-1] for bucket in plan] == sorted((bucket[-1] for bucket in plan), reverse=True)
        for bucket in plan:
            assert len(bucket) == 1 or all(4 * sizes[i] < large for i in bucket)
            assert any(set(bucket) <= set(other) for other in before)


def test_state_dict_matches_torch_ddp(group_of_one):
    ours, theirs = DistributedDataParallel(convolution()), TorchDDP(convolution())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert_same(ours.state_dict(), theirs.state_dict())


def test_a_backward_that_raises_half_way_does_not_spoil_the_next(group_of_one):
    first = nn.Linear(6, 5)
    model, x = DistributedDataParallel(nn.Sequential(first, nn.Linear(5, 4))), torch.ones(2, 6)

    def broken(grad):
        raise KeyError("half-way")

    handle = first.weight.register_hook(broken)
    with pytest.raises(KeyError):
        model(x).sum().backward()
    handle.remove()
    written = [bucket.flat for bucket in model._buckets]  # by an all-reduce that nobody has waited for
    model.zero_grad()
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not {bucket.flat for bucket in model._buckets} & set(written)


def test_buckets_leave_while_backward_runs(group_of_one, monkeypatch):
    """That is the overlap: the last layer's gradient is on its way before the first layer's is computed."""
    first = nn.Linear(6, 5, bias=False)
    layers = nn.Sequential(first, nn.Linear(5, 5, bias=False), nn.Linear(5, 4, bias=False))
    model = DistributedDataParallel(layers, bucket_cap_mb=1e-5)  # a bucket for each parameter
    events: list[str] = []
    all_reduce = dist.all_reduce

    def noted(tensor, **options):
        assert options["async_op"]
        events.append(f"all_reduce of {tensor.numel()}")
        return all_reduce(tensor, **options)

    first.weight.register_hook(lambda grad: events.append("the first layer's gradient"))
    monkeypatch.setattr(dist, "all_reduce", noted)
    model(torch.ones(2, 6)).sum().backward()
    assert events == ["all_reduce of 20", "all_reduce of 25", "the first layer's gradient", "all_reduce of 30"]


def test_wrapping_again_drops_the_first_wrapper(group_of_one, monkeypatch):
    module = nn.Linear(6, 5)
    first = DistributedDataParallel(module)
    del first  # nothing else holds it: its hooks are silent from now on
    second = DistributedDataParallel(module)
    sent = []
    all_reduce = dist.all_reduce

    def counted(tensor, **options):
        sent.append(tensor)
        return all_reduce(tensor, **options)

    monkeypatch.setattr(dist, "all_reduce", counted)
    second(torch.ones(2, 6)).sum().backward()
    assert len(sent) == 1


def test_gradient_checkpointing_works_unless_reentrant(group_of_one):
    class Checkpointed(nn.Module):
        def __init__(self, use_reentrant):
            super().__init__()
            self.first, self.last, self.use_reentrant = nn.Linear(6, 6), nn.Linear(6, 6), use_reentrant

        def forward(self, x):
            x = checkpoint(self.first, self.first(x), use_reentrant=self.use_reentrant)
            return checkpoint(self.last, x, use_reentrant=self.use_reentrant)

    model = DistributedDataParallel(Checkpointed(False))
    model(torch.ones(2, 6)).sum().backward()
    plain = copy.deepcopy(model.module)
    plain.zero_grad()
    plain(torch.ones(2, 6)).sum().backward()
    assert_same(grads(model.module), grads(plain))
    model = DistributedDataParallel(Checkpointed(True))
    with pytest.raises(RuntimeError, match=r"no gradient for first.weight, first.bias: .*use_reentrant=True"):
        model(torch.ones(2, 6)).sum().backward()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"comm_dtype": torch.bfloat16}, TypeError, "unexpected keyword argument 'comm_dtype'"),
        (
            {"device_ids": [0]},
            ValueError,
            r"device_ids=\[0\], output_device=None: the module's parameters are on .*cpu",
        ),
        ({"output_device": 1}, ValueError, "device_ids=None, output_device=1: the module's parameters are on .*cpu"),
    ],
)
def test_what_is_not_supported_is_refused(group_of_one, options, error, text):
    with pytest.raises(error, match=text):
        DistributedDataParallel(nn.Linear(2, 2), **options)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")  # torch, for the second one
def test_what_is_not_supported_in_backward_is_refused(group_of_one):
    sparse = DistributedDataParallel(nn.Embedding(3, 2, sparse=True))
    with pytest.raises(NotImplementedError, match="weight: neither create_graph=True nor sparse gradients"):
        sparse(torch.tensor([1])).sum().backward()
    twice = DistributedDataParallel(nn.Linear(2, 2))
    with pytest.raises(NotImplementedError, match=r"create_graph=True"):
        twice(torch.ones(1, 2)).square().sum().backward(create_graph=True)


def test_frozen_and_thawed_parameters(group_of_one):
    with pytest.raises(RuntimeError, match="no parameter of the module requires a gradient"):
        DistributedDataParallel(nn.Linear(2, 2).requires_grad_(False))
    model = DistributedDataParallel(Tied())
    model.module.frozen.requires_grad_(True)
    with pytest.raises(
        RuntimeError, match=r"frozen, or not there, when the module was wrapped.*\['frozen.w.*', 'frozen.b.*'\]"
    ):
        model(torch.ones(1, 2, dtype=torch.long))


def test_without_a_process_group():
    with pytest.raises(RuntimeError, match="needs a process group: call init_world first"):
        DistributedDataParallel(nn.Linear(2, 2))
