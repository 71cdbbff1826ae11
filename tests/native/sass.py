"""Loops of the CUDA kernels in machine code, and what an iteration of each executes.

python -m tests.native.sass SOURCE [KERNEL]   print the innermost loops of kernels/cuda/SOURCE.cu

Needs nvcc, and nvdisasm: of the package nvidia-cuda-nvdisasm (the extra cuda-tests), or on PATH.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import importlib.metadata
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

from tests.native.cuda_resources import compile_cubin, short_names

INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@(?P<guard>!?U?P\w+)\s+)?(?P<text>\S.*?)\s*;")
SECTION = re.compile(r"\s+\.section\s+\.text\.(?P<name>[^,]+),")
LABEL = re.compile(r"(?P<name>[^\s:]+):$")
TARGET = re.compile(r"`\((?P<label>[^)]+)\)")
REGISTER = re.compile(r"\bR(\d+)\b")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction: `@guard text`, and where it jumps to if it is a branch."""

    guard: str | None
    text: str
    target: int | None

    @property
    def opcode(self) -> str:
        """With its modifiers, such as LDG.E.128."""
        return self.text.split()[0]

    @property
    def ends(self) -> bool:
        """Nothing falls through to the next one."""
        whole = self.guard is None and re.match(r"BRA(\.\w+)* `", self.text)
        return bool(whole) or (self.guard is None and re.match(r"(EXIT|RET|BRX)\b", self.text))


@dataclasses.dataclass(frozen=True)
class Loop:
    """The instructions of a natural loop, in the order of their addresses."""

    instructions: tuple[Instruction, ...]
    innermost: bool

    def __len__(self) -> int:
        return len(self.instructions)

    def count(self, pattern: str) -> int:
        """How many opcodes begin with the regular expression."""
        return sum(re.match(pattern, each.opcode) is not None for each in self.instructions)

    def loads(self, bits: int, of: str = "LDG") -> int:
        """Accesses of one width: LDG, STG, LDS, STS, LDGSTS."""
        wide = {32: r"(?!.*\.(64|128|[US]8|[US]16)\b)", 16: r".*\.[US]16\b", 8: r".*\.[US]8\b"}
        return self.count(rf"{of}\b" + wide.get(bits, rf".*\.{bits}\b"))

    @property
    def in_flight(self) -> int:
        """Loads of 128 bits from global memory that are asked for before one is waited for.

        Counted over two iterations, in the order of addresses. A load is waited for where one of
        its registers is named again, and those before it with it.
        """
        most, pending = 0, []
        for each in self.instructions * 2:
            named = {int(r) for r in REGISTER.findall(each.text)}
            while any(named & registers for registers in pending):
                pending.pop(0)
            if re.match(r"LDG\b.*\.128\b", each.opcode):
                first = int(REGISTER.search(each.text)[1])
                pending.append(set(range(first, first + 4)))
                most = max(most, len(pending))
        return most

    def summary(self) -> dict[str, int]:
        """What the budgets are about, without the zeros."""
        found = {"instructions": len(self), "in_flight": self.in_flight}
        for of in ("LDG", "STG", "LDS", "STS", "LDGSTS"):
            found |= {f"{of}.{bits}": self.loads(bits, of) for bits in (128, 64, 32, 16, 8)}
        for name in ("FFMA", "DFMA", "MUFU", "SHFL", "BAR", "CALL", "LDL", "STL"):
            found[name] = self.count(rf"{name}\b")
        found["MMA"] = self.count("[A-Z]G?MMA")
        found["prefetch"] = self.count(r"CCTL\.E\.PF")
        return {name: count for name, count in found.items() if count}


def nvdisasm() -> str | None:
    """The disassembler, if it is here."""
    try:
        files = importlib.metadata.files("nvidia-cuda-nvdisasm") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    packaged = [str(f.locate()) for f in files if f.name in ("nvdisasm", "nvdisasm.exe")]
    return packaged[0] if packaged else shutil.which("nvdisasm")


@functools.cache
def bodies(source: str, architecture: str = "sm_90") -> dict[str, list[Instruction]]:
    """The instructions of every kernel of kernels/cuda/<source>.cu, by its short name."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = pathlib.Path(folder) / "kernels.cubin"
        compile_cubin(source, architecture, cubin)
        text = subprocess.run(
            [nvdisasm(), "-c", str(cubin)], capture_output=True, text=True, check=True
        ).stdout
    mangled = parse(text)
    return dict(zip(short_names(list(mangled)), mangled.values(), strict=True))


@functools.cache
def kernels(source: str, architecture: str = "sm_90") -> dict[str, list[Loop]]:
    """The loops of every kernel of kernels/cuda/<source>.cu, by its name without a namespace."""
    return {name: loops(body) for name, body in bodies(source, architecture).items()}


def parse(text: str) -> dict[str, list[Instruction]]:
    """The instructions of every section of code, by its mangled name."""
    found: dict[str, list[tuple[str | None, str]]] = {}
    labels: dict[str, int] = {}
    body: list[tuple[str | None, str]] = []
    for line in text.splitlines():
        if match := SECTION.match(line):
            body = found.setdefault(match["name"], [])
        elif match := INSTRUCTION.match(line):
            body.append((match["guard"], match["text"]))
        elif match := LABEL.match(line):
            labels[match["name"]] = len(body)

    def target(text: str) -> int | None:
        label = TARGET.search(text) if text.startswith("BRA") else None
        return labels[label["label"]] if label else None

    return {
        name: [Instruction(guard, text, target(text)) for guard, text in body]
        for name, body in found.items()
    }


@dataclasses.dataclass(frozen=True)
class Flow:
    """The basic blocks of a kernel, the edges between them, and its natural loops."""

    blocks: list[Loop]  # their instructions
    following: list[list[int]]
    loops: dict[int, set[int]]  # of each head the blocks

    def innermost(self, head: int) -> bool:
        """Whether the loop of a head has none within."""
        return not any(other in self.loops[head] for other in self.loops if other != head)

    def cheapest(self, head: int, stops: list[int], turns: dict[int, int]) -> int:
        """Instructions of the cheapest way once round a loop that passes some blocks in order.

        A block of a loop within counts as often as `turns` says of the head.
        """
        weights = [len(block) for block in self.blocks]
        for inner, count in turns.items():
            for block in self.loops[inner]:
                weights[block] *= count
        back = {(b, h) for h, nodes in self.loops.items() for b in nodes if h in self.following[b]}
        latches = {b for b in self.loops[head] if head in self.following[b]}

        def way(start: int, goals: set[int]) -> tuple[int, int]:
            queue, seen = [(0, start)], set()
            while queue:
                cost, block = heapq.heappop(queue)
                if block in goals:
                    return cost, block
                if block in seen:
                    continue
                seen.add(block)
                for after in self.following[block]:
                    if after in self.loops[head] and (block, after) not in back:
                        heapq.heappush(queue, (cost + weights[block], after))
            raise ValueError(f"no way from block {start} to {goals}")

        total, at = 0, head
        for goals in [*({stop} for stop in stops), latches]:
            cost, at = way(at, goals)
            total += cost
        return total + weights[at]


def flow(body: list[Instruction]) -> Flow:
    """Natural loops: one for each block that dominates one from which an edge goes back to it."""
    starts = {0} | {each.target for each in body if each.target is not None}
    starts |= {i + 1 for i, each in enumerate(body[:-1]) if each.target is not None or each.ends}
    begin = sorted(starts)
    index = {at: block for block, at in enumerate(begin)}
    ends = [*begin[1:], len(body)]
    following: list[list[int]] = []
    for block, end in enumerate(ends):
        last = body[end - 1]
        after = [index[last.target]] if last.target is not None else []
        following.append(after + ([block + 1] if not last.ends and end < len(body) else []))
    before: list[list[int]] = [[] for _ in begin]
    for block, after in enumerate(following):
        for each in after:
            before[each].append(block)

    dominators = dominating(following, before)
    nodes: dict[int, set[int]] = {}
    for block, after in enumerate(following):
        for head in after:
            if dominators[block] is not None and dominators[block] >> head & 1:
                nodes.setdefault(head, {head}).update(reaching(block, head, before))
    blocks = [Loop(tuple(body[a:b]), False) for a, b in zip(begin, ends, strict=True)]
    return Flow(blocks, following, nodes)


def loops(body: list[Instruction]) -> list[Loop]:
    """The natural loops of a kernel."""
    found, kernel = [], flow(body)
    for head in sorted(kernel.loops):
        blocks = sorted(kernel.loops[head])
        instructions = tuple(each for b in blocks for each in kernel.blocks[b].instructions)
        if any(each.opcode != "BRA" for each in instructions):  # a kernel ends in a jump to itself
            found.append(Loop(instructions, kernel.innermost(head)))
    return found


def dominating(following: list[list[int]], before: list[list[int]]) -> list[int | None]:
    """For each block those that every way to it passes, as bits; None if there is no way."""
    dominators: list[int | None] = [None] * len(following)
    dominators[0] = 1
    changed = True
    while changed:
        changed = False
        for block in range(1, len(following)):
            known = [dominators[b] for b in before[block] if dominators[b] is not None]
            if known:
                mine = functools.reduce(int.__and__, known) | 1 << block
                changed |= mine != dominators[block]
                dominators[block] = mine
    return dominators


def reaching(block: int, head: int, before: list[list[int]]) -> set[int]:
    """The blocks from which there is a way to `block` that does not pass `head`."""
    found, left = {head}, [block]
    while left:
        if (each := left.pop()) not in found:
            found.add(each)
            left += before[each]
    return found


def main() -> None:
    """Prints the innermost loops of a source file's kernels."""
    wanted = sys.argv[2] if len(sys.argv) > 2 else ""
    for name, found in kernels(sys.argv[1]).items():
        for loop in found:
            if loop.innermost and wanted in name:
                print(f"{name:40} {loop.summary()}")


if __name__ == "__main__":
    main()
