"""What memory there is, and how much of it a computation may take."""

from pathlib import Path

import jax

# Fraction of the free memory that one kind of optional storage (a Krylov basis, linearisation
# residuals) may take without being asked for: the other kinds and the products need the rest.
SHARE = 0.4


def available_bytes() -> int:
    """Free memory, in bytes, where the default device keeps its arrays.

    On a GPU, what its allocator can still give. On a CPU the smaller of the system's available
    memory and what the control group still allows; a very large number if neither is known.
    """
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats["bytes_in_use"])
    free = [_meminfo_available(), _control_group_free()]
    return min((bytes_ for bytes_ in free if bytes_ is not None), default=1 << 62)


def _meminfo_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    values = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return values[0] if values else None


def _control_group_free() -> int | None:
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    # The page cache is charged to the group but given back under pressure.
    return int(limit) - used + int(statistics.get("inactive_file", 0))
