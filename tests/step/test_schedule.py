"""step/schedule.py against transformers.get_scheduler (transformers 5.23), which uses torch 2.13's LambdaLR.

The same learning rate in every step. What the library accepts silently is an error or a warning here.

    python -m pytest tests/step/test_schedule.py

Every comparison is ==: the same operations in the same order.
"""

import copy
import inspect
import itertools
import json
import math
import random
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanofinetune.step.schedule import AFTER_THE_END, SCHEDULES, Schedule, get_scheduler, linear_factor

PAST_THE_END = pytest.mark.filterwarnings("ignore:step .* of a schedule made for")  # ours; has a test of its own
LONG_WARMUP = pytest.mark.filterwarnings("ignore:num_warmup_steps is .*, more than")  # ours; has a test of its own


@pytest.fixture
def library_scheduler():
    """transformers.get_scheduler, or a skip."""
    return pytest.importorskip("transformers", reason="transformers is not installed").get_scheduler


def make_optimizer(lrs=(0.3, 5e-5)):
    """One group for each learning rate; the first one is the optimizer's default too."""
    groups = [{"params": [torch.ones(2, requires_grad=True)], "lr": lr} for lr in lrs]
    return torch.optim.SGD(groups, lr=lrs[0])


def learning_rates(schedule, steps):
    """The learning rates of each update, as the optimizer sees them; checks that the schedule says the same."""
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in schedule.optimizer.param_groups])
        assert rates[-1] == schedule.get_last_lr()
        schedule.optimizer.step()
        schedule.step()
    return rates


# name -> sets of scheduler_specific_kwargs that transformers takes for it
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "linear": [{}],
    "constant": [{}],
    "constant_with_warmup": [{}],
    "cosine": [{}, {"num_cycles": 0.5}, {"num_cycles": 1}, {"num_cycles": 1.75}, {"num_cycles": 0}],
    "cosine_with_restarts": [{}, {"num_cycles": 1}, {"num_cycles": 3}, {"num_cycles": 2.5}],
    "polynomial": [{}, {"power": 2}, {"power": 0.5, "lr_end": 1e-3}, {"lr_end": 0.0}, {"power": 0, "lr_end": 0.1}],
    "inverse_sqrt": [{}, {"timescale": None}, {"timescale": 7}, {"timescale": 2.5}],
}


@PAST_THE_END
@LONG_WARMUP
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", OPTIONS)
def test_schedules_match_transformers_get_scheduler(library_scheduler, name, seed):
    """Random learning rates, warm-ups and totals, warm-ups that are longer than the training, steps past the end."""
    rng = random.Random(f"{name} {seed}")
    for options in OPTIONS[name]:
        total = rng.choice([1, 2, 3, rng.randint(4, 60)])
        warmup = 0 if name == "constant" else rng.choice([0, 1, rng.randint(0, total), rng.randint(0, 2 * total)])
        warmup += name == "polynomial" and warmup == total  # there the library divides by zero: see below
        lrs = (rng.uniform(0.2, 1.0), 10 ** rng.uniform(-6, -1), rng.uniform(0.2, 1.0))
        ours, theirs = (
            get(name, make_optimizer(lrs), warmup, total, options) for get in (get_scheduler, library_scheduler)
        )
        assert learning_rates(ours, total + 9) == learning_rates(theirs, total + 9), (warmup, total, options)
        assert [group["initial_lr"] for group in ours.optimizer.param_groups] == list(lrs)
        for attribute in ("last_epoch", "_step_count", "base_lrs", "_last_lr"):
            assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
        # without what transformers does not need either
        if name not in AFTER_THE_END:
            ours, theirs = (get(name, make_optimizer(lrs), warmup) for get in (get_scheduler, library_scheduler))
            assert learning_rates(ours, 9) == learning_rates(theirs, 9)


def test_every_schedule_and_option_is_transformers():
    optimization = pytest.importorskip("transformers.optimization", reason="transformers is not installed")
    functions = {kind.value: function for kind, function in optimization.TYPE_TO_SCHEDULER_FUNCTION.items()}
    assert set(SCHEDULES) == set(OPTIONS) < set(functions)
    assert set(AFTER_THE_END) < set(SCHEDULES)
    for name, factor in SCHEDULES.items():
        given = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
        theirs = {
            p.name: p.default for p in inspect.signature(functions[name]).parameters.values() if p.name not in given
        }
        ours = {p.name: p.default for p in inspect.signature(factor).parameters.values() if p.kind is p.KEYWORD_ONLY}
        ours.pop("lr_init", None)  # which transformers takes from the optimizer
        assert ours == theirs, name


@PAST_THE_END
def test_polynomial_ends_where_transformers_divides_by_zero(library_scheduler):
    """All steps are warm-up: the library fails at the very last tick, after the training."""
    ours, theirs = (get("polynomial", make_optimizer(), 3, 3) for get in (get_scheduler, library_scheduler))
    assert learning_rates(ours, 2) == learning_rates(theirs, 2)
    with pytest.raises(ZeroDivisionError):
        theirs.step()
    assert learning_rates(ours, 3)[1:] == [[0.3 * (1e-7 / 0.3), 5e-5 * (1e-7 / 0.3)]] * 2


def test_polynomial_goes_to_lr_end_of_the_first_group_only_as_in_transformers(library_scheduler):
    for get in (get_scheduler, library_scheduler):
        schedule = get("polynomial", make_optimizer((0.3, 0.6)), 0, 5, {"lr_end": 0.03})
        learning_rates(schedule, 5)
        assert schedule.get_last_lr() == pytest.approx([0.03, 0.06], rel=1e-15)


def test_cosine_rises_again_past_the_end_silently_in_transformers(library_scheduler):
    theirs = learning_rates(library_scheduler("cosine", make_optimizer(), 0, 4), 9)
    assert theirs[4][0] == 0 and theirs[8][0] == 0.3
    schedule = get_scheduler("cosine", make_optimizer(), 0, 4)
    learning_rates(schedule, 4)
    with pytest.warns(
        UserWarning, match="step 5 of a schedule made for 4: the learning rate follows the cosine, up again"
    ):
        schedule.step()
    assert schedule.get_last_lr() == theirs[5]


@PAST_THE_END
@LONG_WARMUP
@pytest.mark.parametrize("total", [1, 2, 3, 7, 10, 97])
@pytest.mark.parametrize("warmup", [0, 1, 2, 5, 10, 50])
def test_linear_schedule_matches_transformers_get_scheduler(library_scheduler, warmup, total):
    """Longer warm-ups than trainings and three steps past the end included."""
    ours, theirs = (get("linear", make_optimizer(), warmup, total) for get in (get_scheduler, library_scheduler))
    assert learning_rates(ours, total + 3) == learning_rates(theirs, total + 3)
    assert [group["initial_lr"] for group in ours.optimizer.param_groups] == [0.3, 5e-5]
    for name in ("last_epoch", "_step_count", "base_lrs", "_last_lr"):
        assert getattr(ours, name) == getattr(theirs, name), name


def test_linear_factor_matches_transformers_lambda():
    optimization = pytest.importorskip("transformers.optimization", reason="transformers is not installed")
    library = optimization._get_linear_schedule_with_warmup_lr_lambda
    for warmup, total in itertools.product(range(12), range(1, 12)):
        for step in range(15):
            expected = library(step, num_warmup_steps=warmup, num_training_steps=total)
            factor = linear_factor(step, warmup, total)
            assert factor == expected
            assert isinstance(factor, float)


def test_first_warmup_update_changes_nothing_as_in_the_library(library_scheduler):
    for get in (get_scheduler, library_scheduler):
        optimizer = make_optimizer()
        schedule = get("linear", optimizer, 2, 6)
        assert schedule.get_last_lr() == [0.0, 0.0]
        assert [rates[0] / 0.3 for rates in learning_rates(schedule, 6)] == [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]
        assert schedule.get_last_lr() == [0.0, 0.0]


def test_training_under_it_matches_training_under_the_library(library_scheduler):
    def train(get):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        schedule = get("linear", optimizer, num_warmup_steps=3, num_training_steps=12)
        for _ in range(12):
            optimizer.zero_grad()
            model(torch.ones(2, 3)).sum().backward()
            optimizer.step()
            schedule.step()
        return model.weight

    assert torch.equal(train(get_scheduler), train(library_scheduler))


def test_initial_lr_of_a_resumed_optimizer_is_kept(library_scheduler):
    """An optimizer that has been scheduled already keeps its peak: initial_lr is not overwritten by a decayed lr."""
    for get in (get_scheduler, library_scheduler):
        optimizer = make_optimizer()
        learning_rates(get("linear", optimizer, 0, 10), 5)
        assert get("linear", optimizer, 0, 10).base_lrs == [0.3, 5e-5]


# ---- arguments


def test_enum_name_is_accepted(library_scheduler):
    from transformers import SchedulerType

    for name in SCHEDULES:
        ours, theirs = (get(SchedulerType(name), make_optimizer(), 0, 5) for get in (get_scheduler, library_scheduler))
        assert ours.name == name
        assert learning_rates(ours, 5) == learning_rates(theirs, 5)
    with pytest.raises(ValueError, match="scheduler name is 'greedy': known are linear, constant"):
        get_scheduler(SchedulerType.GREEDY, make_optimizer(), 0, 5)


@pytest.mark.parametrize("name", ["cosine_with_min_lr", "reduce_lr_on_plateau", "Linear", "", None])
def test_other_schedules_are_refused(name):
    with pytest.raises(ValueError, match=f"scheduler name is {name!r}: known are linear, constant, "):
        get_scheduler(name, make_optimizer(), 0, 5)


def test_linear_schedule_is_still_a_class_of_its_own_arguments():
    schedule = Schedule(make_optimizer(), 2, 6)
    assert type(schedule) is type(get_scheduler("linear", make_optimizer(), 2, 6)) is Schedule
    assert [rates[0] / 0.3 for rates in learning_rates(schedule, 6)] == [linear_factor(step, 2, 6) for step in range(6)]


@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.25, 1 / 3, 0.5, 0.999])
@pytest.mark.parametrize("total", [1, 7, 10, 1377])
def test_warmup_ratio_matches_training_arguments(ratio, total):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    expected = transformers.TrainingArguments.get_warmup_steps(SimpleNamespace(warmup_steps=ratio), total)
    assert get_scheduler("linear", make_optimizer(), ratio, total).num_warmup_steps == expected


def test_get_scheduler_of_transformers_takes_a_ratio_for_a_count(library_scheduler):
    """There 0.1 means a tenth of a step: the first update has learning rate 0 and the second is past its warm-up."""
    rates = [rate for rate, _ in learning_rates(library_scheduler("linear", make_optimizer(), 0.1, 100), 3)]
    assert rates[0] == 0.0
    assert rates[1] > 0.99 * 0.3
    ours = learning_rates(get_scheduler("linear", make_optimizer(), 0.1, 100), 3)
    assert ours == learning_rates(library_scheduler("linear", make_optimizer(), 10, 100), 3)


def test_whole_floats_are_counts():
    schedule = get_scheduler("linear", make_optimizer(), 2.0, 3.0 * 10)
    assert (schedule.num_warmup_steps, schedule.num_training_steps) == (2, 30)
    assert isinstance(schedule.num_training_steps, int)
    assert get_scheduler("linear", make_optimizer(), 0.0, 5).num_warmup_steps == 0
    assert get_scheduler("linear", make_optimizer(), 1.0, 5).num_warmup_steps == 1  # as TrainingArguments: not 100 %


@pytest.mark.parametrize(
    ("warmup", "total", "message"),
    [
        (None, 10, "num_warmup_steps is None: 'linear' needs a number, 0 for no warm-up"),
        (0, None, "num_training_steps is None: 'linear' needs the number of optimizer updates"),
        (0, 0, "num_training_steps is 0: it must be 1 or more, the number of optimizer updates"),
        (0, -3, "num_training_steps is -3: it must be 1 or more, the number of optimizer updates"),
        (0, 2.5, "num_training_steps is 2.5: it must be a whole number of optimizer updates"),
        (0, float("nan"), "num_training_steps is nan: it must be a whole number of optimizer updates"),
        (-1, 10, "num_warmup_steps is -1: it must be 0 or more, or a ratio below 1"),
        (1.5, 10, "num_warmup_steps is 1.5: it must be a whole number of optimizer updates"),
        (-0.5, 10, "num_warmup_steps is -0.5: it must be a whole number of optimizer updates"),
    ],
)
def test_bad_numbers_are_refused(warmup, total, message):
    optimizer = make_optimizer()
    with pytest.raises(ValueError) as error:
        get_scheduler("linear", optimizer, warmup, total)
    assert str(error.value) == message
    assert "initial_lr" not in optimizer.param_groups[0]  # untouched


def test_where_transformers_ignores_an_argument_we_raise(library_scheduler):
    constant = [[0.3, 5e-5]] * 3
    assert learning_rates(library_scheduler("constant", make_optimizer(), 2, 9, {"num_cycles": 7}), 3) == constant
    assert (
        learning_rates(library_scheduler("constant_with_warmup", make_optimizer(), 0, 9, {"power": 7}), 3) == constant
    )
    with pytest.raises(
        ValueError, match="num_warmup_steps is 2: 'constant' has no warm-up, use 'constant_with_warmup'"
    ):
        get_scheduler("constant", make_optimizer(), 2, 9)
    for name in ("constant", "constant_with_warmup"):
        with pytest.raises(ValueError, match=rf"scheduler_specific_kwargs is {{'power': 7}}: '{name}' takes none"):
            get_scheduler(name, make_optimizer(), 0, 9, {"power": 7})


@PAST_THE_END
@pytest.mark.parametrize(
    ("name", "options", "theirs", "message"),
    [
        ("polynomial", {"lr_end": 0.3}, ValueError, "lr_end is 0.3: it must be below the optimizer's lr, 0.3"),
        (
            "polynomial",
            {"lr_end": -1.0},
            lambda rates: rates[-1][0] < 0,
            "lr_end is -1.0: it must be a number, 0 or more",
        ),
        ("polynomial", {"power": -1.0}, ZeroDivisionError, "power is -1.0: it must be a number, 0 or more"),
        (
            "cosine",
            {"num_cycles": math.nan},
            lambda rates: rates[0][0] == 0,
            "num_cycles is nan: it must be a number, 0 or more",
        ),
        ("inverse_sqrt", {"timescale": 0}, ZeroDivisionError, "timescale is 0: it must be a number, above 0"),
        ("inverse_sqrt", {"timescale": "9"}, TypeError, "timescale is '9': it must be a number, above 0"),
    ],
)
def test_bad_options_are_refused_before_the_training(library_scheduler, name, options, theirs, message):
    """The library fails at some step, or goes on with a learning rate that is nonsense."""
    with pytest.raises(ValueError) as error:
        get_scheduler(name, make_optimizer(), 0, 5, options)
    assert str(error.value) == message
    if isinstance(theirs, type):
        with pytest.raises(theirs):
            learning_rates(library_scheduler(name, make_optimizer(), 0, 5, options), 6)
    else:
        assert theirs(learning_rates(library_scheduler(name, make_optimizer(), 0, 5, options), 6))


def test_options_of_another_schedule_are_refused_as_in_transformers(library_scheduler):
    for name in ("linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt"):
        with pytest.raises(TypeError, match="unexpected keyword argument 'min_lr'"):
            library_scheduler(name, make_optimizer(), 0, 5, {"min_lr": 0.1})
        with pytest.raises(ValueError, match=rf"scheduler_specific_kwargs is {{'min_lr': 0.1}}: '{name}' takes "):
            get_scheduler(name, make_optimizer(), 0, 5, {"min_lr": 0.1})
    with pytest.raises(ValueError, match="'polynomial' takes lr_end, power"):
        get_scheduler("polynomial", make_optimizer(), 0, 5, {"lr_init": 0.1})


def test_numbers_that_a_schedule_needs_are_asked_for_as_in_transformers(library_scheduler):
    for name in SCHEDULES:
        if name != "constant":
            for get in (get_scheduler, library_scheduler):
                with pytest.raises(ValueError, match="num_warmup_steps"):
                    get(name, make_optimizer(), None, 5)
        if name in AFTER_THE_END:
            for get in (get_scheduler, library_scheduler):
                with pytest.raises(ValueError, match="num_training_steps"):
                    get(name, make_optimizer(), 0, None)
    with pytest.raises(ValueError, match=r"num_warmup_steps is 0.5, a ratio: this needs num_training_steps"):
        get_scheduler("inverse_sqrt", make_optimizer(), 0.5)


def test_other_arguments_are_refused():
    with pytest.raises(ValueError, match=r"scheduler_specific_kwargs is {'num_cycles': 2}: 'linear' takes none"):
        get_scheduler("linear", make_optimizer(), 0, 5, {"num_cycles": 2})
    get_scheduler("linear", make_optimizer(), 0, 5, {})
    with pytest.raises(TypeError, match="is not an Optimizer"):
        get_scheduler("linear", torch.nn.Linear(2, 2), 0, 5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a learning rate of the optimizer is a tensor"):
        get_scheduler("linear", torch.optim.SGD([torch.ones(2, requires_grad=True)], lr=torch.tensor(0.1)), 0, 5)
    with pytest.raises(NotImplementedError, match=r"step\(epoch=3\) is not supported"):
        get_scheduler("linear", make_optimizer(), 0, 5).step(3)
    schedule = get_scheduler("linear", make_optimizer(), 0, 5)
    rate = schedule.optimizer.param_groups[0]["lr"] = torch.tensor(0.1)  # later: refused too, not replaced
    with pytest.raises(ValueError, match="a learning rate of the optimizer is a tensor"):
        schedule.step()
    assert schedule.optimizer.param_groups[0]["lr"] is rate


def test_get_scheduler_of_transformers_with_no_steps_is_silently_zero(library_scheduler):
    for total in (0, -3):
        schedule = library_scheduler("linear", make_optimizer(), 0, total)
        assert learning_rates(schedule, 3) == [[0.0, 0.0]] * 3


# ---- warnings


def test_a_step_past_the_end_warns_once(library_scheduler):
    schedule = get_scheduler("linear", make_optimizer(), 0, 3)
    learning_rates(schedule, 3)  # the three updates and the tick after the last one: no warning
    with pytest.warns(UserWarning, match="step 4 of a schedule made for 3: the learning rate stays 0"):
        schedule.step()
    learning_rates(schedule, 3)  # no second one: it would be an error
    learning_rates(library_scheduler("linear", make_optimizer(), 0, 3), 9)  # the library never warns


def test_a_warmup_longer_than_the_training_warns(library_scheduler):
    with pytest.warns(UserWarning, match="num_warmup_steps is 9, more than num_training_steps, which is 3"):
        ours = get_scheduler("linear", make_optimizer(), 9, 3)
    theirs = library_scheduler("linear", make_optimizer(), 9, 3)
    rates = learning_rates(ours, 3)
    assert rates == learning_rates(theirs, 3)
    assert max(rates)[0] < 0.3  # the peak is never reached
    get_scheduler("linear", make_optimizer(), 3, 3)


# ---- state

EVERY_OPTION = pytest.mark.parametrize(
    ("name", "options"), [(name, options) for name in OPTIONS for options in OPTIONS[name][:3]], ids=str
)


def warmup_for(name):
    return 0 if name == "constant" else 2


@EVERY_OPTION
def test_state_dict_continues(name, options):
    schedule = get_scheduler(name, make_optimizer(), warmup_for(name), 10, options)
    learning_rates(schedule, 4)
    saved = json.loads(json.dumps(schedule.state_dict()))  # plain numbers, and every float comes back as it was
    resumed = get_scheduler(name, make_optimizer(), warmup_for(name), 10, options)
    resumed.load_state_dict(saved)
    assert resumed.optimizer.param_groups[0]["lr"] == schedule.get_last_lr()[0]  # even if no optimizer state is loaded
    assert learning_rates(resumed, 6) == learning_rates(schedule, 6)


@pytest.mark.parametrize(
    ("warmup", "total", "message"),
    [
        (2, 20, "num_training_steps is 20, but the saved schedule was made with 10: resume with 10"),
        (3, 10, "num_warmup_steps is 3, but the saved schedule was made with 2: resume with 2"),
    ],
)
@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "polynomial"])
def test_resume_with_other_totals_is_refused(name, warmup, total, message):
    schedule = get_scheduler(name, make_optimizer(), 2, 10)
    learning_rates(schedule, 4)
    resumed = get_scheduler(name, make_optimizer(), warmup, total)
    with pytest.raises(ValueError) as error:
        resumed.load_state_dict(schedule.state_dict())
    assert str(error.value) == message
    assert resumed.last_epoch == 0


def test_resume_with_another_schedule_is_refused_where_lambda_lr_is_silent(library_scheduler):
    resumed = {}
    for get in (get_scheduler, library_scheduler):
        schedule = get("cosine", make_optimizer(), 0, 10)
        learning_rates(schedule, 4)
        resumed[get] = get("linear", make_optimizer(), 0, 10), schedule.state_dict()
    schedule, saved = resumed[library_scheduler]
    schedule.load_state_dict(copy.deepcopy(saved))  # not a word, and it goes on along the other curve
    with pytest.raises(ValueError, match="at step 4, but linear with warm-up 0 of 10 steps gives"):
        get_scheduler("linear", make_optimizer(), 0, 10).load_state_dict(saved)
    schedule, saved = resumed[get_scheduler]
    with pytest.raises(
        ValueError, match="name is linear, but the saved schedule was made with cosine: resume with cosine"
    ):
        schedule.load_state_dict(saved)
    other = get_scheduler("cosine", make_optimizer(), 0, 10, {"num_cycles": 1.0})
    with pytest.raises(ValueError, match=r"options is {'num_cycles': 1.0}, but .* made with {'num_cycles': 0.5}"):
        other.load_state_dict(saved)


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name not in AFTER_THE_END])
def test_a_schedule_without_an_end_resumes_into_a_longer_run(name):
    schedule = get_scheduler(name, make_optimizer(), warmup_for(name), 10)
    learning_rates(schedule, 4)
    longer = get_scheduler(name, make_optimizer(), warmup_for(name), 20)
    longer.load_state_dict(schedule.state_dict())
    assert learning_rates(longer, 9) == learning_rates(schedule, 9)


def test_a_state_dict_from_before_there_were_names_loads():
    schedule = get_scheduler("linear", make_optimizer(), 2, 10)
    learning_rates(schedule, 4)
    saved = schedule.state_dict()
    del saved["name"], saved["options"]
    resumed = get_scheduler("linear", make_optimizer(), 2, 10)
    resumed.load_state_dict(saved)
    assert learning_rates(resumed, 6) == learning_rates(schedule, 6)


def test_lambda_lr_state_dict_forgets_the_totals(library_scheduler):
    """The trap: resumed with twice the steps, the library's learning rate silently jumps up."""
    original = library_scheduler("linear", make_optimizer(), 0, 10)
    learning_rates(original, 4)
    saved = original.state_dict()
    assert saved["lr_lambdas"] == [{}, {}]  # all that is kept of the 0 and the 10
    resumed = library_scheduler("linear", make_optimizer(), 0, 20)
    resumed.load_state_dict(copy.deepcopy(saved))
    resumed.optimizer.step()
    resumed.step()
    assert resumed.get_last_lr()[0] > saved["_last_lr"][0]
    with pytest.raises(
        ValueError, match=r"at step 4, but linear with warm-up 0 of 20 steps gives .*: resume with the same"
    ):
        get_scheduler("linear", make_optimizer(), 0, 20).load_state_dict(saved)


@EVERY_OPTION
def test_lambda_lr_state_dict_loads(library_scheduler, name, options):
    theirs = library_scheduler(name, make_optimizer(), 2, 10, options)
    learning_rates(theirs, 4)
    ours = get_scheduler(name, make_optimizer(), warmup_for(name), 10, options)
    ours.load_state_dict(theirs.state_dict())
    assert learning_rates(ours, 6) == learning_rates(theirs, 6)
    assert ours.state_dict()["_step_count"] == theirs.state_dict()["_step_count"]


@EVERY_OPTION
def test_state_dict_loads_into_lambda_lr(library_scheduler, name, options):
    ours = get_scheduler(name, make_optimizer(), warmup_for(name), 10, options)
    learning_rates(ours, 4)
    optimizer = make_optimizer()
    theirs = library_scheduler(name, optimizer, 2, 10, options)
    theirs.load_state_dict(ours.state_dict())
    optimizer.load_state_dict(ours.optimizer.state_dict())
    assert learning_rates(theirs, 6) == learning_rates(ours, 6)


def test_saved_base_lrs_hold_as_in_lambda_lr(library_scheduler):
    """Resumed with another peak, the saved one goes on; the optimizer's state dict says the same."""
    rates = []
    for get in (get_scheduler, library_scheduler):
        schedule = get("linear", make_optimizer(), 2, 10)
        learning_rates(schedule, 4)
        resumed = get("linear", make_optimizer((1.0, 1.0)), 2, 10)
        resumed.load_state_dict(schedule.state_dict())
        resumed.optimizer.load_state_dict(schedule.optimizer.state_dict())
        rates.append(learning_rates(resumed, 6))
    assert rates[0] == rates[1]


def test_state_dict_of_other_groups_is_refused():
    saved = get_scheduler("linear", make_optimizer((0.1,)), 0, 5).state_dict()
    with pytest.raises(ValueError, match="the saved schedule has 1 parameter groups, the optimizer has 2"):
        get_scheduler("linear", make_optimizer(), 0, 5).load_state_dict(saved)


# ---- in others' hands


def test_accelerate_prepares_it_as_a_scheduler():
    """Why it is an LRScheduler: prepare wraps those and passes anything else through, unprepared."""
    accelerate = pytest.importorskip("accelerate", reason="the extra `test` (accelerate) is not installed")
    from accelerate.state import AcceleratorState, GradientState, PartialState

    try:
        accelerator = accelerate.Accelerator(cpu=True)
        optimizer = make_optimizer()
        schedule = get_scheduler("linear", optimizer, 1, 4)
        lookalike = SimpleNamespace(step=schedule.step, get_last_lr=schedule.get_last_lr)
        prepared_optimizer, prepared, passed = accelerator.prepare(optimizer, schedule, lookalike)
        assert type(prepared).__name__ == "AcceleratedScheduler"
        assert passed is lookalike
        rates = []
        for _ in range(4):
            rates.append(prepared.get_last_lr()[0] / 0.3)
            prepared_optimizer.step()
            prepared.step()
        assert rates == [linear_factor(step, 1, 4) for step in range(4)]
        again = get_scheduler("linear", prepared_optimizer, 1, 4)  # the course builds it on the prepared optimizer
        assert again.get_last_lr() == [0.0, 0.0]
    finally:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()


def test_a_skipped_first_update_does_not_warn(library_scheduler):
    """A GradScaler skips its first updates as a rule; torch then suspects a wrong order of the two step() calls."""

    def skip_the_first(get):
        p = torch.ones(2, requires_grad=True)
        optimizer = torch.optim.SGD([p], lr=0.1)
        schedule = get("linear", optimizer, 0, 4)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for step in range(3):
            scaler.scale((p * (float("inf") if step == 0 else 1.0)).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            optimizer.zero_grad()
        assert scaler.get_scale() == 2.0
        return schedule.get_last_lr()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = skip_the_first(get_scheduler)
    with pytest.warns(UserWarning, match="Detected call of `lr_scheduler.step"):
        assert ours == skip_the_first(library_scheduler)
