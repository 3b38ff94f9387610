"""ICAE v2 against numbers from the official code: import, slots, logits, samples, losses, gradients, export.

Every size is read from the fixture, so CTXCOMP_GOLDEN can name another folder of the same form.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from ctxcomp_rag.backbone import Backbone, load_frozen
from ctxcomp_rag.compressors.icae import ICAECompressor, ICAEConfig
from ctxcomp_rag.importers.icae import load_official_v2, save_official_v2
from ctxcomp_rag.training import (
    AutoencodingObjective,
    ContinuationObjective,
    InstructionObjective,
    SampleIds,
    TrainingSample,
    training_loss,
)

SLOTS, LOGITS, LOSS, GRADIENTS = 2e-5, 5e-5, 1e-5, 2e-5
CHECKPOINTS = ["icae_checkpoint.safetensors", "icae_checkpoint_fp32.safetensors"]


def difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a.detach() - b).abs().max().item()


@pytest.fixture(scope="module")
def folder(golden: Path) -> Path:
    return golden / "icae_v2"


@pytest.fixture(scope="module")
def inputs(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "inputs.json").read_text())


@pytest.fixture(scope="module")
def train(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "train_samples.json").read_text())


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    return load_frozen(folder / "base", device="cpu")


@pytest.fixture(scope="module", params=CHECKPOINTS)
def compressor(request: pytest.FixtureRequest, folder: Path, backbone: Backbone,
               inputs: dict[str, Any]) -> ICAECompressor:
    return load_official_v2(folder / request.param, backbone, mean_compression_rate=inputs["mean_compression_rate"])


def slots_of(compressor: ICAECompressor, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return compressor.encode([ids])[0]


def logits_of(decoder: PreTrainedModel, embeds: Tensor) -> Tensor:
    """Logits at every row of (n, hidden_size) embeddings."""
    with torch.no_grad():
        return decoder(inputs_embeds=embeds[None], position_ids=torch.arange(len(embeds))[None],
                       attention_mask=torch.ones(1, len(embeds), dtype=torch.long)).logits[0]


def decoder_prompt(kind: str, slots: Tensor, compressor: ICAECompressor, inputs: dict[str, Any]) -> Tensor:
    """The official inference layouts: [slots][AE], or the instruction template around [slots][FT] prompt."""
    if kind == "ae":
        return torch.cat([slots, compressor.spec.delimiters["reconstruct"]])
    def text(name: str) -> Tensor:
        return compressor.backbone.embed(torch.tensor(inputs[name]))
    return torch.cat([text("inst_left_ids"), slots, compressor.spec.delimiters["after"], text("ft_prompt_ids"),
                      text("inst_right_ids")])


def test_importer_finds_the_sizes_in_the_file(compressor: ICAECompressor, inputs: dict[str, Any]) -> None:
    lora, config = inputs["lora"], compressor.config
    assert (config.num_memory_tokens, config.lora_rank, config.lora_alpha) == (inputs["mem_size"], lora["r"],
                                                                               lora["alpha"])
    assert sorted(config.lora_targets) == sorted(lora["target_modules"])
    ids = SampleIds.of(compressor)
    numbered = {"base_vocab": ids.vocab_size, "pad": ids.padding, "mem_first": ids.first_memory,
                "mem_last": ids.first_memory + ids.num_memory_tokens - 1, "ae": ids.reconstruct, "lm": ids.continue_,
                "ft": ids.after}
    assert numbered == {name: inputs["ids"][name] for name in numbered}


def test_trained_part_is_held_in_float32(compressor: ICAECompressor) -> None:
    assert {p.dtype for p in compressor.parameters() if p.requires_grad} == {torch.float32}


def test_segments(folder: Path) -> None:
    table = json.loads((folder / "segment_table.json").read_text())
    config = ICAEConfig(num_memory_tokens=table["mem_size"], segment_tokens=table["mem_size"] * table["rate"])
    assert table["columns"] == ["length", "num_segments", "segment_length", "last_segment_length"]
    for length, *expected in table["rows"]:
        lengths = config.segment_lengths(length)
        assert [len(lengths), lengths[0], lengths[-1]] == expected
        assert sum(lengths) == length


def test_slots(compressor: ICAECompressor, folder: Path, inputs: dict[str, Any]) -> None:
    expected = load_file(folder / "compress.safetensors")
    assert expected.keys() == inputs["contexts"].keys()
    for case, ids in inputs["contexts"].items():
        assert difference(slots_of(compressor, ids), expected[case]) <= SLOTS, case


def test_decoder_logits(compressor: ICAECompressor, folder: Path, inputs: dict[str, Any]) -> None:
    for name, expected in load_file(folder / "decoder_logits.safetensors").items():
        kind, case = name.split(".")
        prompt = decoder_prompt(kind, slots_of(compressor, inputs["contexts"][case]), compressor, inputs)
        assert difference(logits_of(compressor.backbone.model, prompt), expected) <= LOGITS, name


def test_greedy_tokens(compressor: ICAECompressor, folder: Path, inputs: dict[str, Any]) -> None:
    greedy = json.loads((folder / "greedy.json").read_text())
    for case, runs in greedy["tokens"].items():
        for kind, expected in runs.items():
            rows = decoder_prompt(kind, slots_of(compressor, inputs["contexts"][case]), compressor, inputs)
            produced: list[int] = []
            while len(produced) < greedy["max_new_tokens"]:
                token = int(logits_of(compressor.backbone.model, rows)[-1].argmax())
                if token == greedy["stop_id"]:
                    break
                produced.append(token)
                rows = torch.cat([rows, compressor.backbone.embed(torch.tensor([token]))])
            assert produced == expected, (case, kind)


def continuation_of(context: list[int], texts: list[list[int]]) -> list[int]:
    """What follows the context in the text it was cut from."""
    for text in texts:
        for start in range(len(text) - len(context) + 1):
            if text[start : start + len(context)] == context:
                return text[start + len(context) :]
    raise AssertionError("the context is not part of any text")


def build_sample(name: str, compressor: ICAECompressor, inputs: dict[str, Any],
                 train: dict[str, Any]) -> TrainingSample:
    end_id = inputs["ids"]["eos"]
    if name == "ft":
        objective = InstructionObjective(compressor, left_ids=inputs["inst_left_ids"],
                                         right_ids=inputs["inst_right_ids"], end_id=end_id)
        return objective.sample(*(train["ft_parts"][part] for part in ("input", "prompt", "answer")))
    if name == "ae":
        text = train["raw_text_ids"]["ae"]
        if len(text) > train["model_max_length"]:  # the window was drawn at random
            text = train["samples"]["ae"]["input_ids"]
        return AutoencodingObjective(compressor, end_id=end_id).draw(text, train["model_max_length"], random.Random(0))
    context = train["samples"][name]["input_ids"]
    continuation = ContinuationObjective(
        compressor, max_tokens=train["model_max_length"], min_tokens=train["min_tokens_for_lm"],
        leave_tokens=train["leave_tokens_for_lm"], with_token=name == "lm_with_lm_token", end_id=end_id)
    return continuation.sample(context, continuation_of(context, list(train["raw_text_ids"].values())))


def test_samples(compressor: ICAECompressor, inputs: dict[str, Any], train: dict[str, Any]) -> None:
    assert set(train["samples"]) == {"ae", "lm", "lm_with_lm_token", "lm_fallback_to_ae", "ft"}
    for name, expected in train["samples"].items():
        sample = build_sample(name, compressor, inputs, train)
        assert list(sample.context_ids) == expected["input_ids"], name
        assert list(sample.prompt_ids) == expected["prompt_answer_ids"], name
        assert list(sample.labels) == expected["labels"], name


def test_training_loss_and_logits(compressor: ICAECompressor, folder: Path, inputs: dict[str, Any],
                                  train: dict[str, Any]) -> None:
    expected_logits = load_file(folder / "train_logits.safetensors")
    for name, expected in train["samples"].items():
        with torch.no_grad():
            loss, logits = training_loss(compressor, build_sample(name, compressor, inputs, train))
        assert abs(loss.item() - expected["loss"]) <= LOSS, name
        if name in expected_logits:
            assert difference(logits, expected_logits[name]) <= LOGITS, name


def test_gradients(compressor: ICAECompressor, folder: Path, inputs: dict[str, Any], train: dict[str, Any]) -> None:
    reference = load_file(folder / "train_grads.safetensors")
    parameters = {f"icae.{n}": p for n, p in compressor.encoder.named_parameters() if "lora_" in n}
    parameters["memory_token_embed.weight"] = compressor.memory_tokens
    for name in sorted({key.split("/")[0] for key in reference}):
        loss, _ = training_loss(compressor, build_sample(name, compressor, inputs, train))
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        expected = {key.split("/", 1)[1]: g for key, g in reference.items() if key.split("/")[0] == name}
        assert expected.keys() == gradients.keys()
        largest = max(g.abs().max().item() for g in expected.values())
        for key, gradient in expected.items():
            assert difference(gradients[key], gradient) <= GRADIENTS * largest, (name, key)
    assert all(p.grad is None and not p.requires_grad for p in compressor.backbone.model.parameters())


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_export_gives_the_imported_bytes(name: str, folder: Path, backbone: Backbone, inputs: dict[str, Any],
                                         tmp_path: Path) -> None:
    original = load_file(folder / name)
    imported = load_official_v2(folder / name, backbone, mean_compression_rate=inputs["mean_compression_rate"])
    options = {"lora_dtype": torch.float32} if "fp32" in name else {}
    save_official_v2(imported, tmp_path / "export.safetensors", **options)
    exported = load_file(tmp_path / "export.safetensors")
    assert exported.keys() == original.keys()
    for key, tensor in original.items():
        assert (exported[key].dtype, exported[key].shape) == (tensor.dtype, tensor.shape)
        assert exported[key].view(torch.uint8).equal(tensor.view(torch.uint8)), key


def test_wrong_lora_scaling_is_seen(folder: Path, backbone: Backbone, inputs: dict[str, Any]) -> None:
    compressor = load_official_v2(folder / CHECKPOINTS[0], backbone,
                                  mean_compression_rate=inputs["mean_compression_rate"])
    for module in compressor.encoder.modules():
        if hasattr(module, "lora_A"):
            module.scaling["default"] = 1.0 if inputs["lora"]["scaling"] != 1 else 0.5
    slots = slots_of(compressor, inputs["contexts"]["one_segment"])
    assert difference(slots, load_file(folder / "compress.safetensors")["one_segment"]) > 100 * SLOTS


def test_adapter_left_on_in_the_decoder_is_seen(compressor: ICAECompressor, folder: Path,
                                                inputs: dict[str, Any]) -> None:
    rows = decoder_prompt("ae", slots_of(compressor, inputs["contexts"]["one_segment"]), compressor, inputs)
    expected = load_file(folder / "decoder_logits.safetensors")["ae.one_segment"]
    assert difference(logits_of(compressor.encoder.get_base_model(), rows), expected) > 100 * LOGITS

