"""The order of nested slots: every beginning of it covers the whole text.

Slots that stand for pieces of a text, in text order, cannot be cut off at the end: the end of the text would be lost.
From coarse to fine, the first slot stands at the end of the text (where a causal encoder has read all of it); those at
every 2^k-th place, counted from there, come before the places between them. So a factor twice as large reads every
second slot, and their pieces are of one length, but for the first. The encoder reads its memory tokens in this order:
a slot depends on the coarser ones only, and slots that are not made change nothing.
"""

from __future__ import annotations


def coarse_to_fine(count: int) -> list[int]:
    """The numbers 0 to count - 1, from 0 at a text's begin to count - 1 at its end, coarsest first."""
    bits = max(1, (count - 1).bit_length())
    from_the_end = (int(f"{i:0{bits}b}"[::-1], 2) for i in range(2**bits))
    return [count - 1 - place for place in from_the_end if place < count]
