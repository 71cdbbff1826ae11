"""The sweeps of block_ortho in machine code: copies in flight, and instructions per panel.

Needs nvcc and nvdisasm, and no GPU.
"""

from __future__ import annotations

import pytest
from tests.native import sass
from tests.native.test_cuda_sass import needs_nvdisasm

TYPES = ("float", "double", "BFloat16", "Half")
SWEEPS = [
    f"{name}<{t}, {b}>"
    for name in ("MeasureSweep", "UpdateSweep")
    for t in TYPES
    for b in (1, 2, 4, 8)
]


@pytest.mark.parametrize("source", [pytest.param("block_ortho", marks=needs_nvdisasm)])
def test_copies_are_in_flight_together(source):
    """Four of 16 bytes per turn, that wait for nothing, in all kernels."""
    for kernel in SWEEPS:
        found = sass.kernels(source)[kernel]
        panels = max(found, key=len)
        assert panels.count("LDL|STL") == 0, kernel
        copies = [loop for loop in found if loop.innermost and loop.loads(128, "LDGSTS") == 4]
        assert len(copies) >= 2, kernel  # rows and block
        for loop in copies:
            assert loop.count("LDGDEPBAR|DEPBAR|BAR|LDG\\b|CALL") == 0, kernel
            assert len(loop) <= 26, f"{kernel}: {loop.summary()}"


def hot_blocks(flow):
    """The loop over panels, and what 64 rows of float and a block of 8 pass in it, by kind."""
    head = max(flow.loops, key=lambda h: len(flow.loops[h]))
    inner = [h for h in sorted(flow.loops) if h in flow.loops[head] and flow.innermost(h)]

    def heads(of, count, fma):
        def counts(h):
            blocks = [flow.blocks[b] for b in flow.loops[h]]
            return sum(b.loads(128, of) for b in blocks), sum(b.count("FFMA") for b in blocks)

        return [h for h in inner if counts(h) == (count, fma)]

    def then(start, last, of, count, fma=0):
        """The first `last` blocks after one that have so many accesses and products."""
        after = range(start + 1, len(flow.blocks))
        like = [
            b
            for b in after
            if (flow.blocks[b].loads(128, of), flow.blocks[b].count("FFMA")) == (count, fma)
        ]
        return like[:last]

    return head, heads, then


def instructions(body, measures, updates):
    """Of a warp, for a panel of 128 elements."""
    flow = sass.flow(body)
    head, heads, then = hot_blocks(flow)
    stops, turns = [], {}
    rows, block = heads("LDGSTS", 4, 0)
    turns[rows] = 4  # 64 rows of 32 vectors, 128 threads, 4 at a time
    stops += [rows, *then(block, 2, "LDGSTS", 1)]
    if updates:
        of_rows, of_block = heads("LDS", 12, 128)
        turns[of_rows] = 4  # 16 of 64 rows
        (shares,) = heads("LDS", 4, 0)
        stops += [of_rows, *then(of_block, 2, "LDS", 3, 32), max(flow.loops[shares])]
        columns = min(
            (h for h in flow.loops if shares in flow.loops[h] and h not in (head, shares)),
            key=lambda h: len(flow.loops[h]),
        )
        turns[columns] = 2
    if measures:
        (products,), (gram,) = heads("LDS", 20, 384), heads("LDS", 10, 64)
        pairs = [b for b in sorted(flow.loops[products]) if flow.blocks[b].count("FFMA") == 64]
        turns[products] = 2
        stops += [
            *pairs[:4],
            max(flow.loops[products]),
            max(b for b in flow.loops[gram] if flow.blocks[b].count("FFMA")),
        ]
    return flow.cheapest(head, stops, turns)


CLOCK, BYTES = (
    1.9,
    32.6,
)  # an H200's GHz, and bytes per ns that memory has for each of its processors


@pytest.mark.parametrize("source", [pytest.param("block_ortho", marks=needs_nvdisasm)])
@pytest.mark.parametrize(
    ("kernel", "measures", "updates", "most"),
    [
        ("MeasureSweep<float, 8>", True, False, 0.65),
        ("UpdateSweep<float, 8>", True, True, 1.0),
        ("UpdateSweep<float, 8>", False, True, 0.65),
    ],
)
def test_instructions_take_no_longer_than_memory(source, kernel, measures, updates, most):
    """With 64 rows of float and a block of 8; by counting, not by the clock."""
    count = instructions(sass.bodies(source)[kernel], measures, updates) * 4  # warps
    bytes_moved = 128 * 4 * (64 + 8 + 8 * updates)
    slots = 4 * CLOCK * bytes_moved / BYTES
    assert 0.3 * slots < count <= most * slots, f"{count} instructions, {slots:.0f} slots"
