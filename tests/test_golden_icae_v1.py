"""ICAE v1 against numbers from the official code: import, slots, logits, losses, greedy tokens, export.

Every size is read from the fixture, so CTXCOMP_GOLDEN can name another folder of the same form. The untrained rows of
v1's resized head are not modelled, so its loss is compared over the decoder's vocabulary; a test appends them.
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
from ctxcomp_rag.compressors.icae import ICAECompressor
from ctxcomp_rag.errors import ModelLoadError
from ctxcomp_rag.importers.containers import read_tensors
from ctxcomp_rag.importers.icae import load_official_v1, save_official_v1
from ctxcomp_rag.importers.layouts import ICAE_V1_END_ID
from ctxcomp_rag.training import SampleIds, TrainingSample, training_loss

SLOTS, LOGITS, LOSS, GRADIENTS = 2e-5, 5e-5, 1e-5, 2e-5
CHECKPOINT = "icae_v1_zeroweight.pt"


def difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a.detach() - b).abs().max().item()


@pytest.fixture(scope="module")
def folder(golden: Path) -> Path:
    return golden / "icae_v1"


@pytest.fixture(scope="module")
def inputs(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "inputs.json").read_text())


@pytest.fixture(scope="module")
def samples(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "train_samples.json").read_text())["samples"]


@pytest.fixture(scope="module")
def compressor(folder: Path, inputs: dict[str, Any]) -> ICAECompressor:
    backbone = load_frozen(folder / "base", device="cpu")
    return load_official_v1(folder / CHECKPOINT, backbone, segment_tokens=inputs["model_max_length"])


def context_of(sample: dict[str, Any], mem_size: int) -> list[int]:
    return sample["input_ids"][:-mem_size]


def test_trained_part(compressor: ICAECompressor, folder: Path, inputs: dict[str, Any], tmp_path: Path) -> None:
    save_official_v1(compressor, tmp_path / "export.pt")
    exported, original = read_tensors(tmp_path / "export.pt"), read_tensors(folder / CHECKPOINT)
    stated = json.loads((folder / "state_dict_keys.json").read_text())["keys"]
    assert exported.keys() == original.keys() == stated.keys()
    assert all(exported[k].dtype == t.dtype and exported[k].equal(t) for k, t in original.items())
    trained = load_file(folder / "icae_v1_trained_part.safetensors")
    assert {k for k, t in exported.items() if t.ndim} == trained.keys()
    assert all(exported[k].equal(t) for k, t in trained.items())
    ids = SampleIds.of(compressor)
    assert {"mem_first": ids.first_memory, "ae": ids.reconstruct, "lm": ids.continue_, "ft": ids.after,
            "eos": ICAE_V1_END_ID}.items() <= inputs["ids"].items()
    assert compressor.config.lora_rank == inputs["lora"]["r"]


@torch.no_grad()
def test_slots(compressor: ICAECompressor, folder: Path, inputs: dict[str, Any], samples: dict[str, Any]) -> None:
    for name, expected in load_file(folder / "slots.safetensors").items():
        context = context_of(samples[name], inputs["mem_size"])
        assert difference(compressor.encode([context])[0], expected) <= SLOTS, name


@torch.no_grad()
def test_logits_and_loss(compressor: ICAECompressor, folder: Path, inputs: dict[str, Any],
                         samples: dict[str, Any]) -> None:
    reference = load_file(folder / "decoder_logits.safetensors")
    memory = [inputs["ids"]["mem_first"]] * inputs["mem_size"]
    for name, expected in samples.items():
        sample = TrainingSample(tuple(context_of(expected, inputs["mem_size"])),
                                (*memory, *expected["prompt_answer_ids"]), (*[-100] * len(memory), *expected["labels"]))
        loss, logits = training_loss(compressor, sample)
        assert abs(loss.item() - expected["loss_base_vocab_only"]) <= LOSS, name
        if name in reference:
            assert difference(logits, reference[name]) <= LOGITS, name


def with_resized_head(compressor: ICAECompressor, folder: Path, sample: TrainingSample) -> tuple[Tensor, Tensor]:
    """(loss, logits of the extra columns) with the untrained rows that the official training head has beyond ours."""
    states: list[Tensor] = []
    head = compressor.backbone.model.get_output_embeddings()
    watch = head.register_forward_hook(lambda module, given, made: states.append(given[0][0]))
    try:
        _, logits = training_loss(compressor, sample)
    finally:
        watch.remove()
    [rows] = load_file(folder / "resized_lm_head_rows.safetensors").values()
    extra = states[0] @ rows.T
    labels = torch.tensor(sample.labels)[1:]
    loss = torch.nn.functional.cross_entropy(torch.cat([logits, extra], dim=1)[:-1], labels, ignore_index=-100)
    return loss, extra


def test_loss_and_gradients_with_the_official_resized_head(compressor: ICAECompressor, folder: Path,
                                                           inputs: dict[str, Any], samples: dict[str, Any]) -> None:
    reference = load_file(folder / "decoder_logits.safetensors")
    gradients = load_file(folder / "train_grads.safetensors")
    memory = [inputs["ids"]["mem_first"]] * inputs["mem_size"]
    parameters = {f"icae.{n}": p for n, p in compressor.encoder.named_parameters() if "lora_" in n}
    parameters["memory_token_embed.weight"] = compressor.memory_tokens
    seen = set()
    for name, expected in samples.items():
        sample = TrainingSample(tuple(context_of(expected, inputs["mem_size"])),
                                (*memory, *expected["prompt_answer_ids"]), (*[-100] * len(memory), *expected["labels"]))
        loss, extra = with_resized_head(compressor, folder, sample)
        assert abs(loss.item() - expected["loss"]) <= LOSS, name
        average = loss.item() * expected["num_labels"] / expected["loss_denominator"]
        assert abs(average - expected["token_avg_loss"]) <= LOSS, name
        if f"{name}.extra_columns" in reference:
            assert difference(extra, reference[f"{name}.extra_columns"]) <= LOGITS, name
        wanted = {k.split("/", 1)[1]: g for k, g in gradients.items() if k.startswith(f"{name}/")}
        if wanted:
            seen.add(name)
            found = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
            largest = max(g.abs().max().item() for g in wanted.values())
            assert wanted.keys() == found.keys()
            for key, gradient in wanted.items():
                assert difference(found[key], gradient) <= GRADIENTS * largest, (name, key)
    assert seen == {"ft", "ae"}


@torch.no_grad()
def test_greedy_tokens(compressor: ICAECompressor, folder: Path, inputs: dict[str, Any],
                       samples: dict[str, Any]) -> None:
    greedy = json.loads((folder / "greedy.json").read_text())
    after, backbone = compressor.spec.delimiters["after"], compressor.backbone
    rows = torch.cat([compressor.encode([context_of(samples["ft"], inputs["mem_size"])])[0], after,
                      backbone.embed(torch.tensor(inputs["prompt_ids"])), after])
    produced: list[int] = []
    while len(produced) < greedy["max_new_tokens"]:
        token = int(backbone.model(inputs_embeds=rows[None]).logits[0, -1].argmax())
        if token == ICAE_V1_END_ID:
            break
        produced.append(token)
        rows = torch.cat([rows, backbone.embed(torch.tensor([token]))])
    assert produced == greedy["tokens"]


def test_damaged_files_are_named(compressor: ICAECompressor, folder: Path, tmp_path: Path) -> None:
    content = read_tensors(folder / CHECKPOINT)
    placeholder = next(k for k, t in content.items() if t.ndim == 0)
    lora = next(k for k, t in content.items() if "lora_A" in k)
    for changes, message in [({placeholder + "x": torch.tensor(0.0)}, "has placeholders of .*x"),
                             ({lora: content[lora].half()}, r"other tensors than float32 as .*float16"),
                             ({lora: "text"}, "something else than a tensor")]:
        torch.save({**content, **changes}, tmp_path / "bad.pt")
        with pytest.raises(ModelLoadError, match=message):
            load_official_v1(tmp_path / "bad.pt", compressor.backbone)


def test_a_checkpoint_with_a_memory_head_is_refused_by_name(compressor: ICAECompressor, folder: Path, tmp_path: Path
                                                            ) -> None:
    """The official code can put a head on the slots, off by default; no published checkpoint has one."""
    head = {k: t for k, t in load_file(folder / "memory_head_variant.safetensors").items() if "memory_head" in k}
    assert len(head) == 4
    torch.save({**read_tensors(folder / CHECKPOINT), **head}, tmp_path / "head.pt")
    with pytest.raises(ModelLoadError, match=r"has unknown keys memory_head\.dense_in\.bias; memory_head\.dense_in"):
        load_official_v1(tmp_path / "head.pt", compressor.backbone)
