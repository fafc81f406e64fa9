"""Tables of the results: on the terminal, in README.md and in docs/benchmarks.md."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from t4r_fast.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TARGETS = ("README.md", "docs/benchmarks.md")
TUTORIAL = "tutorial_step"

Record = dict[str, Any]


def cost(record: Record) -> dict[str, float]:
    """The time to compare by: CPU with one thread, wall with several; p20, p50 and p80 in ms."""
    return record["cpu_ms" if record["threads"] == 1 else "wall_ms"]


def ratio_text(ours: Record, other: Record) -> str:
    """How many times as long `other` takes; under 1 it is a loss of ours and says so."""
    if ours is other or ours["status"] != "ok":
        return ""
    ratio = cost(other)["p50"] / cost(ours)["p50"]
    return f"{ratio:.2f}x" if ratio >= 1 else f"{ratio:.2f}x (slower)"


def memory_text(record: Record) -> str:
    memory = record.get("memory")
    if memory is None:
        return ""
    return "?" if "reason" in memory else f"{memory['extra']:,.0f}"


def compared(records: Iterable[Record]) -> list[list[Record]]:
    """The records that belong side by side, ours first: one case, one thread count."""
    groups: dict[tuple[str, str, int], list[Record]] = {}
    for record in records:
        groups.setdefault((record["op"], record["case"], record["threads"]), []).append(record)
    return [sorted(group, key=lambda record: not record["ours"]) for group in groups.values()]


# -- what is kept ----------------------------------------------------------------------------------


def newest(records: Iterable[Record], dtype: str = "float32") -> list[list[Record]]:
    """Of each case the last run's records: ratios must not mix runs."""
    last: dict[tuple[str, str, int], list[Record]] = {}
    for record in records:
        if record["dtype"] != dtype:
            continue
        key = record["op"], record["case"], record["threads"]
        group = last.setdefault(key, [])
        if group and group[0]["run"] != record["run"]:
            if group[0]["run"] > record["run"]:
                continue
            group.clear()
        group.append(record)
    groups = compared(record for group in last.values() for record in group)
    return sorted(groups, key=lambda group: group[0]["op"])


def read(path: Path) -> list[Record]:
    """The records of a results file; InputError naming a line that is none."""
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise InputError(f"{path}: line {number} is no JSON ({error}); delete it") from None
    return records


def write_tables(root: Path = ROOT, results: Path = RESULTS) -> list[Path]:
    """Write the kept results between the markers of README.md and docs/benchmarks.md.

    The markers are <!-- bench:NAME --> and <!-- /bench:NAME -->; NAME is `ops` (the shown cases),
    `tutorial` (against Transformers4Rec), or `all` (every record). Returns the files written.
    Raises InputError when there are no results or no markers.
    """
    kept = {path: read(path) for path in sorted(results.glob("*.jsonl"))}
    kept = {path: records for path, records in kept.items() if records}
    if not kept:
        raise InputError(f"bench: there are no results in {results}; run `make bench` first")
    # README shows one machine, the one measured last
    last = max(kept, key=lambda path: max(record["run"] for record in kept[path]))
    texts = {
        "ops": ops_table(kept[last]),
        "tutorial": tutorial_table(kept[last]),
        "all": "\n\n".join(full_table(records) for records in kept.values()),
    }
    written = []
    for name in TARGETS:
        path = root / name
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        changed = text
        for part, table in texts.items():
            changed = _between(changed, part, table, path)
        if changed != text:
            path.write_text(changed, encoding="utf-8")
        if "<!-- bench:" in text:
            written.append(path)
    if not written:
        raise InputError(
            f"bench: none of {', '.join(TARGETS)} has a place for the table: put"
            " <!-- bench:ops --> and <!-- /bench:ops --> there"
        )
    return written


def _between(text: str, name: str, table: str, path: Path) -> str:
    begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    if begin not in text:
        return text
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise InputError(f"{path}: {begin} has no {end} behind it; add it")
    return f"{before}{begin}\n{table}\n{end}{after}"


# -- markdown --------------------------------------------------------------------------------------


def _markdown(headings: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> str:
    rule = [":--"] * left + ["--:"] * (len(headings) - left)
    lines = [headings, rule, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def caption(record: Record) -> str:
    machine = record["machine"]
    model = f" (family {machine['family']}, model {machine['model']})" if machine["family"] else ""
    flags = ", ".join(machine["flags"])
    dirty = " with uncommitted changes" if record["uncommitted_changes"] else ""
    return (
        f"{machine['cpu']}{model}, {machine['cores']} cores, {flags}; torch"
        f" {record['versions']['torch']}; commit {record['commit']}{dirty};"
        f" {record['run'][:10]}; {record['dtype']}."
    )


def ops_table(records: Iterable[Record]) -> str:
    """The shown cases with one thread: ours, the usual way, and the best of the others."""
    rows, last = [], None
    for group in newest(records):
        ours = group[0]
        if ours["op"] == TUTORIAL or ours["threads"] != 1:
            continue
        if not ours["shown"] or ours["status"] != "ok":
            continue
        last = ours if last is None or ours["run"] > last["run"] else last
        others = [r for r in group[1:] if r["status"] == "ok"]
        usual = others[:1]
        rest = sorted(others[1:], key=lambda record: cost(record)["p50"])[:1]
        memory = [r for r in (ours, *usual) if "extra" in r.get("memory", {})]
        rows.append(
            [
                f"`{ours['op']}`",
                ours["case"],
                f"{cost(ours)['p50']:.4g}",
                *(_against(ours, found) for found in (usual, rest)),
                f"{100 * ours['floor_share']:.0f}%",
                " / ".join(memory_text(record) for record in memory) or "-",
            ]
        )
    if last is None:
        return "No results yet: `make bench`."
    headings = ["op", "case", "CPU ms", "the usual way", "best of the others", "of floor",
                "extra MiB, ours / usual"]  # fmt: skip
    return _markdown(headings, rows, 2) + f"\n\n{caption(last)}"


def _against(ours: Record, found: list[Record]) -> str:
    if not found:
        return "-"
    return f"**{ratio_text(ours, found[0])}** {found[0]['provider']}"


def full_table(records: Sequence[Record]) -> str:
    """Every case, provider and thread count."""
    rows, last = [], None
    for group in newest(records):
        if group[0]["op"] == TUTORIAL:
            continue
        last = group[0] if last is None or group[0]["run"] > last["run"] else last
        for i, record in enumerate(group):
            head = [f"`{record['op']}`", record["case"], str(record["threads"])]
            head = head if i == 0 else ["", "", ""]
            if record["status"] != "ok":
                rows.append([*head, record["provider"], record["status"], *[""] * 5])
                continue
            time = cost(record)
            rows.append(
                [
                    *head,
                    record["provider"],
                    f"{time['p50']:.4g} ({time['p20']:.4g}-{time['p80']:.4g})",
                    ratio_text(group[0], record),
                    f"{record['gflop_per_s']:.1f}",
                    f"{record['gbyte_per_s']:.1f}",
                    f"{100 * record['floor_share']:.0f}%",
                    memory_text(record),
                ]
            )
    if last is None:
        return "No results yet: `make bench`."
    headings = ["op", "case", "threads", "provider", "ms (p20-p80)", "ours is", "GFLOP/s", "GB/s",
                "of floor", "extra MiB"]  # fmt: skip
    return f"{caption(last)}\n\n" + _markdown(headings, rows, 4)


def tutorial_table(records: Iterable[Record]) -> str:
    """A step of the tutorial's models beside Transformers4Rec's, both from one run."""
    rows, last = [], None
    for group in newest(records):
        ours, theirs = group[0], group[-1]
        if ours["op"] != TUTORIAL or ours is theirs:
            continue
        if ours["status"] != "ok" or theirs["status"] != "ok":
            continue
        last = ours if last is None or ours["run"] > last["run"] else last
        unit = "CPU" if ours["threads"] == 1 else "wall"
        rows.append(
            [
                ours["kind"],
                *(f"{ours['sizes'][key]:,}" for key in ("V", "B")),
                f"{ours['threads']} ({unit})",
                *(f"{1e-3 * cost(record)['p50']:.3g}" for record in (ours, theirs)),
                f"**{ratio_text(ours, theirs)}**",
                " / ".join(f"{r['memory']['process'] / 1024:.2f}" for r in (ours, theirs)),
            ]
        )
    if last is None:
        return "No results yet: `make bench-t4rec`."
    headings = ["step", "items", "batch", "threads", "t4r_fast s", "Transformers4Rec 23.12 s",
                "ours is", "peak RSS GiB, ours / theirs"]  # fmt: skip
    return _markdown(headings, rows, 1) + f"\n\n{caption(last)}"
