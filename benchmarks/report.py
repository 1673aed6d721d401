"""Write measured tables into the README, between markers, so that no figure in it is typed by hand.

python benchmarks/report.py --engine benchmarks/results/engine.json --demo runs/demo/summary.json

<!-- bench:engine --> ... <!-- /bench:engine -->    from bench_engine.py's JSON
<!-- seeds --> ... <!-- /seeds -->                  from digits_seeds.py's JSON
<!-- images --> ... <!-- /images -->                from runs_table.py's JSON
<!-- experiments --> ... <!-- /experiments -->      from experiments.py's JSON
<!-- demo --> ... <!-- /demo -->                    from the demo's summary.json: "table" as a list of rows, or as
                                                    {"headers": [...], "rows": [[...]]}
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import experiments
import runs_table

from mdsnn.kernels.errors import ConfigError, InputError, MdsnnError
from mdsnn.kernels.files import read_bounded, write_text

ENGINE_SCHEMA = "mdsnn.bench-engine/3"
SEEDS_SCHEMA = "mdsnn.digits-seeds/1"
MIN_ROUNDS = 3
_GOALS = ("floor", "target", "moonshot")
README = Path(__file__).resolve().parent.parent / "README.md"
_LIMIT = 1 << 24


def read_document(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON object from a file; raises InputError naming the file and the fault."""
    try:
        document = json.loads(read_bounded(path, _LIMIT, what="JSON file"))
    except (ValueError, RecursionError) as fault:
        raise InputError(f"{path}: is not JSON: {fault}") from fault
    if not isinstance(document, dict):
        raise InputError(f"{path}: holds a {type(document).__name__}, where a JSON object is needed")
    return document


def markdown(headers: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; the first column left, the others right. Pipes and line ends in cells are escaped."""

    def line(cells: Sequence[object]) -> str:
        texts = ("" if cell is None else " ".join(str(cell).split()).replace("|", "\\|") for cell in cells)
        return f"| {' | '.join(texts)} |"

    for row in rows:
        if len(row) != len(headers):
            raise InputError(f"a row of the table has {len(row)} cells, its head {len(headers)}: {list(row)}")
    rule = ["---", *["---:"] * (len(headers) - 1)]
    return "\n".join([line(headers), line(rule), *map(line, rows)])


def replace_between(text: str, name: str, body: str) -> str:
    """`text` with what stands between <!-- name --> and <!-- /name --> replaced by `body`.

    raises  ConfigError  unless each marker stands there once, in this order
    """
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    counts = text.count(start), text.count(end)
    if counts != (1, 1) or text.index(start) > text.index(end):
        raise ConfigError(
            f"the markers {start} and {end} must each stand once, in this order; found {counts[0]} and {counts[1]}"
        )
    before, rest = text.split(start)
    return f"{before}{start}\n{body}\n{end}{rest.split(end)[1]}"


# --------------------------------------------------------------------------------------------------- the tables


def engine_tables(document: dict[str, Any]) -> str:
    """The README's section of a benchmark: the ratios, a table for each workload, where and how it was measured.

    document  of bench_engine.py, schema mdsnn.bench-engine/3
    raises    InputError  for another schema, a --quick run, too few rounds, or a run in which integers differed
    """
    if document.get("schema") != ENGINE_SCHEMA:
        raise InputError(f"schema {document.get('schema')!r} is not {ENGINE_SCHEMA!r}")
    if document.get("quick"):
        raise InputError("it is of a --quick run, which measures nothing; run bench_engine.py without --quick")
    rounds = document.get("rounds")
    if type(rounds) is not int or rounds < MIN_ROUNDS:
        raise InputError(f"it has {rounds} rounds, of which no median can be taken; run at least {MIN_ROUNDS}")
    if not document.get("agrees"):
        raise InputError("integers differed in this run; find out why before any speed is shown")
    try:
        workloads = document["workloads"]
        alone = [workload for workload in workloads if len(_columns(workload)) == 1]
        if len(alone) == 1:
            alone = []
        parts = [_ratios(document["ratios"])] if document["ratios"] else []
        parts += [_workload(document, workload) for workload in workloads if workload not in alone]
        parts += [_side_by_side(document, alone)] if alone else []
        parts.append(_circumstances(document))
    except (KeyError, TypeError, AttributeError, ValueError) as fault:
        raise InputError(f"a {ENGINE_SCHEMA} document lacks or misuses {fault}") from fault
    return "\n\n".join(parts)


def _columns(workload: dict[str, Any]) -> list[tuple[int, int]]:
    """The (threads, batch) that were timed."""
    return list(dict.fromkeys((row["threads"], row["batch"]) for row in workload["rows"]))


def _column(threads: int, batch: int) -> str:
    return f"batch {batch}, {threads} thread{'s' if threads > 1 else ''}"


def _cell(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{_ms(row['ms_per_image'])} ({row['spread_percent']:.0f}%)"


def _ratios(ratios: list[dict[str, Any]]) -> str:
    head = "times faster (batch 1 on one thread if not said)"
    rows = [
        [r["title"], f"**{r['measured']:.2f}**", f"{r['least']:.2f}", *(f"{r[key]:g}" for key in _GOALS)]
        for r in ratios
    ]
    note = (
        "Measured: the quotient of medians. Least visits: of each one's fastest visit, on which what else the machine "
        "did weighs least; where the two differ, the machine was disturbed, and the second is the one to trust."
    )
    return f"{markdown([head, 'measured', 'least visits', *_GOALS], rows)}\n\n{note}"


def _side_by_side(document: dict[str, Any], workloads: list[dict[str, Any]]) -> str:
    """Workloads timed in one way only, as the columns of one table."""
    timed = [{row["contender"]: row for row in workload["rows"]} for workload in workloads]
    names = [name for name in document["contenders"] if any(name in rows for rows in timed)]
    body = [[document["contenders"][name]["title"], *(_cell(rows.get(name)) for rows in timed)] for name in names]
    return markdown([_column(*_columns(workloads[0])[0]), *(workload["name"] for workload in workloads)], body)


def _workload(document: dict[str, Any], workload: dict[str, Any]) -> str:
    rows = {(row["contender"], row["threads"], row["batch"]): row for row in workload["rows"]}
    columns = _columns(workload)
    names = [name for name in document["contenders"] if any(key[0] == name for key in rows)]
    body = []
    for name in names:
        timed = [rows.get((name, *column)) for column in columns]
        known = [row["peak_rss_bytes"] for row in timed if row and row["peak_rss_bytes"] is not None]
        contender = document["contenders"][name]
        memory = f"{max(known) / 2**20:.0f}" if known else "?"
        body.append([contender["title"], contender["computes"], *map(_cell, timed), memory])
    densities = [100 * layer["density"] for layer in workload["layers"]]
    check = workload["check"]
    text = (
        f"**{workload['name']}** ({workload['macs'] / 1e9:.3f} G dense-equivalent MACs an image). "
        f"Milliseconds an image, median of {document['rounds']} interleaved visits, in brackets their range as a part"
        " of it; MiB: peak memory of the process while timed, libraries included."
    )
    note = (
        f"The LIF layers fire in {min(densities):.1f} to {max(densities):.1f} % of their neuron-steps. Before timing,"
        f" {check['compared']:,} integers (h, s, q, logits) were compared with the NumPy reference:"
        f" {check['differing']} differ."
    )
    close: dict[str, float] = {}
    for row in check.get("logits", ()):
        if "correlation" in row:
            close[row["computes"]] = min(row["correlation"], close.get(row["computes"], 1.0))
    if close:
        found = ", ".join(f"{computes} {value:.3f}" for computes, value in close.items())
        note += (
            " Other rows compute the network's float twin, its weight codes and BN slopes with float membranes, whose"
            f" logits correlate with the integers at {workload['twin_correlation']:.3f}; what is timed correlates with"
            f" the twin's, or the ANN's, float32 logits at, in the worst case: {found}."
        )
    heads = ["", "computes", *(_column(*column) for column in columns), "MiB"]
    return f"{text}\n\n{markdown(heads, body)}\n\n{note}"


def _ms(value: float) -> str:
    """Three significant digits, never in powers of ten."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _circumstances(document: dict[str, Any]) -> str:
    machine = document["machine"]
    where = [f"{machine['processor']}, {machine['cores']} cores"]
    where += [f"{key} {machine[key]}" for key in ("memory", "C levels") if key in machine]
    flags = " ".join(document["processor_flags"]) or "unknown"
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    lines = [
        f"Measured on {document['date']}, commit `{document['commit'][:12]}"
        f"{'+changes' if document['commit'].endswith('+changes') else ''}`: {'; '.join(where)}; flags {flags}.",
        f"Versions: {versions}.",
    ]
    if document["environment"]:
        lines.append("Environment: " + ", ".join(f"{k}={v}" for k, v in document["environment"].items()) + ".")
    lines += [f"Left out: {name}: {reason}." for name, reason in document["left_out"].items()]
    return "\n".join(lines)


def demo_table(document: dict[str, Any]) -> str:
    """The table of the demo's summary.json: "table" holds {"headers", "rows"}, or rows of [metric, value, ...]."""
    table = document.get("table")
    if isinstance(table, dict):
        headers, rows = table.get("headers"), table.get("rows")
    elif isinstance(table, list) and all(isinstance(row, list) for row in table):
        headers = [""] * max(map(len, table), default=0)
        rows = [[*row, *headers[len(row) :]] for row in table]
    else:
        headers = rows = None
    if not headers or not rows or not isinstance(headers, list) or not all(isinstance(row, list) for row in rows):
        raise InputError("'table' is missing or empty; rows, or {'headers': [...], 'rows': [[...]]}, are needed")
    return markdown(headers, rows)


def seeds_table(document: dict[str, Any]) -> str:
    """Means and standard errors over seeds of digits_seeds.py's result, schema mdsnn.digits-seeds/1."""
    if document.get("schema") != SEEDS_SCHEMA:
        raise InputError(f"schema {document.get('schema')!r} is not {SEEDS_SCHEMA!r}")
    try:
        seeds = document["seeds"]
        rows = [["teacher", "FP32, live", *_spread([seed["teacher"] for seed in seeds]), "", "", ""]]
        for name in seeds[0]["students"]:
            students = [seed["students"][name] for seed in seeds]
            rates = [rate for student in students for rate in student["spike_rates"].values()]
            if not all(student["agrees"] for student in students):
                raise InputError("executors differ in it; find out why before anything is shown")
            rows.append(
                [
                    name.replace(" alone", ""),
                    "alone, frozen" if "alone" in name else "distilled, frozen",
                    *_spread([student["frozen"] for student in students]),
                    f"{100 * min(rates):.0f} to {100 * max(rates):.0f} %",
                    f"{sum(student['compared'] for student in students):,}",
                    sum(student["differing"] for student in students),
                ]
            )
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as fault:
        raise InputError(f"a {SEEDS_SCHEMA} document lacks or misuses {fault}") from fault
    heads = ["network", "trained", "mean accuracy", "standard error", "worst seed", "neuron-steps that fire, by layer"]
    text = f"{len(seeds)} seeds, {document['samples']} test images each, five executors."
    return f"{text}\n\n{markdown([*heads, 'integers compared', 'differ'], rows)}"


def experiments_tables(document: dict[str, Any]) -> str:
    """Tables V and IV of experiments.py's result, schema mdsnn.experiments/1."""
    if document.get("schema") != experiments.SCHEMA:
        raise InputError(f"schema {document.get('schema')!r} is not {experiments.SCHEMA!r}")
    try:
        rows = [student for seed in document["seeds"] for student in seed["students"]]
        if any(row["frozen"] != row["torch_frozen"] for row in rows):
            raise InputError("the engine and frozen PyTorch differ in it; find out why before anything is shown")
        mean, error = experiments.mean_and_error([seed["teacher"] for seed in document["seeds"]])
        parts = [
            f"{len(document['seeds'])} seeds of {document['data']}, {rows[0]['samples']:,} test images each, mean ±"
            f" standard error. One full-precision teacher a seed, T = {document['timesteps']}:"
            f" {100 * mean:.2f} ± {100 * error:.2f} %."
        ]
        for title, (heads, body) in experiments.summarize(document).items():
            parts += [f"**{title}**", markdown(heads, body)]
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as fault:
        raise InputError(f"a {experiments.SCHEMA} document lacks or misuses {fault}") from fault
    return "\n\n".join(parts)


def images_table(document: dict[str, Any]) -> str:
    """The table of runs_table.py's result, schema mdsnn.runs/1."""
    if document.get("schema") != runs_table.SCHEMA:
        raise InputError(f"schema {document.get('schema')!r} is not {runs_table.SCHEMA!r}")
    try:
        if not document["verify"]["agrees"]:
            raise InputError("executors differ in it; find out why before anything is shown")
        return runs_table.markdown(document).strip()
    except (KeyError, TypeError, AttributeError, ValueError) as fault:
        raise InputError(f"a {runs_table.SCHEMA} document lacks or misuses {fault}") from fault


def _spread(values: list[float]) -> tuple[str, str, str]:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return f"{100 * statistics.mean(values):.2f} %", f"{100 * error:.2f}", f"{100 * min(values):.2f} %"


# -------------------------------------------------------------------------------------------------- command line


def _from(path: str, make: Any) -> str:
    try:
        text: str = make(read_document(path))
    except InputError as fault:
        raise fault if str(fault).startswith(str(path)) else InputError(f"{path}: {fault}") from fault
    return text


TABLES: dict[str, tuple[str, str, Callable[[dict[str, Any]], str]]] = {
    "engine": ("bench:engine", "bench_engine.py --json", engine_tables),
    "demo": ("demo", "mdsnn demo, its summary.json", demo_table),
    "seeds": ("seeds", "digits_seeds.py --json", seeds_table),
    "images": ("images", "runs_table.py", images_table),
    "experiments": ("experiments", "experiments.py --json", experiments_tables),
}
"""Option -> (marker, what wrote the JSON, the table of it)."""


def _options(command: Callable[..., None]) -> Callable[..., None]:
    for name, (_, source, _) in reversed(TABLES.items()):
        command = click.option(f"--{name}", metavar="JSON", help=f"A result of {source}.")(command)
    return command


@click.command()
@_options
@click.option("--readme", default=str(README), help="The file with the markers.  [default: the repository's README.md]")
@click.option("--check", is_flag=True, help="Write nothing; exit 1 if the file does not hold these tables.")
def main(readme: str, check: bool, **results: str | None) -> None:
    """Write the tables of JSON results into README.md, between their markers."""
    given = {name: path for name, path in results.items() if path is not None}
    if not given:
        raise click.UsageError("nothing to write: name " + ", ".join(f"--{name}" for name in TABLES))
    try:
        text = read_bounded(readme, _LIMIT, what="README").decode("utf-8")
    except UnicodeDecodeError as fault:
        raise InputError(f"{readme}: is not UTF-8: {fault}") from fault
    bodies = {TABLES[name][0]: _from(path, TABLES[name][2]) for name, path in given.items()}
    new = text
    for name, body in bodies.items():
        try:
            new = replace_between(new, name, body)
        except ConfigError as fault:
            raise ConfigError(f"{readme}: {fault}") from fault
    if check:
        if new != text:
            click.echo(f"{readme}: differs from {', '.join(bodies)}; run this without --check", err=True)
            raise SystemExit(1)
        return
    if new != text:
        write_text(readme, new, force=True)
    click.echo(f"{readme}: wrote {', '.join(bodies)}", err=True)


if __name__ == "__main__":
    try:
        main()
    except MdsnnError as fault:
        click.echo(f"report: error: {fault}", err=True)
        sys.exit(fault.exit_code)
