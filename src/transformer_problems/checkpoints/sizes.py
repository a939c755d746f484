"""How check-ups write an amount of memory."""


def told_bytes(num_bytes: float) -> str:
    """In the unit of disks and memory that keeps it short, at three digits: "90.9 MB"."""
    for size, unit in ((1e9, "GB"), (1e6, "MB")):
        if num_bytes >= size:
            amount = num_bytes / size
            return f"{amount:,.0f} {unit}" if amount >= 100 else f"{amount:.3g} {unit}"
    return f"{num_bytes / 1e3:.3g} kB"
