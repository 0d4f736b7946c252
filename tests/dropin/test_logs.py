"""nanofinetune.dropin.logs against accelerate 1.15's logging, on one process and on two gloo ranks.

python -m pytest tests/dropin/test_logs.py
"""

import io
import logging
import time

import pytest
from helpers import run_ranks
from side_by_side import ours, reset, theirs

from nanofinetune import get_logger
from nanofinetune.dropin.logs import MultiProcessAdapter


def said_by(make_logger, name, rank=0):
    """The lines, with level, file and function, that a few calls write."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(levelname)s %(filename)s %(funcName)s %(message)s"))
    logger = make_logger(name)
    logger.logger.addHandler(handler)
    logger.logger.propagate = False
    logger.setLevel("INFO")
    logger.debug("not shown")
    logger.info("for one")
    logger.info("%d of %s", 3, "four")
    logger.info("for all", main_process_only=False)
    logger.info("in turn", in_order=True)
    for _ in range(3):
        logger.warning_once("once", main_process_only=False)
    logger.warning_once("another", main_process_only=False)
    try:
        raise ValueError("a traceback")
    except ValueError:
        logger.exception("failed", main_process_only=False)
    return stream.getvalue()


def test_get_logger_matches_accelerate():
    theirs()  # accelerate's needs one
    from accelerate.logging import get_logger as reference

    expected, found = said_by(reference, "dropin.theirs"), said_by(get_logger, "dropin.ours")
    kept = [line for line in found.splitlines() if "once" not in line and "another" not in line]
    assert kept == [line for line in expected.splitlines() if "once" not in line and "another" not in line]
    assert found.count("[RANK 0] once") == expected.count("[RANK 0] once") == 1
    assert found.count("[RANK 0]") == 7 and "ValueError: a traceback" in found
    assert isinstance(get_logger("dropin.ours"), MultiProcessAdapter)


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_a_level_is_set_as_in_accelerate(how, monkeypatch):
    import accelerate.logging

    monkeypatch.setattr(logging.root, "level", logging.root.level)  # both set the root's too
    levels = []
    for number, make in enumerate((accelerate.logging.get_logger, get_logger)):
        logging.root.setLevel("WARNING")
        if how == "environment":
            monkeypatch.setenv("ACCELERATE_LOG_LEVEL", "error")
            logger = make(f"dropin.level{number}")
        else:
            logger = make(f"dropin.level{number}{how}", log_level="debug")
        levels.append((logger.logger.level, logging.root.level))
    assert levels[0] == levels[1] == ((logging.ERROR,) * 2 if how == "environment" else (logging.DEBUG,) * 2)


def test_a_line_needs_no_accelerator_where_accelerate_raises(monkeypatch):
    """Before the ranks have met, the environment says which one this is; accelerate asks for its state."""
    reset()
    from accelerate.logging import get_logger as reference

    with pytest.raises(RuntimeError, match="must initialize the accelerate state"):
        reference("dropin.early").error("x")
    places = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "1"}
    for name, value in (places | {"MASTER_ADDR": "localhost"}).items():
        monkeypatch.setenv(name, value)
    text = said_by(get_logger, "dropin.early2")
    assert "for one" not in text and "[RANK 1] for all" in text and "[RANK 1] in turn" in text


def on_ranks():
    accelerator, found = ours(), []
    reset()
    import accelerate
    from accelerate.logging import get_logger as reference

    accelerate.PartialState(cpu=True)
    for make, name in ((get_logger, "dropin.ours"), (reference, "dropin.theirs")):
        found.append([line for line in said_by(make, name).splitlines() if line.startswith("INFO")])

    class Late(logging.Handler):
        def emit(self, record):
            moments.append(time.monotonic())
            time.sleep(0.2)

    moments: list[float] = []
    logger = get_logger("dropin.turns")
    logger.logger.addHandler(Late())
    logger.logger.propagate = False
    logger.error("mine", in_order=True)
    accelerator.end_training()
    return found, moments


def test_lines_in_order_come_from_every_rank():
    pytest.importorskip("accelerate", reason="the reference, extra `test`")
    results = run_ranks(on_ranks, 2)
    for rank, ((mine, reference), _) in enumerate(results):
        assert mine == reference
        assert [line.split("] ")[1] for line in mine] == ["for one", "3 of four", "for all", "in turn"][2 * rank :]
    (first,), (second,) = (moments for _, moments in results)
    assert second >= first + 0.2  # rank 1 waits until rank 0's line is out
