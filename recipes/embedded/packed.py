"""Rows laid end to end: whatever works on one token at a time sees no padding, and attention takes each row by itself.

A row is a context, which every later token of the row sees, followed by branches, which see the context and themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor


class Branches:
    """The branches of one row, side by side: `gather` lays them out as (branches, longest), `real` takes the tokens
    back out, `bias` (longest, context + longest) keeps each from looking ahead."""

    def __init__(self, context: int, lengths: Sequence[int]) -> None:
        longest = max(lengths)
        self.shape = (len(lengths), longest)
        firsts = accumulate(lengths, initial=0)
        # a short branch is filled up with its last token
        self.gather = torch.tensor([f + min(i, n - 1) for f, n in zip(firsts, lengths, strict=False)
                                    for i in range(longest)])
        self.real = torch.tensor([b * longest + i for b, n in enumerate(lengths) for i in range(n)])
        ahead = torch.full((longest, longest), -1e9).triu(1)
        self.bias = torch.cat([torch.zeros(longest, context), ahead], dim=1)

    def side_by_side(self, x: Tensor) -> Tensor:
        """(tokens, heads, head_dim) -> (branches, heads, longest, head_dim)."""
        return x.index_select(0, self.gather).view(*self.shape, *x.shape[1:]).transpose(1, 2)


class Packing:
    """Where rows lie among all tokens; each row is (tokens of its context, lengths of its branches)."""

    def __init__(self, rows: Sequence[tuple[int, Sequence[int]]]) -> None:
        self.begins = [0, *accumulate(context + sum(branches) for context, branches in rows)]
        self.pieces = [n for context, branches in rows for n in (context, sum(branches))]
        self.branches = [Branches(context, lengths) if lengths else None for context, lengths in rows]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention (tokens, heads * head_dim) of queries, keys and values, each (tokens, heads, head_dim)."""
        width = q.shape[1] * q.shape[2]
        pieces = list(zip(*(x.split(self.pieces) for x in (q, k, v)), strict=True))
        outputs = []
        for context, asked, branches in zip(pieces[::2], pieces[1::2], self.branches, strict=True):
            of_context = [x.transpose(0, 1)[None] for x in context]
            seen = F.scaled_dot_product_attention(*of_context, is_causal=True)
            outputs.append(seen[0].transpose(0, 1).reshape(-1, width))
            if branches is not None:
                query, *own = (branches.side_by_side(x) for x in asked)
                key, value = (torch.cat([shared.expand(len(mine), -1, -1, -1), mine], dim=2)
                              for shared, mine in zip(of_context[1:], own, strict=True))
                seen = F.scaled_dot_product_attention(query, key, value, attn_mask=branches.bias)
                outputs.append(seen.transpose(1, 2).reshape(-1, width).index_select(0, branches.real))
        return torch.cat(outputs)
