"""Accelerate 1.15's own test scripts, run on our classes on 1 and 2 ranks: which cases pass, and why others do not.

The scripts come with the package: accelerate.test_utils.scripts. NOT_PASSED is exact: a case that begins to pass, or
fails in another way, fails the test here. Left out: what needs a GPU, a model from the Hub or another backend.

    python -m pytest tests/peers/test_accelerate_scripts.py -m slow
"""

import ast
from itertools import product

import pytest
from helpers import run_ranks
from swapped import run_cases, text_of

pytest.importorskip("accelerate", reason="the peer itself, extra `test`")

FOLDER = "accelerate.test_utils.scripts."
OPERATIONS = (
    "gather gather_object gather_non_contiguous broadcast pad_across_processes reduce_sum reduce_mean reduce_max"
)
LOADER = "test_data_loader(DataLoader(dataset, {}, num_workers=NUM_WORKERS), accelerator)"
SHUFFLED = "BatchSampler(RandomSampler(dataset), batch_size=BATCH_SIZE, drop_last=False)"
METRICS = "test_torch_metrics(Accelerator(dataloader_config=DataLoaderConfiguration({}, {})), {})"

# script -> what its main() makes first, and its cases: the calls of its main(), each with the numbers of ranks.
ONE: tuple[int, ...] = (1,)
TWO: tuple[int, ...] = (2,)
BOTH: tuple[int, ...] = (1, 2)
SCRIPTS: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "test_ops": (
        "state = PartialState()",
        {f"test_{name}(state)": BOTH for name in [*OPERATIONS.split(), "op_checker", "copy_tensor_to_devices"]},
    ),
    "test_script": (
        "import datasets; accelerator = Accelerator()",
        {
            "init_state_check()": BOTH,
            "process_execution_check()": BOTH,
            "test_split_between_processes_list()": BOTH,
            "test_split_between_processes_nested_dict()": BOTH,
            "test_split_between_processes_tensor()": BOTH,
            "test_split_between_processes_evenly()": BOTH,
            "test_split_between_processes_dataset(datasets.Dataset)": BOTH,
            "rng_sync_check()": BOTH,
            "dl_preparation_check()": BOTH,
            "central_dl_preparation_check()": BOTH,
            "custom_sampler_check()": BOTH,
            "check_seedable_sampler()": BOTH,
            "check_seedable_sampler_with_data_seed()": BOTH,
            "check_seedable_sampler_in_batch_sampler_shard()": TWO,
            "training_check(use_seedable_sampler=False)": BOTH,
            "training_check(use_seedable_sampler=True)": BOTH,
            "test_trigger()": BOTH,
            "test_reinstantiated_state()": BOTH,
        },
    ),
    "test_sync": (
        "accelerator = Accelerator()",
        {
            "test_dataloader_break()": BOTH,
            "test_noop_sync(accelerator)": ONE,
            "test_distributed_sync(accelerator)": TWO,
            "test_distributed_sync_multiple_fwd(accelerator)": TWO,
            "test_gradient_accumulation_with_opt_and_scheduler()": BOTH,
        }
        | {
            f"test_gradient_accumulation{rest}({split}, {dispatch}, {each})": TWO
            for rest, split, dispatch, each in product(("", "_with_opt_and_scheduler"), *[(True, False)] * 3)
            if (rest, split, dispatch, each) != ("_with_opt_and_scheduler", False, False, False)
        },
    ),
    "test_distributed_data_loop": (
        "dataset, accelerator = DummyDataset(), create_accelerator(); torch.manual_seed(accelerator.process_index)",
        {
            "test_default_ensures_even_batch_sizes()": TWO,
            "test_can_disable_even_batches()": TWO,
            "test_can_join_uneven_inputs()": TWO,
            "test_join_can_override_even_batches()": TWO,
            "test_join_can_override_for_mixed_type_dataloaders()": TWO,
            "test_join_raises_warning_for_iterable_when_overriding_even_batches()": TWO,
            "accelerator.state.distributed_type = DistributedType.FSDP;"
            " test_join_raises_warning_for_non_ddp_distributed(accelerator)": TWO,
            "test_pickle_accelerator()": TWO,
            LOADER.format("shuffle=False, batch_size=BATCH_SIZE"): TWO,
            LOADER.format("shuffle=True, batch_size=BATCH_SIZE"): TWO,
            LOADER.format(f"batch_sampler={SHUFFLED}"): TWO,
            LOADER.format(f"sampler={SHUFFLED}, batch_size=None, collate_fn=default_collate"): TWO,
            "test_stateful_dataloader(accelerator)": TWO,
            "test_stateful_dataloader_save_state(accelerator)": TWO,
        },
    ),
    "external_deps.test_metrics": (
        "",
        {
            METRICS.format(f"split_batches={split}", f"dispatch_batches={dispatch}", 99): BOTH
            for split, dispatch in product((True, False), repeat=2)
        }
        | {
            "test_torch_metrics(Accelerator(), 512)": BOTH,
            "test_gather_for_metrics_drop_last()": BOTH,
            "test_gather_for_metrics_with_iterable_dataset()": BOTH,
            "test_gather_for_metrics_with_non_tensor_objects_iterable_dataset()": BOTH,
        },
    ),
}
# Functions of the scripts that are no cases here.
HELPERS = {"test_mrpc": "needs a model from the Hub", "check_model_parameters": "called by others"}

# Why a case does not pass -> what it raises, and the cases: in full, or how they begin.
DISPATCH = "NotImplementedError: dispatch_batches=True is not supported here"
NOT_PASSED: dict[str, dict[str, list[str]]] = {
    "refused: dispatching loaders": {
        DISPATCH: [
            "central_dl_preparation_check()",
            *(f"test_gradient_accumulation{rest}({split}, True" for rest in ("", "_with_opt_and_scheduler")
              for split in (True, False)),
            *(METRICS.partition("{}")[0] + f"split_batches={split}, dispatch_batches=True" for split in (True, False)),
        ],
        "ImportError: nanofinetune has no DataLoaderDispatcher": ["test_gather_for_metrics_with_iterable_dataset()"],
    },
    "refused: stateful loaders": {
        "NotImplementedError: use_stateful_dataloader=True is not supported here": ["test_stateful_dataloader"],
    },
    "different: an epoch's last window is divided by the micro-batches that it holds": {
        "AssertionError: Gradients not in sync when they should be at iteration": [
            *(f"test_gradient_accumulation({split}, False" for split in (True, False)),
            *(f"test_gradient_accumulation_with_opt_and_scheduler({split}, False" for split in (True, False)),
            "test_gradient_accumulation_with_opt_and_scheduler()",
        ],
    },
    "different: the order is a function of (seed, epoch), and the prepared loader moves the epoch on": {
        "AssertionError: Did not obtain the same model on CPU or distributed training": ["training_check("],
    },
    "private: the state of all Accelerators, which is none here": {
        "Failed: DID NOT RAISE AttributeError": ["test_reinstantiated_state()"],
        "AttributeError: property 'distributed_type' of 'AcceleratorState' object has no setter": [
            "accelerator.state.distributed_type = "
        ],
    },
}  # fmt: skip


def expected(case, ranks):
    """The error of a case that does not pass, or "pass"."""
    if case == "test_gradient_accumulation_with_opt_and_scheduler()" and ranks == 1:
        return "pass"  # compares gradients on several ranks only
    found = [error for errors in NOT_PASSED.values() for error in errors if case.startswith(tuple(errors[error]))]
    assert len(found) <= 1, (case, found)
    return found[0] if found else "pass"


def all_cases():
    return [(name, case, n) for name, (_, cases) in SCRIPTS.items() for case in cases for n in cases[case]]


def counts():
    """-> how many outcomes there are, how many of them are passes, and how many of the others have which reason."""
    outcomes = [(case, ranks) for _, case, ranks in all_cases()]
    passed = sum(expected(case, ranks) == "pass" for case, ranks in outcomes)
    by_kind: dict[str, int] = {}
    for reason, errors in NOT_PASSED.items():
        for case, ranks in outcomes:
            if expected(case, ranks) in errors:
                kind = reason.partition(":")[0]
                by_kind[kind] = by_kind.get(kind, 0) + 1
    return len(outcomes), passed, by_kind


def check(name, ranks, only=None):
    setup, cases = SCRIPTS[name]
    names = [case for case in cases if ranks in cases[case] and (only is None or case in only)]
    for outcomes in run_ranks(run_cases, ranks, FOLDER + name, setup, names, timeout=400):
        wrong = {case: got for case, got in outcomes.items() if not got.startswith(expected(case, ranks))}
        assert not wrong and list(outcomes) == names


@pytest.mark.slow
@pytest.mark.parametrize(("name", "ranks"), sorted({(name, ranks) for name, _, ranks in all_cases()}))
def test_accelerates_script_has_the_outcomes_of_the_table(name, ranks):
    check(name, ranks)


def test_a_case_of_accelerates_scripts_passes():
    check("test_ops", 2, ["test_gather(state)", "test_op_checker(state)", "test_reduce_mean(state)"])


def test_no_case_of_the_scripts_is_left_out():
    """Each function that a script has for a case is called; and no entry of the table is for nothing."""
    for name, (_, cases) in SCRIPTS.items():
        functions = [node.name for node in ast.parse(text_of(FOLDER + name)).body if isinstance(node, ast.FunctionDef)]
        for function in functions:
            if function.startswith(("test_", "check_")) or function.endswith("_check"):
                assert function in HELPERS or any(f"{function}(" in case for case in cases), function
    everything = [case for _, case, _ in all_cases()]
    for errors in NOT_PASSED.values():
        for starts in errors.values():
            assert all(any(case.startswith(start) for case in everything) for start in starts)
    total, passed, kinds = counts()
    assert total == passed + sum(kinds.values())
    assert set(kinds) == {"refused", "different", "private"}
