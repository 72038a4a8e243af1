"""A short form of the benchmark of faults: an agent dies at each moment that matters, and nothing is lost."""

import random

from benchmarks import profiling_faults

SMALL = {"space": "vgg16", "image_size": 8, "width": 0.25, "classes": 10, "points": 3}


def test_killed_agents_and_services_lose_nothing_and_count_nothing_twice() -> None:
    result = profiling_faults.faults(profiling_faults.PLACED, 1, random.Random(0), SMALL)
    assert result["entries"] > 150
    assert all(result["hit"][phase] for phase in profiling_faults.PLACED), result
    assert profiling_faults.sound(result | {"hit": {}}), result
