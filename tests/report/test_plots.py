"""What the drawings are made of: nothing of a log is lost that one would look for.

python -m pytest tests/report/test_plots.py
"""

import re

import numpy as np
import pytest
from runs import write_run

from nanofinetune.report import plots
from nanofinetune.report.read import Record, read_run
from nanofinetune.report.thin import Thinned

pytest.importorskip("matplotlib")


def record(losses, **changes):
    log = Thinned(6)
    step = np.arange(1.0, len(losses) + 1)
    same = np.ones(len(losses))
    log.add(np.stack([step, 0.1 * same, losses, 8 * same, 0.5 * same, 16 * same], axis=1))
    return Record("a", log=log.buckets(), updates=len(losses), **changes)


def ticks(drawing):
    return [float(text.replace("\u2212", "-")) for text in re.findall(r"<text[^>]*>([^<a-z]+)</text>", drawing)]


def test_a_spike_in_a_million_updates_is_drawn():
    losses = np.full(1_000_000, 0.5)
    drawing = plots.loss([record(losses)])
    assert 40.0 not in ticks(drawing)
    losses[777_777] = 40.0
    spiked = plots.loss([record(losses)])
    assert 40.0 in ticks(spiked) and len(spiked) < 200_000


def test_smooth_is_numpys_mean_of_neighbours():
    values, weights = np.arange(50.0), np.linspace(1, 2, 50)
    found = plots.smooth(values, weights, share=0.2)
    for k in (0, 3, 25, 49):
        near = slice(max(0, k - 5), k + 6)
        assert found[k] == pytest.approx(np.average(values[near], weights=weights[near]))
    values[20:32] = np.nan
    assert np.isfinite(plots.smooth(values, weights, share=0.2)[[19, 32]]).all()


def test_speed_is_rows_over_seconds_of_either_clock(tmp_path):
    """metrics.jsonl's own times, or those that result.json has."""
    step, rate, low, high = plots.rates(record(np.ones(240)))
    assert len(step) == 60 and step[-1] == 240
    assert rate.tolist() == low.tolist() == high.tolist() == [16.0] * 60
    run = read_run(
        write_run(tmp_path, updates=90)
    )  # 8 rows an update, after 30, 60 and 90 updates 8, 15 and 23 seconds
    step, rate, *_ = plots.rates(run)
    assert step.tolist() == [30, 60, 90] and rate.tolist() == pytest.approx([240 / 8, 240 / 7, 240 / 8])


@pytest.mark.parametrize("speed", [[[1000, 100.0], [1050, 105.0], [1090, 110.0]], [[1050, 105.0], [1090, 110.0]]])
def test_the_speed_of_a_run_resumed_in_another_folder_counts_no_time_of_the_first(speed, tmp_path):
    """With the time at which it went on, or without, as older runs: what cannot be known is not drawn."""
    write_run(tmp_path, updates=1090, speed=speed)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines[1000:]))
    step, rate, *_ = plots.rates(read_run(tmp_path))
    assert step.tolist() == [update for update, _ in speed]
    assert rate[1:].tolist() == pytest.approx([400 / 5, 320 / 5][-len(speed) + 1 :]) and np.isnan(rate[0])


@pytest.mark.parametrize(
    "speed", [None, "fast", [1, 2], [[1, "a"]], [[2, 1.0], [1, 2.0]], [[1, float("nan")]], [[1, 2, 3]]]
)
def test_times_that_cannot_be_are_none(speed, tmp_path):
    assert len(plots.rates(read_run(write_run(tmp_path, speed=speed)))[0]) == 0


@pytest.mark.parametrize("losses", [[0.5], [np.nan], [np.nan, 0.5], [1e30, -1e30], [0.0, 0.0]], ids=str)
def test_any_losses_can_be_drawn(losses):
    run = record(np.array(losses))
    for draw in (plots.loss, plots.learning_rate, plots.speed):
        assert draw([run, Record("empty")]).startswith('<svg role="img"')


def test_names_are_in_no_drawing():
    """matplotlib reads `$` as mathematics, and hides what begins with `_`."""
    run = record(np.ones(5))
    run.name = "_$\\frac{$"
    assert "frac" not in plots.loss([run]) + plots.calibration([run])
