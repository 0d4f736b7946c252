"""Drop-in: the rest of Accelerate's names, so that a script changes its import lines and nothing else.

Nothing needs this room to train. METHODS are functions of a few lines whose first argument is the Accelerator, which
finds them here when it is asked for them, as it does the ATTRIBUTES. Read `processes` (who runs what), `saving`
(weights without a checkpoint, hooks), `partial_state` and `attributes` (the ranks as Accelerate shows them),
`operations`, `logs`, `tracking`, `profiling`, `parallel` (DDP around `ranks`' own), `uneven` (ranks with other numbers
of batches), `batch_size`, `local_sgd`, `available` and `absent`.
"""

# What an Accelerator finds here, by the file that has it.
METHODS = {
    name: module
    for module, names in {
        "processes": "on_process on_local_process on_last_process split_between_processes set_trigger check_trigger",
        "saving": "save save_model get_state_dict register_save_state_pre_hook register_load_state_pre_hook",
        "tracking": "init_trackers log get_tracker",
        "profiling": "profile",
        "uneven": "join_uneven_inputs trigger_sync_in_backward",
    }.items()
    for name in names.split()
}
# The same for what is read without a call.
ATTRIBUTES = dict.fromkeys(
    (
        "state", "project_dir", "logging_dir", "save_iteration", "multi_device", "native_amp", "even_batches",
        "non_blocking", "dispatch_batches", "use_seedable_sampler", "use_stateful_dataloader", "should_save_model",
        "deepspeed_plugin", "parallelism_config", "torch_device_mesh", "is_fsdp2", "is_composable_parallelism_enabled",
        "has_lomo_optimizer", "fp8_enabled", "has_fp8_handler", "delayed_fp8_autocast", "fp8_recipe_handler",
        "ao_recipe_handler", "te_recipe_handler", "msamp_recipe_handler",
    ),
    "attributes",
)  # fmt: skip
