"""Exact diagonal Fisher by limpet and by everyone else: time, peak memory and error, in one table and one picture.

    python benches/fisher_peers.py --results DIR --docs docs
    python benches/fisher_peers.py --results DIR --docs docs --models gpt2   # this group again; the others stay

Each model is measured in a process of its own, all methods in it in turns. `DIR/fisher-peers.json` keeps what was
measured, group by group; the page and the picture in the docs are made from it. A package that is not installed, or
fails, is in the table too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from limpet.scenarios.environment import environment
from peers.measure import answer, exact, first_line, measure, quiet
from peers.methods import methods
from peers.problems import MEASURED, hard_cases
from peers.report import replace, write_page

GROUPS = (*MEASURED, "hard")
SECONDS = 60.0  # of timing, for a model
SWEEP_SECONDS = 8.0  # for a batch size of the picture


def run_group(
    group: str, seconds: float, sweep_seconds: float, save: Callable[[dict[str, Any]], None] = lambda found: None
) -> dict[str, Any]:
    """Measure a model, or answer the hard cases, in this process; ``save`` gets what there is after each batch size."""
    found: dict[str, Any] = {"environment": {**environment(), "allocator": allocator()}}
    if group == "hard":
        found["cases"] = {}
        for name, problem in hard_cases().items():
            with quiet():
                want = exact(problem) if problem.exists else None
                rows = [answer(method, problem, want)[0].as_dict() for method in methods(1, 4)]
            found["cases"][name] = {"exists": problem.exists, "answers": rows}
        return found
    measured = MEASURED[group]
    try:
        problem = measured.problem()
    except ImportError as error:  # the model's own package
        return {"failure": first_line(error)}
    every = methods(measured.batches, measured.chunk)
    found |= {"title": measured.title, "batch": measured.batch}
    found |= measure(problem, every, seconds, exact(problem))
    gave = {row["method"] for row in found["answers"] if row["failure"] is None}
    every = [method for method in every if method.name in gave]
    found["sweep"] = []
    for size in measured.sizes:
        save(found)
        point = measure(measured.problem(size), every, sweep_seconds, None)
        found["sweep"].append({"batch": size, **point})
    return found


def allocator() -> dict[str, str] | str:
    """What the environment asks of the C library's allocator."""
    return {k: v for k, v in os.environ.items() if k.startswith("MALLOC_")} or "defaults of the C library"


def run_apart(group: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure a group in a new process; of one that dies (of memory, of time), what it had saved and its error."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "group.json"
        command = [sys.executable, __file__, "--group", group, "--into", str(target)]
        command += ["--seconds", str(arguments.seconds), "--sweep-seconds", str(arguments.sweep_seconds)]
        command += ["--threads", str(arguments.threads)]
        stopped = None
        try:
            done = subprocess.run(command, timeout=arguments.limit, env={**os.environ, "KINETO_LOG_LEVEL": "99"})
        except subprocess.TimeoutExpired:
            stopped = f"not done after {arguments.limit:.0f} s"
        else:
            if done.returncode:
                stopped = f"the process ended with {done.returncode}"
        found: dict[str, Any] = json.loads(target.read_text()) if target.exists() else {}
        if stopped:
            found["stopped" if found else "failure"] = stopped
        return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("build/fisher-peers"), help="folder for fisher-peers.json")
    parser.add_argument("--docs", type=Path, help="folder for fisher-peers.md and fisher-peers.svg")
    parser.add_argument("--models", nargs="*", choices=GROUPS, default=GROUPS, help="groups; none: write only")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of timing, for a model")
    parser.add_argument("--sweep-seconds", type=float, default=SWEEP_SECONDS, help="for a batch size of the picture")
    parser.add_argument("--limit", type=float, default=520.0, help="seconds after which a group is given up")
    parser.add_argument("--group", choices=GROUPS, help=argparse.SUPPRESS)  # in the process of one group
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(given: list[str] | None = None) -> int:
    arguments = parse(given)
    torch.set_num_threads(arguments.threads)
    if arguments.group:

        def save(found: dict[str, Any]) -> None:
            replace(arguments.into, json.dumps(found, indent=1) + "\n")

        save(run_group(arguments.group, arguments.seconds, arguments.sweep_seconds, save))
        return 0
    arguments.results.mkdir(parents=True, exist_ok=True)
    kept = arguments.results / "fisher-peers.json"
    groups: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    for group in arguments.models:
        print(f"{group} ...", flush=True)
        found = run_apart(group, arguments)
        if "failure" in found:
            print(f"  {found['failure']}", flush=True)
        groups[group] = found
        groups = {name: groups[name] for name in GROUPS if name in groups}
        replace(kept, json.dumps(groups, indent=1) + "\n")
    if arguments.docs:
        write_page(groups, arguments.docs)
    return int(any("failure" in groups[group] for group in arguments.models))


if __name__ == "__main__":
    sys.exit(main())
