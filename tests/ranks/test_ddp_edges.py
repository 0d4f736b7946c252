"""ranks/ddp.py beside torch 2.13's `DistributedDataParallel` where a loop does more than forward, backward, step.

Copies, kept gradients, replaced buffers, ignored parameters, every argument, communication hooks. On 2 real gloo ranks
and bit for bit, where nothing else is said.

    OMP_NUM_THREADS=1 python -m pytest tests/ranks/test_ddp_edges.py
"""

import copy
import inspect
import io
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ddp_pairs import SMALL, TorchDDP, assert_same, batch, convolution, differs_between_ranks, pair, step
from helpers import run_world
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.functional import cross_entropy

from nanofinetune.ranks.ddp import DistributedDataParallel
from nanofinetune.ranks.naive_ddp import NaiveDDP

MANY_BUCKETS = partial(DistributedDataParallel, bucket_cap_mb=SMALL)


# ---- copies ----------------------------------------------------------------------------------------------------------


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
    "copy": copy.copy,
}


def train_copies(world, ours):
    for name, way in WAYS.items():
        mine, reference = pair(world.rank, ours)
        for model in (mine, reference):
            step(model, *batch(world.rank))
        copies = [way(model) for model in (mine, reference)]
        for seed in (2, 4):  # the copy, and what was copied
            for k, models in enumerate((copies, (mine, reference))):
                grads = [step(model, *batch(seed + world.rank)) for model in models]
                assert not differs_between_ranks(grads[0]), (name, seed, k)
                assert_same(*grads)
        if ours is not NaiveDDP:  # the naive one makes buffers rank 0's more often
            assert_same(copies[0].state_dict().values(), copies[1].state_dict().values(), name)
        assert not differs_between_ranks(step(way(copies[0]), *batch(world.rank))), name  # a copy of a copy


@pytest.mark.parametrize("ours", [NaiveDDP, MANY_BUCKETS], ids=["naive", "many"])
def test_copies_average_as_torchs_do(ours):
    run_world(train_copies, 2, ours)


def test_a_loaded_wrapper_works_without_a_group_but_does_not_train(group_of_one, tmp_path):
    model = DistributedDataParallel(convolution())
    rows, labels = batch(0)
    step(model, rows, labels)
    torch.save(model, tmp_path / "model.pt")
    dist.destroy_process_group()
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert_same(loaded.state_dict().values(), model.state_dict().values())
    with torch.no_grad():
        loaded.eval()(rows)
    with pytest.raises(RuntimeError, match="needs a process group: call init_world first"):
        loaded(rows)
    with pytest.raises((RuntimeError, ValueError), match=r"[Pp]rocess [Gg]roup"):
        torch.load(io.BytesIO(_saved_by_torch()), weights_only=False)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    step(loaded, rows, labels)


def _saved_by_torch():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    file = io.BytesIO()
    torch.save(TorchDDP(nn.Linear(2, 1)), file)
    dist.destroy_process_group()
    return file.getvalue()


def test_a_copy_of_a_model_in_a_group_of_its_own_is_refused_as_in_torch(group_of_one):
    group = dist.new_group()
    with pytest.raises(RuntimeError, match="only supported when using DDP with the default process group"):
        copy.deepcopy(TorchDDP(nn.Linear(2, 1), process_group=group))
    ours = DistributedDataParallel(nn.Linear(2, 1), process_group=group)
    with pytest.raises(RuntimeError, match="with a process_group of its own it cannot be copied or saved whole"):
        copy.deepcopy(ours)
    copy.deepcopy(DistributedDataParallel(nn.Linear(2, 1), process_group=dist.group.WORLD))  # the default one


def two_wrappers(world):
    """Wrapped twice, both alive: each averages once; the library's would too."""
    module = nn.Linear(6, 11)
    models = [DistributedDataParallel(module) for _ in range(2)]
    plain = copy.deepcopy(module)
    torch.manual_seed(world.rank)
    rows = torch.randn(4, 6)
    plain(rows).sum().backward()
    mean = torch.stack([parameter.grad for parameter in plain.parameters() if parameter.grad is not None][:1])[0] / 2
    dist.all_reduce(mean)
    for model in (models[0], models[1], models[0], models[0]):
        model.zero_grad()
        model(rows).sum().backward()
        assert_same([module.weight.grad], [mean])
    with pytest.raises(ValueError, match=r"another DistributedDataParallel, of another module, averages 0\.weight"):
        DistributedDataParallel(nn.Sequential(module, nn.Linear(11, 2)))


def test_of_two_wrappers_around_a_module_the_one_that_is_called_averages():
    run_world(two_wrappers, 2)


# ---- buffers that the module replaces, or registers later ------------------------------------------------------------


class Counting(nn.Module):
    """A buffer that is replaced in each forward, and one that is there from the second forward on."""

    seen: torch.Tensor

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        if self.seen.item() and not hasattr(self, "late"):
            self.register_buffer("late", x.mean().detach().clone())
        self.seen = self.seen + x.mean().detach()
        return self.layer(x)


def count(world, ours):
    mine, reference = pair(world.rank, ours, Counting)
    for k in range(4):
        for model in (mine, reference):
            model(torch.full((1, 2), 1.0 + world.rank + k)).sum().backward()
    if ours is not NaiveDDP or world.rank == 0:
        assert_same(mine.state_dict().values(), reference.state_dict().values())
    with torch.no_grad():  # and now they are rank 0's
        for model in (mine, reference):
            model(torch.zeros(1, 2))
    return [(model.module.seen.item(), model.module.late.item()) for model in (mine, reference)]


@pytest.mark.parametrize("ours", [NaiveDDP, DistributedDataParallel])
def test_replaced_and_late_buffers_are_broadcast_as_in_torch(ours):
    (zero, zero_torch), (one, one_torch) = run_world(count, 2, ours)
    assert zero == zero_torch == one_torch
    assert one == zero or ours is NaiveDDP  # which does not broadcast in evaluation


# ---- gradients that somebody keeps -----------------------------------------------------------------------------------


def keep(world, options):
    made = [nn.Linear(6, 5), nn.Linear(5, 300), nn.Linear(300, 11)]
    mine, reference = pair(
        world.rank,
        partial(DistributedDataParallel, bucket_cap_mb=0.01, **options),
        lambda: copy.deepcopy(nn.Sequential(*made)),
    )
    kept: list[list[list[torch.Tensor]]] = [[], []]
    for seed in range(4):
        torch.manual_seed(2 * seed + world.rank)
        rows, labels = torch.randn(4, 6), torch.randint(0, 11, (4,))
        for model, grads in zip((mine, reference), kept, strict=True):
            model.zero_grad()
            if seed == 2:  # a micro-batch that is accumulated before
                with model.no_sync():
                    cross_entropy(model(-rows), labels).backward()
            cross_entropy(model(rows), labels).backward()
            grads.append([parameter.grad for parameter in model.parameters()])
            for ours, theirs in zip(*kept, strict=False):
                assert_same(ours, theirs, seed)
    sizes = [grad.untyped_storage().nbytes() for grad in kept[0][-1]]
    return sizes, [parameter.numel() * 4 for parameter in mine.parameters()]


@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": False}], ids=["default", "no views"])
def test_a_kept_gradient_stays_as_it_is_as_in_torch(options):
    for sizes, own in run_world(keep, 2, options):
        assert sizes == own  # and does not keep its whole bucket, once it is known that somebody keeps them


def keep_while_accumulating(world):
    """Without set_to_none, a kept gradient is `.grad` itself, here as in torch."""
    mine, reference = pair(world.rank)
    kept: list[list[torch.Tensor]] = []
    for model in (mine, reference):
        step(model, *batch(world.rank))
        kept.append([parameter.grad.view(-1) for parameter in model.parameters()])
    for seed in (2, 4):
        for model in (mine, reference):
            model.zero_grad(set_to_none=False)
            rows, labels = batch(seed + world.rank)
            cross_entropy(model(rows), labels).backward()
        assert_same(kept[0], kept[1])
        assert_same(*([parameter.grad for parameter in model.parameters()] for model in (mine, reference)))


def test_gradients_that_are_accumulated_in_place_match_torch():
    run_world(keep_while_accumulating, 2)


def test_gradients_of_their_own_are_no_views(group_of_one):
    """gradient_as_bucket_view=False: what is written into a gradient is in no bucket, and the other way round."""
    model = DistributedDataParallel(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), gradient_as_bucket_view=False)
    for _ in range(2):
        model.zero_grad()
        model(torch.ones(2, 6)).sum().backward()
        (bucket,) = model._buckets
        places = [
            grad.untyped_storage().data_ptr() for grad in (p.grad for p in model.parameters()) if grad is not None
        ]
        assert len(places) == 4 and bucket.flat is not None and bucket.flat.untyped_storage().data_ptr() not in places


# ---- what is left alone, and who takes gradients too soon ------------------------------------------------------------


def ignore(world):
    def make():
        module = convolution()
        TorchDDP._set_params_and_buffers_to_ignore_for_model(module, ["0.weight", "1.running_mean"])
        return module

    mine, reference = pair(world.rank, make=make)
    for seed in (0, 2):
        grads = [step(model, *batch(seed + world.rank)) for model in (mine, reference)]
        assert_same(*grads)
        assert differs_between_ranks(grads[0][:1]) and not differs_between_ranks(grads[0][1:])
        assert_same(mine.state_dict().values(), reference.state_dict().values())
    assert differs_between_ranks([mine.module[0].weight]) and differs_between_ranks([mine.module[1].running_mean])
    mine.module[0].weight.requires_grad_(False)
    step_of_the_rest = mine(batch(0)[0])
    assert step_of_the_rest.requires_grad


def test_ignored_parameters_and_buffers_match_torch():
    run_world(ignore, 2)


def optimizer_in_hooks(module):
    """The usual recipe for an optimizer that steps in backward, to save the memory of the gradients."""
    optimizers = {parameter: torch.optim.SGD([parameter], 0.1) for parameter in module.parameters()}

    def take(parameter):
        optimizers[parameter].step()
        parameter.grad = None

    for parameter in module.parameters():
        parameter.register_post_accumulate_grad_hook(take)


def optimizers_in_backward(world):
    rows = torch.full((1, 2), 1.0 + world.rank)
    texts, apart = [], []
    for before in (True, False):
        for kind in (DistributedDataParallel, TorchDDP):
            module = nn.Linear(2, 1)
            if before:
                optimizer_in_hooks(module)
            model = kind(module)
            if not before:
                optimizer_in_hooks(module)
            try:
                model(rows).sum().backward()
            except RuntimeError as failure:
                texts.append(str(failure))
            else:
                apart.append(differs_between_ranks(module.parameters()))
    return texts, apart


def test_an_optimizer_in_backward_is_refused_where_torch_trains_ranks_apart():
    for texts, apart in run_world(optimizers_in_backward, 2):
        assert [text.partition(":")[0] for text in texts] == ["bias", "bias, weight"]
        assert all("no optimizer can step in backward here" in text for text in texts)
        assert apart == [True, True]


@pytest.mark.filterwarnings(r"ignore:.torch.jit.\w+. is deprecated:DeprecationWarning")  # torch's own import
def test_torchs_optimizers_in_backward_are_refused_by_name(group_of_one):
    from torch.distributed.optim import _apply_optimizer_in_backward

    module = nn.Linear(2, 1)
    _apply_optimizer_in_backward(torch.optim.SGD, module.parameters(), {"lr": 0.1})
    with pytest.raises(NotImplementedError, match=r"optimizers that step in backward are not supported: \['weight', "):
        DistributedDataParallel(module)


def test_parameters_that_are_replaced_or_added_are_named_where_torch_says_nothing(group_of_one):
    for change in (
        lambda model: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True),
        lambda model: model.module.register_parameter("weight", nn.Parameter(torch.ones(1, 2))),
    ):
        model = DistributedDataParallel(nn.Linear(2, 1))
        change(model)
        with pytest.raises(RuntimeError, match=r"nothing would average them: \['weight'.*wrap the module again"):
            model(torch.ones(1, 2))
    torch_model = TorchDDP(nn.Linear(2, 1))
    torch_model.module.register_parameter("late", nn.Parameter(torch.ones(1)))
    (torch_model(torch.ones(1, 2)) * torch_model.module.late).sum().backward()
    (torch_model(torch.ones(1, 2)) * torch_model.module.late).sum().backward()  # of this rank alone


# ---- arguments -------------------------------------------------------------------------------------------------------


def test_arguments_are_torchs_by_name_place_and_default():
    ours, theirs = (inspect.signature(kind.__init__).parameters for kind in (DistributedDataParallel, TorchDDP))
    taken = {name: p.default for name, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert list(taken) == list(theirs)
    differing = {name for name, default in taken.items() if default != theirs[name].default}
    assert differing == {"gradient_as_bucket_view"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dim", 1),
        ("check_reduction", True),
        ("delay_all_reduce_named_params", [("weight", nn.Parameter(torch.ones(1)))]),
        ("param_to_hook_all_reduce", nn.Parameter(torch.ones(1))),
        ("mixed_precision", object()),
        ("skip_all_reduce_unused_params", True),
        ("batched_grad_copy", True),
    ],
)
def test_an_argument_that_is_not_supported_is_refused_by_name(group_of_one, name, value):
    DistributedDataParallel(nn.Linear(2, 1), **{name: inspect.signature(TorchDDP.__init__).parameters[name].default})
    with pytest.raises(NotImplementedError, match=f"(?s)^{name}=.* is not supported: leave it out"):
        DistributedDataParallel(nn.Linear(2, 1), **{name: value})


@pytest.mark.parametrize("options", [(True, None), (False, None), (False, True), (True, False), (None, False)])
def test_the_old_name_of_forward_sync_buffers_is_taken_with_torchs_warning(group_of_one, options):
    """Where both are passed, the new name counts."""
    names = dict(zip(("broadcast_buffers", "forward_sync_buffers"), options, strict=True))
    seen = []
    for kind in (DistributedDataParallel, TorchDDP):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            model = kind(nn.Linear(2, 1), **names)
        assert [warning.filename for warning in said] == [__file__] * len(said)
        seen.append(([warning.category for warning in said], model.forward_sync_buffers))
    assert seen[0] == seen[1]


def synchronise(world):
    """What is equal on all ranks at the start, and after a synchronised forward, with each setting."""
    from torch.distributed.device_mesh import init_device_mesh

    seen = []
    for options in (
        {"init_sync": False},
        {"forward_sync_buffers": False},
        {"forward_sync_buffers": True},
        {"broadcast_buffers": False},
        {"device_mesh": init_device_mesh("cpu", (world.size,))},
    ):
        torch.manual_seed(7)
        weights = convolution().state_dict()
        both = []
        for kind in (DistributedDataParallel, TorchDDP):
            module = convolution()
            module.load_state_dict({name: value + world.rank for name, value in weights.items()})
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch's, about the name broadcast_buffers
                model = kind(module, **options)
            both.append([differs_between_ranks(model.parameters()), differs_between_ranks(model.buffers())])
            for seed in (0, 2):
                step(model, *batch(seed + world.rank))
            with torch.no_grad():
                model.eval()(batch(0)[0])
            both[-1].append(differs_between_ranks(model.buffers()))
        assert both[0] == both[1], options
        seen.append(both[0])
    return seen


def test_what_is_made_equal_at_the_start_and_in_forward_matches_torch():
    for seen in run_world(synchronise, 2):
        assert seen == [
            [True, True, False],
            [False, False, True],
            [False, False, False],
            [False, True, True],
            [False, False, False],
        ]


# ---- communication hooks ---------------------------------------------------------------------------------------------


def unchanged(state, bucket):
    """Reduces nothing."""
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def noted(state, bucket):
    """A sum in place of the mean, and a note of what the bucket says."""
    state.append((bucket.index(), bucket.is_last(), [tuple(p.shape) for p in bucket.parameters()]))
    assert [tuple(g.shape) for g in bucket.gradients()] == state[-1][2]
    assert sum(g.numel() for g in bucket.gradients()) == bucket.buffer().numel()
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda future: future.value()[0])


def bf16(state, bucket):
    """torch's `bf16_compress_hook` by another name: under its own, torch's DDP refuses it without NCCL."""
    return default_hooks.bf16_compress_hook(state, bucket)


def power():
    torch.manual_seed(0)
    return powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2)


HOOKS: dict[str, tuple[Callable[[], Any], Any]] = {
    "allreduce": (lambda: None, default_hooks.allreduce_hook),
    "fp16": (lambda: dist.group.WORLD, default_hooks.fp16_compress_hook),
    "bf16": (lambda: None, bf16),
    "nothing": (lambda: None, unchanged),
    "noted": (list, noted),
    "powerSGD": (power, powerSGD_hook.powerSGD_hook),
    "powerSGD in fp16": (power, default_hooks.fp16_compress_wrapper(powerSGD_hook.powerSGD_hook)),
}


def hooked(world):
    for name, (state, hook) in HOOKS.items():

        def make():
            return nn.Sequential(nn.Linear(6, 40), nn.Linear(40, 11))

        # one bucket, as torch's has here: what a hook computes may depend on what is in it
        mine, reference = pair(world.rank, make=make)
        states = [state(), state()]
        for model, its_state in zip((mine, reference), states, strict=True):
            model.register_comm_hook(its_state, hook)
        for seed in range(4):
            torch.manual_seed(2 * seed + world.rank)
            rows, labels = torch.randn(4, 6), torch.randint(0, 11, (4,))
            grads = [step(model, rows, labels) for model in (mine, reference)]
            assert differs_between_ranks(grads[0]) == (name == "nothing")
            if name.startswith("powerSGD"):  # sums of a flat bucket in torch's order of parameters, which is not ours
                for got, expected in zip(*grads, strict=True):
                    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
            else:
                assert_same(grads[0], grads[1], name)
        if name == "noted":
            assert states[0][:1] == [(0, True, [(11,), (11, 40), (40,), (40, 6)])]
            assert sorted(states[0][0][2]) == sorted(states[1][0][2]) and states[0][0][:2] == states[1][0][:2]
        copied = copy.deepcopy(mine)  # takes its hook along
        assert differs_between_ranks(step(copied, rows + world.rank, labels)) == (name == "nothing")


def test_communication_hooks_match_torch_ddp():
    run_world(hooked, 2)


def bucket_by_bucket(world):
    """A hook in many buckets, and on parameters that are not used everywhere."""
    mine, reference = pair(world.rank, partial(MANY_BUCKETS, gradient_as_bucket_view=world.size == 2))
    for model in (mine, reference):
        model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    for seed in range(3):
        assert_same(*(step(model, *batch(2 * seed + world.rank)) for model in (mine, reference)))


def test_a_hook_on_many_buckets_matches_torch_ddp():
    run_world(bucket_by_bucket, 2)


def by_accelerates_name(world):
    from nanofinetune.accelerator import Accelerator
    from nanofinetune.settings import DistributedDataParallelKwargs

    def make():
        return nn.Linear(6, 11)

    for name, hook in (("fp16", default_hooks.fp16_compress_hook), ("bf16", bf16)):
        mine, reference = pair(world.rank, lambda module: module, make)
        reference.register_comm_hook(None, hook)
        accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(comm_hook=name)])
        mine = accelerator.prepare(mine)
        torch.manual_seed(world.rank)
        rows, labels = torch.randn(4, 6), torch.randint(0, 11, (4,))
        assert_same(*(step(model, rows, labels) for model in (mine, reference)))


def test_comm_hook_of_the_kwargs_matches_torch():
    run_world(by_accelerates_name, 2)


def power_by_accelerates_name(world):
    from nanofinetune.accelerator import Accelerator
    from nanofinetune.settings import DistributedDataParallelKwargs

    option: dict[str, Any] = {"matrix_approximation_rank": 2, "start_powerSGD_iter": 2}
    for wrapper in ("no", "fp16"):
        settings = DistributedDataParallelKwargs(comm_hook="power_sgd", comm_wrapper=wrapper, comm_state_option=option)
        mine, reference = pair(world.rank, lambda module: module, lambda: nn.Linear(6, 11, bias=False))
        hook: Any = powerSGD_hook.powerSGD_hook
        hook = default_hooks.fp16_compress_wrapper(hook) if wrapper == "fp16" else hook
        reference.register_comm_hook(powerSGD_hook.PowerSGDState(None, **option), hook)
        mine = Accelerator(cpu=True, kwargs_handlers=[settings]).prepare(mine)
        for seed in range(4):  # PowerSGD begins after two
            torch.manual_seed(2 * seed + world.rank)
            rows, labels = torch.randn(4, 6), torch.randint(0, 11, (4,))
            ours, theirs = (step(model, rows, labels) for model in (mine, reference))
            assert_same(ours, theirs, f"{wrapper} {seed}")


def test_power_sgd_of_the_kwargs_matches_torch():
    run_world(power_by_accelerates_name, 2)


def a_buffer_replaced_before_the_first_forward(world):
    seen = []
    for make in (DistributedDataParallel, TorchDDP):
        torch.manual_seed(0)
        model: Any = make(nn.BatchNorm1d(2))
        if world.rank == 0:
            model.module.running_mean = model.module.running_mean + 1
        model.eval()(torch.ones(3, 2))
        seen.append(model.module.running_mean.clone())
    return torch.equal(*seen), seen[0].tolist()


def test_a_buffer_replaced_before_the_first_forward_matches_torch():
    assert run_world(a_buffer_replaced_before_the_first_forward, 2) == [(True, [1.0, 1.0])] * 2


def test_what_is_no_hook_is_refused_as_in_torch(group_of_one):
    for kind in (DistributedDataParallel, TorchDDP):
        model = kind(nn.Linear(2, 1))
        with pytest.raises(TypeError, match="must be callable"):
            model.register_comm_hook(None, "fp16")  # type: ignore[arg-type]
        model.register_comm_hook(None, default_hooks.allreduce_hook)
        with pytest.raises(RuntimeError, match="can only be called once"):
            model.register_comm_hook(None, default_hooks.allreduce_hook)

    def short(state, bucket):
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer()[:1])
        return future

    model = DistributedDataParallel(nn.Linear(2, 1))
    model.register_comm_hook(None, short)
    with pytest.raises(RuntimeError, match="future must give a tensor of 3 elements"):
        model(torch.ones(1, 2)).sum().backward()
