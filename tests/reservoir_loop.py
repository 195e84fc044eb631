"""The textbook's loops in plain Python integers, with the draws that limpet's kernels use."""

from collections.abc import Iterator

RESERVOIR, SAMPLE = 1, 2
WORD = 2**32 - 1


def philox(counter: list[int], key: tuple[int, int]) -> list[int]:
    """Philox 4x32-10 (Salmon and others 2011)."""
    (a, b, c, d), (first, second) = counter, key
    for _ in range(10):
        left, right = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = right >> 32 ^ b ^ first, right & WORD, left >> 32 ^ d ^ second, left & WORD
        first, second = first + 0x9E3779B9 & WORD, second + 0xBB67AE85 & WORD
    return [a, b, c, d]


def uniform(bound: int, number: int, index: int, purpose: int, seed: int) -> int:
    """A uniform integer in [0, bound): draw ``index`` of ``number``."""
    for attempt in range(100):
        counter = [number & WORD, number >> 32, index // 2, purpose << 16 | attempt]
        words = philox(counter, (seed & WORD, seed >> 32))
        bits = (words[2 * (index % 2)] << 32 | words[2 * (index % 2) + 1]) >> 1
        value = bits // (2**63 // bound)
        if value < bound:
            return value
    raise AssertionError("a hundred draws in a row were left over")


def slots(first: int, last: int, capacity: int, seed: int) -> Iterator[int]:
    """Algorithm R, item by item."""
    for item in range(first, last):
        if item < capacity:
            yield item
            continue
        slot = uniform(item + 1, item // 2, item % 2, RESERVOIR, seed)
        yield slot if slot < capacity else -1


def shuffled(population: int, count: int, seed: int, draw: int) -> list[int]:
    """Fisher and Yates, on the whole population."""
    places = list(range(population))
    for step in range(count):
        other = step + uniform(population - step, draw, step, SAMPLE, seed)
        places[step], places[other] = places[other], places[step]
    return places[:count]
