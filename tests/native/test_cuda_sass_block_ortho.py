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


# By storage: bytes of an element and of the compute type, elements of a panel of 64 rows with a
# block of 8, products of matrices for a tile of rows over a strip (also for the update) and for the
# block with itself.
TENSOR = {
    "BFloat16": (2, 4, 128, 6, 8),
    "Half": (2, 4, 128, 12, 16),
    "double": (8, 8, 64, 4, 4),
}


def instructions_on_tensor_cores(body, storage, measures, updates):
    """Of a warp, for a panel of 64 rows and a block of 8."""
    size, compute, panel, of_tile, of_block = TENSOR[storage]
    flow = sass.flow(body)
    head, heads, then = hot_blocks(flow)
    threads, tiles = 128, 64 // (8 if size == 8 else 16)

    def after(start, fits):
        return [b for b in sorted(flow.loops[head]) if b > start and fits(flow.blocks[b])]

    def multiplies(block):
        return block.count("[HD]MMA")

    def loads(block):
        return block.count(r"LDSM|LDS\b.*\.128")

    rows, block = heads("LDGSTS", 4, 0)
    turns = {rows: 64 * panel * size // 16 // threads // 4}
    assert 8 * panel * compute // 16 // threads == 2
    stops = [rows, *then(block, 2, "LDGSTS", 1)]
    if updates:
        inner = {h for h in flow.loops if flow.innermost(h) and h > block}
        of_rows, of_mix = sorted(
            h
            for h in inner & flow.loops[head]
            if any(multiplies(flow.blocks[b]) for b in flow.loops[h])
        )[:2]
        unrolled = [b for b in sorted(flow.loops[of_rows]) if multiplies(flow.blocks[b])]
        assert {multiplies(flow.blocks[b]) for b in unrolled} == {of_tile}
        turns[of_rows] = tiles // len(unrolled)
        # Of 16 bytes of the compute type, in the type that they are stored in.
        wide = 128 if measures else 128 * size // compute
        stores = after(of_mix, lambda b: b.loads(wide, "STG"))
        if size == compute:  # new rows, then columns, twice
            stores = stores[measures::2]
        stops += [*unrolled, of_mix, *stores[:2]]
    if measures:
        products = after(stops[-1], lambda b: multiplies(b) == of_tile and loads(b))[:tiles]
        assert len(products) == tiles
        stops += products
        stops.append(
            after(
                stops[-1],
                lambda b: multiplies(b) == of_block and not b.count("LDS"),
            )[0]
        )
    return flow.cheapest(head, stops, turns)


# An H200's GHz, and bytes per ns that memory has for each of its processors.
CLOCK, BYTES = 1.9, 32.6


def slots(panel, bytes_of_element):
    """How many instructions a processor can issue while it moves a panel."""
    return 4 * CLOCK * panel * bytes_of_element / BYTES


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
    there = slots(128, 4 * (64 + 8 + 8 * updates))
    assert 0.3 * there < count <= most * there, f"{count} instructions, {there:.0f} slots"


@pytest.mark.parametrize("source", [pytest.param("block_ortho", marks=needs_nvdisasm)])
@pytest.mark.parametrize(
    ("storage", "measures", "updates", "most"),
    [
        ("BFloat16", True, False, 0.55),
        ("BFloat16", True, True, 0.9),
        ("BFloat16", False, True, 0.75),
        ("Half", True, False, 0.65),
        ("Half", True, True, 1.0),
        ("Half", False, True, 0.8),
        ("double", True, False, 0.35),
        ("double", True, True, 0.5),
        ("double", False, True, 0.4),
    ],
)
def test_instructions_on_tensor_cores_take_no_longer(source, storage, measures, updates, most):
    """The same with rows in 16 bits and in double."""
    size, compute, panel = TENSOR[storage][:3]
    name = "UpdateSweep" if updates else "MeasureSweep"
    body = sass.bodies(source)[f"{name}<{storage}, 8>"]
    count = instructions_on_tensor_cores(body, storage, measures, updates) * 4
    written = 8 * (compute if measures else size) * updates
    there = slots(panel, 64 * size + 8 * compute + written)
    assert 0.2 * there < count <= most * there, f"{count} instructions, {there:.0f} slots"


@pytest.mark.parametrize("source", [pytest.param("block_ortho", marks=needs_nvdisasm)])
@pytest.mark.parametrize(
    ("storage", "opcode", "others"),
    [
        ("BFloat16", r"HMMA\.16816\.F32\.BF16", r"HMMA\.1688\.F32\.TF32"),  # of mix
        ("Half", r"HMMA\.1688\.F32\.TF32", None),
        ("double", r"DMMA\.8x8x4|DMMA\.884", None),
    ],
)
def test_all_products_are_on_tensor_cores(source, storage, opcode, others):
    for name in ("MeasureSweep", "UpdateSweep"):
        panels = max(sass.kernels(source)[f"{name}<{storage}, 8>"], key=len)
        assert panels.count(opcode) > 0
        allowed = opcode if others is None or name == "MeasureSweep" else f"{opcode}|{others}"
        assert panels.count("[HD]MMA") == panels.count(allowed)
        assert panels.count("FFMA|DFMA") <= 40  # of random numbers and scales alone
