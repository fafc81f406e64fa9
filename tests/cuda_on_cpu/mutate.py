"""`make mutate-cuda`: do the tests notice when a barrier or a boundary mask is missing?

All mutants of csrc/cuda are in one build: each barrier and each comparison in device code asks for
the number of the mutant that runs.

    __syncthreads(); __syncwarp();    left out
    if (i < n), i < n ? a : b         true; false in front of return, continue and break
    bool inside = i < n;              true where the name is used
    i == n || ..., p != nullptr && .. false, true: what comes behind is not guarded
    for (...; i < n; ...)             one further, as in while

A mutant is caught when a test of lane cuda-on-cpu fails, AddressSanitizer ends it, or it does not
end. 95% must be caught; EQUIVALENT names those that change no result, and why.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cuda_on_cpu import build

BUILD = build.ROOT / "build/mutate-cuda"
LIBRARY = BUILD / "libt4r_fast_emulated.so"
WANTED = 0.95
SECONDS = 40  # of CPU for one op's tests of a mutant; without it they take 10

_SHIFT = "no lane takes part in a shift by the number of lanes"
_PAST = "positions behind the end are masked inside the loop"
_NO_BITS = "positions from n on have no bits; the comparison saves their work"
# (file, mutant as it is printed) -> why no result can differ
EQUIVALENT: dict[tuple[str, str], str] = {
    (
        "log_uniform_sample.cu",
        "lanes < static_cast<int>(kWarp) -> lanes <= static_cast<int>(kWarp)",
    ): _SHIFT,
    (
        "log_uniform_sample.cu",
        "lanes < static_cast<int>(kWarp) -> lanes <= static_cast<int>(kWarp) #2",
    ): _SHIFT,
    (
        "log_uniform_sample.cu",
        "first < kMostPairs -> true",
    ): "a stop after 2**33 draws, for a generator that is wrong",
    (
        "look_back.cuh",
        "block == 0 -> false",
    ): "later blocks find nothing before block 0, and add nothing",
    (
        "look_back.cuh",
        "nearest >= 0 -> nearest + 1 >= 0",
    ): "before the first block there are counts of 0 that end the search",
    ("look_back.cuh", "block > 0 -> true"): "block 0 leaves the same word again",
    ("mask_mlm.cu", "l < n -> l <= n"): _NO_BITS,
    ("mask_mlm.cu", "l < n -> true"): _NO_BITS,
    ("mask_permutation.cu", "l < n -> l <= n"): _NO_BITS,
    ("mask_permutation.cu", "l < n -> true"): _NO_BITS,
    (
        "mask_permutation.cu",
        "current < n -> current <= n",
    ): "a span that begins at n is cut to nothing",
    (
        "mask_permutation.cu",
        "current < l + kPositions -> current <= l + kPositions",
    ): "a span behind these positions is drawn earlier, and kept for the next",
    ("mask_permutation.cu", "step < positions -> step <= positions"): _PAST,
    ("mask_permutation.cu", "rows < positions -> rows <= positions"): _PAST,
    (
        "mask_permutation.cu",
        "source < kLanes -> source <= kLanes",
    ): "the first of the next rows, which write it again",
    (
        "mask_permutation.cu",
        "k < kPositions -> k <= kPositions #2",
    ): "a fifth bit, at which nobody looks",
    ("radix_sort.cuh", "step < kWarp -> step <= kWarp"): _SHIFT,
    (
        "radix_sort.cuh",
        "round < kTileRounds -> round <= kTileRounds #2",
    ): "the next tile's first entries, put where that tile puts them",
    ("radix_sort.cuh", "inside -> true #2"): "entries behind the end come last in their tile",
    (
        "radix_sort.cuh",
        "without __syncwarp(); #2",
    ): "__match_any_sync of the next round waits too; only the barrier orders memory",
    ("sequence_embedding.cu", "first < g.width -> first <= g.width"): _PAST,
    ("sequence_mask.cuh", "l < sessions.positions -> l <= sessions.positions"): _PAST,
    ("sequence_mask.cuh", "lanes < kWarp -> lanes <= kWarp"): _SHIFT,
    ("sequence_mask.cuh", "step < warp_stop -> step <= warp_stop"): _PAST,
    ("sequence_mask.cuh", "lanes < kLanes -> lanes <= kLanes"): _SHIFT,
}


class Mutant(NamedTuple):
    line: int
    what: str  # as it is printed
    edits: list[tuple[int, int, str]]  # (start, end, new text) of the file; {} is its number


def hidden(text: str) -> str:
    """The text with comments and strings blanked, so that places stay."""
    pattern = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"'
    return re.sub(pattern, lambda found: " " * len(found[0]), text, flags=re.DOTALL)


def closing(code: str, at: int) -> int:
    """The place of the bracket that closes the one at `at`."""
    depth = 0
    for i in range(at, len(code)):
        depth += (code[i] in "([{") - (code[i] in ")]}")
        if depth == 0:
            return i
    raise ValueError(f"the bracket at {at} is not closed")


def device_bodies(code: str) -> list[tuple[int, int]]:
    """Where the bodies of kernels and device functions are."""
    bodies = []
    for found in re.finditer(r"__(?:global|device)__\b", code):
        i = found.end()
        while code[i] not in "{;":
            i = closing(code, i) + 1 if code[i] == "(" else i + 1
        if code[i] == "{":
            bodies.append((i, closing(code, i)))
    return bodies


def operands(code: str, start: int, end: int) -> tuple[int, int]:
    """Where the comparison whose operator is code[start:end] begins and ends."""
    depth, first = 0, start
    while True:
        c = code[first - 1]
        depth += (c in ")]") - (c in "([")
        word = code[max(0, first - 6) : first]
        if depth < 0 or (depth == 0 and (c in ",;?{}&|!=" or word == "return")):
            break
        if depth == 0 and c == ":" and code[first - 2] != ":" and code[first] != ":":
            break
        first -= 1
    depth, last = 0, end
    while True:
        c = code[last]
        depth += (c in "([") - (c in ")]")
        if depth < 0 or (depth == 0 and (c in ",;?{}" or code[last : last + 2] in ("&&", "||"))):
            break
        if depth == 0 and c == ":" and code[last + 1] != ":" and code[last - 1] != ":":
            break
        last += 1
    while code[first].isspace():
        first += 1
    while code[last - 1].isspace():
        last -= 1
    return first, last


def conditions(code: str, keyword: str) -> list[tuple[int, int]]:
    """The brackets of all `keyword (...)`."""
    found = re.finditer(rf"\b{keyword} ?\(", code)
    return [(f.end() - 1, closing(code, f.end() - 1)) for f in found]


def mutants(text: str) -> list[Mutant]:
    code = hidden(text)
    bodies = device_bodies(code)
    ifs, fors, whiles = (conditions(code, word) for word in ("if", "for", "while"))
    constant = conditions(code, "if constexpr") + conditions(code, "static_assert")
    leaves = [
        span for span in ifs if re.match(r"\)\s*\{?\s*(return|continue|break)\b", code[span[1] :])
    ]
    found: list[Mutant] = []

    def inside(place: int, spans: list[tuple[int, int]]) -> bool:
        return any(first <= place < last for first, last in spans)

    def add(place: int, what: str, *edits: tuple[int, int, str]) -> None:
        what = re.sub(r"\s+", " ", what)
        found.append(Mutant(text.count("\n", 0, place) + 1, what, list(edits)))

    def guard(first: int, last: int, value: str = "") -> None:
        value = value or ("false" if inside(first, leaves) else "true")
        opening = "(!is_mutant({}) && (" if value == "false" else "(is_mutant({}) || ("
        add(first, f"{text[first:last]} -> {value}", (first, first, opening), (last, last, "))"))

    for barrier in re.finditer(r"__sync(?:threads|warp)\([^)]*\);", code):
        if inside(barrier.start(), bodies):
            place = barrier.start()
            add(place, f"without {barrier[0]}", (place, place, "if (!is_mutant({})) "))
    for operator in re.finditer(r" (<=?|>=?) ", code):
        place = operator.start()
        statement = re.split(r"[;{}]", code[:place])[-1]
        if not inside(place, bodies) or inside(place, constant) or "constexpr" in statement:
            continue
        first, last = operands(code, place, operator.end())
        if inside(place, whiles) or any(
            code.count(";", span[0], place) == 1 for span in fors if span[0] < place < span[1]
        ):
            further = {"<": "<=", "<=": "- 1 <=", ">": ">=", ">=": "+ 1 >="}[operator[1]]
            left, right = text[first:place], text[operator.end() : last]
            loop = f"{left} {further} {right}"
            add(
                first,
                f"{text[first:last]} -> {loop}",
                (first, first, f"(is_mutant({{}}) ? ({loop}) : ("),
                (last, last, "))"),
            )
            continue
        flag = re.search(r"\bbool \w+ = [^;]*$", code[:place])
        whole = flag is not None and code[last] == ";" and code[:first].endswith(" = ")
        if not whole:
            guard(first, last)
    for operator in re.finditer(r" (==|!=) ", code):
        place = operator.start()
        if not inside(place, bodies) or inside(place, constant):
            continue
        first, last = operands(code, place, operator.end())
        behind = code[last:].split(maxsplit=1)[0]
        if behind == "?" or behind == {"==": "||", "!=": "&&"}[operator[1]]:
            guard(first, last, "false" if operator[1] == "==" else "true")
    for flag in re.finditer(r"\bbool (\w+) = ([^;]*);", code):
        body = next((b for b in bodies if b[0] <= flag.start() < b[1]), None)
        if body is None or not re.search(r" (<|>)=? ", flag[2]):
            continue
        for use in re.finditer(rf"(?<![\w.])!?{flag[1]}\b", code[flag.end() : body[1]]):
            first = flag.end() + use.start() + use[0].startswith("!")
            guard(first, flag.end() + use.end())
    numbered: list[Mutant] = []
    for mutant in sorted(found, key=lambda mutant: mutant.line):
        before = sum(other.what.partition(" #")[0] == mutant.what for other in numbered)
        numbered.append(mutant._replace(what=f"{mutant.what} #{before + 1}") if before else mutant)
    return numbered


def instrument(text: str, all_mutants: list[Mutant], first_number: int) -> str:
    """The text with all its mutants in it."""
    edits = []
    for number, mutant in enumerate(all_mutants, first_number):
        width = mutant.edits[-1][1] - mutant.edits[0][0]
        for k, (start, _, new) in enumerate(mutant.edits):
            # at one place: what ends there, inner ones first; then what begins there, outer first
            ends = k == 1
            order = (start, not ends, width if ends else -width)
            edits.append((order, start, new.replace("{}", str(number), 1)))
    for _, start, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[start:]
    return text


def ops_of(path: Path) -> list[str]:
    """The ops whose source includes the file."""
    if path.suffix == ".cu":
        return [path.stem]
    users = [p for p in path.parent.iterdir() if f'#include "{path.name}"' in p.read_text()]
    return sorted({op for user in users for op in ops_of(user)})


HEADER = """#pragma once
extern int mutant_that_runs;
inline bool is_mutant(int number) { return number == mutant_that_runs; }
"""
CHOICE = """#include "mutant.h"
int mutant_that_runs = 0;
extern "C" __attribute__((visibility("default"))) void choose_mutant(int number) {
  mutant_that_runs = number;
}
"""


def make(only: str) -> list[tuple[str, Mutant]]:
    """Builds all mutants of the files whose name holds `only`; number i is entry i - 1."""
    shutil.rmtree(BUILD, ignore_errors=True)
    shutil.copytree(build.ROOT / "csrc", BUILD / "csrc", ignore=shutil.ignore_patterns("cpu"))
    found: list[tuple[str, Mutant]] = []
    for path in sorted((BUILD / "csrc/cuda").glob("*.cu*")):
        text = path.read_text()
        here = mutants(text) if only in path.name else []
        path.write_text(instrument(text, here, len(found) + 1))
        found += [(path.name, mutant) for mutant in here]
    (BUILD / "mutant.h").write_text(HEADER)
    (BUILD / "mutant.cpp").write_text(CHOICE)
    sources = [*sorted((BUILD / "csrc/cuda").glob("*.cu")), BUILD / "mutant.cpp"]
    flags = ["-include", str(BUILD / "mutant.h"), "-w"]
    build.build(LIBRARY, [build.HERE / "engine.cpp", *sources], sanitize=True, flags=flags)
    return found


def serve() -> None:
    """Runs the tests of (number, op) for each line of the input, in a process of its own."""
    import pytest

    import t4r_fast.backend

    t4r_fast.backend.table()  # imports all ops
    chosen = ctypes.CDLL(str(LIBRARY)).choose_mutant
    for line in sys.stdin:
        number, op = json.loads(line)
        child = os.fork()
        if child == 0:
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
            chosen(number)
            options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow"]
            os._exit(pytest.main([*options, "-k", build.LANE_TESTS, f"tests/test_{op}.py"]))
        print(json.dumps(outcome(os.waitpid(child, 0)[1])), flush=True)


def outcome(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    meaning = {0: "passed", 1: "a test failed", -signal.SIGXCPU: "did not end"}
    return meaning.get(code, f"ended with {code}")


class Server:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            cwd=build.ROOT,
            env=build.sanitized_environment(LIBRARY),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, number: int, op: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps([number, op]), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit("make mutate-cuda: the process that runs the tests has ended")
        return json.loads(answer)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def run_all(found: list[tuple[str, Mutant]], jobs: int) -> list[str]:
    """The outcome of each mutant, "passed" where no op's tests caught it."""
    servers = [Server() for _ in range(jobs)]
    for path in build.ops():
        result = servers[0].run(0, path.stem)
        if result != "passed":
            sys.exit(f"make mutate-cuda: the tests of {path.stem} without a mutant: {result}")

    def one(job: tuple[Server, int]) -> list[tuple[int, str]]:
        server, start = job
        results = []
        for i in range(start, len(found), jobs):
            result = "passed"
            for op in ops_of(build.ROOT / "csrc/cuda" / found[i][0]):
                result = server.run(i + 1, op)
                if result != "passed":
                    break
            results.append((i, result))
        return results

    with ThreadPoolExecutor(jobs) as pool:
        results = dict(pair for part in pool.map(one, zip(servers, range(jobs))) for pair in part)
    for server in servers:
        server.close()
    return [results[i] for i in range(len(found))]


def report(found: list[tuple[str, Mutant]], results: list[str]) -> bool:
    files = {name for name, _ in found}
    wrong = {named for named in EQUIVALENT if named[0] in files}
    wrong -= {(name, mutant.what) for name, mutant in found}
    counts: dict[str, list[int]] = {}
    for (name, mutant), result in zip(found, results):
        count = counts.setdefault(name, [0, 0, 0])
        reason = EQUIVALENT.get((name, mutant.what))
        caught = result != "passed"
        if reason is not None and caught:
            print(f"{name}:{mutant.line}: {mutant.what}: named as equivalent, but {result}")
            wrong.add((name, mutant.what))
        count[0] += caught
        count[1] += 1
        count[2] += not caught and reason is not None
        if not caught:
            state = f"equivalent: {reason}" if reason else "NOT CAUGHT"
            print(f"{name}:{mutant.line}: {mutant.what}: {state}")
    print(f"{'file':28} caught of equivalent")
    for name, (caught, all_, equivalent) in counts.items():
        print(f"{name:28} {caught:6} {all_:2} {equivalent:10}")
    caught, all_, equivalent = (sum(column) for column in zip(*counts.values()))
    share = caught / (all_ - equivalent)
    print(f"{'all':28} {caught:6} {all_:2} {equivalent:10}: {share:.1%} of those that matter")
    for name, what in sorted(wrong):
        print(f"EQUIVALENT names {name}: {what}, which is not there or is caught")
    return share >= WANTED and not wrong


def main() -> None:
    if "--serve" in sys.argv:
        return serve()
    if (reason := build.not_here()) is not None:
        sys.exit(f"make mutate-cuda: {reason}")
    start = time.monotonic()
    found = make(sys.argv[1] if len(sys.argv) > 1 else "")
    print(f"{len(found)} mutants built in {time.monotonic() - start:.0f} s", flush=True)
    if not report(found, run_all(found, jobs=2)):
        sys.exit(f"make mutate-cuda: at least {WANTED:.0%} must be caught")
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
