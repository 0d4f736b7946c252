"""Ideas for a faster step that were tried and left out: each beside what is done now, in one run.

    python bench/tried.py                             all of them, at the sizes of the packaged checkpoint
    python bench/tried.py flat qkv --repeats 9 --json tried.json

Both ways first have to give equal results; otherwise nothing is timed, the difference is named and the exit code is 1.
Then they take turns, as in pieces.py. A ratio above 1 means that the idea is faster; `in a step` is what it would save
where a step has that work, as often as it has it (below 0: what it would cost). An idea goes into the code when it
saves more than a hundredth of a step, changes no result, and needs few lines; then it leaves this file.
The last line of stdout is one JSON object with every single turn.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from pieces import (
    BATCH,
    GATE_STEPS,
    LR,
    SEED,
    STEPS,
    TOKENS,
    Job,
    NotEqual,
    Row,
    Worker,
    clock,
    ddp_rank,
    interleave,
    machine,
    model_of,
    need_equal_losses,
    need_equal_parameters,
    on_a_cpu,
    random_batch,
    ranks,
    run_gated,
    slowest,
)
from torch import Tensor, nn
from torch.nn import functional as F

from nanofinetune.cpu.dropout import draws_doubles, torch_noise
from nanofinetune.ground.cli import Parser, number
from nanofinetune.ground.errors import UsageError
from nanofinetune.step.optim import AdamW

P = 0.1  # of dropout
Tried = tuple[Row, int]  # the turns (as it is, with the idea), and how often a step has this work
Way = Callable[[], list[Tensor]]  # one way to do the work, and what comes of it


def numbers(*shape: int, seed: int = SEED, grad: bool = False) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


def beside(name: str, what: str, now: Way, idea: Way, repeats: int, times: int) -> Tried:
    """Check that both give the same, then let them take turns: short ones, and more of them than of a step's."""
    for i, (a, b) in enumerate(zip(now(), idea(), strict=True)):
        if a.shape != b.shape or not torch.allclose(a, b, rtol=1e-4, atol=1e-5):
            raise NotEqual(f"{name}: result {i} of the idea is another one")
    turns = clock(now, times=4), clock(idea, times=4)
    return Row(name, what, interleave(turns[0], turns[1], 5 * repeats)), times


# --- the ideas: what is done now, then the idea -----------------------------------------------------------------------


def draw(job: Job, config: Any, repeats: int) -> Iterator[Tried]:
    """One core idles while torch's generator draws dropout's doubles: draw the next ones while products run."""
    x, generator = numbers(BATCH * TOKENS, config.hidden_size), torch.Generator()
    up = numbers(config.intermediate_size, config.hidden_size)
    doubles = torch.empty(BATCH * TOKENS * config.hidden_size, dtype=torch.float64)

    def products() -> Tensor:
        return F.linear(F.gelu(F.linear(x, up)), up.T)

    def now() -> list[Tensor]:
        doubles.uniform_(generator=generator.manual_seed(SEED))
        return [products(), doubles]

    with ThreadPoolExecutor(1) as pool:

        def idea() -> list[Tensor]:
            drawing = pool.submit(doubles.uniform_, generator=generator.manual_seed(SEED))
            out = products()
            return [out, drawing.result()]

        # underneath: OpenMP gives each thread its half of a product; the core that draws is late with its half
        yield beside("draw", "doubles in a second thread", now, idea, repeats, 2 * config.num_hidden_layers)


def words(job: Job, config: Any, repeats: int) -> Iterator[Tried]:
    """torch draws one double at a time from its Mersenne twister; numpy's fills an array with the same words."""
    shape = torch.Size((BATCH, TOKENS, config.hidden_size))
    twister = np.random.MT19937()

    def now() -> list[Tensor]:
        torch.manual_seed(SEED)
        return [torch_noise(shape, torch.float32, P)]

    def idea() -> list[Tensor]:
        twister._legacy_seeding(SEED)  # as torch.manual_seed does it
        high, low = twister.random_raw(2 * shape.numel()).reshape(-1, 2).T
        double = ((high << np.uint64(32) | low) & np.uint64(2**53 - 1)) * 2.0**-53
        return [torch.from_numpy(double < 1 - P).float().div_(1 - P).view(shape)]

    yield beside("words", "dropout's words from numpy", now, idea, repeats, 2 * config.num_hidden_layers)


def qkv(job: Job, config: Any, repeats: int) -> Iterator[Tried]:
    """Query, key and value are three products of one input: make them one, of weights that lie side by side."""
    width = config.hidden_size
    x = numbers(BATCH * TOKENS, width, grad=True)
    joined, bias = numbers(3 * width, width, grad=True), numbers(3 * width, grad=True)
    weights, biases = ([p.detach().clone().requires_grad_() for p in whole.chunk(3)] for whole in (joined, bias))
    gradients = [numbers(BATCH * TOKENS, width, seed=i) for i in range(3)]

    def now() -> list[Tensor]:
        outs = [F.linear(x, weight, b) for weight, b in zip(weights, biases, strict=True)]
        return list(torch.autograd.grad(outs, [x, *weights, *biases], gradients))

    def idea() -> list[Tensor]:
        outs = F.linear(x, joined, bias).chunk(3, -1)
        first, weight, b = torch.autograd.grad(outs, [x, joined, bias], gradients)
        return [first, *weight.chunk(3), *b.chunk(3)]

    yield beside("qkv", "one product for three", now, idea, repeats, config.num_hidden_layers)


def bias(job: Job, config: Any, repeats: int) -> Iterator[Tried]:
    """A bias's gradient is a sum over all tokens: let the weight's product add it up, by a column of ones."""
    x, gradient = (numbers(BATCH * TOKENS, n) for n in (config.hidden_size, config.intermediate_size))
    ones = torch.ones(BATCH * TOKENS, 1)

    def now() -> list[Tensor]:
        return [gradient.T @ x, gradient.sum(0)]

    def idea() -> list[Tensor]:
        both = gradient.T @ torch.cat([x, ones], 1)
        return [both[:, :-1], both[:, -1]]

    yield beside("bias", "a bias's gradient by the product", now, idea, repeats, config.num_hidden_layers)


class _Weights(torch.autograd.Function):
    """Mask, softmax and dropout of scores, in their own memory."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, mask: Tensor, noise: Tensor) -> Tensor:
        weights = torch.softmax(scores.add_(mask), -1, out=scores)
        ctx.save_for_backward(weights, noise)
        return weights * noise

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        weights, noise = ctx.saved_tensors
        return torch._softmax_backward_data(gradients[0] * noise, weights, -1, weights.dtype), None, None


def softmax(job: Job, config: Any, repeats: int) -> Iterator[Tried]:
    """Attention's scores get a mask, a softmax and dropout, each a tensor of its own: one function, in place."""
    width = config.hidden_size // config.num_attention_heads
    q, k = (numbers(BATCH, config.num_attention_heads, TOKENS, width, seed=i, grad=True) for i in range(2))
    mask = torch.zeros(BATCH, 1, 1, TOKENS).masked_fill_(torch.arange(TOKENS) > TOKENS - 9, -torch.inf)
    noise = torch_noise(torch.Size((BATCH, config.num_attention_heads, TOKENS, TOKENS)), torch.float32, P)
    gradient = numbers(*noise.shape)

    def now() -> list[Tensor]:
        out = ((q @ k.mT) + mask).softmax(-1) * noise
        return [out, *torch.autograd.grad(out, [q, k], gradient)]

    def idea() -> list[Tensor]:
        out = _Weights.apply(q @ k.mT, mask, noise)
        return [out, *torch.autograd.grad(out, [q, k], gradient)]

    yield beside("softmax", "mask, softmax, dropout in place", now, idea, repeats, config.num_hidden_layers)


def _normed(config: Any) -> tuple[list[Tensor], Tensor, Callable[..., Tensor]]:
    """What ends each half of a layer: its input, and the function that adds the residual and normalizes."""
    width = config.hidden_size
    h, x = (numbers(BATCH * TOKENS, width, seed=i, grad=True) for i in range(2))
    weight, shift = (numbers(width, seed=i, grad=True) for i in (2, 3))
    noise = torch_noise(h.shape, torch.float32, P)

    def normed(h: Tensor, x: Tensor, weight: Tensor, shift: Tensor, noise: Tensor) -> Tensor:
        return F.layer_norm(h * noise + x, (width,), weight, shift)

    return [h, x, weight, shift], noise, normed


def _forward_backward(function: Callable[..., Tensor], leaves: list[Tensor], noise: Tensor) -> list[Tensor]:
    out = function(*leaves, noise)
    return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]


def norm(job: Job, config: Any, repeats: int) -> Iterator[Tried]:
    """Dropout multiplies, the residual adds: both in one pass before the LayerNorm."""
    leaves, noise, normed = _normed(config)

    def in_one(h: Tensor, x: Tensor, weight: Tensor, shift: Tensor, noise: Tensor) -> Tensor:
        return F.layer_norm(torch.addcmul(x, h, noise), weight.shape, weight, shift)

    ways = [partial(_forward_backward, function, leaves, noise) for function in (normed, in_one)]
    yield beside("norm", "dropout and residual in one pass", ways[0], ways[1], repeats, 2 * config.num_hidden_layers)


def compiled(job: Job, config: Any, repeats: int) -> Iterator[Tried]:
    """The same by torch.compile, its kernels cached on disk; and what its first call costs a new process."""
    leaves, noise, normed = _normed(config)
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, {"TORCHINDUCTOR_CACHE_DIR": folder}):
        ways = [partial(_forward_backward, function, leaves, noise) for function in (normed, torch.compile(normed))]
        often = 2 * config.num_hidden_layers
        yield beside("compiled", "the same by torch.compile", ways[0], ways[1], repeats, often)
        turns = [(_first_call(config, False), _first_call(config, True)) for _ in range(repeats)]
        yield Row("compiled", "its first call in a process", turns), 0


def _first_call(config: Any, compiles: bool) -> float:
    """Milliseconds of the first forward and backward of a new process."""
    with Worker(_new_process, config, compiles) as worker:
        took: float = worker()
    return took


def _new_process(config: Any, compiles: bool) -> Callable[[], float]:
    leaves, noise, normed = _normed(config)
    function: Any = torch.compile(normed) if compiles else normed
    return clock(partial(_forward_backward, function, leaves, noise))


def flat(job: Job, config: Any, repeats: int) -> Iterator[Tried]:
    """AdamW's kernel is called for a list of tensors: one flat tensor has no list."""
    apart = [p.detach().clone().requires_grad_() for p in job.classifier().parameters()]
    whole = torch.cat([p.detach().flatten() for p in apart]).requires_grad_()
    whole.grad = numbers(len(whole))
    for p, grad in zip(apart, whole.grad.split([p.numel() for p in apart]), strict=True):
        p.grad = grad.view_as(p).clone()
    optimizers = AdamW(apart, lr=LR), AdamW([whole], lr=LR)

    for optimizer in optimizers:
        optimizer.step()
    views = whole.detach().split([p.numel() for p in apart])
    need_equal_parameters("flat", [p.detach().flatten() for p in apart], views)
    turns = [clock(optimizer.step, times=3) for optimizer in optimizers]
    yield Row("flat", "AdamW on one flat tensor", interleave(turns[0], turns[1], repeats)), 1


def backward(job: Job, config: Any, repeats: int) -> Iterator[Tried]:
    """AdamW for each weight as soon as its gradient is there, while backward runs."""
    models = [job.classifier().train()]
    models.append(copy.deepcopy(models[0]))
    batch = random_batch(models[0].config, SEED)
    for model in models:
        on_a_cpu(model)
    together = AdamW(models[0].parameters(), lr=LR)
    for parameter in models[1].parameters():
        own = AdamW([parameter], lr=LR)

        def update(p: Tensor, own: AdamW = own) -> None:
            own.step()
            own.zero_grad()

        parameter.register_post_accumulate_grad_hook(update)

    def train(steps: int, model: nn.Module, optimizer: AdamW | None) -> list[float]:
        losses = []
        for step in range(steps):
            torch.manual_seed(step)
            loss = model(**batch).loss
            loss.backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    sides = (models[0], together), (models[1], None)
    need_equal_losses("backward", train(GATE_STEPS, *sides[0]), train(GATE_STEPS, *sides[1]))
    turns = [clock(partial(train, STEPS, *side), STEPS) for side in sides]
    yield Row("backward", "AdamW while backward runs, a step", interleave(turns[0], turns[1], repeats)), 1


def pinned(job: Job, config: Any, repeats: int) -> Iterator[Tried]:
    """Each of two ranks stays on a core of its own."""
    with ranks(job, ("ours",)) as free, ranks(job, ("ours",), _rank_on_a_core) as fixed:
        for (_, losses, _), (_, others, _) in zip(free("ours", GATE_STEPS), fixed("ours", GATE_STEPS), strict=True):
            need_equal_losses("pinned", losses, others)
        turns = [partial(slowest, both, "ours") for both in (free, fixed)]
        yield Row("pinned", "2 ranks, each on its core, a step", interleave(turns[0], turns[1], repeats)), 1


def _rank_on_a_core(job: Job, rank: int, meeting: str, wrappers: Sequence[str]) -> Any:
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    return ddp_rank(job, rank, meeting, wrappers)


IDEAS = {
    "draw": draw, "words": words, "qkv": qkv, "bias": bias, "softmax": softmax, "norm": norm, "compiled": compiled,
    "flat": flat, "backward": backward, "pinned": pinned,
}  # fmt: skip
HEADER = f"{'idea':<9} {'what':<34} {'as it is':>10}     {'idea':>10}      {'ratio (lowest to highest)':<26} in a step"


def missing(idea: str) -> str:
    """Why an idea cannot be measured here, or ""."""
    if idea == "words" and not draws_doubles():
        return "torch draws no doubles for dropout here"
    if idea == "compiled" and shutil.which("g++") is None:
        return "torch.compile needs g++"
    if idea == "pinned" and (not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2):
        return "there are no two cores that a process can be kept on"
    return ""


def saved(row: Row, times: int) -> float:
    """Milliseconds that the idea would save in a step."""
    return statistics.median(now - idea for now, idea in row.turns) * times


def main() -> None:
    parser = Parser(prog="tried.py", description=__doc__)
    add = parser.add_argument
    add("ideas", metavar="IDEA", nargs="*", help=f"{', '.join(IDEAS)} (default: all)")
    add(
        "--repeats",
        metavar="N",
        type=number(int, 5),
        default=5,
        help="turns of whole steps; of less: 5 times as many",
    )
    add("--json", metavar="FILE", help="gets the JSON object, too")
    add("--model", metavar="DIR", help="a folder or a name on the Hub (default: the packaged checkpoint)")
    args = parser.parse_args()
    for idea in args.ideas:
        if idea not in IDEAS:
            raise UsageError(f"{idea}: there is no such idea; choose from {', '.join(IDEAS)}")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise UsageError(f"--json {args.json}: there is no such folder")
    job, began = Job(model_of(args.model), "stdlib-pairs"), time.perf_counter()
    config, rows, skipped = job.classifier().config, [], {}
    print(HEADER, flush=True)
    for name in args.ideas or IDEAS:
        if reason := missing(name):
            skipped[name] = reason
            print(f"{name:<9} skipped: {reason}", flush=True)
            continue
        for row, times in IDEAS[name](job, config, args.repeats):
            in_step = saved(row, times) if times else None  # a process's first call is in no step
            print(f"{row.line():<97} {f'{in_step:.3g} ms' if in_step is not None else ''}".rstrip(), flush=True)
            rows.append(row.record() | {"times": times, "in_step": in_step})
    record = {"machine": machine(), "model": args.model or "the packaged checkpoint", "rows": rows, "skipped": skipped}
    if args.json:
        Path(args.json).write_text(json.dumps(record, indent=2) + "\n")
    print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    run_gated("tried.py", main)
