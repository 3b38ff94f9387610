"""Imported models read text as the official code does: its BOS, templates and stop ids, against the official numbers.

The fixtures of ICAE are ids; here they get a tokenizer in which every id is a word, and which puts BOS before a text as
Llama's and Mistral's do. What goes in is text, and what comes out is compared with the official code.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ctxcomp_rag import CompressedRAG, Document, GenerationSettings
from ctxcomp_rag.backbone import Backbone, load_frozen
from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.compressors import Compressor, load_compressor
from ctxcomp_rag.decoding import FrozenDecoder, TokenIds, enclosed, question_prompt, reconstruction_prompt
from ctxcomp_rag.decoding.prompt import Text, text_ids
from ctxcomp_rag.importers import load_official_pcc, load_official_v1, load_official_v2, load_patched_decoder
from ctxcomp_rag.importers.layouts import ICAE_V2_LEFT, ICAE_V2_RIGHT, icae_v2_layout
from ctxcomp_rag.pipeline import prompt_parts
from tests.tiny_models import tiny_backbone

SLOTS, LOGITS = 2e-5, 5e-5


class OneForAll:
    """A retrieval encoder for an index of one text."""

    name = "one"

    def encode(self, sentences: list[str], /) -> NDArray[np.float32]:
        return np.ones((len(sentences), 2), dtype=np.float32)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def with_words(folder: Path, inputs: dict[str, Any], out: Path) -> Path:
    """The decoder of an ICAE fixture with a tokenizer of one word per id."""
    names = {0: "<unk>", inputs["ids"]["bos"]: "<s>", 2: "</s>"}
    for key, tokens in (("inst_left_ids", ICAE_V2_LEFT), ("inst_right_ids", ICAE_V2_RIGHT)):
        names |= dict(zip(inputs.get(key, ()), tokens, strict=False))
    vocabulary = {names.get(i, str(i)): i for i in range(inputs["ids"]["base_vocab"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])
                                                                                             ])
    shutil.copytree(folder, out)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
                            ).save_pretrained(out)
    return out


def text_of(ids: list[int], backbone: Backbone) -> str:
    return " ".join(backbone.tokenizer.hf.convert_ids_to_tokens(ids))


def compress(compressor: Compressor, text: str) -> Any:
    return compressor.compress([Chunk("c", text, 0, len(text), 1)])[0]


def answer(compressor: Compressor, prompt: list[Any], tokens: int) -> list[int]:
    decoder = FrozenDecoder(compressor.backbone, end_ids=compressor.spec.end_ids)
    return list(decoder.generate(prompt, GenerationSettings(max_new_tokens=tokens)).token_ids)


def difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


@pytest.fixture(scope="module")
def v2(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Compressor, dict[str, Any], Path]:
    """(imported, saved and loaded again; inputs of the fixture; folder of its decoder, with the compressor beside)."""
    inputs = read_json(golden / "icae_v2" / "inputs.json")
    model = with_words(golden / "icae_v2" / "base", inputs, tmp_path_factory.mktemp("v2") / "decoder")
    backbone = load_frozen(model, device="cpu")
    load_official_v2(golden / "icae_v2" / "icae_checkpoint.safetensors", backbone,
                     mean_compression_rate=inputs["mean_compression_rate"]).save_pretrained(model.parent / "icae")
    return load_compressor(model.parent / "icae", backbone), inputs, model


def cases_with_bos(inputs: dict[str, Any]) -> dict[str, list[int]]:
    """Contexts that a tokenizer made: the others are bare ids, for the arithmetic of segments."""
    bos = inputs["ids"]["bos"]
    return {name: ids for name, ids in inputs["contexts"].items() if ids[0] == bos and not {bos, 2} & set(ids[1:])}


@torch.no_grad()
def test_icae_v2_from_text(v2: tuple[Compressor, dict[str, Any], Path], golden: Path) -> None:
    compressor, inputs, _ = v2
    slots, logits = (load_file(golden / "icae_v2" / f"{n}.safetensors") for n in ("compress", "decoder_logits"))
    greedy = read_json(golden / "icae_v2" / "greedy.json")
    cases = cases_with_bos(inputs)
    assert cases.keys() >= greedy["tokens"].keys()
    prompt = text_of(inputs["ft_prompt_ids"], compressor.backbone)
    decoder = FrozenDecoder(compressor.backbone)
    for case, ids in cases.items():
        span = compress(compressor, text_of(ids[1:], compressor.backbone))
        assert span.num_source_tokens == len(ids) - 1
        assert difference(span.embeds, slots[case]) <= SLOTS, case
        asked = prompt_parts(compressor.backbone, prompt, [enclosed(span, compressor.spec)], compressor.spec)
        repeated = reconstruction_prompt(span, compressor.spec)
        assert difference(decoder.logits(asked), logits[f"ft.{case}"]) <= LOGITS, case
        assert difference(decoder.logits(repeated), logits[f"ae.{case}"]) <= LOGITS, case
        found = {"ft": answer(compressor, asked, greedy["max_new_tokens"]),
                 "ae": answer(compressor, repeated, greedy["max_new_tokens"])}
        assert found == greedy["tokens"][case], case


def test_icae_v2_answers_of_an_index_are_the_official_ones(v2: tuple[Compressor, dict[str, Any], Path], golden: Path,
                                                           tmp_path: Path) -> None:
    compressor, inputs, model = v2
    greedy = read_json(golden / "icae_v2" / "greedy.json")
    backbone, ids = compressor.backbone, inputs["contexts"]["one_segment"]
    settings = GenerationSettings(max_new_tokens=greedy["max_new_tokens"])
    with CompressedRAG.create(tmp_path / "kb", model=model, compressor=model.parent / "icae",
                              encoder=OneForAll()) as rag:
        assert rag.index([Document("d", text_of(ids[1:], backbone))]).chunks == 1
    with CompressedRAG.open(tmp_path / "kb", model=model, encoder=OneForAll()) as rag:
        asked = rag.answer(text_of(inputs["ft_prompt_ids"], backbone), settings=settings)
        repeated = rag.reconstruct(asked.sources[0], max_new_tokens=greedy["max_new_tokens"])
    expected = greedy["tokens"]["one_segment"]
    assert asked.text == backbone.tokenizer.decode(expected["ft"])
    assert repeated == backbone.tokenizer.decode(expected["ae"])


def test_template_of_icae_v2_is_found_by_its_tokens(v2: tuple[Compressor, dict[str, Any], Path]) -> None:
    compressor, inputs, _ = v2
    layout = compressor.spec.layout
    assert layout is not None
    assert layout.left_ids == tuple(inputs["inst_left_ids"])
    assert layout.right_ids == tuple(inputs["inst_right_ids"])
    assert layout.context_ids == (inputs["ids"]["bos"],)
    assert layout.end_ids == (inputs["ids"]["eos"],)
    lacking = icae_v2_layout(tiny_backbone("llama"))
    assert (lacking.left_ids, lacking.right_ids) == (None, ())


def test_a_chunk_leaves_room_for_the_bos_in_its_segment(v2: tuple[Compressor, dict[str, Any], Path]) -> None:
    compressor, inputs, _ = v2
    longest = inputs["mem_size"] * inputs["mean_compression_rate"]
    assert compressor.max_chunk_tokens == longest - 1
    assert compressor.num_slots(longest - 1) == inputs["mem_size"]
    assert compressor.num_slots(longest) == 2 * inputs["mem_size"]


@torch.no_grad()
def test_icae_v1_from_text(golden: Path, tmp_path: Path) -> None:
    folder = golden / "icae_v1"
    inputs, greedy = read_json(folder / "inputs.json"), read_json(folder / "greedy.json")
    backbone = load_frozen(with_words(folder / "base", inputs, tmp_path / "decoder"), device="cpu")
    compressor = load_official_v1(folder / "icae_v1_zeroweight.pt", backbone, segment_tokens=inputs["model_max_length"])
    span = compress(compressor, text_of(inputs["context_ids"][1:], backbone))
    assert difference(span.embeds, load_file(folder / "slots.safetensors")["ft"]) <= SLOTS
    asked = prompt_parts(backbone, text_of(inputs["prompt_ids"], backbone), [enclosed(span, compressor.spec)],
                         compressor.spec)
    assert answer(compressor, asked, greedy["max_new_tokens"]) == greedy["tokens"]
    assert compressor.spec.end_ids == (inputs["ids"]["eos"],) != (2,)
    sample = read_json(folder / "train_samples.json")["samples"]["ft"]["prompt_answer_ids"]
    logits = FrozenDecoder(backbone).logits(asked)
    expected = load_file(folder / "decoder_logits.safetensors")["ft"][: len(logits)]
    assert len(logits) == len(span.positions) + sample.index(inputs["ids"]["ft"], 1) + 1
    assert difference(logits, expected) <= LOGITS


CHECKPOINT = {"pcc_lite": "compressor_checkpoint", "pcc_large": "adapter_checkpoint"}


@pytest.fixture(scope="module", params=sorted(CHECKPOINT))
def pcc(request: pytest.FixtureRequest, golden: Path, tmp_path_factory: pytest.TempPathFactory
        ) -> tuple[Compressor, Path]:
    """The imported model, and its fixture. The tokenizer of Large puts BOS before a text, as the real one does."""
    folder = golden / request.param
    inputs = read_json(folder / "inputs.json")
    checkpoint = shutil.copytree(folder / CHECKPOINT[request.param], tmp_path_factory.mktemp("pcc") / "checkpoint")
    options: dict[str, Any] = {}
    if request.param == "pcc_large":
        options = {"encoder_base": folder / "encoder_base"}
        file = checkpoint / "tokenizer.json"
        tokenizer = Tokenizer.from_str(file.read_text())
        bos = read_json(checkpoint / "tokenizer_config.json")["bos_token"]
        bos = bos["content"] if isinstance(bos, dict) else bos
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
        file.write_text(tokenizer.to_str())
        backbone = load_frozen(folder / "decoder_merged", device="cpu")
    else:
        backbone = load_patched_decoder(folder / "decoder_base", folder / "special_token_patch.pt", device="cpu")
    return load_official_pcc(checkpoint, backbone, segment_tokens=inputs["segment_length"],
                             slots_per_segment=inputs["embed_len"], **options), folder


@torch.no_grad()
def test_pcc_from_text(pcc: tuple[Any, Path]) -> None:
    compressor, folder = pcc
    inputs, greedy = (read_json(folder / f"{n}.json") for n in ("inputs", "greedy"))
    slots = load_file(folder / "slots.safetensors")
    layout, hf = compressor.spec.layout, compressor.encoder.tokenizer.hf
    ids = inputs["contexts"]["one_segment"]
    assert layout.context_ids == ((ids[0],) if folder.name == "pcc_large" else ())
    text = " ".join(hf.convert_ids_to_tokens(ids[len(layout.context_ids) :]))
    span = compress(compressor, text)
    assert difference(span.embeds, slots["one_segment"]) <= SLOTS
    asked = question_prompt(TokenIds(tuple(inputs["question_ids"])), [enclosed(span, compressor.spec)],
                            compressor.spec)
    assert asked is not None
    stops = greedy["stop_ids"]
    assert set(layout.end_ids) == set(stops)
    for name, prompt in (("qa", asked), ("ae", reconstruction_prompt(span, compressor.spec))):
        expected = greedy["runs"][f"{name}.one_segment"]["tokens"]
        expected = expected[:-1] if expected[-1] in stops else expected  # the official loop keeps it
        assert answer(compressor, prompt, greedy["max_new_tokens"]) == expected, name


def test_pcc_asks_without_a_chat_template(pcc: tuple[Any, Path]) -> None:
    compressor, folder = pcc
    backbone, spec = compressor.backbone, compressor.spec
    backbone.tokenizer.hf.chat_template = "{{ messages }} not this"
    bos = read_json(folder / "inputs.json")["ids"]["decoder"]["bos"]
    parts = prompt_parts(backbone, "w5?", [[Text("w9")]], spec)
    assert parts == [TokenIds((bos,)), Text("w9"), "Question: w5?\n\nAnswer: "]
    assert text_ids(parts[2], backbone.tokenizer) == backbone.tokenizer.encode("Question: w5?\n\nAnswer: ")
