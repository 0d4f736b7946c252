"""step/optim.py against torch.optim.AdamW (torch 2.13), each of the three forms against torch's own, bit for bit.

Parameters and state tensors, over a matrix of settings, through state dicts both ways, and under torch.amp.GradScaler.
`decay_groups` against transformers.Trainer.get_decay_parameter_names (transformers 5.23), for nine architectures.

    python -m pytest tests/step/test_optim.py

Comparisons are torch.equal, since each form is the same sequence of the same operations. Only comparisons across forms
have a tolerance.
"""

import copy
import inspect
import io
import itertools
import pickle
import subprocess
import sys
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from conftest import tiny_bert
from torch.utils import _foreach_utils

from nanofinetune.step.optim import FUSED_DEVICES, FUSED_DTYPES, AdamW, choose_form, decay_groups

# form -> the arguments that ask for it, the same in torch and here
FLAGS: dict[str, dict[str, Any]] = {
    "loop": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
SHAPES = ((3, 4), (5,), (), (17, 3))
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def make_params(dtype=torch.float32, seed=0, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def set_grads(params, seed, scale=1.0):
    generator = torch.Generator().manual_seed(1000 + seed)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p.dtype)


def train(optimizer, steps, first=0):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(first, first + steps):
        set_grads(params, step)
        optimizer.step()
    return params


def clones(params):
    return [p.detach().clone().requires_grad_() for p in params]


def through_a_file(state_dict):
    """What a checkpoint does; also makes sure that no tensor is shared: torch's load_state_dict does not copy."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same(ours, theirs):
    """Equal parameters, equal state: names, dtypes, devices and bits."""
    for group, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        for p, q in zip(group["params"], other["params"], strict=True):
            assert torch.equal(p, q)
            assert list(ours.state[p]) == list(theirs.state[q])
            for name, value in theirs.state[q].items():
                mine = ours.state[p][name]
                assert torch.equal(mine, value), name
                assert (mine.dtype, mine.device, mine.shape) == (value.dtype, value.device, value.shape), name


def check_matrix(form, dtype, amsgrad, maximize, weight_decay):
    for lr, betas, eps in itertools.product((0.0, 1e-3, 0.3), ((0.9, 0.999), (0.0, 0.5)), (1e-8, 0.0, 1e-3)):
        arguments = (lr, betas, eps, weight_decay, amsgrad)
        ours = AdamW(make_params(dtype), *arguments, maximize=maximize, **FLAGS[form])
        theirs = torch.optim.AdamW(make_params(dtype), *arguments, maximize=maximize, **FLAGS[form])
        assert ours.form(ours.param_groups[0]) == form
        for first, steps in ((0, 1), (1, 4)):
            train(ours, steps, first)
            train(theirs, steps, first)
            assert_same(ours, theirs)
        if lr:
            assert not torch.equal(ours.param_groups[0]["params"][0], make_params(dtype)[0])


MATRIX = pytest.mark.parametrize(
    ("dtype", "amsgrad", "maximize", "weight_decay"),
    list(itertools.product(DTYPES, (False, True), (False, True), (0.0, 0.01, 0.3))),
)


@MATRIX
def test_loop_matches_torch_for_loop_adamw(dtype, amsgrad, maximize, weight_decay):
    check_matrix("loop", dtype, amsgrad, maximize, weight_decay)


@MATRIX
def test_foreach_matches_torch_foreach_adamw(dtype, amsgrad, maximize, weight_decay):
    check_matrix("foreach", dtype, amsgrad, maximize, weight_decay)


@MATRIX
def test_fused_matches_torch_fused_adamw(dtype, amsgrad, maximize, weight_decay):
    check_matrix("fused", dtype, amsgrad, maximize, weight_decay)


@pytest.mark.parametrize("form", FLAGS)
def test_many_steps_match_torch_adamw(form):
    """Bias corrections go from 1 - beta to 1: two hundred steps, more than one vector register of numbers."""
    ours = AdamW(make_params(shapes=((67, 5),)), **FLAGS[form])
    theirs = torch.optim.AdamW(make_params(shapes=((67, 5),)), **FLAGS[form])
    train(ours, 200)
    train(theirs, 200)
    assert_same(ours, theirs)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_three_forms_agree(dtype, amsgrad):
    """One formula: they differ by rounding alone (a few units in the last place after 20 steps, times 10)."""
    loop, foreach, fused = (train(AdamW(make_params(dtype), amsgrad=amsgrad, **FLAGS[form]), 20) for form in FLAGS)
    tolerance = 200 * torch.finfo(dtype).eps
    for p, q, r in zip(loop, foreach, fused, strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(p, r, rtol=tolerance, atol=tolerance)


# ---- torch's own cases, and values that are set later

# Prints nothing: it writes torch's own test inputs for AdamW into a file. In a process of its own, since importing
# them changes torch's settings; `expecttest` is only the base of a test class there.
OPTIM_DB = """
import sys, types, unittest
import torch
sys.modules.setdefault("expecttest", types.SimpleNamespace(TestCase=unittest.TestCase))
from torch.testing._internal.common_optimizers import optim_db
info = next(info for info in optim_db if info.optim_cls is torch.optim.AdamW)
inputs = [
    (dtype, case.desc, case.kwargs)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for device in ("cpu", "mps", "cuda")  # which differ in their arguments; nothing is put on these devices
    for case in info.optim_inputs_func(device=device, dtype=dtype)
]
errors = [
    (case.optimizer_error_input.desc, case.optimizer_error_input.params, case.optimizer_error_input.kwargs,
     case.error_type, case.error_regex)
    for case in info.optim_error_inputs_func(device="cpu", dtype=torch.float32)
]
torch.save((inputs, errors), sys.argv[1])
"""


@pytest.fixture(scope="module")
def torchs_cases(tmp_path_factory):
    """(dtype, description, arguments) and (description, params, arguments, error, its text) of torch's own tests."""
    file = tmp_path_factory.mktemp("optim_db") / "cases.pt"
    done = subprocess.run([sys.executable, "-c", OPTIM_DB, str(file)], capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"torch.testing._internal.common_optimizers cannot be imported: {done.stderr.splitlines()[-1:]}")
    return torch.load(file, weights_only=False)


@pytest.mark.slow
def test_torchs_own_cases_match_torch_adamw(torchs_cases):
    """Each form, on a CPU. Refused is what has `capturable`: no form here can be captured in a CUDA graph."""
    seen, refused = set(), set()
    for (dtype, description, arguments), form in itertools.product(torchs_cases[0], FLAGS):
        seen.add(description)
        make = partial(AdamW, make_params(dtype), **copy.deepcopy(arguments), **FLAGS[form])
        if arguments.get("capturable"):
            refused.add(description)
            with pytest.raises(NotImplementedError, match="capturable is True"):
                make()
        elif isinstance(arguments.get("lr"), torch.Tensor) and form == "foreach":
            for cls, error in ((AdamW, NotImplementedError), (torch.optim.AdamW, ValueError)):
                with pytest.raises(error, match=r"lr .*Tensor"):
                    cls(make_params(dtype), **arguments, **FLAGS[form])
        else:
            theirs = torch.optim.AdamW(make_params(dtype), **copy.deepcopy(arguments), **FLAGS[form])
            ours = make()
            train(ours, 5)
            train(theirs, 5)
            assert_same(ours, theirs)
    assert {"default", "amsgrad", "maximize", "nonzero weight_decay", "Tensor lr"} <= seen - refused
    assert all("capturable" in description for description in refused)


@pytest.mark.slow
def test_what_torchs_own_cases_refuse_is_refused(torchs_cases):
    for description, params, arguments, error, text in torchs_cases[1]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # duplicate parameters: a warning that says that it will be an error
            with pytest.raises(error, match=text):
                torch.optim.AdamW(copy.deepcopy(params) or make_params(), **arguments)
            with pytest.raises((error, NotImplementedError)):
                AdamW(copy.deepcopy(params) or make_params(), **arguments)
        assert description


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(
    "lr", [torch.tensor(0.1), torch.tensor([0.1]), torch.tensor([[0.1]], dtype=torch.float64)], ids=str
)
@pytest.mark.parametrize("form", ["loop", "fused"])
def test_tensor_lr_matches_torch_adamw(form, lr, weight_decay):
    """Given at construction, filled with another value, set later, and in a state dict."""
    ours, theirs = (
        cls(make_params(), lr=lr.clone(), weight_decay=weight_decay, **FLAGS[form])
        for cls in (AdamW, torch.optim.AdamW)
    )
    for optimizer in (ours, theirs):
        train(optimizer, 3)
        optimizer.param_groups[0]["lr"].fill_(0.2)
        train(optimizer, 3, first=3)
        optimizer.param_groups[0]["lr"] = 0.3
        train(optimizer, 1, first=6)
        optimizer.param_groups[0]["lr"] = lr.clone()
        train(optimizer, 1, first=7)
    assert_same(ours, theirs)
    assert torch.equal(ours.param_groups[0]["lr"], lr)  # neither changed nor replaced
    resumed = AdamW(clones(theirs.param_groups[0]["params"]))
    resumed.load_state_dict(through_a_file(theirs.state_dict()))
    for optimizer in (resumed, theirs):
        train(optimizer, 2, first=8)
    assert_same(resumed, theirs)


def set_later(cls, form, values):
    """Five steps, then other values in the group, then three steps."""
    optimizer = cls(make_params(), weight_decay=0.1, **FLAGS[form])
    train(optimizer, 5)
    optimizer.param_groups[0].update(values)
    train(optimizer, 3, first=5)
    return optimizer


@pytest.mark.parametrize(
    "values",
    [{"lr": 0.3}, {"betas": (0.5, 0.7)}, {"eps": 0.1}, {"weight_decay": 0.0}, {"maximize": True}, {"foreach": True},
     {"fused": True}, {"foreach": False, "fused": False}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("form", FLAGS)
def test_values_set_later_match_torch_adamw(form, values):
    assert_same(set_later(AdamW, form, values), set_later(torch.optim.AdamW, form, values))


@pytest.mark.parametrize("form", FLAGS)
def test_amsgrad_switched_off_and_on_again_matches_torch_adamw(form):
    """The maximum is kept while it is off, and not updated, as in torch."""
    ours, theirs = (cls(make_params(), amsgrad=True, **FLAGS[form]) for cls in (AdamW, torch.optim.AdamW))
    for optimizer in (ours, theirs):
        train(optimizer, 2)
        optimizer.param_groups[0]["amsgrad"] = False
        train(optimizer, 2, first=2)
        optimizer.param_groups[0]["amsgrad"] = True
        train(optimizer, 2, first=4)
    assert_same(ours, theirs)


@pytest.mark.parametrize("form", FLAGS)
def test_amsgrad_switched_on_later_is_refused_as_in_torch_adamw(form):
    """Not even a parameter that comes later, and has a maximum, may lend it to one that has none."""
    for cls, error, message in (
        (
            AdamW,
            RuntimeError,
            r"amsgrad was switched on after 5 steps of a parameter of shape \(4,\), without its maximum",
        ),
        (torch.optim.AdamW, KeyError, "max_exp_avg_sq"),
    ):
        optimizer = cls(make_params(shapes=((4,),)), **FLAGS[form])
        train(optimizer, 5)
        optimizer.param_groups[0]["amsgrad"] = True
        optimizer.param_groups[0]["params"].append(make_params(shapes=((4,),), seed=1)[0])
        before = clones(optimizer.param_groups[0]["params"])
        with pytest.raises(error, match=message):
            train(optimizer, 1, first=5)
        assert all(torch.equal(p, q) for p, q in zip(optimizer.param_groups[0]["params"], before, strict=True))


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"betas": (torch.tensor(0.9), torch.tensor(0.99))}, NotImplementedError, r"betas\[0\] is a Tensor"),
        ({"eps": torch.tensor(0.1)}, NotImplementedError, "eps is a Tensor"),
        ({"weight_decay": torch.tensor(0.1)}, NotImplementedError, "weight_decay is a Tensor"),
        ({"lr": torch.tensor([0.1, 0.2])}, ValueError, r"lr is a Tensor of shape \(2,\): it must have one element"),
        ({"lr": torch.tensor(-0.1)}, ValueError, "lr is -0.1.*: it must be at least 0"),
        ({"lr": -0.1}, ValueError, "lr is -0.1: it must be at least 0"),
        ({"lr": float("nan")}, ValueError, "lr is nan: it must be at least 0"),
        ({"capturable": True}, NotImplementedError, "capturable is True"),
        ({"differentiable": True}, NotImplementedError, "differentiable is True"),
        (
            {"decoupled_weight_decay": False},
            NotImplementedError,
            "decoupled_weight_decay is False, which makes it Adam",
        ),
    ],
)
@pytest.mark.parametrize("form", FLAGS)
def test_what_is_refused_at_construction_is_refused_later(form, values, error, message):
    """torch's step would follow most of these; without the check ours would ignore some and follow others."""
    first, second = make_params(), make_params(seed=1)
    optimizer = AdamW([{"params": first}, {"params": second}], **FLAGS[form])
    train(optimizer, 1)
    before = clones([*first, *second])
    optimizer.param_groups[1].update(values)
    if form == "foreach" and isinstance(values.get("lr"), torch.Tensor):
        error, message = NotImplementedError, "lr is a Tensor: with foreach=True it must be a number"
    with pytest.raises(error, match=message):
        train(optimizer, 1, first=1)
    assert all(torch.equal(p, q) for p, q in zip([*first, *second], before, strict=True))  # of the first group either


# ---- which form


def test_default_is_fused_where_torch_default_is_the_for_loop():
    ours = AdamW(make_params(shapes=((500,),)), lr=0.1)
    theirs = torch.optim.AdamW(make_params(shapes=((500,),)), lr=0.1)
    assert ours.form(ours.param_groups[0]) == "fused"
    torch_loop, torch_fused = (
        torch.optim.AdamW(make_params(shapes=((500,),)), lr=0.1, **FLAGS[form]) for form in ("loop", "fused")
    )
    for optimizer in (ours, theirs, torch_loop, torch_fused):
        train(optimizer, 20)
    assert_same(ours, torch_fused)
    assert_same(theirs, torch_loop)
    assert any(
        not torch.equal(p, q)
        for p, q in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True)
    ), "the two forms round alike here, so the two lines above prove nothing"


def test_device_lists_are_torchs():
    backend = torch._C._get_privateuse1_backend_name()
    assert set(_foreach_utils._get_fused_kernels_supported_devices()) == FUSED_DEVICES | {backend}
    # Why choose_form has no case that takes foreach by itself:
    assert set(_foreach_utils._get_foreach_kernels_supported_devices()) <= FUSED_DEVICES | {backend}


@pytest.mark.parametrize("dtype", sorted(FUSED_DTYPES, key=str))
def test_each_fused_dtype_has_a_kernel(dtype):
    params = make_params(dtype)
    train(AdamW(params, fused=True), 1)
    assert all(torch.isfinite(p).all() for p in params)


@pytest.mark.parametrize(
    ("use_foreach", "use_fused", "form"),
    [
        (None, None, "fused"), (None, True, "fused"), (False, True, "fused"),
        (True, None, "foreach"), (True, False, "foreach"),
        (False, None, "loop"), (None, False, "loop"), (False, False, "loop"),
    ],
)  # fmt: skip
def test_form_asked_for_is_torchs_reading_of_the_flags(use_foreach, use_fused, form):
    """Each but None, None names the form that torch takes for the same two values."""
    ours = AdamW(make_params(), foreach=use_foreach, fused=use_fused)
    assert ours.form(ours.param_groups[0]) == form
    theirs = torch.optim.AdamW(make_params(), foreach=use_foreach, fused=use_fused)
    if (use_foreach, use_fused) != (None, None):
        train(ours, 3)
        train(theirs, 3)
        assert_same(ours, theirs)


def test_form_falls_back_to_the_loop_without_a_kernel():
    gaps = torch.zeros(4, 10)[:, ::2]
    for p in (gaps, torch.zeros(2, device="meta"), torch.zeros(2, dtype=torch.float8_e4m3fn)):
        assert choose_form([torch.zeros(2), p]) == "loop"
    assert (
        choose_form([torch.zeros(5, 4).t(), torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)]) == "fused"
    )
    with pytest.raises(RuntimeError, match=r"no kernel for a parameter of torch.float32 on meta with shape \(2,\)"):
        choose_form([torch.zeros(2, device="meta")], use_fused=True)
    with pytest.raises(RuntimeError, match="fused=True and foreach=True exclude each other"):
        AdamW(make_params(), foreach=True, fused=True)


def test_groups_may_have_different_forms():
    p, q, r = make_params(shapes=((3,), (3,), (3,)))
    optimizer = AdamW([{"params": [p], "fused": False}, {"params": [q], "foreach": True}, {"params": [r]}])
    assert [optimizer.form(group) for group in optimizer.param_groups] == ["loop", "foreach", "fused"]
    assert not optimizer._step_supports_amp_scaling


# ---- what is in a step


@pytest.mark.parametrize("form", FLAGS)
def test_params_without_gradient_are_skipped_as_in_torch_adamw(form):
    ours, theirs = (cls(make_params(), weight_decay=0.5, **FLAGS[form]) for cls in (AdamW, torch.optim.AdamW))
    for optimizer in (ours, theirs):
        params = optimizer.param_groups[0]["params"]
        untouched = params[1].detach().clone()
        for step in range(4):
            set_grads(params, step)
            params[1].grad = None  # never has one
            if step % 2:
                params[0].grad = None  # sometimes has one: its own step count decides its bias corrections
            optimizer.step()
        assert torch.equal(params[1], untouched)
        assert params[1] not in optimizer.state
        assert [optimizer.state[params[i]]["step"].item() for i in (0, 2)] == [2.0, 4.0]
    assert_same(ours, theirs)
    ours.zero_grad()
    before = clones(ours.param_groups[0]["params"])
    ours.step()  # no gradient at all
    assert all(torch.equal(p, q) for p, q in zip(ours.param_groups[0]["params"], before, strict=True))


@pytest.mark.parametrize("form", FLAGS)
def test_several_groups_and_dtypes_match_torch_adamw(form):
    def build(cls):
        a, b, c = (make_params(dtype, seed) for seed, dtype in enumerate(DTYPES))
        groups = [
            {"params": a + b, "lr": 0.1, "weight_decay": 0.0},
            {"params": c, "betas": (0.5, 0.9), "amsgrad": True, "maximize": True},
        ]
        return cls(groups, lr=0.01, **FLAGS[form])

    ours, theirs = build(AdamW), build(torch.optim.AdamW)
    train(ours, 4)
    train(theirs, 4)
    assert_same(ours, theirs)


def test_closure_runs_with_gradients_and_before_the_step():
    p = torch.ones(3, requires_grad=True)
    optimizer = AdamW([p])

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == 3.0
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    assert (p < 1).all()
    assert optimizer.step() is None


def test_step_hooks_of_torch_optimizers_run():
    optimizer, calls = AdamW(make_params()), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    train(optimizer, 1)
    assert calls == ["pre", "post"]


@pytest.mark.parametrize("form", FLAGS)
def test_deterministic(form):
    first, second = (train(AdamW(make_params(), **FLAGS[form]), 10) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("form", FLAGS)
def test_converges_on_a_quadratic(form, maximize):
    target = torch.tensor([3.0, -2.0, 0.5])
    p = torch.zeros(3, requires_grad=True)
    optimizer = AdamW([p], lr=0.1, weight_decay=0.0, maximize=maximize, **FLAGS[form])
    for _ in range(500):
        optimizer.zero_grad()
        loss = ((p - target) ** 2 * torch.tensor([1.0, 100.0, 0.01])).sum()
        (-loss if maximize else loss).backward()
        optimizer.step()
    torch.testing.assert_close(p.detach(), target, rtol=0, atol=1e-3)


@pytest.mark.parametrize("form", FLAGS)
def test_decay_is_decoupled(form):
    """With gradients of zero Adam's L2 penalty would go through m and v; AdamW multiplies by 1 - lr * weight_decay."""
    p = torch.full((2,), 2.0, requires_grad=True)
    p.grad = torch.zeros(2)
    AdamW([p], lr=0.5, weight_decay=0.5, **FLAGS[form]).step()
    assert p.tolist() == [1.5, 1.5]


# ---- layouts in memory


LAYOUTS = {
    "transposed parameter": (lambda: torch.randn(4, 5).t(), lambda: torch.randn(5, 4)),
    "transposed gradient": (lambda: torch.randn(5, 4), lambda: torch.randn(4, 5).t()),
    "channels last": (
        lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        lambda: torch.randn(2, 3, 4, 5),
    ),
}


def train_layout(cls, layout, **flags):
    make_param, make_grad = LAYOUTS[layout]
    torch.manual_seed(0)
    p = make_param().requires_grad_()
    optimizer = cls([p], lr=0.1, **flags)
    for _ in range(3):
        p.grad = make_grad()
        optimizer.step()
    return p.detach()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_torch_fused_adamw_is_wrong_where_layouts_differ(layout):
    """torch's CPU kernel silently pairs the wrong numbers; ours, with the same kernel, does not."""
    right = train_layout(torch.optim.AdamW, layout, foreach=False)
    wrong = train_layout(torch.optim.AdamW, layout, fused=True)
    assert (wrong - right).abs().max() > 0.1, "torch has fixed its kernel: drop the copy"
    for flags in FLAGS.values():
        torch.testing.assert_close(train_layout(AdamW, layout, **flags), right)  # default tolerance: rounding of forms


def test_expanded_gradient_is_right():
    """torch's kernel would read past the end of the five numbers, so this test does not call it that way."""
    p, q = make_params(shapes=((5, 4),)), make_params(shapes=((5, 4),))
    ours, theirs = AdamW(p, lr=0.1), torch.optim.AdamW(q, lr=0.1, fused=True)
    for step in range(3):
        gradient = torch.randn(5, 1, generator=torch.Generator().manual_seed(step)).expand(5, 4)
        p[0].grad, q[0].grad = gradient, gradient.contiguous()
        ours.step()
        theirs.step()
    assert_same(ours, theirs)


def test_parameter_with_gaps_is_right_by_default_and_refused_by_fused():
    memory = torch.ones(4, 10)
    p = memory[:, ::2].requires_grad_()
    optimizer = AdamW([p], lr=0.1)
    assert optimizer.form(optimizer.param_groups[0]) == "loop"
    train(optimizer, 2)
    assert torch.equal(memory[:, 1::2], torch.ones(4, 5))  # the numbers in between are someone else's
    with pytest.raises(RuntimeError, match=r"no kernel for a parameter .* strides \(10, 2\)"):
        AdamW([p], fused=True)


@pytest.mark.parametrize("when", ["loaded", "moved"])
def test_moments_follow_the_layout_of_their_parameter(when):
    """A state saved from a contiguous copy of the model, or a model moved to channels-last during training."""
    shape = (2, 3, 4, 5)
    plain = make_params(shapes=(shape,))
    reference = AdamW(plain, lr=0.1, amsgrad=True, fused=False)
    train(reference, 2)
    optimizer = AdamW(make_params(shapes=(shape,)), lr=0.1, amsgrad=True)
    train(optimizer, 2)
    (p,) = optimizer.param_groups[0]["params"]
    if when == "loaded":
        saved = through_a_file(optimizer.state_dict())
        p = p.detach().to(memory_format=torch.channels_last).requires_grad_()
        optimizer = AdamW([p], lr=0.1, amsgrad=True)
        optimizer.load_state_dict(saved)
    else:
        p.data = p.data.to(memory_format=torch.channels_last)
    train(optimizer, 3, first=2)
    train(reference, 3, first=2)
    assert optimizer.state[p]["max_exp_avg_sq"].stride() == p.stride() != plain[0].stride()
    torch.testing.assert_close(p, plain[0])  # across forms


# ---- state


@pytest.mark.parametrize("default_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", FLAGS)
def test_step_count_is_kept_as_in_torch_adamw(form, default_dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(default_dtype)
    try:
        ours, theirs = (cls(make_params(torch.bfloat16), **FLAGS[form]) for cls in (AdamW, torch.optim.AdamW))
        assert not ours.state  # made lazily
        train(ours, 2)
        train(theirs, 2)
        assert_same(ours, theirs)  # dtype and device included
    finally:
        torch.set_default_dtype(before)


def test_step_count_of_another_form_is_cast_at_load():
    source = AdamW(make_params(), **FLAGS["loop"])
    train(source, 3)
    saved = through_a_file(source.state_dict())
    for index, value in enumerate((3, 3.0, torch.tensor(3, dtype=torch.int64), torch.tensor(3.0, dtype=torch.float64))):
        saved["state"][index]["step"] = value  # Python numbers are what torch saved before 1.12
    for form in FLAGS:
        saved["param_groups"][0].update(foreach=form == "foreach", fused=form == "fused")
        optimizer = AdamW(clones(source.param_groups[0]["params"]))
        optimizer.load_state_dict(copy.deepcopy(saved))
        for p in optimizer.param_groups[0]["params"]:
            step = optimizer.state[p]["step"]
            assert (step.dtype, step.device.type, step.shape, step.item()) == (torch.float32, "cpu", (), 3.0)
        train(optimizer, 1)


def two_groups(cls, params, flags, **options):
    return cls([{"params": params[:2], "lr": 0.02, "weight_decay": 0.2}, {"params": params[2:]}], **flags, **options)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("form", FLAGS)
def test_state_dict_continues_in_torch_adamw(form, amsgrad):
    ours = two_groups(AdamW, make_params(), FLAGS[form], amsgrad=amsgrad, maximize=True)
    reference = two_groups(torch.optim.AdamW, make_params(), FLAGS[form], amsgrad=amsgrad, maximize=True)
    train(ours, 3)
    train(reference, 3)
    params = [p for group in ours.param_groups for p in group["params"]]
    theirs = two_groups(torch.optim.AdamW, clones(params), {})  # what it was built with does not matter
    theirs.load_state_dict(through_a_file(ours.state_dict()))
    assert set(theirs.param_groups[0]) == set(torch.optim.AdamW(make_params()).param_groups[0])
    for optimizer in (theirs, ours, reference):
        train(optimizer, 3, first=3)
    assert_same(ours, theirs)
    assert_same(ours, reference)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("form", FLAGS)
def test_torch_adamw_state_dict_continues_here(form, amsgrad):
    theirs = two_groups(torch.optim.AdamW, make_params(), FLAGS[form], amsgrad=amsgrad)
    train(theirs, 3)
    params = [p for group in theirs.param_groups for p in group["params"]]
    ours = two_groups(AdamW, clones(params), {}, maximize=True)
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    assert [ours.form(group) for group in ours.param_groups] == [form, form]
    train(ours, 3, first=3)
    train(theirs, 3, first=3)
    assert_same(ours, theirs)


def test_default_state_dict_continues_fused_in_torch():
    """Ours says which form it chose, so that torch goes on in that one and not in its own default."""
    ours = AdamW(make_params())
    train(ours, 2)
    theirs = torch.optim.AdamW(clones(ours.param_groups[0]["params"]))
    theirs.load_state_dict(through_a_file(ours.state_dict()))
    assert theirs.param_groups[0]["fused"] is True
    train(ours, 2, first=2)
    train(theirs, 2, first=2)
    assert_same(ours, theirs)


@pytest.mark.parametrize("form", ["loop", "foreach"])
def test_state_dict_without_a_form_keeps_the_one_asked_for(form):
    """torch's default saves foreach=None, fused=None, which does not override what was asked for here."""
    theirs = torch.optim.AdamW(make_params())
    train(theirs, 2)
    ours = AdamW(clones(theirs.param_groups[0]["params"]), **FLAGS[form])
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    assert ours.form(ours.param_groups[0]) == form
    train(ours, 2, first=2)
    train(theirs, 2, first=2)
    if form == "loop":  # the form that torch's default takes on a CPU
        assert_same(ours, theirs)


def test_state_dict_read_by_torch_adam_stays_decoupled():
    """decoupled_weight_decay is saved, so torch.optim.Adam goes on as AdamW; an Adam loaded here becomes an AdamW."""
    ours = AdamW(make_params(), weight_decay=0.5, **FLAGS["loop"])
    train(ours, 2)
    adam = torch.optim.Adam(clones(ours.param_groups[0]["params"]))
    adam.load_state_dict(through_a_file(ours.state_dict()))
    train(ours, 2, first=2)
    train(adam, 2, first=2)
    assert_same(ours, adam)
    plain_adam = torch.optim.Adam(make_params(), weight_decay=0.5)
    train(plain_adam, 2)
    for cls in (AdamW, torch.optim.AdamW):
        optimizer = cls(make_params())
        optimizer.load_state_dict(through_a_file(plain_adam.state_dict()))
        assert optimizer.param_groups[0]["decoupled_weight_decay"] is True


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("form", FLAGS)
def test_copied_optimizer_continues(form, how):
    optimizer = AdamW(make_params(), weight_decay=0.1, **FLAGS[form])
    train(optimizer, 2)
    twin = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    assert twin.form(twin.param_groups[0]) == form
    train(twin, 2, first=2)
    train(optimizer, 2, first=2)
    assert_same(twin, optimizer)


@pytest.mark.parametrize("form", FLAGS)
def test_add_param_group_matches_torch_adamw(form):
    ours, theirs = AdamW(make_params(), **FLAGS[form]), torch.optim.AdamW(make_params(), **FLAGS[form])
    for optimizer in (ours, theirs):
        train(optimizer, 2)
        optimizer.add_param_group({"params": make_params(seed=5), "lr": 0.5})
        train(optimizer, 2, first=2)
    assert_same(ours, theirs)
    assert [ours.form(group) for group in ours.param_groups] == [form, form]


def test_bad_group_is_not_added():
    ours, theirs = AdamW(make_params()), torch.optim.AdamW(make_params())
    with pytest.raises(ValueError, match=r"lr is -1\.0: it must be at least 0"):
        ours.add_param_group({"params": make_params(seed=1), "lr": -1.0})
    assert len(ours.param_groups) == 1
    theirs.add_param_group({"params": make_params(seed=1), "lr": -1.0})  # torch checks the defaults only
    saved = through_a_file(ours.state_dict())
    saved["param_groups"][0]["lr"] = float("nan")
    with pytest.raises(ValueError, match="lr is nan"):
        ours.load_state_dict(saved)
    assert ours.param_groups[0]["lr"] == 1e-3


def test_older_state_dict_loads():
    """Keys that torch added over the years get their defaults, as in torch."""
    theirs = torch.optim.AdamW(make_params())
    train(theirs, 2)
    saved = through_a_file(theirs.state_dict())
    for name in ("maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"):
        del saved["param_groups"][0][name]
    ours = AdamW(clones(theirs.param_groups[0]["params"]), **FLAGS["loop"])
    ours.load_state_dict(saved)
    train(ours, 2, first=2)
    train(theirs, 2, first=2)
    assert_same(ours, theirs)


# ---- gradient scaling


def scaled_steps(optimizer, clip=False):
    """Five steps, the third one with an inf, the fifth one with a nan: parameters, step counts and scales."""
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=2)
    params, scales = optimizer.param_groups[0]["params"], []
    for step in range(5):
        scaler.scale(torch.zeros((), requires_grad=True)).backward()  # the scaler makes its scale at first use
        set_grads(params, step, scale=scaler.get_scale())
        if step in (2, 4):
            params[1].grad[3] = float("inf") if step == 2 else float("nan")
        if clip:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(params, 1.0)
        before = clones(params)
        scaler.step(optimizer)
        scaler.update()
        moved = not all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
        assert moved == (step not in (2, 4))
        scales.append(scaler.get_scale())
    assert [optimizer.state[p]["step"].item() for p in params] == [3.0] * len(params)
    return scales


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("form", FLAGS)
def test_grad_scaler_matches_torch_fused_adamw(form, amsgrad, clip):
    """The fused form unscales and skips by itself; for the other two the scaler does. As torch with the same flags."""
    ours, theirs = (cls(make_params(), amsgrad=amsgrad, **FLAGS[form]) for cls in (AdamW, torch.optim.AdamW))
    assert ours._step_supports_amp_scaling == (form == "fused")
    assert scaled_steps(ours, clip) == scaled_steps(theirs, clip)
    assert_same(ours, theirs)


def test_grad_scaler_works_after_the_form_changed_where_torch_adamw_fails():
    """torch keeps `_step_supports_amp_scaling` from its construction, whatever form a state dict puts in force."""
    saved = torch.optim.AdamW(make_params(), **FLAGS["loop"]).state_dict()
    ours, theirs = (cls(make_params(), fused=True) for cls in (AdamW, torch.optim.AdamW))
    ours.load_state_dict(copy.deepcopy(saved))
    theirs.load_state_dict(copy.deepcopy(saved))
    with pytest.raises(AssertionError, match="Expected grad_scale and found_inf"):
        scaled_steps(theirs)
    scaled_steps(ours)


# ---- refusals


def test_signature_and_groups_are_torchs():
    def parameters(cls):
        return [(p.name, p.kind, p.default) for p in inspect.signature(cls.__init__).parameters.values()]

    assert parameters(AdamW) == parameters(torch.optim.AdamW)
    ours, theirs = AdamW(make_params()), torch.optim.AdamW(make_params())
    assert ours.defaults == theirs.defaults
    assert set(ours.param_groups[0]) == set(theirs.param_groups[0])
    assert isinstance(ours, torch.optim.Optimizer)
    named = AdamW(torch.nn.Linear(2, 2).named_parameters())
    assert named.param_groups[0]["param_names"] == ["weight", "bias"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1}, "lr is -1: it must be at least 0 and below inf"),
        ({"lr": float("nan")}, "lr is nan: it must be at least 0 and below inf"),
        ({"lr": float("inf")}, "lr is inf: it must be at least 0 and below inf"),
        ({"eps": -1e-8}, "eps is -1e-08: it must be at least 0 and below inf"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1: it must be at least 0 and below inf"),
        ({"weight_decay": float("nan")}, "weight_decay is nan: it must be at least 0 and below inf"),
        ({"betas": (1.0, 0.999)}, "betas[0] is 1.0: it must be at least 0 and below 1.0"),
        ({"betas": (-0.1, 0.999)}, "betas[0] is -0.1: it must be at least 0 and below 1.0"),
        ({"betas": (0.9, float("nan"))}, "betas[1] is nan: it must be at least 0 and below 1.0"),
    ],
)
def test_invalid_values_name_the_argument(options, message):
    for make in (lambda: AdamW(make_params(), **options), lambda: AdamW([{"params": make_params(), **options}])):
        with pytest.raises(ValueError) as error:
            make()
        assert str(error.value) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capturable": True}, "capturable is True: use torch.optim.AdamW"),
        ({"differentiable": True}, "differentiable is True: use torch.optim.AdamW"),
        (
            {"lr": torch.tensor(1e-3), "foreach": True, "fused": False},
            r"lr is a Tensor: with foreach=True .* pass lr.item\(\)",
        ),
        ({"betas": (torch.tensor(0.9), torch.tensor(0.99))}, r"betas\[0\] is a Tensor"),
    ],
)
def test_what_is_not_supported_is_refused(options, message):
    with pytest.raises(NotImplementedError, match=message):
        AdamW(make_params(), **options)
    saved = AdamW(make_params()).state_dict()
    saved["param_groups"][0].update(options)
    with pytest.raises(NotImplementedError, match=message):
        AdamW(make_params()).load_state_dict(saved)


def test_complex_and_text_are_refused():
    with pytest.raises(NotImplementedError, match=r"a parameter of shape \(2,\) is torch.complex64"):
        AdamW([torch.zeros(2, dtype=torch.complex64, requires_grad=True)])
    with pytest.raises(TypeError, match="lr is '1e-3': it must be a number"):
        AdamW(make_params(), lr="1e-3")  # type: ignore[arg-type]


@pytest.mark.parametrize("form", FLAGS)
def test_sparse_gradients_are_refused_as_in_torch_adamw(form):
    for cls, message in ((AdamW, "make the embedding with sparse=False"), (torch.optim.AdamW, "sparse gradients")):
        embedding = torch.nn.Embedding(5, 2, sparse=True)
        embedding(torch.tensor([1, 2])).sum().backward()
        with pytest.raises(RuntimeError, match=message):
            cls(embedding.parameters(), **FLAGS[form]).step()


def test_cuda_graph_capture_is_refused(monkeypatch):
    """The step count would be baked into the graph. (Simulated: no GPU is needed.)"""
    optimizer = AdamW(make_params())
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
        optimizer.step()


def test_runs_inside_accelerate():
    """accelerate.Accelerator.prepare round-trips the state dict and forwards step: ours is an Optimizer to it."""
    accelerate = pytest.importorskip("accelerate", reason="the extra `test` (accelerate) is not installed")
    from accelerate.state import AcceleratorState, GradientState, PartialState

    try:
        accelerator = accelerate.Accelerator(cpu=True)
        optimizer = AdamW(make_params())
        prepared = accelerator.prepare(optimizer)
        assert type(prepared).__name__ == "AcceleratedOptimizer"
        train(prepared, 2)
    finally:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
    reference = torch.optim.AdamW(make_params(), fused=True)
    train(reference, 2)
    assert_same(optimizer, reference)


# ---- decay groups


def architectures():
    import transformers as t

    small = {
        "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32
    }  # fmt: skip
    return {
        "bert": lambda: tiny_bert(),
        "bert with tied head": lambda: t.BertForMaskedLM(t.BertConfig(**small)),
        "distilbert": lambda: t.DistilBertForSequenceClassification(
            t.DistilBertConfig(vocab_size=40, dim=16, n_layers=2, n_heads=2, hidden_dim=32)
        ),
        "roberta": lambda: t.RobertaForSequenceClassification(t.RobertaConfig(**small)),
        "deberta-v2": lambda: t.DebertaV2ForSequenceClassification(
            t.DebertaV2Config(**small, relative_attention=True, pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm")
        ),
        "albert": lambda: t.AlbertForSequenceClassification(t.AlbertConfig(**small, embedding_size=8)),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16)),
        "t5": lambda: t.T5ForConditionalGeneration(
            t.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        ),
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**small, num_key_value_heads=2)),
    }


NAMES = ("bert", "bert with tied head", "distilbert", "roberta", "deberta-v2", "albert", "gpt2", "t5", "llama")


@pytest.mark.parametrize("name", NAMES)
def test_decay_groups_match_trainer_decay_parameter_names(name):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = architectures()[name]()
    frozen = next(iter(model.parameters()))
    frozen.requires_grad_(False)
    decay_names = transformers.Trainer.get_decay_parameter_names(None, model)
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]  # as Trainer.create_optimizer does
    expected = [
        {id(p) for n, p in trainable if n in decay_names},
        {id(p) for n, p in trainable if n not in decay_names},
    ]
    groups = decay_groups(model, 0.25)
    assert [{id(p) for p in group["params"]} for group in groups] == expected
    assert [group["weight_decay"] for group in groups] == [0.25, 0.0]
    assert all(expected), "one of the two sets is empty: this proves nothing"
    everything = [id(p) for group in groups for p in group["params"]]
    assert len(everything) == len(set(everything)) == len(trainable)
    assert id(frozen) not in everything
    AdamW(groups)


def test_decay_groups_are_the_matrices_for_bert():
    """nanoGPT's rule, two dimensions or more decay, gives the Trainer's sets for BERT (not for T5: relative biases)."""
    model = tiny_bert()
    decayed, others = (group["params"] for group in decay_groups(model, 0.01))
    assert all(p.dim() >= 2 for p in decayed)
    assert all(p.dim() < 2 for p in others)


def test_plain_adamw_decays_everything_unless_given_decay_groups():
    """The trap: with weight_decay left at 0.01, torch's AdamW shrinks LayerNorm weights and biases as well."""

    def layer_norm_after_a_step(cls, group):
        model = tiny_bert()
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        cls(group(model), lr=0.1).step()
        return model.bert.embeddings.LayerNorm.weight

    for cls in (torch.optim.AdamW, AdamW):
        shrunk = layer_norm_after_a_step(cls, lambda model: model.parameters())
        torch.testing.assert_close(shrunk.detach(), torch.full_like(shrunk, 1 - 0.1 * 0.01))
        kept = layer_norm_after_a_step(cls, lambda model: decay_groups(model, 0.01))
        assert torch.equal(kept, torch.ones_like(kept))


def test_decay_groups_of_a_frozen_model_are_refused():
    model = torch.nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="Linear has no parameter that requires a gradient"):
        decay_groups(model, 0.01)
