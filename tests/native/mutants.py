"""Changes of the device code, one at a time, that the emulated GPU must find."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

CUDA = Path(__file__).parents[2] / "kernels" / "cuda"


class Mutant(NamedTuple):
    """A change of a file in kernels/cuda.

    Attributes:
        file: its name.
        at: where `old` stands in it.
        old: what is replaced,
        new: and by what.
        name: of the test.
    """

    file: str
    at: int
    old: str
    new: str
    name: str

    def made(self, text: str) -> str:
        """The file with the change."""
        end = self.at + len(self.old)
        assert text[self.at : end] == self.old
        return text[: self.at] + self.new + text[end:]


def barriers() -> Iterator[Mutant]:
    """Without each barrier of the block, and each wait for its copies."""
    for path in sorted(CUDA.glob("*.cuh")):
        text = path.read_text()
        for match in re.finditer(
            r"(?<=\n) +(if \(ahead\) )?(SyncThreads|WaitForCopies)\(\);", text
        ):
            # That of Sums, which the barriers of what follows its only use make superfluous.
            if "f(i, sum);\n    }\n" in text[match.start() - 30 : match.start()]:
                continue
            line = text.count("\n", 0, match.start()) + 1
            yield Mutant(path.name, match.start(), match.group(), "", f"{path.name}:{line}")


def changes(table: list[tuple[str, str, str]]) -> Iterator[Mutant]:
    """Those of a table of a file, what stands there first, and what is put in its place."""
    for file, old, new in table:
        at = (CUDA / file).read_text().index(old)
        yield Mutant(file, at, old, new, f"{file}: {new or 'without ' + old.strip()}")


OFF_BY_ONE = [
    ("softmax_ce_row.cuh", "return j >= 0 && j < count_;", "return j >= 0 && j <= count_;"),
    ("softmax_ce_row.cuh", "return v * V - shift_;", "return v * V - shift_ + 1;"),
    ("softmax_ce_row.cuh", "CeilDiv(count + shift_, V)", "(count + shift_) / V"),
    ("softmax_ce_row.cuh", "/ (kTile * V) : 0", "/ (kTile * V) + 1 : 0"),
    ("softmax_ce_row.cuh", "shift_ > 0 ? 1 : 0", "shift_ > 0 ? 0 : 0"),
    ("softmax_ce_row.cuh", "Warp() < begin ? Warp() + warps", "Warp() < begin ? Warp()"),
    ("softmax_ce_row.cuh", "tile < begin || tile >= end", "tile < begin || tile > end"),
    ("softmax_ce.cuh", "row_ += blocks / parts_", "row_ += blocks / parts_ + 1"),
    ("softmax_ce.cuh", "part_ >= parts_", "part_ > parts_"),
    ("softmax_ce.cuh", "if (HasRow()) {", "if (row_ <= args_.rows) {"),
    ("softmax_ce.cuh", "= queue.HasRow() && !queue", "= !queue"),
    ("softmax_ce.cuh", "int p = Lane(); p <", "int p = Lane() + 1; p <"),
    ("device.cuh", "Lane() < Warps() ? memory[i", "Lane() < Warps() - 1 ? memory[i"),
    ("device.cuh", "    memory_ = other_;\n", ""),
    ("block_ortho_launch.h", "% sizeof(Bytes16) == 0;", "% 4 == 0;"),
    ("panel.cuh", "left >= 1 << log_panel", "left + 1 >= 1 << log_panel"),
    ("panel.cuh", "if (i >= left)", "if (i + 1 >= left)"),
    ("panel.cuh", "(1 << log_step) - 1) >> log_step", "(1 << log_step) - 2) >> log_step"),
    ("block_ortho_sweep.cuh", "i = n() + Th", "i = n() + 1 + Th"),
    (
        "row_update.cuh",
        "k < 1 << shape.log_sharers",
        "k < shape.log_sharers",
    ),
    ("panel.cuh", "if (k < left)", "if (k < left - 1)"),
    ("panel.cuh", "left >= N &&", "left >= N - 1 &&"),
    ("block_ortho_sweep.cuh", "if (!keep_products || flush) {", "if (flush) {"),
    ("block_ortho_sweep.cuh", "kFlushPanels == 0 || last_panel);", "kFlushPanels == 0);"),
    ("block_ortho_sweep.cuh", "{item.count + 1, 0}) >= n()", "{item.count + 2, 0}) >= n()"),
    ("block_ortho_sweep.cuh", "item.part != groups() - 1", "item.part != 0"),
    ("block_ortho_sweep.cuh", "if (item.part != 0) {", "if (item.part > 1) {"),
    ("block_ortho_sweep.cuh", "item.part >= Parts(update) - groups()", "item.part >= 0"),
    ("block_ortho_sweep.cuh", "|| what == NextSweep::kStoreMixed;", ";"),
    ("block_ortho_sweep.cuh", "Min(group(), rows_ - FirstOfGroup(item))", "group()"),
    ("row_sums.cuh", "if (owner && row < rows)", "if (owner && row <= rows)"),
    ("row_sums.cuh", "(lane >> log_owned)", "(lane >> log_owned) + 1"),
    ("row_sums.cuh", "int strip = SharedLane(shape) >> kLogLanes", "int strip = 1"),
    ("row_sums.cuh", "sum_[j][c] = 0", "sum_[j][c] *= 0.5f"),
    ("block_ortho.cuh", "k = 1; k < kShares", "k = 2; k < kShares"),
    ("device.cuh", "int mask = kWarpSize / 2", "int mask = kWarpSize / 4"),
    ("rotate_basis.cuh", "if (row < used) *", "if (row < used - 1) *"),
    ("rotate_basis.cuh", "if (i >= width) return;", "if (i + 4 >= width) return;"),
    ("rotate_basis.cuh", "g = whole + team / split", "g = team / split"),
    ("rotate_basis.cuh", "left * 2 <= teams", "left * 2 <= teams + 2"),
    ("rotate_basis.cuh", "left * 4 <= teams", "left * 4 <= teams + 4"),
    ("rotate_basis.cuh", "j < kept ? launch", "j < kept - 1 ? launch"),
    ("rotate_basis.cuh", "if (j >= p.kept) continue", "if (j > p.kept) continue"),
    ("rotate_basis.cuh", "e * stride, p.width - 1)", "e * stride, p.width - 2)"),
]


# Of what is made on tensor cores: parts of numbers left out, fragments in another order.
ON_TENSOR_CORES = [
    ("mma.cuh", "Mma::Multiply(d, a[k], b[k].low);", "(void)b;"),
    ("mma.cuh", "Mma::Multiply(d, a[k], b[k].middle);", "(void)b;"),
    ("mma.cuh", "Mma::Multiply(d, {a[k].low[0], 0, a[k].low[1], 0}, b[k].high);", ""),
    ("mma.cuh", "[1] = a[k].middle[0]", "[1] = a[k].middle[1]"),
    ("mma.cuh", "  *x -= BitCast<float>(bits);\n", ""),
    ("mma.cuh", "kBf16Bits = 0xffff0000u", "kBf16Bits = 0xfff80000u"),
    ("mma.cuh", "kTf32Bits = 0xffffe000u", "kTf32Bits = 0xfffffc00u"),
    (
        "mma.cuh",
        "first = x[2 * i], second = x[2 * i + 1]",
        "first = x[2 * i + 1], second = x[2 * i]",
    ),
    ("tensor_tiles.cuh", "loaded[2 * part + i % 2]", "loaded[2 * part + i / 2]"),
    ("tensor_tiles.cuh", "k = r % 2 + r % 16 / 8 * 2", "k = r % 2 * 2 + r % 16 / 8"),
    ("tensor_tiles.cuh", "^ (16 * s + 8 * h)", "^ (8 * s + 16 * h)"),
    ("tensor_tiles.cuh", "LoadMatrices<true>(", "LoadMatrices<false>("),
    ("tensor_tiles.cuh", "row(rows.Offset(Lane() % 16,", "row(rows.Offset(Lane() % 16 ^ 8,"),
    ("tensor_tiles.cuh", "rows_[s][k] += d[k]", "rows_[s][k] = d[k]"),
    ("tensor_tiles.cuh", "^ k % 2 * 12)", "^ k % 2 * 4)"),
    ("tensor_tiles.cuh", "Tf32::Multiply(block_[s], high, parts.middle);", ""),
    ("tensor_tiles.cuh", "a[h], q[j]", "a[1 - h], q[j]"),
    ("tensor_tiles.cuh", "sum_[0][k], sum_[1][k]", "sum_[k][0], sum_[k][1]"),
    ("tensor_sums.cuh", "sum_[p + k][e] = 0", "sum_[p + k][e] *= C(0.5)"),
    ("tensor_sums.cuh", "e / 2 * 8, c = column + e % 2", "e % 2 * 8, c = column + e / 2"),
    ("tensor_sums.cuh", "if (r < rows && c", "if (r <= rows && c"),
    ("tensor_sums.cuh", "Warp() - warp.strip + s", "Warp() - warp.strip"),
    ("tensor_sums.cuh", "other == column", "other <= column"),
    ("tensor_sums.cuh", "if (p >= first + tiles) break", "if (p > first + tiles) break"),
    ("tensor_update.cuh", "r += teams", "r += teams + 1"),
    ("tensor_update.cuh", "c >= shape.columns", "c > shape.columns"),
    ("tensor_update.cuh", "exchange + k * share", "exchange"),
    ("block_ortho_sweep.cuh", "          *RowsOf(item.count).At(r, Element()) = S{};\n", ""),
    ("block_ortho_sweep.cuh", "groups() == 1 ? rows_ : 0", "Min(group(), rows_)"),
    ("block_ortho_sweep.cuh", "if (kTensor && groups() > 1) SyncThreads();", ""),
    ("block_ortho_sweep.cuh", "if (!keep_gram || flush) sums", "if (!keep_gram) sums"),
]
