"""The command line: ``limpet run`` learns tasks and shows what was forgotten; ``limpet info`` shows versions.

What only one command needs is imported when that command runs.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from torch import nn

    from limpet import EWC
    from limpet.scenarios.runner import MethodResult, Progress
    from limpet.scenarios.streams import Stream

METHODS = ("finetune", "ewc", "si", "replay", "der", "der++", "replay-ewc", "replay-si", "progressive")
FISHER_LABELS = ("data", "sampled", "expected", "batched")
INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the program's name; the process's own arguments, when not given.

    Returns:
        The exit code: 0, 1 for an error that the message explains, 130 when interrupted. Wrong usage raises
        ``SystemExit(2)``, as argparse does.
    """
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except KeyboardInterrupt:
        print("limpet: interrupted; no report was written", file=sys.stderr)
        return INTERRUPTED
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"limpet: error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(prog="limpet", description="Continual learning with fused kernels.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    formatter = argparse.ArgumentDefaultsHelpFormatter

    run = commands.add_parser("run", help="learn a stream of tasks with several methods", formatter_class=formatter)
    run.set_defaults(command=_run)
    run.add_argument(
        "--dataset",
        default="mnist-subset",
        choices=["mnist-subset", "mnist", "fashion-mnist"],
        help="the subset ships with limpet",
    )
    run.add_argument("--data", metavar="DIR", help="folder with the IDX files of a full data set, plain or gzipped")
    run.add_argument(
        "--setting", default="task", choices=["task", "domain", "class"], help="what is known at test time"
    )
    run.add_argument(
        "--all-outputs", action="store_true", help="class-incremental: all classes answer from the first task on"
    )
    run.add_argument("--shuffle-classes", action="store_true", help="draw which classes make a task, for each seed")
    run.add_argument("--methods", default="finetune,ewc", type=_methods, help=f"any of {', '.join(METHODS)}")
    run.add_argument("--strength", type=float, default=1e6, help="of the EWC penalty")
    run.add_argument("--si-strength", type=float, default=100.0, help="of Synaptic Intelligence's penalty")
    run.add_argument("--buffer", type=int, default=1000, metavar="N", help="how many images replay keeps in all")
    run.add_argument("--replay-fraction", type=float, default=0.5, help="the replayed images' share of a batch")
    run.add_argument("--alpha", type=float, default=0.5, help="of the distance to old logits in der and der++")
    run.add_argument("--beta", type=float, default=0.5, help="of the old labels' cross-entropy in der++")
    run.add_argument("--cache", action="store_true", help="progressive: run earlier columns once on each task's images")
    run.add_argument("--epochs", type=int, default=10, help="passes over each task")
    run.add_argument("--iterations", type=int, metavar="N", help="steps of each task, instead of epochs")
    run.add_argument("--batch-size", type=int, default=128, help="images a batch")
    run.add_argument("--lr", type=float, default=1e-3, help="learning rate of Adam")
    run.add_argument("--seed", type=int, default=0, help="of first parameters and data order")
    run.add_argument("--seeds", type=int, default=1, metavar="N", help="run N seeds, the first of them --seed")
    run.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
    run.add_argument("--fisher-samples", type=int, metavar="N", help="images of each task that EWC looks at, not all")
    run.add_argument(
        "--fisher-labels", default="data", choices=FISHER_LABELS, help="whose labels EWC's Fisher information is of"
    )
    run.add_argument("--report", metavar="DIR", help="write report.md, results.json and pictures into this folder")

    info = commands.add_parser("info", help="versions, instruction set, threads, devices")
    info.set_defaults(command=_info)
    info.add_argument("--json", action="store_true", help="for programs")
    return parser


def _methods(text: str) -> list[str]:
    """Parse a list of methods: each one known, and named once."""
    names = text.split(",")
    unknown = [name for name in names if name not in METHODS]
    if unknown or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"expected some of {','.join(METHODS)}, each once, got {text!r}")
    return names


def _run(options: argparse.Namespace) -> None:
    """Train, show the tables, write the report."""
    _require("rich")
    if options.report is not None:
        _require("matplotlib")
        if Path(options.report).exists() and not Path(options.report).is_dir():
            raise NotADirectoryError(f"--report must name a folder, got the file {options.report!r}")
    from rich.console import Console

    from limpet import _checks
    from limpet.scenarios import datasets, report, runner, seeds, streams

    device = _device(options.device)
    dataset = datasets.load(options.dataset, options.data)
    split = partial(
        streams.split,
        dataset,
        setting=options.setting,
        batch_size=options.batch_size,
        shuffle_classes=options.shuffle_classes,
        all_outputs=options.all_outputs,
        device=device,
    )
    stream = split(seed=options.seed)
    numbers = range(options.seed, options.seed + _checks.integer("seeds", options.seeds, minimum=1))
    training = runner.Training(
        epochs=options.epochs,
        iterations=options.iterations,
        learning_rate=options.lr,
        seed=options.seed,
        consolidation_samples=options.fisher_samples,
    )
    methods = {name: _factory(name, options) for name in options.methods}
    console = Console(highlight=False)
    with _showing_progress(console) as show:
        results = seeds.run(lambda seed: split(seed=seed), methods, training, numbers, progress=show)
    stream = seeds.named(stream, results)
    for runs in seeds.by_method(results).values():
        console.print(_matrix_table(stream, seeds.mean(runs)))
    console.print(_summary_table(stream, results))
    if options.report is not None:
        arguments = {key: value for key, value in vars(options).items() if key != "command"}
        report.write_report(options.report, stream, training, results, arguments)
        console.print(f"The report is in {options.report}: report.md, results.json and pictures.", soft_wrap=True)


def _factory(name: str, options: argparse.Namespace) -> Callable[[nn.Module], Any]:
    """What makes a method for a network; its options are checked before another method has been trained."""
    if name == "finetune":
        return lambda model: None
    if name == "progressive":
        return _progressive(options.setting, options.cache)
    from limpet import Hybrid

    make, *others = [_part(part, options) for part in name.split("-")]
    return make if not others else lambda model: Hybrid([part(model) for part in (make, *others)])


def _part(name: str, options: argparse.Namespace) -> Callable[[nn.Module], Any]:
    """What makes one method of a hybrid."""
    from limpet import EWC, SynapticIntelligence, _checks

    if name == "ewc":
        _checks.finite_number("strength", options.strength, minimum=0.0)
        return lambda model: _ewc(EWC(model, options.strength), options.fisher_labels)
    if name == "si":
        _checks.finite_number("si_strength", options.si_strength, minimum=0.0)
        return lambda model: SynapticIntelligence(model, strength=options.si_strength)
    return _replay(name, options)


def _replay(name: str, options: argparse.Namespace) -> Callable[[nn.Module], Any]:
    """What makes experience replay, or dark experience replay of as many images beside each batch."""
    import torch

    from limpet import DarkReplay, Replay

    def seed() -> int:
        return torch.initial_seed() % 2**63  # the run's, of several

    def replay(model: nn.Module) -> Replay:
        return Replay(options.buffer, fraction=options.replay_fraction, seed=seed())

    def dark(model: nn.Module) -> DarkReplay:
        share = options.replay_fraction / (1 - options.replay_fraction)
        return DarkReplay(
            model,
            options.buffer,
            alpha=options.alpha,
            beta=options.beta if name == "der++" else 0.0,
            batch_size=max(1, round(options.batch_size * share)),
            seed=seed(),
        )

    replay(torch.nn.Identity())
    if name == "replay":
        return replay
    if options.setting == "class" and not options.all_outputs:
        raise ValueError(f"{name} compares logits, and needs --all-outputs in the class-incremental setting")
    dark(torch.nn.Identity())
    return dark


def _progressive(setting: str, cache: bool) -> Callable[[nn.Module], Any]:
    """What makes a progressive network, of columns as wide as a network's layers, and as the method that grows it."""
    if setting != "task":
        raise ValueError(f"progressive has a column for each task, and needs --setting task, got {setting!r}")
    from limpet.scenarios.models import ProgressiveMLP

    return partial(ProgressiveMLP.beside, cache=cache)


def _ewc(ewc: EWC, labels: str) -> Any:
    """EWC's moments, its Fisher information with these labels."""
    return SimpleNamespace(add_penalty_grad_=ewc.add_penalty_grad_, end_task=partial(ewc.consolidate, labels=labels))


def _device(name: str) -> str:
    """Require a device that torch knows and that answers."""
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--device must name a device that answers, got {name!r}: {reason}") from None
    return name


def _require(package: str) -> None:
    """Say how to install what is missing before any work is done."""
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise ModuleNotFoundError(f"this command needs {package}: pip install 'limpet[cli]'", name=package)


@contextmanager
def _showing_progress(console: Console) -> Iterator[Callable[[Progress], None]]:
    """A bar that moves on a terminal; elsewhere a plain line after each epoch."""
    if not console.is_terminal:
        yield lambda progress: print(_describe(progress), flush=True) if progress.epoch_ended else None
        return
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    with Bar(BarColumn(bar_width=24), TextColumn("{task.description}"), console=console, transient=True) as bar:
        handle = bar.add_task("starting", total=1.0)
        yield lambda progress: bar.update(handle, completed=progress.fraction, description=_describe(progress))


def _describe(progress: Progress) -> str:
    """Where a run stands, in one line."""
    left = math.ceil(progress.seconds_left)
    return (
        f"{progress.method}: task {progress.task.index + 1}/{progress.num_tasks} ({progress.task.name}), "
        f"epoch {progress.epoch}/{progress.num_epochs}, loss {progress.loss:.4f}, {left // 60}:{left % 60:02d} left"
    )


def _matrix_table(stream: Stream, result: MethodResult) -> Table:
    """R[i][j] in percent."""
    from rich.table import Table

    table = Table(title=f"{result.method}: accuracy (%) on each task")
    table.add_column("after learning")
    for task in stream.tasks:
        table.add_column(task.name, justify="right")
    for i, row in enumerate(result.matrix.values.tolist()):
        cells = ["" if math.isnan(value) else f"{100 * value:.1f}" for value in row]
        cells[i] = f"[bold]{cells[i]}[/bold]"
        table.add_row(stream.tasks[i].name, *cells)
    return table


def _summary_table(stream: Stream, results: Sequence[MethodResult]) -> Table:
    """One row of numbers for each method, means over its seeds."""
    from rich.table import Table

    from limpet.scenarios import seeds

    table = Table(title=f"summary: {stream.name}, {stream.setting}-incremental")
    table.add_column("method")
    for heading in (
        "average\naccuracy",
        "BWT",
        "forgetting",
        "training\nseconds",
        "consolidation\nseconds",
        "peak\nMB",
    ):
        table.add_column(heading, justify="right")
    for name, runs in seeds.by_method(results).items():
        result, metrics = seeds.mean(runs), [seeds.metrics(run) for run in runs]
        accuracy, bwt, forgetting = (
            seeds.mean_and_error([run[metric] for run in metrics])
            for metric in ("average_accuracy", "bwt", "forgetting")
        )
        memory = result.peak_memory_bytes
        table.add_row(
            name,
            f"{accuracy[0]:.4f}" if len(runs) == 1 else f"{accuracy[0]:.4f} ± {accuracy[1]:.4f}",
            f"{bwt[0]:+.4f}",
            f"{forgetting[0]:.4f}",
            f"{result.training_seconds:.1f}",
            f"{result.consolidation_seconds:.1f}",
            "" if memory is None else f"{memory / 1e6:.0f}",
        )
    return table


def _info(options: argparse.Namespace) -> None:
    """Print what limpet runs on."""
    from limpet.scenarios.environment import environment

    facts = environment()
    if options.json:
        print(json.dumps(facts, indent=2))
        return
    core, machine = facts["core"], facts["machine"]
    rows = {
        **{name: version or "not installed" for name, version in facts["versions"].items()},
        "commit": facts["commit"] or "not known",
        "compiled core": "not built" if core is None else core["compiler"],
        "instruction set": "-"
        if core is None
        else f"{core['instruction_set']} (of {', '.join(core['instruction_sets'])})",
        "OpenMP": "-" if core is None else _yes(core["openmp"]),
        "CUDA compiled": "-" if core is None else _yes(core["cuda"]),
        "processor": f"{machine['cpu'] or 'unknown'}, {machine['cpus']} CPUs",
        "threads": machine["threads"],
        "GPU": ", ".join(machine["gpus"]) or "none answers",
        "system": machine["system"],
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"


if __name__ == "__main__":
    sys.exit(main())
