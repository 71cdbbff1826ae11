"""What memory there is, and how much of it a computation may take."""

import dataclasses
from pathlib import Path

import jax

from curvax import _native
from curvax.typing import PyTree

# Fraction of a host's free memory that one kind of optional storage (a Krylov basis, linearisation
# residuals) may take without being asked for: the other kinds, the products and other programs need
# the rest.
SHARE = 0.4
# Fraction of a device's free memory that is left alone where the rest is shared by what each part
# needs: for what no forecast shows, as the workspaces of libraries, their code, and holes.
RESERVE = 0.05


@dataclasses.dataclass(frozen=True)
class Memory:
    """The memory that arrays are kept in.

    Attributes:
        free: bytes that can still be allocated.
        foreign: bytes of a device that JAX's allocator does not hold but others do: other
            processes, and the driver for this one (under 1 GB). 0 where that is not known.
        on_device: whether it is that of a device and not of the host.
    """

    free: int
    foreign: int = 0
    on_device: bool = False

    @property
    def shareable(self) -> float:
        """Bytes that one solve may plan with, its products and residuals included.

        The memory of a device serves one computation, which takes what it needs. That of a host
        serves other programs too.
        """
        return (1 - RESERVE if self.on_device else SHARE) * self.free

    @property
    def remedies(self) -> list[str]:
        """How more of it could be free, other than by needing less."""
        found = []
        # A process of CUDA has half a gigabyte for itself.
        if self.foreign > 1 << 30:
            found.append(
                f"end the other process that holds {self.foreign / 1e9:.1f} GB of the device "
                "(nvidia-smi lists it)"
            )
        if self.on_device:
            found.append(
                "let JAX have more of the device than the 75 % of its default "
                "(XLA_CLIENT_MEM_FRACTION=.93)"
            )
        return found


def memory_of(tree: PyTree) -> Memory:
    """The memory where a computation on these arrays happens.

    Args:
        tree: a pytree, as an operator. Arrays that are committed to devices decide; without such,
            as with None, JAX's default device does.

    Raises:
        RuntimeError: a device does not say how much memory it has.
    """
    return min((memory_on(device) for device in _devices(tree)), key=lambda memory: memory.free)


def available_bytes(tree: PyTree) -> int:
    """Free memory, in bytes, where a computation on these arrays happens; see `memory_of`."""
    return memory_of(tree).free


def check_fits(need: int, tree: PyTree, what: str, remedy: str) -> None:
    """Refuse what would not fit beside these arrays.

    Args:
        need: bytes.
        tree: see `memory_of`.
        what: subject and verb, of which the bytes are the object.
        remedy: what needs less.

    Raises:
        MemoryError: more than is free.
    """
    free = available_bytes(tree)
    if need > free:
        raise MemoryError(f"{what} {readable(need)}, but {readable(free)} are free: {remedy}")


def on_device(tree: PyTree) -> bool:
    """Whether that memory is a device's and not the host's."""
    return any(device.platform != "cpu" for device in _devices(tree))


def _devices(tree: PyTree) -> set[jax.Device]:
    # Within a trace it is where the program will run, and JAX's default device at the best.
    arrays = [leaf for leaf in jax.tree.leaves(tree) if not isinstance(leaf, jax.core.Tracer)]
    bound = [leaf for leaf in arrays if getattr(leaf, "committed", False)]
    return set().union(*(leaf.devices() for leaf in bound)) or {default_device()}


def default_device() -> jax.Device:
    """The device that JAX puts new arrays on."""
    chosen = jax.config.jax_default_device  # type: ignore[attr-defined]
    if chosen is None or isinstance(chosen, str):
        return jax.local_devices(backend=chosen)[0]
    return chosen


def memory_on(device: jax.Device) -> Memory:
    """On a GPU, what the allocator can still give.

    On a CPU that of the host.

    Raises:
        RuntimeError: the device does not say how much memory it has.
    """
    if device.platform == "cpu":
        return Memory(host_bytes())
    stats = device.memory_stats() or {}
    driver = _native.device_memory(device.local_hardware_id) if device.platform == "gpu" else None
    if "bytes_limit" not in stats:
        if driver is None:
            raise RuntimeError(
                f"the free memory of {device} is not known: JAX's allocator keeps no account of it "
                "(XLA_PYTHON_CLIENT_ALLOCATOR=platform does not), and curvax has no CUDA module to "
                f"ask the driver with. Unset that variable, or {_native.CUDA_REMEDY}"
            )
        return Memory(driver[0], on_device=True)
    free, foreign = stats["bytes_limit"] - stats["bytes_in_use"], 0
    if driver is not None and "pool_bytes" in stats:
        # The allocator's limit is a part of the whole device, whatever others hold of it: it can
        # give what its pool has and what the driver has.
        unused, total = driver
        free = min(free, stats["pool_bytes"] - stats["bytes_in_use"] + unused)
        foreign = max(total - unused - stats["pool_bytes"], 0)
    return Memory(int(free), int(foreign), on_device=True)


def host_bytes() -> int:
    """Free bytes of the host.

    The smaller of the system's available memory and what the control group still allows; a very
    large number if neither is known.
    """
    known = [_meminfo_available(), _control_group_free()]
    return min((bytes_ for bytes_ in known if bytes_ is not None), default=1 << 62)


def readable(count: int) -> str:
    """Bytes in kB, MB or GB."""
    for size, unit in ((1e9, "GB"), (1e6, "MB")):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count / 1e3:.2f} kB"


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
