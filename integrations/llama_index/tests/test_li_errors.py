"""What the parts refuse, and what they do when something fails: nodes are never lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from li_setup import QUESTIONS, RecordingLLM, Setup, node
from llama_index.core.llms import ChatMessage, ImageBlock, MockLLM
from llama_index.core.response_synthesizers import get_response_synthesizer
from llama_index.core.schema import ImageNode, NodeWithScore, TextNode

from ctxcomp_rag import InputError, MemoryIndex, RetrievedSpan, SoftSpan, SpanChat
from ctxcomp_rag.errors import IndexDamagedError
from llama_index_ctxcomp import (
    CtxcompLLM,
    EncoderEmbedding,
    PromptError,
    SpanNode,
    SpanPostprocessor,
    SpanSynthesizer,
    SpanVectorStore,
)
from llama_index_ctxcomp.chunks import chunk_id


class DamagedIndex(MemoryIndex):
    """An index on a disk that has lost one chunk."""

    lost = ""

    def get(self, chunk_ids) -> list[RetrievedSpan]:  # type: ignore[no-untyped-def]
        if self.lost in chunk_ids:
            raise IndexDamagedError(f"the bytes of chunk {self.lost} are not those that were written")
        return super().get(chunk_ids)


def test_order_number_scores_and_ids_stay(setup: Setup) -> None:
    found = setup.retrieved(QUESTIONS[0], top_k=3)
    found.insert(1, NodeWithScore(node=node("No span.", "elsewhere"), score=0.25))
    found.insert(3, NodeWithScore(node=ImageNode(image_url="http://localhost/x.png")))
    out = setup.postprocessor().postprocess_nodes(found, query_bundle=None)
    assert [(n.node.node_id, n.score, n.node.metadata) for n in out] == [
        (n.node.node_id, n.score, n.node.metadata) for n in found]
    assert [isinstance(n.node, SpanNode) for n in out] == [True, False, True, False, True]
    assert [type(n.node) for n in found[:1]] == [TextNode]  # the nodes that came in are not changed


async def test_nodes_are_looked_up_without_blocking_the_loop(setup: Setup) -> None:
    found = setup.retrieved(QUESTIONS[0])
    out = await setup.postprocessor().apostprocess_nodes(found, query_str="why?")
    assert all(isinstance(n.node, SpanNode) for n in out)


def test_a_missing_span_is_text_or_raised_or_made(setup: Setup, tmp_path: Path) -> None:
    index = MemoryIndex.create(tmp_path / "kb", setup.compressor.spec, vector_size=384,
                               retrieval_encoder=setup.embedding.model_name)
    chat = SpanChat(setup.rag.backbone, index)
    found = [NodeWithScore(node=node("A text without a span.", "d"), score=0.5)]
    assert not isinstance(SpanPostprocessor(chat).postprocess_nodes(found)[0].node, SpanNode)
    with pytest.raises(InputError, match=r"1 have none, first .* run SpanPrecompress on them, or use"):
        SpanPostprocessor(chat, on_missing="raise").postprocess_nodes(found)
    with pytest.raises(InputError, match="on_missing='compress' needs a compressor and an embed_model"):
        SpanPostprocessor(chat, on_missing="compress")
    making = SpanPostprocessor(chat, on_missing="compress", compressor=setup.compressor, embed_model=setup.embedding)
    assert isinstance(making.postprocess_nodes(found)[0].node, SpanNode)
    assert len(index) == 1
    chat.close()


def test_a_damaged_span_is_text_or_raised_and_takes_no_other_with_it(setup: Setup) -> None:
    with DamagedIndex.open(setup.rag.memory.path, read_only=True) as damaged:
        found = setup.retrieved(QUESTIONS[0])
        damaged.lost = found[1].node.node_id
        chat = SpanChat(setup.rag.backbone, damaged)
        out = SpanPostprocessor(chat).postprocess_nodes(found)
        assert [isinstance(n.node, SpanNode) for n in out] == [True, False, True]
        with pytest.raises(IndexDamagedError, match="not those that were written"):
            SpanPostprocessor(chat, on_error="raise").postprocess_nodes(found)


@pytest.fixture
def spoiled(setup: Setup, tmp_path: Path) -> Iterator[tuple[SpanChat, list[NodeWithScore]]]:
    """Nodes with references, of which the second span has lost a bit on the disk since."""
    index = MemoryIndex.create(tmp_path / "kb", setup.compressor.spec, vector_size=8, retrieval_encoder="axes",
                               codec="exact")
    SpanVectorStore(index, setup.compressor).add([node(f"The {n} text of three.", n, vector=i)
                                                  for i, n in enumerate(("first", "second", "third"))])
    found = SpanVectorStore(index).get_nodes()
    span = index.get([chunk_id(found[1])])[0].span
    assert isinstance(span, SoftSpan)
    lost = span.embeds.numpy().tobytes()[:64]
    chat = SpanChat(setup.rag.backbone, index)
    nodes = SpanPostprocessor(chat, scope="alice").postprocess_nodes([NodeWithScore(node=n, score=0.5) for n in found])
    (file,) = [f for f in (index.path / "spans.lance" / "data").rglob("*.lance") if lost in f.read_bytes()]
    content = bytearray(file.read_bytes())
    content[content.index(lost) + 5] ^= 1
    file.write_bytes(bytes(content))
    index.close()
    with SpanChat(setup.rag.backbone, MemoryIndex.open(index.path, read_only=True),
                  references=chat.references) as reader:
        yield reader, nodes


async def test_a_span_damaged_after_retrieval_is_text_or_raised_by_model_and_synthesizer(
        spoiled: tuple[SpanChat, list[NodeWithScore]], caplog: pytest.LogCaptureFixture) -> None:
    chat, nodes = spoiled
    llm = RecordingLLM(chat, scope="alice", max_tokens=2)
    strict = RecordingLLM(chat, scope="alice", max_tokens=2, on_error="raise")
    response = SpanSynthesizer(llm).synthesize("Which?", nodes)
    assert (len(llm.spliced), llm.rejected) == (2, {"damaged": 1})
    assert "The second text of three." in llm.text
    assert [n.node.node_id for n in response.source_nodes] == [n.node.node_id for n in nodes]
    assert "a span stays text: chunk" in caplog.text
    with pytest.raises(IndexDamagedError, match="do not match their checksum"):
        SpanSynthesizer(strict).synthesize("Which?", nodes)
    with pytest.raises(IndexDamagedError, match="do not match their checksum"):
        await SpanSynthesizer(strict).asynthesize("Which?", nodes)
    with pytest.raises(IndexDamagedError, match="do not match their checksum"):
        SpanSynthesizer(strict, streaming=True).synthesize("Which?", nodes)
    with pytest.raises(IndexDamagedError, match="do not match their checksum"):
        get_response_synthesizer(llm=strict, response_mode="compact").synthesize("Which?", nodes)


class Unreachable(EncoderEmbedding):
    """Embeddings of a service that does not answer when asked to embed a certain text."""

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        if any("unlucky" in text for text in texts):
            raise ConnectionError("the embedding service does not answer")
        return super()._get_text_embeddings(texts)


def test_what_cannot_be_compressed_now_stays_text_and_takes_no_other_with_it(
        setup: Setup, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    index = MemoryIndex.create(tmp_path / "kb", setup.compressor.spec, vector_size=384,
                               retrieval_encoder=setup.embedding.model_name)
    chat = SpanChat(setup.rag.backbone, index)
    found = [NodeWithScore(node=node(text, text, n=i), score=i / 10)
             for i, text in enumerate(("An unlucky text.", "A lucky one.", "Another one."))]
    making = {"on_missing": "compress", "compressor": setup.compressor, "embed_model": Unreachable(setup.rag.encoder)}
    out = SpanPostprocessor(chat, **making).postprocess_nodes(found)  # type: ignore[arg-type]
    assert [isinstance(n.node, SpanNode) for n in out] == [False, True, True]
    assert [(n.node.node_id, n.score, n.node.metadata) for n in out] == [
        (n.node.node_id, n.score, n.node.metadata) for n in found]
    assert "the embedding service does not answer" in caplog.text
    with pytest.raises(ConnectionError, match="does not answer"):
        SpanPostprocessor(chat, on_error="raise", **making).postprocess_nodes(found)  # type: ignore[arg-type]
    chat.close()


@pytest.mark.parametrize("part", [SpanPostprocessor, CtxcompLLM])
def test_what_to_do_on_an_error_is_one_of_two(setup: Setup, part: type) -> None:
    with pytest.raises(ValueError, match="Input should be 'text' or 'raise'"):
        part(setup.chat, on_error="ignore")


@pytest.mark.parametrize("part", [SpanPostprocessor, CtxcompLLM])
def test_a_folder_in_the_place_of_a_chat_is_answered_with_what_to_type(part: type) -> None:
    with pytest.raises(InputError, match=r"expected a SpanChat, got str 'kb'; open one with SpanChat.open\(folder\)"):
        part("kb")


def test_a_chunk_deleted_after_retrieval_is_read_as_text(setup: Setup, empty) -> None:  # type: ignore[no-untyped-def]
    empty.add([node("A fleeting text about lighthouses.", "d", vector=1), node("A lasting text.", "e", vector=2)])
    chat = SpanChat(setup.rag.backbone, empty.client)
    nodes = SpanPostprocessor(chat).postprocess_nodes([NodeWithScore(node=n) for n in empty.get_nodes()])
    empty.delete("d")
    llm = RecordingLLM(chat, max_tokens=2)
    SpanSynthesizer(llm).synthesize("What?", nodes)
    assert len(llm.spliced) == 1
    assert llm.rejected == {"deleted": 1}
    assert "fleeting" in llm.text


def test_misuse_of_the_model_is_answered_with_a_sentence(setup: Setup) -> None:
    llm = setup.llm()
    with pytest.raises(PromptError, match="this model has no setting 'temprature'; expected some of max_tokens"):
        llm.complete("x", temprature=1)
    with pytest.raises(InputError, match="max_new_tokens of at least 1, got 0"):
        CtxcompLLM(setup.chat, max_tokens=0)
    with pytest.raises(PromptError, match="expected messages of text and spans, got a ImageBlock"):
        llm.chat([ChatMessage(role="user", blocks=[ImageBlock(url="http://localhost/x.png")])])
    with pytest.raises(PromptError, match="expected a message with text or spans, got none"):
        llm.chat([])
    with pytest.raises(InputError, match="expected a CtxcompLLM, which reads spans, got MockLLM"):
        SpanSynthesizer(MockLLM())  # type: ignore[arg-type]
    for part in (CtxcompLLM, SpanPostprocessor):
        with pytest.raises(InputError, match=r"got an empty one; use new_scope\(\)"):
            part(setup.chat, scope="")
    with pytest.raises(InputError, match="has no prompt 'text_qa_template' to replace"):
        setup.synthesizer().update_prompts({"text_qa_template": None})  # type: ignore[dict-item]


def test_too_much_context_is_refused_with_the_number_of_positions(setup: Setup) -> None:
    long = [NodeWithScore(node=node("word " * 1500, str(i))) for i in range(3)]
    with pytest.raises(PromptError, match="positions, but the decoder 'embedded' was made for 2048"):
        setup.synthesizer().synthesize("why?", long)


def test_no_nodes_give_the_frameworks_empty_response(setup: Setup) -> None:
    assert setup.synthesizer().synthesize("why?", []).response == "Empty Response"


def test_completion_and_chat_agree_and_a_stop_string_ends_both(setup: Setup) -> None:
    llm = setup.llm()
    text = llm.complete("The lighthouse").text
    assert llm.chat([ChatMessage(role="user", content="The lighthouse")]).message.content == text
    assert "".join(r.delta or "" for r in llm.stream_complete("The lighthouse")) == text
    assert llm.complete("The lighthouse", stop=(text[-1],)).text == text[: text.index(text[-1])].strip()
    assert llm.metadata.context_window == 2048
    assert llm.to_payload().keys() <= {"class_name", *llm.metadata.model_dump()}
