"""AdamW: one formula in three forms. The loop reads like the paper, foreach and fused do the same work faster.

>>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
>>> optimizer = AdamW([weight], lr=0.1, weight_decay=0.0)
>>> weight.grad = torch.tensor([4.0, -0.01])
>>> optimizer.step()
>>> weight.data  # the first step moves each weight by lr, against the sign of its gradient, however small that is
tensor([ 0.9000, -1.9000])
>>> optimizer.form(optimizer.param_groups[0])
'fused'

Underneath: `torch.optim.AdamW` (torch 2.13), which chooses between `torch.optim.adam._single_tensor_adam`,
`torch.optim.adam._multi_tensor_adam` and `torch.optim.adam._fused_adam`; for `decay_groups`,
`transformers.Trainer.get_decay_parameter_names` (transformers 5.23).
  - Kept: signature, state, state dict (it loads both ways) and the arithmetic of each form, bit for bit.
  - Different: fused is the default wherever it has a kernel. Where a gradient's memory layout differs from its
    parameter's it is copied first: torch's fused form is wrong there. Every group's values are checked.
  - Left out, and refused: tensors as hyper-parameters other than lr, complex parameters, `capturable`,
    `differentiable`.

Proof: test_loop_matches_torch_for_loop_adamw, test_fused_matches_torch_fused_adamw in tests/step/test_optim.py.
"""

import math
import re
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

Group = dict[str, Any]  # one of Optimizer.param_groups: "params" and their hyper-parameters

# What has a fused kernel: torch.utils._foreach_utils._get_fused_kernels_supported_devices without the private backend.
FUSED_DEVICES = frozenset({"cpu", "cuda", "hpu", "mps", "mtia", "xpu"})
FUSED_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})

# The formula, three times. p: parameter (θ), g: gradient, m and v: first and second moment, t: step count (incremented
# first), η: learning rate, λ: weight decay. Loshchilov & Hutter, Decoupled Weight Decay Regularization (arXiv
# 1711.05101), algorithm 2. v_max, only with `amsgrad`: Reddi, Kale & Kumar, On the Convergence of Adam and Beyond.


def loop(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor], steps: list[Tensor], *, lr: float, betas: tuple[float, float], eps: float,
    weight_decay: float, amsgrad: bool, maximize: bool,
) -> None:  # fmt: skip
    """One parameter after another, one equation per line: about ten passes over memory for each. In place.

    Shapes: the i-th parameter, its gradient and its moments are alike; `steps` are scalars. `max_exp_avg_sqs` is empty
    without `amsgrad`. `lr` may be a scalar tensor. Bit for bit torch.optim.adam._single_tensor_adam.
    """
    beta1, beta2 = betas
    for i, (p, g, m, v, step) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True)):
        step += 1
        t = step.item()  # a Python float from here on, so that the bias corrections cost no tensor operation
        if maximize:
            g = -g
        if weight_decay:
            p.mul_(1 - lr * weight_decay)  # θ ← θ − ηλθ, which m and v never see: the point of the paper
        m.lerp_(g, 1 - beta1)  # m ← β₁m + (1 − β₁)g
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)  # v ← β₂v + (1 − β₂)g²
        if amsgrad:
            v = torch.maximum(max_exp_avg_sqs[i], v, out=max_exp_avg_sqs[i])  # v_max ← max(v_max, v)
        # underneath: eps comes after the bias correction and outside the root; some texts put it elsewhere.
        denominator = (v.sqrt() / (1 - beta2**t) ** 0.5).add_(eps)  # √v̂ + ε, where v̂ = v / (1 − β₂ᵗ)
        p.addcdiv_(m, denominator, value=-(lr / (1 - beta1**t)))  # θ ← θ − ηm̂ / (√v̂ + ε), m̂ = m / (1 − β₁ᵗ)


def foreach(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor], steps: list[Tensor], *, lr: float, betas: tuple[float, float], eps: float,
    weight_decay: float, amsgrad: bool, maximize: bool,
) -> None:  # fmt: skip
    """The loop turned inside out: each equation once, for the whole list; a few kernel launches instead of thousands.

    Same arguments as `loop`, all on one device and of one dtype. Needs memory for one more copy of the parameters.
    In place. Bit for bit torch.optim.adam._multi_tensor_adam.
    """
    beta1, beta2 = betas
    torch._foreach_add_(steps, 1)
    ts = [step.item() for step in steps]
    if maximize:
        grads = list(torch._foreach_neg(grads))
    if weight_decay:
        torch._foreach_mul_(params, 1 - lr * weight_decay)  # θ ← θ − ηλθ
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)  # m ← β₁m + (1 − β₁)g
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)  # v ← β₂v + (1 − β₂)g²
    if amsgrad:
        torch._foreach_maximum_(max_exp_avg_sqs, exp_avg_sqs)  # v_max ← max(v_max, v)
    denominators = torch._foreach_sqrt(max_exp_avg_sqs if amsgrad else exp_avg_sqs)
    torch._foreach_div_(denominators, [(1 - beta2**t) ** 0.5 for t in ts])
    torch._foreach_add_(denominators, eps)  # √v̂ + ε
    step_sizes = [-(lr / (1 - beta1**t)) for t in ts]
    torch._foreach_addcdiv_(params, exp_avgs, denominators, step_sizes)  # θ ← θ − ηm̂ / (√v̂ + ε)


def fused(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor], steps: list[Tensor], *, lr: float | Tensor, betas: tuple[float, float], eps: float,
    weight_decay: float, amsgrad: bool, maximize: bool, grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:  # fmt: skip
    """All equations in one kernel: each number is read and written once. That is fast because AdamW waits for memory.

    Same arguments as `foreach`, and two scalars that torch.amp.GradScaler sets: the gradients are divided by
    `grad_scale`, and with `found_inf` above 0 the step does nothing. In place.
    Bit for bit torch.optim.adam._fused_adam.
    """
    device = params[0].device
    if isinstance(lr, Tensor) and lr.device.type != "cpu":  # the kernel reads it on its own device, or on the CPU
        lr = lr.to(device, non_blocking=True)
    grad_scale = None if grad_scale is None else grad_scale.to(device, non_blocking=True)
    found_inf = None if found_inf is None else found_inf.to(device, non_blocking=True)
    torch._foreach_add_(steps, 1)
    torch._fused_adamw_(
        params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps,
        lr=lr, beta1=betas[0], beta2=betas[1], eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, maximize=maximize,
        grad_scale=grad_scale, found_inf=found_inf,
    )  # fmt: skip
    if found_inf is not None:  # a step that did nothing does not count; subtracting needs no wait for the GPU
        torch._foreach_sub_(steps, [found_inf] * len(steps))


FORMS: dict[str, Callable[..., None]] = {"loop": loop, "foreach": foreach, "fused": fused}


def choose_form(params: list[Tensor], use_foreach: bool | None = None, use_fused: bool | None = None) -> str:
    """Which of FORMS updates `params`: the one asked for, else the fastest one that can.

    The two arguments are AdamW's `foreach` and `fused`. True asks for that form, None leaves the choice open. Where
    neither is True, a False asks for the loop.
    Raises RuntimeError if both are asked for, or if fused is and a parameter has no fused kernel.
    """
    if use_fused and use_foreach:
        raise RuntimeError("fused=True and foreach=True exclude each other: pass one of them")
    odd = next((p for p in params if not _has_fused_kernel(p)), None)
    if use_fused and odd is not None:
        raise RuntimeError(
            f"fused=True has no kernel for a parameter of {odd.dtype} on {odd.device.type} with shape "
            f"{tuple(odd.shape)} and strides {odd.stride()}: leave fused out, or move the parameter (its tensors are "
            f"dense, floating point and on one of {', '.join(sorted(FUSED_DEVICES))})"
        )
    if use_fused:
        return "fused"
    if use_foreach:
        return "foreach"
    # underneath: torch never chooses the fused kernel by itself, and on a CPU not even foreach: it takes the slow loop.
    # Every device with foreach kernels has the fused kernel too, so foreach is never the best choice here.
    if use_fused is None and use_foreach is None and odd is None:
        return "fused"
    return "loop"  # runs anywhere, on any kind of tensor


class AdamW(torch.optim.Optimizer):
    """torch.optim.AdamW: its arguments, defaults, state and state dict.

    Raises ValueError for a value out of range and NotImplementedError for what is left out (see the module): here, in
    a group, in a loaded state dict, and in `step` for what was set later. `step` also raises RuntimeError for a sparse
    gradient, and for `amsgrad` switched on after the first step.
    """

    def __init__(
        self,
        params: Any,  # tensors, (name, tensor) pairs or groups: whatever torch.optim.Optimizer takes
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        # underneath: 0.01 where Adam has 0, and for every parameter given, biases and LayerNorm too: see decay_groups.
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad,
            "maximize": maximize, "foreach": foreach, "capturable": capturable, "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": True,  # underneath: in a state dict, the only difference between AdamW and Adam
        }  # fmt: skip
        _check(defaults)
        super().__init__(params, defaults)  # calls add_param_group for each group

    def add_param_group(self, param_group: Group) -> None:
        """torch.optim.Optimizer.add_param_group; also checks the group's values and chooses its form."""
        super().add_param_group(param_group)
        try:
            _settle(param_group, self.defaults)
        except Exception:
            self.param_groups.pop()
            raise

    def form(self, group: Group) -> str:
        """The form that updates this group: "loop", "foreach" or "fused"."""
        return "fused" if group["fused"] else "foreach" if group["foreach"] else "loop"

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether torch.amp.GradScaler leaves unscaling and skipping to `step`; otherwise it does both itself."""
        # underneath: torch sets this in __init__ only; if a loaded state dict changes the form, its step() fails.
        return all(self.form(group) == "fused" for group in self.param_groups)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. Calls `closure` first, if given, and returns its result."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("AdamW.step cannot be captured in a CUDA graph: use torch.optim.AdamW(capturable=True)")
        for group in self.param_groups:  # once more: anyone may have changed these values since
            _check(group)
        for group in self.param_groups:
            form = self.form(group)
            options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize")}
            if isinstance(group["lr"], Tensor):
                options["lr"] = group["lr"].squeeze()  # one element, whatever its shape
            if form == "fused":  # GradScaler sets these two attributes during the call
                options |= {name: getattr(self, name, None) for name in ("grad_scale", "found_inf")}
            for lists in self._lists(group, form):
                FORMS[form](*lists, **options)
        return loss

    def _lists(self, group: Group, form: str) -> list[tuple[list[Tensor], ...]]:
        """The six lists that a form takes, for each device and dtype. A first gradient makes a parameter's state."""
        lists: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], ...]] = {}
        for p in group["params"]:
            grad = p.grad
            if grad is None:  # underneath: neither decayed nor counted; zero_grad(set_to_none=False) would do both
                continue
            if grad.is_sparse:
                raise RuntimeError(
                    f"AdamW got a sparse gradient for a parameter of shape {tuple(p.shape)}: make the embedding with "
                    "sparse=False, or give it to torch.optim.SparseAdam"
                )
            state = self.state[p]
            if not state:
                state["step"] = _step_for(p, form, 0.0)
                moments = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")
                state |= {name: torch.zeros_like(p, memory_format=torch.preserve_format) for name in moments}
            # underneath: the kernel walks raw memory. Where strides differ, torch pairs the wrong numbers on a CPU,
            # silently, and raises on a GPU (pytorch issue 110758).
            if form == "fused" and not p.stride() == grad.stride() == state["exp_avg"].stride():
                grad = _laid_out_like(p, grad)
                _lay_out_moments(p, state)
            maximum = state.get("max_exp_avg_sq") if group["amsgrad"] else None
            if group["amsgrad"] and maximum is None:  # underneath: torch's KeyError says only 'max_exp_avg_sq'
                raise RuntimeError(
                    f"amsgrad was switched on after {state['step'].item():.0f} steps of a parameter of shape "
                    f"{tuple(p.shape)}, without its maximum so far: set amsgrad when you make the optimizer"
                )
            row = (p, grad, state["exp_avg"], state["exp_avg_sq"], maximum, state["step"])
            columns = lists.setdefault((p.device, p.dtype), ([], [], [], [], [], []))
            for column, tensor in zip(columns, row, strict=True):
                if tensor is not None:
                    column.append(tensor)
        return list(lists.values())

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by load_state_dict, unpickling and deepcopy. Checks all groups before it changes anything."""
        defaults = state.get("defaults") or self.defaults
        for group in state["param_groups"]:
            _settle(group, defaults)
        super().__setstate__(state)
        for group in self.param_groups:
            for p in group["params"]:
                if p_state := self.state.get(p):
                    p_state["step"] = _step_for(p, self.form(group), p_state["step"])


def decay_groups(model: nn.Module, weight_decay: float) -> list[Group]:
    """Two parameter groups for AdamW: what decays; and biases and normalisation layers, with weight decay 0.

    Source: transformers.Trainer.get_decay_parameter_names. Frozen parameters are in neither group, tied ones are in
    one, once. Raises ValueError if the model has nothing to train.
    """
    inside_layer_norm = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.LayerNorm))
    groups: list[Group] = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in model.named_parameters():  # names a tied parameter once
        if parameter.requires_grad:
            # underneath: the library goes by names, since T5's and Llama's norms are classes of their own. So anything
            # with "bias" in its name counts as one: T5's relative_attention_bias, an embedding, does not decay.
            spared = name.startswith(inside_layer_norm) or _BIAS_OR_NORM.search(name.lower()) is not None
            groups[spared]["params"].append(parameter)
    if not any(group["params"] for group in groups):
        raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient: there is nothing to train")
    return groups


# ---- Below: checks, and the layout of memory.

_BIAS_OR_NORM = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.|_)norm(?:$|\.)")


def _check(options: Group) -> None:
    """Raise for a hyper-parameter that is out of range or not supported."""
    for name in ("capturable", "differentiable"):
        if options[name]:
            raise NotImplementedError(f"{name} is {options[name]}: use torch.optim.AdamW, there is no such form here")
    if not options["decoupled_weight_decay"]:
        raise NotImplementedError("decoupled_weight_decay is False, which makes it Adam: use torch.optim.Adam")
    beta1, beta2 = options["betas"]
    values = {name: options[name] for name in ("lr", "eps", "weight_decay")} | {"betas[0]": beta1, "betas[1]": beta2}
    for name, value in values.items():
        if isinstance(value, Tensor):
            if name != "lr" or (options["foreach"] and not options["fused"]):  # underneath: foreach takes none in torch
                what = "with foreach=True it must be a number" if name == "lr" else "it must be a number"
                raise NotImplementedError(f"{name} is a Tensor: {what}, pass {name}.item()")
            if value.numel() != 1:
                raise ValueError(f"lr is a Tensor of shape {tuple(value.shape)}: it must have one element")
            if value.device.type != "cpu":
                continue  # reading it would wait for the device
        elif not isinstance(value, (float, int, Real)):  # the first two only because asking Real takes longer
            raise TypeError(f"{name} is {value!r}: it must be a number")
        end = 1.0 if name.startswith("betas") else math.inf
        if not 0.0 <= float(value) < end:  # NaN fails this test too
            raise ValueError(f"{name} is {value}: it must be at least 0 and below {end}")


def _settle(group: Group, defaults: Group) -> None:
    """Check a group, fill in what an older state dict lacks, and write the chosen form into "foreach" and "fused".

    Neither is None afterwards, so torch continues from our state dict in the same form.
    """
    for name in ("amsgrad", "maximize", "capturable", "differentiable"):
        group.setdefault(name, False)
    for name in ("foreach", "fused"):
        group.setdefault(name, None)
    group["decoupled_weight_decay"] = True  # underneath: torch's AdamW also turns a loaded Adam into an AdamW
    _check(group)
    for p in group["params"]:
        if p.is_complex():
            raise NotImplementedError(f"a parameter of shape {tuple(p.shape)} is {p.dtype}: complex is not supported")
    asked = (group["foreach"], group["fused"])
    if asked == (None, None):
        asked = (defaults["foreach"], defaults["fused"])
    form = choose_form(group["params"], *asked)
    group["foreach"], group["fused"] = form == "foreach", form == "fused"


def _has_fused_kernel(p: Tensor) -> bool:
    """Whether torch._fused_adamw_ takes this parameter: a plain, dense tensor of a known device and dtype."""
    plain = type(p) in (Tensor, nn.Parameter)  # a subclass (DTensor) has its own idea of what an operation does
    return plain and p.device.type in FUSED_DEVICES and p.dtype in FUSED_DTYPES and _is_dense(p)


def _is_dense(p: Tensor) -> bool:
    """Whether p fills its memory without gaps or overlaps, in whatever order of dimensions."""
    return torch.empty_like(p, device="meta", memory_format=torch.preserve_format).stride() == p.stride()


def _step_for(p: Tensor, form: str, value: float | Tensor) -> Tensor:
    """The step count, a scalar, where `form` needs it: on p's device for the kernel, else on the CPU for .item()."""
    if form == "fused":
        return torch.as_tensor(value, dtype=torch.float32, device=p.device)
    # underneath: the other forms count in float64 if that is the default dtype, whatever p's own dtype is.
    wide = torch.get_default_dtype() == torch.float64
    return torch.as_tensor(value, dtype=torch.float64 if wide else torch.float32, device="cpu")


def _laid_out_like(p: Tensor, tensor: Tensor) -> Tensor:
    """`tensor` itself if its strides are p's, else a copy that has them."""
    if tensor.stride() == p.stride():
        return tensor
    return torch.empty_like(p, dtype=tensor.dtype, memory_format=torch.preserve_format).copy_(tensor)


def _lay_out_moments(p: Tensor, state: dict[str, Tensor]) -> None:
    """Give the moments p's strides: a loaded state may have others, and p itself may have moved to channels-last."""
    for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        if name in state:
            state[name] = _laid_out_like(p, state[name])
