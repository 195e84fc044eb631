"""What was measured, as a page of tables; the picture is beside it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peers.measure import WRONG
from peers.picture import draw

Row = Mapping[str, Any]


def replace(path: Path, text: str) -> None:
    """Write a file so that it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _shown(error: float) -> str:
    return "wrong shape" if error == float("inf") else f"{error:.0e}" if error < 0.01 else f"{error:.2f}"


def verdict(row: Row) -> str:
    """One cell: how far a method's answer is from the exact one."""
    if row["failure"] is not None:
        return "refuses" if row["refused"] else "fails"
    words = []
    if row["missing"]:
        words.append(f"{len(row['missing'])} of {row['tensors']} tensors missing")
    if row["error"] is not None and (row["error"] > WRONG or not words):
        shown = _shown(row["error"])
        wrong = shown if shown == "wrong shape" else f"wrong by {shown}"
        words.append(f"right ({shown})" if row["error"] <= WRONG else f"**{wrong}**")
    return ", ".join(words)


def model_table(group: Mapping[str, Any]) -> list[str]:
    """One model's table, the ordinary pass in its caption, errors of packages below it."""
    base, parameters = group["baseline"], group["parameter_bytes"]
    lines = [
        f"## {group['title']}",
        "",
        f"One ordinary forward and backward takes {base['milliseconds']:.1f} ms and allocates "
        f"{base['peak'] / 1e6:.0f} MB at its peak; the parameters are {parameters / 1e6:.1f} MB. "
        f"{base['rounds']} rounds, {group['environment']['machine']['threads']} thread(s).",
        "",
        _line(
            ["method", "time over the ordinary pass", "quartiles", "ms", "peak MB beyond it", "/ parameters", "error"]
        ),
        _line(["---", "---:", "---:", "---:", "---:", "---:", "---"]),
    ]
    for row in group["answers"]:
        name = f"**{row['method']}**" if row["package"] == "limpet" else row["method"]
        name += f" ({row['note']})" if row["note"] else ""
        if row["failure"] is not None:
            lines.append(_line([name, *[""] * 5, verdict(row)]))
            continue
        beyond = row["peak"] - base["peak"]
        low, high = row["quartiles"]
        cells = [f"{row['ratio']:.2f}", f"{low:.2f}-{high:.2f}", f"{row['milliseconds']:.1f}"]
        lines.append(_line([name, *cells, f"{beyond / 1e6:+.0f}", f"{beyond / parameters:+.1f}", verdict(row)]))
    if "stopped" in group:
        lines += ["", f"Larger batches were not measured: {group['stopped']}."]
    return [*lines, "", *_failures(group["answers"])]


def _failures(rows: Sequence[Row]) -> list[str]:
    """What methods said that gave no answer, the same words once."""
    said: dict[str, list[str]] = {}
    for row in rows:
        if row["failure"] is not None:
            said.setdefault(row["failure"], []).append(row["method"])
    return [f"- {', '.join(names)}: `{text[:240].replace('`', chr(39))}`" for text, names in said.items()] + [""]


def hard_table(group: Mapping[str, Any]) -> list[str]:
    """One line per method, one column per hard case."""
    cases = group["cases"]
    lines = [
        "## Hard cases",
        "",
        "Tiny models, eight samples, one difficulty each. In training mode BatchNorm mixes samples, so that no sample "
        "has a gradient of its own: any answer is wrong there, and refusing is right.",
        "",
        _line(["method", *cases]),
        _line(["---"] * (1 + len(cases))),
    ]
    columns = [{row["method"]: row for row in case["answers"]} for case in cases.values()]
    for name in columns[0]:
        cells = []
        for case, column in zip(cases.values(), columns, strict=True):
            answers = case["exists"] or column[name]["failure"] is not None
            cells.append(verdict(column[name]) if answers else "**answers all the same**")
        lines.append(_line([name, *cells]))
    lines += ["", "What was said:", ""]
    for title, case in cases.items():
        said = _failures(case["answers"])[:-1]
        lines += [f"*{title}*", "", *said, ""] if said else []
    return lines


def _facts(groups: Mapping[str, Any]) -> list[str]:
    """The machine and the versions, once for all groups that agree."""
    told: dict[str, list[str]] = {}
    for name, group in groups.items():
        if "environment" not in group:
            continue
        facts, core = group["environment"], group["environment"]["core"] or {}
        versions = {key: value for key, value in facts["versions"].items() if value}
        text = (
            f"{facts['machine']['cpu']}, {facts['machine']['cpus']} cores, {facts['machine']['threads']} thread(s), "
            f"{core.get('instruction_set')}; allocator: {facts['allocator']}; "
            + ", ".join(f"{key} {value}" for key, value in versions.items())
            + f"; commit {facts['commit']}"
        )
        told.setdefault(text, []).append(name)
    rows = next((g["answers"] for g in groups.values() if "answers" in g), [])
    rows = rows or next((c["answers"] for g in groups.values() for c in g.get("cases", {}).values()), [])
    peers = {row["package"]: row["version"] for row in rows if row["package"] not in ("torch", "limpet")}
    shown = ", ".join(f"{name} {version or 'not installed'}" for name, version in peers.items())
    return [*(f"- {', '.join(names)}: {text}" for text, names in told.items()), f"- peers: {shown}"]


def page(groups: Mapping[str, Any]) -> str:
    """The whole page; it links to the picture where there is one."""
    lines = [
        "# Exact diagonal Fisher: limpet and the others",
        "",
        "Made by `make fisher-peers`; [how to read it](fisher.md). float32 on the CPU.",
        "",
        *_facts(groups),
        "",
    ]
    if any(group.get("sweep") for group in groups.values()):
        lines += ["![Time and peak memory over the batch size](fisher-peers.svg)", ""]
    for name, group in groups.items():
        if "failure" in group:
            lines += [f"## {name}", "", f"Not measured: {group['failure']}.", ""]
        else:
            lines += hard_table(group) if "cases" in group else model_table(group)
    return "\n".join(lines).rstrip() + "\n"


def write_page(groups: Mapping[str, Any], folder: Path) -> None:
    """Write `fisher-peers.md`, and `fisher-peers.svg` where several batch sizes were measured."""
    replace(folder / "fisher-peers.md", page(groups))
    swept = {name: group for name, group in groups.items() if group.get("sweep")}
    if swept:
        draw(list(swept.values()), folder / "fisher-peers.svg")
