"""The loss of one training sample: gradients reach the compressor through the frozen decoder, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ctxcomp_rag.compressors.icae import ICAECompressor
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.training.objectives import IGNORED, SampleIds, TrainingSample


def training_loss(compressor: ICAECompressor, sample: TrainingSample) -> tuple[Tensor, Tensor]:
    """(mean cross-entropy over the labelled tokens, logits (prompt length, vocab_size)) of a sample.

    Raises:
        InputError: the prompt has another number of slots than the context gives, or slots that are not in a row.
    """
    backbone = compressor.backbone
    slots = compressor.encode([sample.context_ids], compression_factor=sample.compression_factor)[0]
    embeds, positions = _decoder_inputs(compressor, sample, slots)
    # the mask is always passed: without one, positions that jump are taken for several packed sequences
    logits: Tensor = backbone.model(
        inputs_embeds=embeds[None], position_ids=positions[None], use_cache=False,
        attention_mask=torch.ones(1, embeds.shape[0], dtype=torch.long, device=backbone.device),
    ).logits[0, :, : int(backbone.config.vocab_size)]
    labels = torch.tensor(sample.labels, device=backbone.device)
    return functional.cross_entropy(logits[:-1].float(), labels[1:], ignore_index=IGNORED), logits


def summed_loss(compressor: ICAECompressor, samples: Sequence[TrainingSample]) -> Tensor:
    """Cross-entropy of samples, summed over their labelled tokens: the loss of a `Trainer`."""
    return torch.stack([training_loss(compressor, s)[0] * sum(label != IGNORED for label in s.labels)
                        for s in samples]).sum()


def _decoder_inputs(compressor: ICAECompressor, sample: TrainingSample, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings (n, hidden_size) and positions (n,) of the prompt, slots and special rows in place."""
    ids, backbone = SampleIds.of(compressor), compressor.backbone
    prompt = torch.tensor(sample.prompt_ids, device=backbone.device)
    at = (prompt == ids.first_memory).nonzero().flatten()
    places, num_positions = compressor.span_positions(len(sample.context_ids), sample.compression_factor)
    if at.numel() != len(places) or int(at[-1] - at[0]) + 1 != len(places):
        raise InputError(f"a context of {len(sample.context_ids)} tokens gives {len(places)} slots in a row; the "
                         f"prompt of the sample has {at.numel()} places for them, from {at[:1].tolist()} "
                         f"to {at[-1:].tolist()}")
    start = int(at[0])
    special = (prompt >= ids.reconstruct).nonzero().flatten()
    embeds = backbone.embed(prompt.where(prompt < ids.vocab_size, 0))
    embeds = embeds.index_copy(0, at, slots.to(embeds.dtype))
    rows = compressor.memory_tokens[compressor.config.num_memory_tokens + prompt[special] - ids.reconstruct]
    embeds = embeds.index_copy(0, special, rows.to(embeds.dtype))
    tail = torch.arange(len(prompt) - start - len(places)) + start + num_positions
    positions = torch.cat([torch.arange(start), torch.tensor(places) + start, tail])
    return embeds, positions.to(backbone.device)
