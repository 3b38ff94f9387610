"""One encoder, many decoders: an index of the encoder's memory, read through the converter of each decoder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ctxcomp_rag import (
    ChatTurn,
    CompressedRAG,
    Document,
    GenerationSettings,
    MemoryIndex,
    SpanChat,
    SpanReference,
)
from ctxcomp_rag.backbone import load_frozen
from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.compressors import load_compressor
from ctxcomp_rag.compressors.pcc import PCCCompressor, PCCConfig, load_encoder
from ctxcomp_rag.decoding import Delimiter
from ctxcomp_rag.errors import IncompatibleSpanError, InputError, ModelLoadError
from ctxcomp_rag.spans import LatentSpan, SoftSpan
from tests.compressors.contract import assert_same_span
from tests.compressors.test_pcc import save_bert
from tests.tiny_models import LetterCounts, save_tiny, tiny_backbone, tiny_config, tiny_model, tiny_tokenizer

CONFIG = PCCConfig(segment_tokens=24, slots_per_segment=6)
TEXTS = ["The lighthouse of Varn was built in 1871.", "A keeper painted the stairs red every spring.",
         "Yes.", "Höhe: 31 m, and the lamp is green in the fog of the north wind."]
DOCUMENTS = [Document(f"d{i}", text) for i, text in enumerate(TEXTS)]
QUESTION = "Who painted the stairs?"
SHORT = GenerationSettings(max_new_tokens=8)


def save_wide(folder: Path) -> Path:
    """A decoder twice as wide as the encoder, with another tokenizer than the encoder and the other decoder have."""
    tokenizer = tiny_tokenizer(num_merges=0)
    config = tiny_config("qwen2", hidden_size=48, vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id,
                         eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    tiny_model(config, seed=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_compressor(decoder: Path, encoder: Path, folder: Path, *, seed: int, config: PCCConfig = CONFIG) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(9)
        source = load_encoder(encoder)  # the rows of its memory tokens are drawn here
        torch.manual_seed(seed)
        PCCCompressor(load_frozen(decoder), source, config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Name -> (decoder, its PCC compressor); one encoder, 24 wide, serves both."""
    root = tmp_path_factory.mktemp("models")
    encoder = save_bert(root / "encoder")
    decoders = {"narrow": save_tiny("llama", root / "narrow"), "wide": save_wide(root / "wide")}
    return {name: (decoder, save_compressor(decoder, encoder, root / f"pcc_{name}", seed=i))
            for i, (name, decoder) in enumerate(decoders.items())}


@pytest.fixture(scope="module")
def index(models: dict[str, tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of latent spans, written beside the narrow decoder."""
    folder = tmp_path_factory.mktemp("latent") / "kb"
    model, compressor = models["narrow"]
    with CompressedRAG.create(folder, model=model, compressor=compressor, encoder=LetterCounts(), latent=True,
                              codec="exact") as rag:
        assert rag.index(DOCUMENTS).added == len(rag.memory)
        assert rag.index(DOCUMENTS, factor=4.0).added == 0
    with CompressedRAG.create(folder, model=model, compressor=compressor, encoder=LetterCounts()) as again:
        assert again.memory.spec.kind == "latent"
        assert again.index(DOCUMENTS).added == 0
    return folder


def reader(index: Path, models: dict[str, tuple[Path, Path]], name: str) -> CompressedRAG:
    model, compressor = models[name]
    return CompressedRAG.open(index, model=model, compressor=compressor, encoder=LetterCounts())


def test_an_index_of_memory_names_its_encoder_and_no_decoder(index: Path) -> None:
    with MemoryIndex.open(index, read_only=True) as memory:
        assert memory.verify().ok
        spec, spans = memory.spec, [s.span for s in memory.get([c.id for c in memory.chunks()])]
    assert (spec.kind, spec.reader, spec.decoder.hidden_size, dict(spec.delimiters)) == ("latent", None, 24, {})
    assert spec.compressor.startswith("pcc-encoder-")
    assert all(isinstance(s, LatentSpan) and s.memory.shape == (s.num_slots, 24) for s in spans)
    assert all(s.num_slots % CONFIG.slots_per_segment == 0 for s in spans)  # no brackets


@pytest.mark.parametrize("name", ["narrow", "wide"])
def test_every_decoder_reads_the_spans_that_its_own_compressor_makes(name: str, index: Path,
                                                                     models: dict[str, tuple[Path, Path]]) -> None:
    model, folder = models[name]
    own = load_compressor(folder, load_frozen(model))
    with reader(index, models, name) as rag:
        sources = rag.retrieve(QUESTION, top_k=len(rag.memory))
        assert len(sources) == len(rag.memory) > len(DOCUMENTS)
        for source in sources:
            read, (made,) = rag.read(source), own.compress([source.chunk])
            own.spec.require_span(read)
            assert_same_span(read, made, atol=1e-5)  # encoded in another batch
        assert rag.spec.fingerprint == own.spec.fingerprint


@pytest.mark.parametrize("name", ["narrow", "wide"])
def test_every_decoder_answers_as_from_an_index_of_its_own_spans(name: str, index: Path, tmp_path: Path,
                                                                 models: dict[str, tuple[Path, Path]]) -> None:
    model, folder = models[name]
    with reader(index, models, name) as rag:
        got = rag.answer(QUESTION, settings=SHORT)
        text = rag.reconstruct(got.sources[0], max_new_tokens=6)
        truncated = rag.answer(QUESTION, mode="truncated", settings=SHORT)
        latent_bytes = rag.memory.stats()["span_bytes"]
        chunks = list(rag.memory.chunks())
        with pytest.raises(InputError, match="opened for reading"):
            rag.index(DOCUMENTS)
    with CompressedRAG.create(tmp_path / "own", model=model, compressor=folder, encoder=LetterCounts(),
                              codec="exact") as own:
        assert own.compressor is not None
        spans = own.compressor.compress(chunks)
        own.memory.add(chunks, spans, LetterCounts().encode([c.text for c in chunks]), spec=own.compressor.spec)
        expected = own.answer(QUESTION, settings=SHORT)
        assert (got.text, got.usage) == (expected.text, expected.usage)
        assert text == own.reconstruct(expected.sources[0], max_new_tokens=6)
        assert truncated.usage.positions == got.usage.positions - 2 * len(got.sources)  # the outer brackets
        assert latent_bytes < own.memory.stats()["span_bytes"]  # the encoder is narrower than either decoder


def test_reading_is_exact_where_the_encoder_saw_the_same_batch(models: dict[str, tuple[Path, Path]]) -> None:
    own = {name: load_compressor(folder, load_frozen(model)) for name, (model, folder) in models.items()}
    chunks = [Chunk(d.id, d.text, 0, len(d.text), 1) for d in DOCUMENTS]
    latents = own["narrow"].latent.compress(chunks)
    assert [own["wide"].latent.chunk_slots(c) for c in chunks] == [s.num_slots for s in latents]
    for compressor in own.values():
        for latent, chunk, made in zip(latents, chunks, compressor.compress(chunks), strict=True):
            assert_same_span(compressor.read(latent, chunk), made)
            assert not latent.memory.is_inference()
            assert compressor.read(made, chunk) is made


def without_encoder(folder: Path, out: Path) -> Path:
    """What a reader is given of a compressor: settings and converter, and no encoder."""
    return shutil.copytree(folder, out, ignore=shutil.ignore_patterns("encoder"))


@pytest.mark.parametrize("name", ["narrow", "wide"])
def test_reading_takes_the_converter_and_not_the_encoder(name: str, index: Path, tmp_path: Path,
                                                         models: dict[str, tuple[Path, Path]]) -> None:
    model, folder = models[name]
    reduced = without_encoder(folder, tmp_path / "reduced")
    with pytest.raises(ModelLoadError, match=r"the encoder in .* cannot be loaded"):
        load_compressor(reduced, load_frozen(model))
    whole = load_compressor(folder, load_frozen(model))
    chat_of_whole = SpanChat.open(index, model=model, compressor=folder)
    with (CompressedRAG.open(index, model=model, compressor=reduced, encoder=LetterCounts()) as rag,
          SpanChat.open(index, model=model, compressor=reduced) as chat, chat_of_whole):
        assert rag.spec.fingerprint == chat.spec.fingerprint == whole.spec.fingerprint
        for source in rag.retrieve(QUESTION, top_k=len(rag.memory)):
            assert_same_span(rag.read(source), whole.read(source.span, source.chunk))
        assert rag.compressor is not None
        with pytest.raises(InputError, match="opened without its encoder, for reading; load it with load_compressor"):
            rag.compressor.compress([source.chunk])
        with pytest.raises(InputError, match="opened without its encoder, for reading; copy the folder"):
            rag.compressor.save_pretrained(tmp_path / "out")
        # the chat splices the span that was read, brackets included
        turn = ChatTurn("user", (SpanReference(chat.references.mint(source.chunk.id, "s")), QUESTION))
        prompt = chat.prompt([turn], "s")
        assert prompt.chunk_ids == (source.chunk.id,)
        [spliced] = [p for p in prompt.parts if isinstance(p, SoftSpan)]
        assert_same_span(spliced, rag.read(source))
        rows = [p.embeds for p in prompt.parts if isinstance(p, Delimiter)]
        assert torch.equal(torch.cat(rows), torch.cat([whole.spec.delimiters[n] for n in ("before", "after")]))
        assert chat.submit(prompt, SHORT).result().finish_reason in ("stop", "length")


def test_a_chat_over_memory_needs_a_converter(index: Path, models: dict[str, tuple[Path, Path]]) -> None:
    with pytest.raises(IncompatibleSpanError, match=r"no decoder reads as it is; pass the compressor"):
        SpanChat.open(index, model=models["narrow"][0])


def test_the_converter_of_another_decoder_is_refused(index: Path, models: dict[str, tuple[Path, Path]]) -> None:
    with pytest.raises(IncompatibleSpanError, match=r"was trained for the decoder .*they differ in .*hidden_size"):
        CompressedRAG.open(index, model=models["narrow"][0], compressor=models["wide"][1], encoder=LetterCounts())


def test_the_command_line_writes_latent_indexes_and_reads_them_with_a_converter(
        models: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    def ctxcomp(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "ctxcomp_rag.cli", *map(str, arguments)], capture_output=True,
                              text=True, check=False, timeout=300, env={**os.environ, "COLUMNS": "200"})

    (tmp_path / "varn.txt").write_text(TEXTS[0])
    model, compressor = models["narrow"]
    made = ctxcomp("precompress", tmp_path / "varn.txt", "--out", tmp_path / "kb", "--model", model, "--compressor",
                   compressor, "--latent")
    assert made.returncode == 0, made.stderr
    with MemoryIndex.open(tmp_path / "kb", read_only=True) as memory:
        assert memory.spec.kind == "latent"
    wide, folder = models["wide"]
    converter = without_encoder(folder, tmp_path / "converter")
    asked = ctxcomp("ask", tmp_path / "kb", QUESTION, "--model", wide, "--compressor", converter, "--json",
                    "--max-new-tokens", "4")
    assert asked.returncode == 0, asked.stderr
    assert json.loads(asked.stdout)["usage"]["slots"] > 0
    refused = ctxcomp("ask", tmp_path / "kb", QUESTION, "--model", wide)
    assert (refused.returncode, "ctxcomp ask --compressor FOLDER" in refused.stderr) == (2, True)


def test_a_decoder_is_added_by_training_a_converter_only(index: Path, models: dict[str, tuple[Path, Path]]) -> None:
    model, folder = models["wide"]
    compressor = load_compressor(folder, load_frozen(model))
    assert isinstance(compressor, PCCCompressor)
    before, memory = compressor.spec.fingerprint, compressor.latent.spec.fingerprint
    with MemoryIndex.open(index, read_only=True) as stored:
        source = next(iter(stored.get([c.id for c in stored.chunks()])))
        assert isinstance(source.span, LatentSpan)
        optimizer = torch.optim.SGD([*compressor.converter.parameters(), compressor.special_rows], lr=0.1)
        segments = compressor.config.segments(source.span.num_source_tokens, compressor.compression_factor)
        compressor.bracketed(compressor.convert(source.span.memory), segments)[0].square().mean().backward()
        optimizer.step()
        assert all(p.grad is None for p in compressor.encoder_model.parameters())
        assert compressor.spec.fingerprint != before
        assert compressor.latent.spec.fingerprint == memory == stored.spec.fingerprint
        with CompressedRAG(compressor.backbone, stored, LetterCounts(), compressor) as rag:
            assert rag.answer(QUESTION, settings=SHORT).sources


def test_memory_without_a_converter_is_refused(index: Path, models: dict[str, tuple[Path, Path]]) -> None:
    message = r"are the memory of the encoder .*no decoder reads as it is; pass the compressor that converts it"
    with pytest.raises(IncompatibleSpanError, match=message):
        CompressedRAG.open(index, model=models["narrow"][0], encoder=LetterCounts())
    with MemoryIndex.open(index, read_only=True) as memory, pytest.raises(IncompatibleSpanError, match=message):
        CompressedRAG(tiny_backbone("llama"), memory, LetterCounts())


@pytest.mark.parametrize(("config", "other", "match"), [
    (CONFIG, True, "converts that of .*they differ in weights_digest"),
    (replace(CONFIG, slots_per_segment=4), False, "they differ in segment_tokens, slots_per_segment or slot_positions"),
])
def test_memory_of_another_encoder_is_refused(config: PCCConfig, other: bool, match: str, index: Path, tmp_path: Path,
                                              models: dict[str, tuple[Path, Path]]) -> None:
    decoder, folder = models["narrow"]
    source = save_tiny("gpt2", tmp_path / "gpt2") if other else folder / "encoder"
    wrong = save_compressor(decoder, source, tmp_path / "wrong", seed=0, config=config)
    with pytest.raises(IncompatibleSpanError, match=match):
        CompressedRAG.open(index, model=decoder, compressor=wrong, encoder=LetterCounts())
    with pytest.raises(IncompatibleSpanError, match=r"made by the compressor pcc-encoder-.*come from pcc-encoder-"):
        CompressedRAG.create(index, model=decoder, compressor=wrong, encoder=LetterCounts())


def test_soft_and_latent_spans_do_not_mix(models: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    model, folder = models["narrow"]
    CompressedRAG.create(tmp_path / "kb", model=model, compressor=folder, encoder=LetterCounts()).close()
    with pytest.raises(IncompatibleSpanError, match=r"made by the compressor pcc-.*\(soft.*come from pcc-encoder-"):
        CompressedRAG.create(tmp_path / "kb", model=model, compressor=folder, encoder=LetterCounts(), latent=True)


def test_a_method_inside_the_decoder_has_no_memory_to_share(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "llama")
    with pytest.raises(InputError, match="'infinipot' makes spans for one decoder only"):
        CompressedRAG.create(tmp_path / "kb", model=model, compressor="infinipot", encoder=LetterCounts(), latent=True)


def test_a_soft_index_is_read_with_or_without_a_compressor(models: dict[str, tuple[Path, Path]],
                                                           tmp_path: Path) -> None:
    model, folder = models["narrow"]
    with CompressedRAG.create(tmp_path / "kb", model=model, compressor=folder, encoder=LetterCounts()) as rag:
        rag.index(DOCUMENTS[:1])
    for given in (None, folder):
        with CompressedRAG.open(tmp_path / "kb", model=model, compressor=given, encoder=LetterCounts()) as rag:
            (source,) = rag.retrieve(QUESTION, top_k=1)
            assert isinstance(source.span, SoftSpan)
            assert rag.read(source) is source.span
