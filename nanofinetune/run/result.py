"""What a run leaves: the JSON line at its end, and the folder that --output names.

    model/          what `transformers.pipeline` loads
    metrics.jsonl   one line an update
    checkpoints/    to go on from
    result.json     written last: where it is, the run is complete

>>> in_a_line({"epoch": 2, "f1": 0.5, "confusion_matrix": [[3, 1], [1, 3]]})
{'epoch': 2, 'f1': 0.5}

Underneath: the course ends with `metric.compute()` on the screen; `transformers.Trainer.save_model` (transformers 5.23)
writes a model folder.
  - Files get their names when they are complete.

Proof: test_the_last_line_is_the_result, test_the_output_folder_loads_in_the_transformers_pipeline in
tests/test_train.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from nanofinetune.data.job import Job
from nanofinetune.ground.errors import Halt, first_line
from nanofinetune.ground.machine import machine, versions
from nanofinetune.ground.process import peak_rss_mb, seconds_since_start
from nanofinetune.ground.xla import state_on_host
from nanofinetune.report.write import write_report
from nanofinetune.run.best import best


def summary(accelerator: Any, job: Job, log: Any, padding: float) -> dict[str, Any]:
    """The result, as it is printed: what was trained on what, how long, and the scores. A collective."""
    device = accelerator.device
    accelerator.print(f"model      saved: {log.which}", flush=True)
    return {
        "model": job.model_name,
        "data": job.data.name,
        "world": accelerator.num_processes,
        "steps": log.update,
        "seconds": round(seconds_since_start(), 3),
        "examples_per_second": round(log.examples / log.seconds, 2),
        "first_step_seconds": round(log.first_step_seconds, 3),
        "peak_rss_mb": round(accelerator.gather(torch.tensor(peak_rss_mb(), device=device)).max().item(), 1),
        "padding": round(padding, 4),
        **{key: value for key, value in in_a_line(log.kept).items() if key != "epoch"},
        "saved_epoch": log.kept["epoch"],
        "best": in_a_line(best(log.evaluations, job.data.metrics[0])),
        "device": str(device),
        "precision": accelerator.mixed_precision,
        "notes": job.notes,
    }


def in_a_line(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """An evaluation without its tables, which only result.json has."""
    return {name: value for name, value in evaluation.items() if not isinstance(value, list)}


def save(output: Path, model: Any, tokenizer: Any, result: dict[str, Any], evaluations: list[Any], args: Any) -> None:
    """model/ (what transformers.pipeline loads) and result.json, the latter last: where it is, the run is complete."""
    tables = evaluations[result["saved_epoch"] - 1]
    whole = result | {name: value for name, value in tables.items() if isinstance(value, list)}
    whole |= {"evaluations": evaluations, "arguments": vars(args)}
    unfinished = output / ".result.json"
    whole |= {"versions": versions(), "machine": machine()}
    try:
        model.save_pretrained(output / "model", state_dict=state_on_host(model))
        tokenizer.save_pretrained(output / "model")
        unfinished.write_text(json.dumps(whole, indent=2) + "\n")
        unfinished.replace(output / "result.json")
    except (OSError, SafetensorError) as error:
        why = f"--output {output}: the model cannot be written ({first_line(error)})"
        raise Halt(1, f"{why}; make room, and --resume auto goes on from the newest checkpoint") from error
    write_report(output)
