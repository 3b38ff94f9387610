"""Metadata filters of llama_index over nodes."""

from __future__ import annotations

from typing import Any

from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores.types import FilterCondition, FilterOperator, MetadataFilters
from llama_index.core.vector_stores.utils import build_metadata_filter_fn

from ctxcomp_rag import InputError

_DOCUMENT_KEYS = ("document_id", "doc_id", "ref_doc_id")


def matches(node: BaseNode, filters: MetadataFilters | None) -> bool:
    """Whether a node passes; filters may be nested, the keys document_id, doc_id and ref_doc_id mean its document."""
    if filters is None or not filters.filters:
        return True
    metadata: dict[str, Any] = {**dict.fromkeys(_DOCUMENT_KEYS, node.ref_doc_id), **node.metadata}
    verdicts = []
    for each in filters.filters:
        if isinstance(each, MetadataFilters):
            verdicts.append(matches(node, each))
            continue
        try:
            one = MetadataFilters(filters=[each])
            verdicts.append(build_metadata_filter_fn(lambda _: metadata, one)(node.node_id))
        except TypeError as error:
            raise InputError(f"the filter {each.key!r} {each.operator.value} {each.value!r} cannot be applied to the "
                             f"value {metadata.get(each.key)!r} of node {node.node_id!r} ({error})") from error
    condition = filters.condition or FilterCondition.AND
    if condition == FilterCondition.NOT:
        return not any(verdicts)
    return any(verdicts) if condition == FilterCondition.OR else all(verdicts)


def equalities(filters: MetadataFilters | None) -> dict[str, Any]:
    """Conditions on text that every match fulfils: what the index itself can look up before it searches."""
    if filters is None or filters.condition not in (None, FilterCondition.AND):
        return {}
    return {f.key: f.value for f in filters.filters
            if not isinstance(f, MetadataFilters) and f.operator == FilterOperator.EQ and isinstance(f.value, str)
            and f.key not in _DOCUMENT_KEYS}


__all__ = ["equalities", "matches"]
