"""How many programs XLA compiles."""

import jax

_events: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **about: _events.append(name)
)


def compiled(run):
    """How many programs were compiled, and the result."""
    before = len(_events)
    result = jax.block_until_ready(run())
    events = _events[before:]
    return sum(name.endswith("backend_compile_duration") for name in events), result
