"""mypy, strict: the package, and a program that uses the installed package."""

import pathlib
import subprocess
import sys

import pytest

CLIENT = pathlib.Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("files", [[], ["tests/typed_program.py"]], ids=["package", "program"])
def test_types(files, tmp_path):
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path), *files]
    done = subprocess.run(command, cwd=CLIENT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
