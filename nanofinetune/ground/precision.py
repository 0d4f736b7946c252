"""The facade: Accelerate's names for the pieces of the other files, and the little state that holds them together.

>>> accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
>>> model = nn.Linear(1, 1, bias=False)
>>> model, optimizer, loader = accelerator.prepare(
...     model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(torch.ones(6, 1), batch_size=1)
... )
>>> for row in loader:
...     with accelerator.accumulate(model):
...         accelerator.backward(model(row).mean())  # every row's gradient is 1, so a window's mean is 1 as well
...         if accelerator.sync_gradients:
...             print(model.weight.grad.item())  # Accelerate: 1.0, and 0.5 for the short window at the end
...         optimizer.step()
...         optimizer.zero_grad()
1.0
1.0

    Accelerate's name                                  where the work is done
    Accelerator(), device, process_index, ...          distributed.py  init_world, World
    prepare, prepare_model                             here (autocast), ddp.py  DistributedDataParallel
    prepare_data_loader, skip_first_batches            loader.py, sampler.py
    prepare_optimizer, optimizer.step                  here  AcceleratedOptimizer, around optim.py
    prepare_scheduler, scheduler.step                  here  AcceleratedScheduler, around schedule.py
    backward                                           here  _weigh; loader.py  rows_of_step
    accumulate, sync_gradients                         here; loader.py  running, end_of_dataloader
    no_sync                                            ddp.py
    clip_grad_norm_, clip_grad_value_                  torch.nn.utils, after the scaler's unscale_
    gather, reduce, pad_across_processes               distributed.py
    gather_for_metrics                                 distributed.py  gather; loader.py  remainder
    wait_for_everyone, main_process_first              distributed.py
    save_state, load_state                             here, which objects; checkpoint.py, how they are kept
    save, save_model, get_state_dict                   here, a few lines each
    end_training                                       distributed.py  shutdown

Underneath: `accelerate.Accelerator` (accelerate 1.15) keeps its state in dictionaries that all instances share
(`accelerate.state.PartialState`, `accelerate.state.AcceleratorState`, `accelerate.state.GradientState`) and wraps what
must wait for the end of an accumulation window: `accelerate.optimizer.AcceleratedOptimizer`,
`accelerate.scheduler.AcceleratedScheduler`. Kept: names, arguments, order of results, a full window's gradient, the
ticking of schedules; preparing twice changes nothing. Left out: other backends and precisions, plugins, trackers,
`torch.compile`; an argument or a method for one of them is refused by name. Different on purpose:
  - A window's gradient is the mean over the rows it really holds, the short window at an epoch's end included;
    Accelerate divides by `gradient_accumulation_steps`. Where nobody knows these rows beforehand (streams, batches that
    vary in size, `even_batches=False`), or the window (backward without `accumulate`), it is as in Accelerate.
  - With `uneven="mask"` no row counts twice, and ranks weigh as much as they have rows, so that N ranks compute the
    gradient of one. The loss given to `backward` must be the mean over the rank's rows for that.
  - `gather_for_metrics` raises where it cannot tell which rows are repeated; Accelerate returns them all.
  - In fp16 a step was skipped if the scale has fallen. Accelerate asks instead whether the optimizer's `step` was
    called: a fused one's always is, and skips by itself, so that Accelerate counts that step as done.
  - An inner loop left by `break` does not take the flush at its end from the outer one. fp16 on a CPU is refused.
  - `Accelerator(split_batches=True)` splits; in 1.15 only `dataloader_config` does, and the argument is ignored.

Proof: test_windows_match_accelerate_but_for_the_short_one, test_broken_inner_loop_keeps_the_outer_flush,
test_fused_skip_is_seen_where_accelerate_misses_it, test_scheduler_ticks_match_accelerate,
test_mixed_precision_matches_accelerate, test_fp16_on_cpu_is_refused_where_accelerate_trains_fp32,
test_accelerate_ignores_split_batches, test_kwargs_handlers_match_accelerate, test_gather_for_metrics_on_ranks,
test_public_names_and_signatures_match_accelerate, test_what_is_absent_says_what_to_use_instead,
test_save_and_get_state_dict_match_accelerate in tests/test_accelerator.py;
test_ranks_equal_one_process_where_accelerate_does_not, test_course_listing_matches_accelerate_under_torchrun in
tests/test_equal_ranks.py.
"""

from __future__ import annotations

import os

import torch

from nanofinetune.ground.errors import UsageError

PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def checked_precision(name: str | None, device: torch.device) -> str:
    """The precision in force, checked against what the device can do."""
    name = name or os.environ.get("NANOFINETUNE_MIXED_PRECISION") or "no"
    if name not in PRECISIONS:
        raise UsageError(f"mixed_precision is {name!r}: choose no, bf16 or fp16")
    if name == "fp16" and device.type == "cpu":
        # underneath: Accelerate trains in fp32 then, without a word, and still reports "fp16"
        raise UsageError("mixed_precision is 'fp16', and a CPU has no half-precision training: choose bf16, or a GPU")
    if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise UsageError(f"mixed_precision is 'bf16', which {torch.cuda.get_device_name(device)} lacks: choose fp16")
    return name
