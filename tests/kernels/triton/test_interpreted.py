"""The kernels in Triton's interpreter: the `check_*.py` beside this file, in a process of its own.

The interpreter must be chosen before a kernel is imported, and computes bf16 wrongly; what the
compiler and bf16 make of the kernels is tested in `test_compiled.py` and `../test_gpu.py`.
"""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

HERE = Path(__file__).parent
CHECKS = sorted(file.stem for file in HERE.glob("check_*.py"))


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """What each check file came to: a list of (test, failure or None)."""
    report = tmp_path_factory.mktemp("interpreted") / "report.xml"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}"]
    done = subprocess.run(
        [*command, *(str(HERE / f"{check}.py") for check in CHECKS)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=HERE.parents[2],
        capture_output=True,
        text=True,
    )
    assert report.exists(), done.stdout + done.stderr
    found = {check: [] for check in CHECKS}
    for case in ElementTree.parse(report).iter("testcase"):
        failures = [failure.text for name in ("failure", "error") for failure in case.iter(name)]
        check = next(
            name for name in CHECKS if name in case.get("classname", "") + case.get("name", "")
        )
        found[check].append((case.get("name"), "\n".join(failures) or None))
    return found, done.stdout


@pytest.mark.parametrize("check", CHECKS)
def test_kernels_in_the_interpreter(interpreted, check):
    found, output = interpreted
    assert found[check], output
    failed = [f"{name}\n{failure}" for name, failure in found[check] if failure]
    assert not failed, "\n\n".join(failed)
