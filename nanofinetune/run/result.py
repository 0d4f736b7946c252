"""What a run leaves: the JSON line at its end, lines for people, and the folder that --output names.

    model/            what `transformers.pipeline` loads
    metrics.jsonl     one line an update
    validation.jsonl  what the model says of the validation rows
    checkpoints/      to go on from
    result.json       written last: where it is, the run is complete

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
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from nanofinetune.data.job import Job
from nanofinetune.ground.errors import Halt, first_line, shown
from nanofinetune.ground.machine import machine, versions
from nanofinetune.ground.process import peak_rss_mb, seconds_since_start
from nanofinetune.ground.progress import clock, columns_of, plural, wrapped
from nanofinetune.ground.xla import state_on_host
from nanofinetune.report.write import write_report
from nanofinetune.run.answers import FILE, INDENT
from nanofinetune.run.best import best


def conclude(accelerator: Any, run: Any, job: Job, padding: float) -> None:
    """Save what --output asks for; print the result, on a terminal also what people want to know. A collective."""
    try:
        result = summary(accelerator, job, run, padding)
        if accelerator.is_main_process:
            if run.output:
                model = accelerator.unwrap_model(run.model, keep_fp32_wrapper=False)
                save(run.output, model, job, result, run)
            print(json.dumps(result), flush=True)
            if sys.stderr.isatty():
                lines = closing(result, job, run, max(columns_of(sys.stderr), 50))
                print("\n".join(lines), file=sys.stderr, flush=True)
    finally:
        run.log.close()  # now other runs may write there
    accelerator.wait_for_everyone()


def summary(accelerator: Any, job: Job, run: Any, padding: float) -> dict[str, Any]:
    """The result, as it is printed: what was trained on what, how long, and the scores. A collective."""
    device, log = accelerator.device, run.log
    accelerator.print(f"model      {'saved' if run.output else 'not saved'}: {log.which}", flush=True)
    return {
        "model": job.model_name,
        "data": job.data.name,
        "world": accelerator.num_processes,
        "steps": log.update,
        **({"resumed_after": log.update - log.steps} if log.steps < log.update else {}),
        "seconds": round(seconds_since_start(), 3),  # of this start, like peak_rss_mb
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


def save(output: Path, model: Any, job: Job, result: dict[str, Any], run: Any) -> None:
    """model/ (what transformers.pipeline loads), validation.jsonl, and result.json last: then the run is complete."""
    tables = run.log.evaluations[result["saved_epoch"] - 1]
    whole = result | {name: value for name, value in tables.items() if isinstance(value, list)}
    whole |= {"evaluations": run.log.evaluations, "arguments": vars(run.args), "speed": run.log.pace}
    unfinished = output / ".result.json"
    whole |= {"plan": run.plan.told, "versions": versions(), "machine": machine()}
    try:
        model.save_pretrained(output / "model", state_dict=state_on_host(model))
        job.tokenizer.save_pretrained(output / "model")
        whole["validation_rows"] = job.answers.write(output / FILE)
        unfinished.write_text(json.dumps(whole, indent=2) + "\n")
        unfinished.replace(output / "result.json")
    except (OSError, SafetensorError) as error:
        why = f"--output {output}: the model cannot be written ({first_line(error)})"
        raise Halt(1, f"{why}; make room, and --resume auto goes on from the newest checkpoint") from error
    write_report(output)


def closing(result: Mapping[str, Any], job: Job, run: Any, width: int) -> list[str]:
    """For people, in lines of at most `width` columns: the scores, five rows, where the model is and how to use it."""
    scores = [f"{name} {value:.4f}" for name, value in run.log.kept.items() if isinstance(value, float)]
    rows = plural(len(next(iter(job.validation.values()))), "row")
    before = result.get("resumed_after", 0)
    part = f"{result['steps'] - before:,} of " if before else ""  # the time is that of this start alone
    spent = f"{part}{plural(result['steps'], 'update')} in {clock(result['seconds'])}"
    speed, memory = f"{result['examples_per_second']:.1f} examples a second", f"{result['peak_rss_mb']:,.0f} MiB"
    lines = [
        "",
        wrapped(f"result     {', '.join(scores)} ({rows})", width, indent=INDENT),
        f"           {spent}, {speed}, {memory} of memory",
    ]
    if job.answers.logits is not None:
        lines += ["", *job.answers.table(width), ""]
    if run.output is None:
        return [*lines, "model      not kept: give --output DIR"]
    folder, texts = str(run.output / "model"), "\\t".join(["one", "another"][: len(job.data.text_columns)])
    use = f"printf '{texts}\\n' | python -m nanofinetune.predict {shlex.quote(folder)}"
    return [*lines, f"model      {shown(folder)}, and what labels texts with it:", shown(use)]
