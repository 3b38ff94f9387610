"""Where the slots of a segment stand when they are spread over its text (EPL, arXiv 2409.14364)."""

from __future__ import annotations


def spread_places(segment_length: int, num_slots: int) -> list[int]:
    """Positions from the segment's first token: each slot on the last token of the piece of text it stands for."""
    return [max(1, (j + 1) * segment_length // num_slots) - 1 for j in range(num_slots)]
