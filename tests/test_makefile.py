"""The Makefile, before it installs anything."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("python", ["false", "no-such-python"])
def test_a_python_that_does_not_run_is_named(tmp_path: Path, python: str) -> None:
    """Such as a shim of a version that is not installed; it is not called too old."""
    if shutil.which("make") is None:
        pytest.skip("no make")
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    command = ["make", "demo", f"PYTHON={python}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"error: PYTHON: {python} did not run; use the name or path of a Python that does" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Makefile", "pyproject.toml"]
