"""Build, test and bench on a machine with an NVIDIA GPU, and write what happened: `make gpu-check RESULTS=DIR`.

Needs no network: it installs into a folder of its own with the torch, pybind11, scikit-build-core, ninja and nvcc that
are there. A step that fails does not stop the others; the exit status is 0 only if every step passed. Writes
gpu-check.{json,md,log} and, from the benches, gpu.{json,md}.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TextIO

from gpu_report import Report, Table

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "build" / "gpu-check"
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:benchmark", "--tb", "short"]
GPU_TESTS = [*PYTEST, "-m", "gpu", "-v"]  # a line a test: what has failed is in the log even if time runs out
GPU_FILES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_gpu*.py"))
# Without torch's caching allocator every tensor is an allocation of its own, and a read past its end is seen. float32
# alone covers each kernel's addressing; a CUDA graph cannot allocate so.
PLAIN = "not graph and not wait and not bfloat16 and not float16 and not float64 and not fisher"
SANITIZED = [*GPU_TESTS, "tests/test_gpu.py", "-k", PLAIN]


@dataclass(frozen=True)
class Step:
    """One command and the seconds it may take."""

    name: str
    command: Sequence[str]
    seconds: float
    environment: dict[str, str]


def phases(results: Path) -> list[list[Step]]:
    """What is to be done: one phase after the other, the steps of a phase at once."""
    device = "import torch; print(torch.cuda.get_device_properties(0)); torch.ones(3, device='cuda').sum().item()"
    build = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--upgrade"]
    build += ["--target", str(SITE), "-C", "cmake.define.LIMPET_CUDA=ON"]
    build += ["-C", "cmake.define.CMAKE_CUDA_ARCHITECTURES=native", str(ROOT)]
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    check = ["compute-sanitizer", "--error-exitcode", "1", "--target-processes", "all"]
    parallel = ["-n", str(max(2, (os.cpu_count() or 2) - 2))] if find_spec("xdist") else []  # they wait for compilers
    gpu_tests = [*GPU_TESTS, *parallel, *GPU_FILES, "--durations", "5"]
    cpu_tests = [*PYTEST, *parallel, "-m", "not slow and not gpu", "tests"]
    benches = [sys.executable, "benches/gpu.py", "--results", str(results), "--seconds", "40"]
    return [
        [Step("device answers", [sys.executable, "-c", device], 60, {})],
        [Step("versions", ["nvcc", "--version"], 10, {})],
        [Step("build with CUDA", build, 150, {})],
        [Step("GPU tests", gpu_tests, 240, {})],
        [Step("GPU benches", benches, 150, {})],
        [
            Step("memcheck", [*check, "--tool", "memcheck", *SANITIZED], 100, uncached),
            Step("racecheck", [*check, "--tool", "racecheck", *SANITIZED, "-x"], 100, uncached),
            Step("CPU tests", cpu_tests, 100, {"OMP_NUM_THREADS": "1"}),
        ],
    ]


def run(phase: Sequence[Step], seconds: float, log: TextIO) -> list[tuple[str, float]]:
    """Run steps at once, their output in the log one after the other.

    Returns, for each, ``passed``, ``failed (status)``, ``absent`` or ``out of time``, and its seconds.
    """
    with ThreadPoolExecutor(len(phase)) as pool, TemporaryDirectory() as folder:
        outputs = [Path(folder) / str(number) for number in range(len(phase))]
        found = list(pool.map(lambda step, output: _run_one(step, min(step.seconds, seconds), output), phase, outputs))
        for step, output in zip(phase, outputs, strict=True):
            log.write(f"\n=== {step.name}: {' '.join(step.command)}\n{output.read_text(errors='replace')}")
        log.flush()
    return found


def _run_one(step: Step, seconds: float, output: Path) -> tuple[str, float]:
    start = time.monotonic()
    with open(output, "w") as file:
        if shutil.which(step.command[0]) is None:
            return "absent", 0.0
        environment = os.environ | {"PYTHONPATH": str(SITE), "PYTHONDONTWRITEBYTECODE": "1"} | step.environment
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return "out of time", time.monotonic() - start
    return "passed" if status == 0 else f"failed ({status})", time.monotonic() - start


def main() -> None:
    """Run every step and write the report after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="folder for the reports")
    parser.add_argument("--seconds", type=float, default=460.0, help="time for all steps together")
    arguments = parser.parse_args()
    results = arguments.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(SITE, ignore_errors=True)
    os.environ["PATH"] += os.pathsep + "/usr/local/cuda/bin"

    deadline = time.monotonic() + arguments.seconds
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    table = Table("Steps", ["step", "outcome", "seconds"])
    report = Report("GPU check", {"commit": commit or None, "python": sys.version.split()[0]}, [table])
    with open(results / "gpu-check.log", "w") as log:
        for phase in phases(results):
            left = deadline - time.monotonic()
            found = run(phase, left, log) if left > 5 else [("out of time", 0.0)] * len(phase)
            for step, (outcome, seconds) in zip(phase, found, strict=True):
                table.rows.append([step.name, outcome, seconds])
                print(f"{step.name}: {outcome}", flush=True)
            report.write(results, "gpu-check")
    # compute-sanitizer comes in a package of its own; every other step must pass.
    accepted = {"memcheck": ("passed", "absent"), "racecheck": ("passed", "absent")}
    sys.exit(any(outcome not in accepted.get(str(name), ("passed",)) for name, outcome, _ in table.rows))


if __name__ == "__main__":
    main()
