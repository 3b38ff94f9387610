"""What the answers of a system are worth: each measure's mean over the questions, with a 95 % bootstrap interval."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from ctxcomp_rag.evaluation.metrics import exact_match, mean, names_kept, numbers_kept, rouge, token_f1

_RESAMPLES = 1000

MEASURES: dict[str, Callable[[str, Sequence[str]], float | None]] = {
    "em": exact_match, "f1": token_f1, "numbers": numbers_kept, "names": names_kept,
    "rouge1": partial(rouge, kind="rouge1"), "rouge2": partial(rouge, kind="rouge2"),
    "rouge_l": partial(rouge, kind="rougeL"),
}
"""Measures of one answer: (prediction, references) -> 0.0 to 1.0, None where it says nothing. "bleu" is of all."""

Scored = tuple[float, tuple[float, float]]


def score(measure: str, predictions: Sequence[str], references: Sequence[Sequence[str]], seed: int) -> Scored:
    """(per cent, its 95 % interval) of predictions; (0.0, (0.0, 0.0)) where no question says anything."""
    if measure == "bleu":
        return _bleu(predictions, [r[0] for r in references], seed)
    values = [MEASURES[measure](p, r) for p, r in zip(predictions, references, strict=True)]
    told = [100 * v for v in values if v is not None]
    return (round(mean(told), 1), interval(told, seed)) if told else (0.0, (0.0, 0.0))


def interval(values: Sequence[float], seed: int, digits: int = 1) -> tuple[float, float]:
    """95 % percentile bootstrap of the mean."""
    drawn = np.random.default_rng(seed).integers(0, len(values), (_RESAMPLES, len(values)))
    low, high = np.percentile(np.asarray(values)[drawn].mean(axis=1), [2.5, 97.5])
    return round(float(low), digits), round(float(high), digits)


def _bleu(predictions: Sequence[str], references: Sequence[str], seed: int) -> Scored:
    """Corpus BLEU with sacrebleu's own bootstrap."""
    from sacrebleu.metrics.bleu import BLEU

    before = os.environ.get("SACREBLEU_SEED")
    os.environ["SACREBLEU_SEED"] = str(seed)  # the only way in
    try:
        made = BLEU().corpus_score(list(predictions), [list(references)], n_bootstrap=_RESAMPLES)
    finally:
        if before is None:
            del os.environ["SACREBLEU_SEED"]
        else:
            os.environ["SACREBLEU_SEED"] = before
    middle, half = float(made._mean), float(made._ci)
    return round(float(made.score), 1), (round(max(0.0, middle - half), 1), round(min(100.0, middle + half), 1))
