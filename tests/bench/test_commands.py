"""bench/commands.py: README's commands, and what README shows of their last lines. The commands are not run here.

Run: python -m pytest tests/bench/test_commands.py
"""

import json
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "bench"))

import commands
import readme

README = (ROOT / "README.md").read_text()


def test_readmes_three_commands_are_those_of_the_record():
    rows = readme.newest("commands")[1]["rows"]
    every = commands.commands(README)
    assert len(every) == 3 and list(rows) == [command for command in every if command in rows]
    results = [json.loads(last) for last in rows.values() if last.startswith("{")]
    assert [result["world"] for result in results] == [1, 4]
    assert "failed" not in rows.get(".venv/bin/python -m pytest", "")


def test_readme_shows_each_last_line_under_its_command():
    lines = README.splitlines()
    for command, last in readme.newest("commands")[1]["rows"].items():
        assert lines[lines.index(command) + 1] == f"# {readme.short(last)}"


def test_a_result_is_shortened_and_a_line_of_pytest_is_not():
    line = '{"model": ".../minilm", "steps": 3, "seconds": 1.5, "padding": 0.25, "accuracy": 0.56789, "notes": ["a"]}'
    assert readme.short(line) == '{"model": ".../minilm", "steps": 3, ..., "accuracy": 0.5679, ...}'
    assert readme.short("==== 3 passed in 1.2s ====") == "3 passed in 1.2s"


def test_a_command_runs_in_the_clone_and_its_last_line_is_kept_without_the_machines_folders(tmp_path):
    assert commands.run("cat .venv/printed", with_environment(tmp_path)) == '{"model": ".../minilm", "world": 1}'


def test_the_third_command_gets_the_environment_activated(tmp_path):
    assert commands.run("echo $ACTIVE", with_environment(tmp_path)) == "yes"


def test_a_command_that_fails_writes_no_record(tmp_path):
    with pytest.raises(SystemExit, match="false: it ended with 1"):
        commands.run("false", with_environment(tmp_path))


def with_environment(folder):
    """A folder with an environment that can be activated."""
    binaries = folder / ".venv" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "activate").write_text("ACTIVE=yes\n")
    (folder / ".venv" / "printed").write_text('first\n{"model": "/srv/lib/minilm", "world": 1}\n\n')
    return folder
