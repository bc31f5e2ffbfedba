"""What happens to files on disks and on the way: bits, pieces, ends."""

import random


def damaged(seeded: random.Random, data: bytes) -> bytes:
    """Return other bytes than `data`, most of them the same."""
    at = seeded.randrange(len(data))
    match seeded.randrange(7):
        case 0:
            return data[:at] + bytes([data[at] ^ 1 << seeded.randrange(8)]) + data[at + 1 :]
        case 1:
            return data[:at]
        case 2:
            return data[:at] + seeded.randbytes(seeded.randrange(1, 40)) + data[at:]
        case 3:
            return data + seeded.randbytes(seeded.choice([1, 100, 100_000]))
        case 4:
            return bytes(len(data)) if any(data) else b"\1" * len(data)
        case 5:
            return data[:at] + bytes([data[at] + 1 & 255]) + data[at + 1 :]
        case _:
            return data[:at] + data[at + 1 :]
