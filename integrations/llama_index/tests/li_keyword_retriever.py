"""A keyword retriever that is not ours: it knows nothing of spans."""

from __future__ import annotations

from collections.abc import Sequence

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode


class KeywordRetriever(BaseRetriever):
    """Nodes that share a word with the query, those that share most first; the score is how many they share."""

    def __init__(self, nodes: Sequence[TextNode], top_k: int = 3) -> None:
        super().__init__()
        self._nodes, self._top_k = list(nodes), top_k

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        words = set(query_bundle.query_str.lower().split())
        found = [NodeWithScore(node=n, score=float(len(words & set(n.text.lower().split())))) for n in self._nodes]
        return [n for n in sorted(found, key=lambda n: -(n.score or 0)) if n.score][: self._top_k]
