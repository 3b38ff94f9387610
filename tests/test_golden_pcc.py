"""PCC Lite and Large against numbers from the official code: import, slots, batches, logits, losses, gradients.

Every size is read from the fixture, so CTXCOMP_GOLDEN can name another folder of the same form.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ctxcomp_rag.backbone import load_frozen
from ctxcomp_rag.compressors.pcc import PCCCompressor
from ctxcomp_rag.importers.containers import read_tensors
from ctxcomp_rag.importers.pcc import (
    load_official_converter,
    load_official_pcc,
    load_patched_decoder,
    read_patch,
    save_official_pcc,
)
from ctxcomp_rag.training.bracketed import (
    BracketedSample,
    autoencoding_sample,
    bracketed_loss,
    collate,
    continuation_sample,
    question_sample,
)

SLOTS, LOGITS, LOSS, GRADIENTS, NORMS = 2e-5, 5e-5, 1e-5, 2e-5, 1e-4
CHECKPOINT = {"pcc_lite": "compressor_checkpoint", "pcc_large": "adapter_checkpoint"}


def difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a.detach() - b).abs().max().item()


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture(scope="module", params=sorted(CHECKPOINT))
def folder(request: pytest.FixtureRequest, golden: Path) -> Path:
    return golden / request.param


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Path:
    return folder / CHECKPOINT[folder.name]


@pytest.fixture(scope="module")
def inputs(folder: Path) -> dict[str, Any]:
    return read_json(folder / "inputs.json")


@pytest.fixture(scope="module")
def ids(inputs: dict[str, Any]) -> dict[str, int]:
    return inputs["ids"]["decoder"]


@pytest.fixture(scope="module")
def compressor(folder: Path, checkpoint: Path, inputs: dict[str, Any]) -> PCCCompressor:
    if folder.name == "pcc_lite":
        backbone = load_patched_decoder(folder / "decoder_base", folder / "special_token_patch.pt", device="cpu")
    else:
        backbone = load_frozen(folder / "decoder_merged", device="cpu")
    return load_official_pcc(checkpoint, backbone, segment_tokens=inputs["segment_length"],
                             slots_per_segment=inputs["embed_len"])


@pytest.fixture(scope="module")
def train(folder: Path) -> dict[str, Any]:
    return read_json(folder / "train_samples.json")["samples"]


def stripped(row: list[int], *fillers: int) -> list[int]:
    """The raw ids of a row of an official batch, which has fillers at its end only."""
    while row and row[-1] in fillers:
        row = row[:-1]
    return row


def samples_of(expected: dict[str, Any], inputs: dict[str, Any]) -> list[BracketedSample]:
    batch, ids = expected["batch"], inputs["ids"]["decoder"]
    contexts = [stripped(row, inputs["ids"]["encoder"]["pad"]) for row in batch["compress_ids"]]
    if expected["task"] == "rag":
        return [question_sample(c, inputs["question_ids"], inputs["answer_ids"], ids["eos"]) for c in contexts]
    key, make = {"ae": ("llm_ids", autoencoding_sample), "next_token": ("next_ids", continuation_sample)}[
        expected["task"]]
    texts = [stripped(row, ids["pad"], ids["eos"]) for row in batch[key]]
    return [make(c, t, ids["eos"]) for c, t in zip(contexts, texts, strict=True)]


def test_ids_are_found_in_the_tokenizers(compressor: PCCCompressor, inputs: dict[str, Any]) -> None:
    encoder, decoder = inputs["ids"]["encoder"], inputs["ids"]["decoder"]
    assert compressor.encoder.memory_ids[0] == encoder["mem_first"]
    assert len(compressor.encoder.memory_ids) == encoder["mem_tokens_total"]
    assert compressor.encoder.padding_id == encoder["pad"]
    hf = compressor.backbone.tokenizer.hf
    assert hf.convert_tokens_to_ids(["<mem>", "<ae>", "</mem>"]) == [decoder[k] for k in ("mem", "ae", "end_mem")]
    assert compressor.backbone.config.vocab_size == decoder["vocab_after_patch"]


def test_special_rows_are_those_of_the_patch(compressor: PCCCompressor, folder: Path) -> None:
    embedding, head = read_patch(folder / "special_token_patch.pt")
    assert compressor.special_rows.detach().equal(embedding.float())
    assert compressor.backbone.model.get_output_embeddings().weight[-3:].equal(head.float())


def test_containers_equal_their_twins(folder: Path, checkpoint: Path) -> None:
    for name in (checkpoint / "memory_converter.bin", folder / "special_token_patch.pt"):
        tensors = {k: v for k, v in read_tensors(name).items() if isinstance(v, Tensor)}
        twin = load_file(name.with_suffix(".safetensors"))
        assert tensors.keys() == twin.keys()
        assert all(tensors[k].dtype == twin[k].dtype and tensors[k].equal(twin[k]) for k in twin)


def test_converter(folder: Path, checkpoint: Path) -> None:
    probe = load_file(folder / "converter_probe.safetensors")
    converter = load_official_converter(checkpoint / "memory_converter.bin")
    assert difference(converter(probe["input"]), probe["expected"]) <= SLOTS


@torch.no_grad()
def test_hidden_states_and_slots(compressor: PCCCompressor, folder: Path, inputs: dict[str, Any]) -> None:
    hidden, slots = (load_file(folder / f"{name}.safetensors") for name in ("encoder_hidden", "slots"))
    for case, context in inputs["contexts"].items():
        assert compressor.config.segment_lengths(len(context)) == inputs["segments"][case]["lengths"]
        assert difference(compressor.memory([context])[0], hidden[case]) <= SLOTS, case
        assert difference(compressor.encode([context])[0], slots[case]) <= SLOTS, case


@torch.no_grad()
def test_slots_of_a_padded_batch(compressor: PCCCompressor, folder: Path, inputs: dict[str, Any],
                                 train: dict[str, Any]) -> None:
    contexts = [s.context_ids for s in samples_of(train["ae.batch_of_two"], inputs)]
    assert len({len(c) for c in contexts}) == 2
    expected = load_file(folder / "slots.safetensors")["batch_of_two"]
    assert difference(torch.stack(compressor.encode(contexts)), expected) <= SLOTS


def test_batches(inputs: dict[str, Any], train: dict[str, Any]) -> None:
    ids = inputs["ids"]
    for name, expected in train.items():
        batch = collate(samples_of(expected, inputs), encoder_padding_id=ids["encoder"]["pad"],
                        padding_id=ids["decoder"]["pad"])
        key = {"ae": "llm_ids", "next_token": "next_ids", "rag": "query_answer_ids"}[expected["task"]]
        assert batch[0] == expected["batch"]["compress_ids"], name
        assert batch[1] == expected["batch"][key], name
        if expected["task"] == "rag":
            assert batch[2] == expected["batch"]["label_ids"], name


@torch.no_grad()
def test_labels_loss_and_logits(compressor: PCCCompressor, folder: Path, inputs: dict[str, Any], ids: dict[str, int],
                                train: dict[str, Any]) -> None:
    reference = load_file(folder / "decoder_logits.safetensors")
    assert reference.keys() <= train.keys()
    for name, expected in train.items():
        loss, logits, labels = bracketed_loss(compressor, samples_of(expected, inputs), bos_id=ids["bos"],
                                              padding_id=ids["pad"])
        assert labels.tolist() == expected["targets"], name
        assert abs(loss.item() - expected["loss"]) <= LOSS, name
        if name in reference:
            assert difference(logits[0], reference[name]) <= LOGITS, name


@torch.no_grad()
def test_greedy_tokens(compressor: PCCCompressor, folder: Path, inputs: dict[str, Any], ids: dict[str, int]) -> None:
    greedy = read_json(folder / "greedy.json")
    embed = compressor.backbone.embed
    opening, closing = (compressor.spec.delimiters[n] for n in ("before", "after"))
    for name, run in greedy["runs"].items():
        context = inputs["contexts"][name.split(".")[1]]
        segments = compressor.config.segments(len(context), compressor.compression_factor)
        span = compressor.bracketed(compressor.encode([context])[0], segments)[0]
        rows = torch.cat([embed(torch.tensor([ids["bos"]])), opening, span, closing,
                          embed(torch.tensor(run["prompt_ids"]))])
        produced: list[int] = []
        while len(produced) < greedy["max_new_tokens"]:
            produced.append(int(compressor.backbone.model(inputs_embeds=rows[None]).logits[0, -1].argmax()))
            if produced[-1] in greedy["stop_ids"]:
                break
            rows = torch.cat([rows, embed(torch.tensor(produced[-1:]))])
        assert produced == run["tokens"], name


def official_parameters(compressor: PCCCompressor) -> dict[str, torch.nn.Parameter]:
    """What the official code trains, under its names."""
    encoder = {n.removeprefix("base_model.model.").replace(".default", ".pcc_adapter"): p
               for n, p in compressor.encoder.model.named_parameters() if p.requires_grad}
    converter = {f"converter.{n.replace('norm.', 'RMSNorm.')}": p for n, p in compressor.converter.named_parameters()}
    return {**{f"compressor.model.{n}": p for n, p in encoder.items()}, **converter}


def test_gradients(compressor: PCCCompressor, folder: Path, inputs: dict[str, Any], ids: dict[str, int],
                   train: dict[str, Any]) -> None:
    parameters = official_parameters(compressor)
    reference = load_file(folder / "train_grads.safetensors")
    for name, norms in read_json(folder / "train_grad_norms.json").items():
        loss, _, _ = bracketed_loss(compressor, samples_of(train[name], inputs), bos_id=ids["bos"],
                                    padding_id=ids["pad"])
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        gradients = {k: g for k, g in zip(parameters, found, strict=True) if g is not None}
        assert norms.keys() <= gradients.keys()
        for key, norm in norms.items():
            assert gradients[key].norm().item() == pytest.approx(norm, rel=NORMS), (name, key)
        for key, expected in ((k.split("/", 1)[1], g) for k, g in reference.items() if k.startswith(f"{name}/")):
            gradient = gradients[key.removesuffix("[mem rows]")]
            if key.endswith("[mem rows]"):
                gradient = gradient[list(compressor.encoder.memory_ids[: inputs["embed_len"]])]
            assert difference(gradient, expected) <= GRADIENTS * expected.abs().max().item(), (name, key)
    assert not any(p.requires_grad for p in compressor.backbone.model.parameters())


def test_export_gives_the_imported_bytes(compressor: PCCCompressor, checkpoint: Path, tmp_path: Path) -> None:
    save_official_pcc(compressor, tmp_path)
    weights = "adapter_model.safetensors" if "adapter" in checkpoint.name else "model.safetensors"
    for original, exported in [(load_file(checkpoint / weights), load_file(tmp_path / weights)),
                               *[(read_tensors(checkpoint / n), read_tensors(tmp_path / n))
                                 for n in ("memory_converter.bin",)]]:
        assert exported.keys() == original.keys()
        for key, tensor in original.items():
            assert exported[key].dtype == tensor.dtype
            assert exported[key].equal(tensor), key


@torch.no_grad()
def test_one_bracket_around_all_segments_is_seen(compressor: PCCCompressor, folder: Path, inputs: dict[str, Any],
                                                 ids: dict[str, int]) -> None:
    slots = compressor.encode([inputs["contexts"]["three_segments"]])[0]
    tail = torch.tensor([*inputs["question_ids"], *inputs["answer_ids"], ids["eos"]])
    delimiters, embed = compressor.spec.delimiters, compressor.backbone.embed
    rows = torch.cat([embed(torch.tensor([ids["bos"]])), delimiters["before"], slots, delimiters["after"], embed(tail)])
    logits = compressor.backbone.model(inputs_embeds=rows[None]).logits[0, -1]
    expected = load_file(folder / "decoder_logits.safetensors")["rag.three_segments"][-1]
    assert difference(logits, expected) > 100 * LOGITS


@torch.no_grad()
def test_slots_in_the_official_precision_point_the_same_way(folder: Path, checkpoint: Path, inputs: dict[str, Any]
                                                            ) -> None:
    """Encoder and converter in bfloat16, as the official code runs them: a loose reference, compared by direction."""
    backbone = load_frozen(folder / "decoder_merged", device="cpu") if folder.name == "pcc_large" else (
        load_patched_decoder(folder / "decoder_base", folder / "special_token_patch.pt", device="cpu"))
    compressor = load_official_pcc(checkpoint, backbone, segment_tokens=inputs["segment_length"],
                                   slots_per_segment=inputs["embed_len"])
    compressor.encoder_model.to(torch.bfloat16)
    reference = load_file(folder / "slots_official_bf16_loose.safetensors")
    assert reference.keys() == inputs["contexts"].keys()
    for case, context in inputs["contexts"].items():
        memory = compressor.memory([context])[0]
        assert memory.dtype == torch.bfloat16
        slots = compressor.convert(memory)
        assert slots.shape == reference[case].shape
        assert torch.cosine_similarity(slots.flatten(), reference[case].float().flatten(), dim=0) > 0.999, case
