"""What is in a compiled GPU kernel: registers, stack, shared memory, and the mix of its main loop.

Reads cubins and libraries with `cuobjdump`, which triton brings along; needs no GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

# Tensor-core instructions by generation: mma.sync, wgmma, tcgen05
TENSOR_CORE = re.compile(r"HMMA|HGMMA|UTC\w*MMA|QGMMA")
RESOURCES = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
FUNCTION = re.compile(r"^\s*Function : (\S+)", re.MULTILINE)
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
LOCAL_MEMORY = re.compile(r"^(LDL|STL)\b")


class Kernel(NamedTuple):
    """One kernel for one architecture.

    registers, stack, shared  per thread, bytes per thread, static bytes per block
    spills                    loads and stores of local memory in the code
    code                      (address, opcode, operands) in order
    """

    name: str
    registers: int
    stack: int
    shared: int
    spills: int
    code: list[tuple[int, str, str]]

    def tensor_core(self) -> str:
        """The first tensor-core instruction, such as HGMMA.64x128x16.F32.BF16; else nothing."""
        return next((op for _, op, _ in self.code if TENSOR_CORE.match(op)), "")

    def main_loop(self) -> list[tuple[int, str, str]]:
        """The innermost loop with tensor-core instructions, else the longest loop, else all."""
        loops = self._loops()
        if not loops:
            return self.code
        busy = [loop for loop in loops if any(TENSOR_CORE.match(op) for _, op, _ in loop)]
        # Of nested loops the inner one is shorter; of a main loop and its tail the longer counts.
        inner = [
            loop
            for loop in busy
            if not any(
                other is not loop and loop[0][0] <= other[0][0] and other[-1][0] <= loop[-1][0]
                for other in busy
            )
        ]
        return max(inner or loops, key=len)

    def _loops(self) -> list[list[tuple[int, str, str]]]:
        found = []
        for address, op, operands in self.code:
            target = re.search(r"0x([0-9a-f]+)", operands)
            if op.startswith("BRA") and target and int(target[1], 16) < address:
                start = int(target[1], 16)
                found.append([line for line in self.code if start <= line[0] <= address])
        return found

    def mix(self) -> Counter[str]:
        """Instructions of the main loop by kind: tensor, exp, fp32, int, memory, other."""
        return Counter(kind(op) for _, op, _ in self.main_loop())


def kind(op: str) -> str:
    if TENSOR_CORE.match(op):
        return "tensor"
    if op.startswith("MUFU.EX2"):
        return "exp"
    if re.match(r"(FADD|FMUL|FFMA|FMNMX|FSEL|FSETP|FSET|F2FP|F2F|HADD|HMUL|HFMA|HMNMX)", op):
        return "fp32"
    if re.match(
        r"(LDG|STG|LDS|STS|LDSM|STSM|LDGSTS|LDL|STL|LDC|LDT|STT|UTMA|LDTM|STTM|ATOM|RED)", op
    ):
        return "memory"
    if re.match(r"(IMAD|IADD|LOP3|SHF|ISETP|LEA|IMNMX|SEL|PRMT|VIADD|VIMNMX|MOV)", op):
        return "int"
    return "other"


@functools.cache
def cuobjdump() -> str:
    """Its path: the one in triton, else the one on the path."""
    spec = importlib.util.find_spec("triton")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "backends/nvidia/bin/cuobjdump"
        if path.exists():
            return str(path)
    found = shutil.which("cuobjdump")
    if found is None:
        raise FileNotFoundError("cuobjdump: neither triton nor the CUDA toolkit is installed")
    return found


def read(path: Path) -> list[Kernel]:
    """The kernels of a cubin, or of all architectures of an object file or library."""

    def dump(option: str) -> str:
        done = subprocess.run([cuobjdump(), option, str(path)], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{cuobjdump()} {option} {path}: {done.stderr.strip()}")
        return done.stdout

    resources = {
        name: tuple(map(int, rest)) for name, *rest in RESOURCES.findall(dump("-res-usage"))
    }
    parts = FUNCTION.split(dump("-sass"))
    kernels = []
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        code = [(int(at, 16), op, rest) for at, op, rest in INSTRUCTION.findall(text)]
        registers, stack, shared, local = resources[name]
        spills = sum(bool(LOCAL_MEMORY.match(op)) for _, op, _ in code)
        kernels.append(Kernel(name, registers, stack + local, shared, spills, code))
    return kernels
