"""Numbers, dates and names of a text."""

from __future__ import annotations

import pytest

from ctxcomp_rag.facts import facts, retained


@pytest.mark.parametrize(("text", "expected"), [
    ("The tower is 31.5 metres high and cost 1,310 crowns.", {"31.5", "1,310"}),
    ("It was lit on 4 March 1904, rebuilt in May 1911 and sold on June 3, 1920.",
     {"4 March 1904", "May 1911", "June 3, 1920"}),
    ("Signed 2024-05-17 at 10:30.", {"2024-05-17", "10:30"}),
    ("The keeper was Ada Skellan of Varn. She left Varn.", {"Ada Skellan", "Varn"}),
    ("Varn is small. We saw Varn.", {"Varn"}),
    ("Nothing here. Nor here!", set()),
    ("Die Höhe von Élan-Käse.", {"Höhe", "Élan-Käse"}),
    ("", set()),
])
def test_facts_of_a_text(text: str, expected: set[str]) -> None:
    assert facts(text) == expected


def test_the_share_that_another_text_states() -> None:
    text = "Ada Skellan built it in 1904; it is 31 metres high, say the people of Varn."
    assert facts(text) == {"Skellan", "1904", "31", "Varn"}  # a capital at the start of a sentence says nothing
    assert retained(text, text) == 1.0
    assert retained(text, "Built by Skellan in 1904, it is 31.5 metres high.") == 0.5  # 31.5 is not 31
    assert retained(text, "Varna, 19041, 1.31") == 0.0
    assert retained("nothing to lose", "") == 1.0
