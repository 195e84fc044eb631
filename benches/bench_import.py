"""What ``import limpet`` costs beyond ``import torch``, in fresh interpreters."""

import statistics
import subprocess
import sys

CODE = "import time, torch; t = time.perf_counter(); import limpet; print(time.perf_counter() - t)"


def test_import(benchmark):
    times = []

    def fresh():
        out = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout
        times.append(float(out))

    benchmark.pedantic(fresh, rounds=1 if benchmark.disabled else 7)
    benchmark.extra_info["milliseconds beyond torch (target: under 50)"] = 1e3 * statistics.median(times)
    print(f"\nimport limpet: {1e3 * statistics.median(times):.1f} ms beyond import torch (target: under 50)")
