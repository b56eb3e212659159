"""A new interpreter, in which nothing is imported yet."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any


# Stands for a machine without the package: nothing named optimum_pgsvd can be imported.
WITHOUT_PACKAGE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "optimum_pgsvd":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
"""


def in_fresh_process(
    code: str, *arguments: Any, home: Path, without_package: bool = False, isolated: bool = False
) -> str:
    """What code prints in a new interpreter.

    Args:
        code: run with what follows as `sys.argv[1:]`.
        arguments: of it.
        home: for what transformers keeps.
        without_package: as on a machine where this package is not installed.
        isolated: with nothing from the environment or the current folder on the path: packages as they are installed.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home)}
    code = textwrap.dedent(code)
    if without_package:
        environment["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
        code = WITHOUT_PACKAGE + code
    done = subprocess.run(
        [sys.executable, *["-I"] * isolated, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr
