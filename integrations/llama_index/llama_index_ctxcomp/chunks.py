"""Nodes to chunks and back. A chunk is named by its document, place and text, and so is the node that it holds.

Metadata names no chunk: whoever can write metadata could otherwise choose another document's span.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llama_index.core.schema import BaseNode, MetadataMode, NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.vector_stores.utils import metadata_dict_to_node, node_to_metadata_dict

from ctxcomp_rag import Chunk, InputError

NODE_ID = "_node_id"
_RESERVED = (NODE_ID, "_node_content", "_node_type", "document_id", "doc_id", "ref_doc_id")


def has_text(node: BaseNode) -> bool:
    """Whether a span can stand for the node."""
    return isinstance(node, TextNode) and bool(node.text.strip())


def chunk_id(node: BaseNode) -> str:
    """Id of the chunk of a node, whichever store it comes from."""
    return _chunk(node, 0, {}).id


def chunk_of(node: BaseNode, count: Callable[[str], int]) -> Chunk:
    """The chunk of a node, with the whole node in its metadata so that a store can give it back.

    Args:
        count: decoder tokens of a text.
    """
    if not has_text(node):
        raise InputError(f"expected nodes with text, but the {type(node).__name__} {node.node_id!r} has none; leave it "
                         "out, or keep it in another vector store")
    everything = node_to_metadata_dict(node, remove_text=True)
    flat = {k: v for k, v in everything.items() if v is None or isinstance(v, str | int | float | bool)}
    return _chunk(node, count(node.get_content(metadata_mode=MetadataMode.NONE)), {**flat, NODE_ID: node.node_id})


def node_of(chunk: Chunk) -> BaseNode:
    """The node that a chunk was made of; for a chunk that was made elsewhere, a node of the same text and place."""
    if NODE_ID in chunk.metadata:
        try:
            node = metadata_dict_to_node(dict(chunk.metadata), text=chunk.text)
        except (ValueError, TypeError):
            node = None
        # not believed where it says another document or place: metadata may have been written by anybody
        if node is not None and chunk_id(node) == chunk.id and node.node_id == chunk.metadata[NODE_ID]:
            return node
    metadata = {k: v for k, v in chunk.metadata.items() if k not in _RESERVED}
    source = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id=chunk.document_id)}
    return TextNode(id_=chunk.id, text=chunk.text, start_char_idx=chunk.start, end_char_idx=chunk.end,
                    metadata=metadata, relationships=source)


def _chunk(node: BaseNode, num_tokens: int, metadata: Mapping[str, Any]) -> Chunk:
    text = node.get_content(metadata_mode=MetadataMode.NONE)
    start = (node.start_char_idx if isinstance(node, TextNode) else None) or 0
    return Chunk(node.ref_doc_id or node.node_id, text, start, start + len(text), num_tokens, metadata)


__all__ = ["NODE_ID", "chunk_id", "chunk_of", "has_text", "node_of"]
