"""How far a training step is from what this machine could do at best, and where the rest of its time goes.

    python bench/limit.py                                       fp32, bf16 and best, on the packaged checkpoint
    python bench/limit.py fp32 --data ./mrpc --repeats 9
    python bench/limit.py --data ./mrpc --record limit

train.py trains in a process for each setup. They take turns, and one computes while the others wait. A turn measures
the rate of matrix products at the model's own sizes, then a number of training steps, then a few steps under
torch.profiler; where steps are slow it takes fewer. The distance is the time of a step over `operations` / rate: 1.0
would be the limit.

    operations  of the products that must be computed: for the tokens of the rows, without padding, and of the last
                layer only what the head reads; forward and backward (`operations` says which)
    rate        the limit: the highest that torch.mm reached in any turn, in the setup's precision, at the sizes and
                in the layouts of the model's products; a large square product is measured too, for comparison

The profiler slows a step down. So its parts are shares of a profiled step, multiplied by the time of a plain one. Each
moment belongs to one part, to that of the operator which began last; parts add up to the step. The last line of stdout
is one JSON object. `--record NAME` writes bench/records/DATE_cpu_NAME.json and .png.
"""

from __future__ import annotations

import heapq
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd.profiler import record_function

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pieces import Child, job_of, machine, short
from readme import record_base
from throughput import BEST, best_precision

from nanofinetune.data.pretrained import packaged_model
from nanofinetune.ground.cli import Parser, number, run_main
from nanofinetune.ground.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent
WARM_UP, STEPS, PROFILED = 4, 20, 3  # steps: before the first turn; at most timed, and at most profiled, in a turn
LONGEST = 20.0  # seconds after which a turn begins no further step
SECONDS = 0.05  # for each product whose rate is measured, in each turn
SQUARE = 1024  # rows and columns of the large product
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Setup:
    """How train.py is started, and which distance we would like to see."""

    what: str
    precision: str
    options: tuple[str, ...]
    target: str = ""


QUICK, QUICK_NAME = best_precision()
SETUPS = {
    "fp32": Setup("fp32", "no", (), "<= 1.4"),
    "bf16": Setup("bf16", "bf16", ("--precision", "bf16")),
    "best": Setup(f"{QUICK_NAME}, grouped, fast dropout", QUICK, ("--precision", QUICK, *BEST), "<= 1.15"),
}

# --- the operations that must be computed -----------------------------------------------------------------------------


class Shape(NamedTuple):
    """Of a BertForSequenceClassification."""

    layers: int
    width: int
    inner: int  # width between the two products of a feed-forward part
    classes: int


def shape_of(model: Any) -> Shape:
    """The shape of a model. Raises UsageError for another build, whose products `operations` does not know."""
    name, config = type(model).__name__, model.config
    if name != "BertForSequenceClassification":
        raise UsageError(f"--model: a {name}; name a BertForSequenceClassification, whose operations are known")
    return Shape(config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.num_labels)


def operations(shape: Shape, lengths: Sequence[int], all_read: bool = False) -> int:
    """Floating-point operations of the matrix products of one training step: 2mnk of each.

    Args:
        lengths: tokens of each row, without padding.
        all_read: the last layer computes every token, as transformers has it; else the head's first token of each row.

    Forward, for T tokens in B rows, n of them in a row, width H and inner width F:
    a layer 8TH² (query, key, value, output) + 4TFH (feed-forward) + 4H Σn² (scores, and their products with the
    values); the last one 4TH² (key, value) + 4BH² (query, output) + 4BFH + 4TH; the pooler 2BH², the classifier 2BHC.
    Backward computes two products for each of these, since every operand has a gradient. Embeddings have no product.
    """
    layers, width, inner, classes = shape
    rows, tokens, pairs = len(lengths), sum(lengths), sum(n * n for n in lengths)
    full = 8 * tokens * width**2 + 4 * tokens * inner * width + 4 * width * pairs
    first = 4 * tokens * width**2 + 4 * rows * width**2 + 4 * rows * inner * width + 4 * width * tokens
    head = 2 * rows * width**2 + 2 * rows * width * classes
    return 3 * ((layers - 1) * full + (full if all_read else first) + head)


# --- the rate of the machine ------------------------------------------------------------------------------------------


def products(shape: Shape, tokens: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any], int]]:
    """The products of the layers' weights with so many tokens, as a step computes them -> (name, action, operations).

    Forward multiplies by the transposed weight; backward by the weight, and the tokens' gradients by the tokens.
    """
    for outs, ins in ((shape.width, shape.width), (shape.inner, shape.width), (shape.width, shape.inner)):
        yield from layouts(tokens, ins, outs, dtype)


def layouts(tokens: int, ins: int, outs: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any], int]]:
    x, gradient = torch.rand(tokens, ins).to(dtype), torch.rand(tokens, outs).to(dtype)
    weight = torch.rand(outs, ins).to(dtype)
    size, work = f"{tokens} x {ins} -> {outs}", 2 * tokens * ins * outs
    yield f"{size}, forward", lambda: torch.mm(x, weight.t()), work
    yield f"{size}, to the input", lambda: torch.mm(gradient, weight), work
    yield f"{size}, to the weight", lambda: torch.mm(gradient.t(), x), work


def rates(found: Iterable[tuple[str, Callable[[], Any], int]], seconds: float = SECONDS) -> dict[str, float]:
    """The highest rate of each product in that time, in operations a second."""
    best = {}
    for name, action, work in found:
        action()  # oneDNN compiles a kernel for a new size
        times: list[float] = []
        end = time.perf_counter() + seconds
        while not times or time.perf_counter() < end:
            began = time.perf_counter()
            action()
            times.append(time.perf_counter() - began)
        best[name] = work / min(times)
    return best


# --- where the time goes ----------------------------------------------------------------------------------------------


class Event(NamedTuple):
    """An operator, or a named range, of a trace; times in any one unit."""

    name: str
    start: float
    end: float
    thread: int = 1
    sequence: int = -1  # autograd's number: that of the forward operator, and of its node in backward
    forward_thread: int = 1  # of a node in backward: where the forward operator ran


PRODUCTS, ATTENTION, DROPOUT, NORMS = "products", "attention", "dropout", "norms and activations"
EMBEDDING, PACKING, ADAMW, DATA, OTHER, REST = "embedding", "packing", "AdamW", "data", "other operators", "Python"
PARTS = {
    PRODUCTS: "products of weights, with biases and their gradients",
    ATTENTION: "scores, softmax, and their products",
    DROPOUT: "drawing masks, and multiplying by those of hidden states",
    NORMS: "LayerNorm, GELU, tanh, loss",
    EMBEDDING: "looking up and adding, and the tables' gradients",
    PACKING: "between rows with padding and tokens without",
    ADAMW: "the optimizer's step, with its Python",
    DATA: "loading and collation, with their Python",
    OTHER: "residual additions, casts, masks, the log",
    REST: "the step's time in which no operator runs",
}
NAMED = {
    PRODUCTS: ("aten::mm", "aten::addmm", "aten::linear", "aten::mkldnn_linear"),
    ATTENTION: ("aten::bmm", "aten::baddbmm", "aten::_softmax", "aten::_softmax_backward_data", "attention",
                "aten::scaled_dot_product_attention"),
    DROPOUT: ("aten::dropout", "aten::native_dropout", "aten::bernoulli_", "dropout"),
    NORMS: ("aten::layer_norm", "aten::native_layer_norm", "aten::native_layer_norm_backward", "aten::gelu",
            "aten::gelu_backward", "aten::tanh", "aten::tanh_backward", "aten::_log_softmax",
            "aten::_log_softmax_backward_data", "aten::nll_loss_nd", "aten::nll_loss_forward",
            "aten::nll_loss_backward", "aten::cross_entropy_loss"),
    EMBEDDING: ("aten::embedding", "aten::embedding_backward", "aten::embedding_dense_backward", "embedding"),
    PACKING: ("_Pack", "_Unpack"),
}  # fmt: skip
PART_OF = {name: part for part, names in NAMED.items() for name in names}
STARTS = {"Optimizer.": ADAMW, "enumerate(DataLoader)": DATA}  # of ranges that torch records itself
ENGINE = "autograd::engine::evaluate_function"


def part_named(name: str) -> str | None:
    return PART_OF.get(name) or next((part for start, part in STARTS.items() if name.startswith(start)), None)


def parts_of(events: Sequence[Event]) -> list[str]:
    """The part of each event: by its name, else by what encloses it; a node in backward is where its forward was."""
    order = sorted(range(len(events)), key=lambda i: (events[i].thread, events[i].start, -events[i].end))
    parent: dict[int, int] = {}
    forward: dict[tuple[int, int], int] = {}  # (thread, sequence) -> the last event of forward that has it
    open_events: list[int] = []
    in_backward: set[int] = set()
    for i in order:
        event = events[i]
        while open_events and (
            events[open_events[-1]].thread != event.thread or events[open_events[-1]].end <= event.start
        ):
            open_events.pop()
        if open_events:
            parent[i] = open_events[-1]
        if event.name.startswith(ENGINE) or parent.get(i) in in_backward:
            in_backward.add(i)
        elif event.sequence >= 0:  # several may bear a number; the last one took it
            forward[event.thread, event.sequence] = i
        open_events.append(i)

    def part(at: int | None) -> str:
        while at is not None:
            event = events[at]
            found = part_named(event.name)
            if found:
                return found
            place = (event.forward_thread, event.sequence)
            at = forward[place] if event.name.startswith(ENGINE) and place in forward else parent.get(at)
        return OTHER

    return [part(i) for i in range(len(events))]


def spent(events: Sequence[Event]) -> Iterator[tuple[int, float]]:
    """(event, time) for each moment in which some event runs: it belongs to the one that began last, on any thread.

    So no moment counts twice, though an event encloses others, and a thread waits for another one's events.
    """
    order = sorted(range(len(events)), key=lambda i: (events[i].start, -events[i].end))
    times = sorted({time for event in events for time in (event.start, event.end)})
    running: list[tuple[int, int]] = []  # (-place in order, event): the latest first
    place = 0
    for now, then in pairwise(times):
        while place < len(order) and events[order[place]].start <= now:
            heapq.heappush(running, (-place, order[place]))
            place += 1
        while running and events[running[0][1]].end <= now:
            heapq.heappop(running)
        if running:
            yield running[0][1], then - now


def breakdown(events: Sequence[Event], wall: float) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """A trace of so much time -> each part's time, which add up to it; and within each part its operators' times."""
    found, by_name = dict.fromkeys(PARTS, 0.0), {part: defaultdict[str, float](float) for part in PARTS}
    parts = parts_of(events)
    for i, took in spent(events):
        found[parts[i]] += took
        by_name[parts[i]][events[i].name] += took
    found[REST] = wall - sum(found.values())
    return found, {part: dict(names) for part, names in by_name.items()}


def events_of(profiler: torch.profiler.profile) -> list[Event]:
    """The trace of a profiler, in milliseconds."""
    return [
        Event(
            e.name, e.time_range.start / 1e3, e.time_range.end / 1e3, e.thread, e.sequence_nr, e.fwd_thread or e.thread
        )
        for e in profiler.events()
        if not e.is_async
    ]  # fmt: skip


# --- train.py, watched ------------------------------------------------------------------------------------------------


def ranged(name: str, function: Any) -> Any:
    """The function, as a named range of a trace where one is taken."""

    @wraps(function)
    def inside(*args: Any, **kwargs: Any) -> Any:
        if not torch.autograd._profiler_enabled():
            return function(*args, **kwargs)
        with record_function(name):
            return function(*args, **kwargs)

    return inside


def name_ranges() -> None:
    """Let traces tell dropout, attention and embedding from what else the same operators do."""
    from transformers.models.bert.modeling_bert import BertEmbeddings

    from nanofinetune.cpu import dropout

    for place, what, name in (
        (dropout.ExactDropout, "forward", "dropout"), (dropout.FastDropout, "forward", "dropout"),
        (dropout, "torch_noise", "dropout"), (dropout, "fast_noise", "dropout"),
        (BertEmbeddings, "forward", "embedding"),
    ):  # fmt: skip
        setattr(place, what, ranged(name, getattr(place, what)))
    for table in (dropout.ATTENTIONS, dropout.TABLE):
        for name, attention in table.items():
            table[name] = ranged("attention", attention)


@dataclass(frozen=True)
class Turn:
    """What one turn of a setup measured."""

    seconds: float  # of `steps` steps, as tokens and operations are
    steps: int
    tokens: int
    operations: int
    rates: dict[str, float]  # of the model's products
    square: float  # rate of the large product
    traced: int  # steps under the profiler
    profiled: dict[str, float]  # milliseconds of the profiled steps, by part
    operators: dict[str, dict[str, float]]


def profile() -> torch.profiler.profile:
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])


def turns(pipe: Any, steps: int, precision: str, model: Callable[[], Any]) -> Generator[None, list[int], None]:
    """A generator that is sent each batch's lengths before the batch is trained; between steps it does as told."""
    lengths = yield
    typical = []
    for _ in range(WARM_UP):
        typical.append(sum(lengths))
        lengths = yield
    with profile():  # the first one takes longer
        lengths = yield
    shape, dtype, tokens = shape_of(model()), DTYPES[precision], int(statistics.median(typical))
    pipe.send((True, None))
    while True:
        pipe.recv()
        reached = rates(products(shape, tokens, dtype))
        square = max(rates(layouts(SQUARE, SQUARE, SQUARE, dtype)).values())
        trained: list[list[int]] = []
        began = time.perf_counter()
        while not trained or (len(trained) < steps and time.perf_counter() - began < LONGEST):
            trained.append(lengths)
            lengths = yield
        seconds = time.perf_counter() - began
        with profile() as profiler:
            began, traced = time.perf_counter(), 0
            while not traced or (traced < PROFILED and time.perf_counter() - began < LONGEST / 2):
                lengths = yield
                traced += 1
            wall = (time.perf_counter() - began) * 1e3
        counted = sum(operations(shape, batch) for batch in trained)
        found = breakdown(events_of(profiler), wall)
        all_tokens = sum(map(sum, trained))
        pipe.send((True, Turn(seconds, len(trained), all_tokens, counted, reached, square, traced, *found)))


def train_watched(pipe: Any, log: str, setup: Setup, arguments: Sequence[str], steps: int) -> None:
    """A process: train.py with these arguments, which goes on when `pipe` says so, and without evaluation."""
    with open(log, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    import train

    built: list[Any] = []
    script = turns(pipe, steps, setup.precision, lambda: built[-1])
    next(script)
    compute_faster = train.compute_faster

    def watched_model(model: Any, *args: Any) -> None:
        built.append(model)
        shape_of(model)  # refuses now
        compute_faster(model, *args)

    class Run(train.Run):
        def batches(self, epoch: int) -> Iterator[Any]:
            for batch in super().batches(epoch):
                script.send(batch["attention_mask"].sum(1).tolist())
                yield batch

    name_ranges()
    train.compute_faster, train.Run = watched_model, Run  # type: ignore[misc, assignment]
    train.evaluate_all = lambda *_: {}
    sys.argv = ["train.py", *arguments, *setup.options, "--device", "cpu", "--max-steps", str(10**6)]
    try:
        code = train.run_main("train.py", train.main)
    except EOFError:  # the parent is gone
        return
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    if code:
        pipe.send((False, code))


class Trainer(Child):
    """The process of a setup: it trains as far as its turn goes, then waits."""

    def __init__(self, name: str, arguments: Sequence[str], steps: int, folder: Path) -> None:
        self.log = folder / f"{name}.log"
        super().__init__(train_watched, str(self.log), SETUPS[name], arguments, steps)

    def answer(self) -> Any:
        """What the process sends. Raises UsageError for what train.py takes for a mistake."""
        try:
            fine, value = self.pipe.recv()
        except EOFError:
            fine, value = False, None
        if not fine:
            lines = self.log.read_text().splitlines()
            if value == 2 and lines:
                raise UsageError(lines[-1].removeprefix("train.py: "))
            self.process.join(10)
            raise RuntimeError(f"train.py ended with {value or self.process.exitcode}:\n" + "\n".join(lines[-15:]))
        return value

    def turn(self) -> Turn:
        self.pipe.send(True)
        return self.answer()


# --- the record -------------------------------------------------------------------------------------------------------


def summary(setup: Setup, taken: Sequence[Turn], limit: float) -> dict[str, Any]:
    """A setup's part of the record. `limit`: operations a second."""
    ms = statistics.median(turn.seconds * 1e3 / turn.steps for turn in taken)
    distances = [turn.seconds * limit / turn.operations for turn in taken]
    wall = sum(sum(turn.profiled.values()) for turn in taken)
    scale = ms / wall
    operators = {
        part: {name: scale * sum(turn.operators[part].get(name, 0.0) for turn in taken) for name in names}
        for part, names in {part: {n for turn in taken for n in turn.operators[part]} for part in PARTS}.items()
    }
    return {
        **asdict(setup), "ms": ms, "tokens": statistics.median(turn.tokens / turn.steps for turn in taken),
        "operations": statistics.median(turn.operations / turn.steps for turn in taken), "limit": limit,
        "floor": statistics.median(turn.operations / turn.steps / limit * 1e3 for turn in taken),
        "distance": statistics.median(distances), "low": min(distances), "high": max(distances),
        "rates": {name: max(turn.rates[name] for turn in taken) for name in taken[0].rates},
        "square": max(turn.square for turn in taken),
        "profiled": wall / sum(turn.traced for turn in taken),  # ms of a step under the profiler
        "parts": {part: scale * sum(turn.profiled[part] for turn in taken) for part in PARTS},
        "operators": {part: most(names) for part, names in operators.items()},
        "turns": [{key: value for key, value in asdict(turn).items() if key != "operators"} for turn in taken],
    }  # fmt: skip


def most(times: Mapping[str, float], count: int = 8) -> dict[str, float]:
    return dict(sorted(times.items(), key=lambda item: -item[1])[:count])


def summaries(taken: Mapping[str, Sequence[Turn]]) -> dict[str, Any]:
    """Every setup's part of the record. A precision's limit is the highest rate in any turn that computed in it."""
    limits: dict[str, float] = {}
    for name, found in taken.items():
        precision = SETUPS[name].precision
        limits[precision] = max([limits.get(precision, 0.0), *(max(turn.rates.values()) for turn in found)])
    return {name: summary(SETUPS[name], found, limits[SETUPS[name].precision]) for name, found in taken.items()}


def lines(name: str, found: Mapping[str, Any]) -> list[str]:
    """What is printed of a setup."""
    text = [
        f"{name}: {found['ms']:.4g} ms a step of {found['tokens']:.0f} tokens; {found['operations'] / 1e9:.3g} Gflop at"
        f" {found['limit'] / 1e9:.3g} Gflop/s are {found['floor']:.4g} ms; distance {found['distance']:.2f}"
        f" ({found['low']:.2f} to {found['high']:.2f}) {found['target']}".rstrip(),
        f"  large square product {found['square'] / 1e9:.3g} Gflop/s; a profiled step took {found['profiled']:.4g} ms",
    ]
    for part, ms in found["parts"].items():
        operators = ", ".join(f"{operator} {value:.2f}" for operator, value in [*found["operators"][part].items()][:4])
        text.append(f"  {part:<22} {ms:8.2f} ms {ms / found['ms']:6.1%}  {operators}".rstrip())
    return text


def plot(record: Mapping[str, Any], path: Path) -> None:
    """A stacked bar for each setup, in ms a step, with a line where its operations would end at the limit's rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    setups = record["setups"]
    figure, axis = pyplot.subplots(figsize=(9, 1.8 + 0.7 * len(setups)), layout="constrained")
    colors = pyplot.get_cmap("tab10").colors
    lefts = [0.0] * len(setups)
    for color, part in zip(colors, PARTS, strict=True):
        widths = [max(0.0, found["parts"][part]) for found in setups.values()]
        axis.barh(range(len(setups)), widths, 0.6, left=lefts, color=color, label=part)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    for place, found in enumerate(setups.values()):
        label = "operations / rate" if place == 0 else None
        axis.plot([found["floor"]] * 2, [place - 0.42, place + 0.42], color="black", linewidth=2, label=label)
    axis.set_yticks(range(len(setups)), [found["what"] for found in setups.values()], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("ms a step", fontsize=8)
    axis.set_xlim(left=0)
    figure.legend(loc="outside lower center", ncols=4, fontsize=7)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    pyplot.close(figure)


def write(record: Mapping[str, Any], base: Path) -> None:
    """base.json and base.png."""
    base.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    plot(record, base.with_suffix(".png"))


# --- the command line -------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> Any:
    parser = Parser(prog="limit.py", description=__doc__)
    add = parser.add_argument
    add("setups", metavar="SETUP", nargs="*", help=f"{', '.join(SETUPS)} (default: all)")
    add("--model", metavar="DIR", help="a folder or a name on the Hub (default: the packaged checkpoint)")
    add("--data", metavar="DIR", default="stdlib-pairs", help="what train.py takes (default stdlib-pairs)")
    add("--repeats", metavar="N", type=number(int, 1), default=5, help="turns (default 5)")
    add("--steps", metavar="N", type=number(int, 1), default=STEPS, help=f"timed in a turn (default {STEPS})")
    add("--record", metavar="NAME", help="write bench/records/DATE_cpu_NAME.{json,png}")
    args = parser.parse_args(argv)
    for name in args.setups:
        if name not in SETUPS:
            raise UsageError(f"{name}: there is no such setup; choose from {', '.join(SETUPS)}")
    args.base = record_base(args.record, "cpu")
    return args


def measure(names: Sequence[str], model: str, data: str, repeats: int, steps: int) -> dict[str, Any]:
    """All turns of these setups -> their parts of the record."""
    taken: dict[str, list[Turn]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(prefix="nanofinetune-limit-") as folder, ExitStack() as stack:
        os.environ |= {"NANOFINETUNE_CACHE": str(Path(folder, "tokens")), "TOKENIZERS_PARALLELISM": "false"}
        trainers = {}
        for name in names:  # one after another: the first fills the cache of tokens
            arguments = ("--model", model, "--data", data)
            trainers[name] = stack.enter_context(Trainer(name, arguments, steps, Path(folder)))
            trainers[name].answer()
        for _ in range(repeats):
            for name, trainer in trainers.items():
                taken[name].append(trainer.turn())
    return summaries(taken)


def main() -> None:
    args = parse()
    names = list(dict.fromkeys(args.setups)) or list(SETUPS)
    job = job_of(args.model, args.data)
    found = measure(names, job.model, job.data, args.repeats, args.steps)
    record = {
        "what": "limit", "machine": machine(), "model": short(job.model, packaged_model()),
        "data": short(job.data, None),
        "device": "cpu", "steps": args.steps, "warm_up": WARM_UP, "setups": found,
    }  # fmt: skip
    for name, part in found.items():
        print("\n".join(lines(name, part)), flush=True)
    if args.base:
        write(record, args.base)
    print(json.dumps(record))


if __name__ == "__main__":
    sys.exit(run_main("limit.py", main))
