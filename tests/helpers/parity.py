"""How far this project is from outside software."""

DISTANCES: dict[str, tuple[float, float, int]] = {}  # what → largest, allowed, how many compared


def apart(what: str, distance: float, allowed: float) -> None:
    """How far this project is from outside software: an assertion, and a line of `make verify`."""
    largest, _, count = DISTANCES.get(what, (0.0, 0.0, 0))
    DISTANCES[what] = max(largest, distance), allowed, count + 1
    assert distance <= allowed, f"{what}: {distance} apart, {allowed} allowed"
