"""torch 2.13's own tests of DistributedDataParallel, on our class and 2 gloo ranks: which pass, and why others do not.

They come with the package: torch.testing._internal.distributed.distributed_test. The cases here are all that torch's
own class passes on a CPU. NOT_PASSED is exact: a case that begins to pass, or fails in another way, fails the test.

    python -m pytest tests/peers/test_torch_ddp.py -m slow
"""

import tempfile
from pathlib import Path

import pytest
import torch_cases
from helpers import run_ranks

PASSED = """
DistributedDataParallelCPU DistributedDataParallelCPU_grad_is_view DistributedDataParallel_requires_grad
DistributedDataParallel_with_amp_and_grad_is_view accumulate_gradients_no_sync
accumulate_gradients_no_sync_allreduce_hook accumulate_gradients_no_sync_allreduce_with_then_hook
accumulate_gradients_no_sync_grad_is_view ddp_broadcast_buffer ddp_broadcast_buffer_via_hook
ddp_broadcast_buffers_deprecation_warning ddp_bucket_cap_mb_list ddp_buffer_hook_allreduce
ddp_buffer_hook_allreduce_return_future ddp_device_mesh_initialization ddp_forward_backward_hook
ddp_grad_div_uneven_inputs ddp_hook_parity_allreduce ddp_hook_parity_post_localSGD ddp_hook_parity_powerSGD
ddp_ignore_params_arg ddp_init_sync_buffers_with_forward_sync_buffers_false ddp_join_model_equivalence
ddp_join_respects_forward_sync_buffers_false ddp_model_diff_num_params_across_ranks ddp_namedtuple
ddp_new_tensor_in_fwd ddp_new_tensor_in_fwd_static_graph ddp_remove_autograd_hooks ddp_returns_tensor_with_no_grad
ddp_shared_grad_acc_unused_params ddp_sink_noclone ddp_sync_module_states ddp_uneven_input_exception
ddp_uneven_input_join_disable ddp_zero_output_features get_data_parallel_params grads_same_across_ranks_with_no_sync
output_unused_in_loss_dict_module output_unused_in_loss_tuple_module post_localSGD_optimizer_parity
post_localSGD_optimizer_parity_grad_is_view post_localSGD_optimizer_parity_with_hierarchical_sgd
post_localSGD_optimizer_parity_with_hierarchical_sgd_grad_is_view post_localSGD_optimizer_step_reload
static_graph_multi_forward verify_model_across_rank_with_logger verify_model_across_rank_without_logger
"""
# Why a case does not pass -> what it raises, and the cases.
NOT_PASSED: dict[str, dict[str, str]] = {
    "private: what torch's reducer and its logger in C++ count and rebuild": {
        "AttributeError: 'DistributedDataParallel' object has no attribute '_build_params_for_reducer'":
            "ddp_build_debug_param_to_name_mapping ddp_build_debug_param_to_name_mapping_requires_grad",
        "AttributeError: 'DistributedDataParallel' object has no attribute '_get_ddp_logging_data'":
            "ddp_comm_hook_logging ddp_python_error_logged different_graph_across_ranks",
        "AttributeError: 'DistributedDataParallel' object has no attribute '_set_ddp_runtime_logging_sample_rate'":
            "ddp_logging_data_cpu",
        "AttributeError: 'DistributedDataParallel' object has no attribute 'reducer'":
            "ddp_control_flow_different_across_ranks ddp_control_flow_same_across_ranks detect_ddp_is_actually_static",
        "AssertionError: 0 not greater than or equal to 1": "ddp_profiling_torch_profiler",  # of torch's own events
    },
    "refused: an argument or a kind of gradient that is not here": {
        "NotImplementedError: skip_all_reduce_unused_params=True is not supported": "skip_all_reduce_unused_parameters",
        "NotImplementedError: p: neither create_graph=True nor sparse gradients are supported": "ddp_create_graph",
    },
    "different: a parameter without a gradient is named in the backward that left it out": {
        "RuntimeError: no gradient for ":
            "ddp_multiple_nested_unused_params_error ddp_multiple_nested_unused_params_err_ignore_params"
            " ddp_unused_params_rebuild_buckets_exception",
        "RuntimeError: fc3.weight: the gradient was taken or replaced": "undefined_grad_parity_unused_parameters",
    },
    "different: what nothing would average, or two wrappers would, is refused": {
        "RuntimeError: these were frozen, or not there, when the module was wrapped": "stateless_api_with_ddp",
        "ValueError: another DistributedDataParallel, of another module, averages": "ddp_static_graph_nested_types",
    },
    "different: a graph that was said to be static may change, and may be said so late": {
        "AssertionError: RuntimeError not raised": "invalid_static_graph static_graph_api_cpu",
    },
}  # fmt: skip
EXPECTED = dict.fromkeys(PASSED.split(), "pass") | {
    name: error for errors in NOT_PASSED.values() for error, names in errors.items() for name in names.split()
}


def counts():
    """-> how many cases there are, how many of them pass, and how many of the others have which reason."""
    kinds: dict[str, int] = {}
    for reason, errors in NOT_PASSED.items():
        kind = reason.partition(":")[0]
        kinds[kind] = kinds.get(kind, 0) + sum(len(names.split()) for names in errors.values())
    return len(EXPECTED), len(PASSED.split()), kinds


def outcome(name, whose="ours"):
    with tempfile.TemporaryDirectory() as folder:
        for place in ("barrier", "test_dir"):
            Path(folder, place).mkdir()
        Path(folder, "lockfile").touch()
        found = run_ranks(torch_cases.run_case, 2, f"test_{name}", whose, folder, timeout=120)
    assert len({each[:60] for each in found}) == 1, found
    return found[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_torchs_case_has_the_outcome_of_the_table(name):
    assert outcome(name).startswith(EXPECTED[name])


def test_a_case_of_torchs_passes():
    assert outcome("DistributedDataParallelCPU") == "pass"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DistributedDataParallelCPU", "ddp_broadcast_buffer", "ddp_create_graph"])
def test_torchs_own_class_passes_its_cases_as_they_are_run_here(name):
    assert outcome(name, "theirs") == "pass"
