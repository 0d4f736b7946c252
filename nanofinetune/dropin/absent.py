"""What a script may import from Accelerate and does not find here, each name with what to use instead.

>>> instead_of("DataLoaderDispatcher")
'dispatching loaders are not handled here: let every rank read its own rows'
>>> instead_of("Acceleratr") is None  # nobody has it
True

Underneath: `accelerate.utils`, `accelerate.hooks`, `accelerate.big_modeling` (accelerate 1.15).
  - An import of such a name raises ImportError with this text.
  - The names that are here stand in the package's own __init__.py.
  - Another backend, or models that do not fit on a device, are accelerate's own; its helpers are too.

Proof: test_every_name_of_accelerate_is_here_or_says_what_to_use, test_no_entry_is_for_nothing in
tests/dropin/test_public_names.py.
"""

from __future__ import annotations

ABSENT = {
    name: instead
    for names, instead in (
        ("DeepSpeedPlugin DeepSpeedSequenceParallelConfig DummyOptim DummyScheduler GatheredParameters"
         " HfDeepSpeedConfig FullyShardedDataParallelPlugin merge_fsdp_weights save_fsdp_model save_fsdp_optimizer"
         " load_fsdp_model load_fsdp_optimizer MegatronLMPlugin MegatronLMDummyDataLoader MegatronLMDummyScheduler"
         " AbstractTrainStep BertTrainStep GPTTrainStep T5TrainStep ParallelismConfig TorchContextParallelConfig"
         " TorchTensorParallelConfig TorchTensorParallelPlugin TorchDynamoPlugin DynamoBackend compile_regions"
         " FP8RecipeKwargs AORecipeKwargs TERecipeKwargs MSAMPRecipeKwargs BnbQuantizationConfig"
         " load_and_quantize_model prepare_pippy SageMakerDistributedType",
         "that is another backend: use accelerate for it"),
        ("init_empty_weights init_on_device dispatch_model cpu_offload cpu_offload_with_hook disk_offload"
         " infer_auto_device_map load_checkpoint_and_dispatch load_checkpoint_in_model align_module_device"
         " calculate_maximum_sizes compute_module_sizes find_tied_parameters get_balanced_memory get_max_memory"
         " load_state_dict offload_state_dict set_module_tensor_to_device",
         "models larger than a device are not handled here: use accelerate for it"),
        ("AimTracker ClearMLTracker CometMLTracker DVCLiveTracker MLflowTracker SwanLabTracker TrackioTracker"
         " WandBTracker", "pass log_with an object with a method `log` that calls the service"),
        ("debug_launcher", "use notebook_launcher(function, args, num_processes=N), which works on a CPU too"),
        ("GradientState", "there is one for each Accelerator: ask yours, `accelerator.gradient_state`"),
        ("is_initialized", "ask torch.distributed.is_initialized()"),
        ("DataLoaderDispatcher", "dispatching loaders are not handled here: let every rank read its own rows"),
        ("SkipDataLoader", "use skip_first_batches(dataloader, num_batches)"),
        ("save", "use the Accelerator's method: accelerator.save"),
        ("load", "use torch.load(file, weights_only=True)"),
        ("write_basic_config", "run ./launch.sh config"),
        ("convert_outputs_to_fp32 ConvertOutputsToFp32", "`prepare` does that to a model with mixed_precision"),
        ("is_compiled_module has_compiled_regions", "use hasattr(model, '_orig_mod')"),
        ("compare_versions is_torch_version", "use packaging.version.parse"),
        ("CPUInformation CannotPadNestedTensorWarning CustomDtype FP8BackendType SageMakerConfig"
         " add_model_config_to_megatron_parser apply_fp8_autowrap avg_losses_across_data_parallel_group"
         " build_pipeline check_cuda_fp8_capability check_cuda_p2p_ib_support check_tied_parameters_in_config"
         " compile_regions_deepspeed compile_regions_fsdp2 contextual_fp8_autocast convert_dict_to_env_variables"
         " convert_model convert_model_to_fp8_ao deepspeed_required disable_fsdp_ram_efficient_loading"
         " enable_fsdp_ram_efficient_loading find_pippy_batch_size fsdp2_apply_ac fsdp2_canonicalize_names"
         " fsdp2_load_full_state_dict fsdp2_prepare_model fsdp2_switch_optimizer_parameters"
         " get_cpu_distributed_information get_driver_version get_fsdp2_grad_scaler get_gpu_info get_model_tp_size"
         " has_4bit_bnb_layers has_ao_layers has_repeated_blocks has_transformer_engine_layers install_xla"
         " is_habana_gaudi1 is_repeated_blocks model_has_dtensor override_numa_affinity parse_bert_config"
         " parse_glm4_moe_config parse_gpt2_config parse_llama_config parse_t5_config pippy_forward"
         " prepare_deepspeed_cmd_env prepare_extend_env_parallelism_config prepare_sagemager_args_inputs"
         " prepare_tpu set_numa_affinity setup_fp8_env torchao_required",
         "it belongs to another backend: use accelerate for it"),
        ("AlignDevicesHook CpuOffload LayerwiseCastingHook ModelHook OffloadedWeightsLoader SequentialHook"
         " UserCpuOffloadHook add_hook_to_module attach_align_device_hook attach_align_device_hook_on_blocks"
         " attach_execution_device_hook attach_layerwise_casting_hooks check_device_map check_device_same"
         " check_tied_parameters_on_same_device clean_device_map compute_module_total_buffer_size"
         " convert_file_size_to_int dtype_byte_size ensure_weights_retied extract_submodules_state_dict"
         " fallback_allocate filter_first_and_last_linear_layers generate_device_map get_max_layer_size"
         " get_module_children_bottom_up get_module_class_from_name get_module_leaves get_module_size_with_ties"
         " get_non_persistent_buffers get_state_dict_from_offload get_state_dict_offloaded_model"
         " has_offloaded_params id_tensor_storage load_offloaded_weight load_offloaded_weights named_module_tensors"
         " offload_weight remove_hook_from_module remove_hook_from_submodules save_offload_index",
         "models larger than a device, and hooks in them, are not handled here: use accelerate for it"),
        ("is_numpy_available is_rich_available is_tqdm_available"
            " is_4bit_bnb_available is_8bit_bnb_available is_bitsandbytes_multi_backend_available is_pippy_available"
         " is_rocm_available is_torch_distributed_available is_torchdata_stateful_dataloader_available"
         " is_transformer_engine_available is_transformer_engine_mxfp8_available is_weights_only_available",
         "use nanofinetune.dropin.available.is_available(package)"),
        ("BaseEnum ComputeEnvironment DataLoaderAdapter DataLoaderStateMixin EnumWithContains PrefixedDataset"
         " PrepareForLaunch TensorInformation ThreadLocalSharedDict are_libraries_initialized chained_operation"
         " check_os_kernel clean_state_dict_for_safetensors clear_device_cache clear_environment convert_bytes"
         " do_nothing env_var_path_add filter_trackers find_device gather_tensor_shape get_available_trackers"
         " get_current_device_type get_data_structure get_free_port get_grad_scaler get_int_from_env"
         " get_mixed_precision_context_manager get_pretty_name get_sampler get_shape honor_type"
         " ignorant_find_batch_size initialize_tensors is_namedtuple is_peft_model is_port_in_use"
         " is_tensor_information is_torch_tensor is_torch_xpu_tensor listify load_accelerator_state"
         " load_custom_state logger merge_dicts move_to_device pad_input_tensors parse_choice_from_env"
         " parse_flag_from_env patch_environment patch_optimizer_step prepare_multi_gpu_env"
         " prepare_simple_launcher_cmd_env purge_accelerate_environment recursive_getattr retie_parameters"
         " save_accelerator_state save_custom_state should_reduce_batch_size slice_tensors str_to_bool test_launch"
         " verify_operation",
         "it is a helper inside of Accelerate that no loop needs: import it from accelerate, or write its few lines"),
    )
    for name in names.split()
}  # fmt: skip


def instead_of(name: str) -> str | None:
    """What to use in place of a name of Accelerate's; None for one that it does not have either."""
    if name.isupper():
        return "the names of Accelerate's files, its versions and other constants are its own: write the value"
    return ABSENT.get(name)
