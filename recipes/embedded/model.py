"""A Llama written for fast training on a CPU, with the ICAE encoder folded into the same weights.

The arithmetic equals `transformers.LlamaForCausalLM` (a test compares the logits); what differs is that
projections are fused, the LoRA of the encoder is merged before the matrix product (differentiably, so
that its cost does not grow with the number of tokens), and logits are computed only where there is a label.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from packed import Packing
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes of the decoder and of its compressor. Smaller heads copy worse: what a head carries has to name a token."""

    vocab_size: int = 4096
    hidden_size: int = 256
    num_layers: int = 6
    num_heads: int = 4
    intermediate_size: int = 704
    max_positions: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    lora_rank: int = 64
    lora_alpha: int = 128

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    def rotary_frequencies(self) -> Tensor:
        return self.rope_theta ** (-torch.arange(0, self.head_dim, 2).float() / self.head_dim)


Edit = Callable[[Tensor], Tensor]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def owner(projection: str) -> str:
    """The module of a Llama layer that a projection belongs to."""
    return "self_attn" if projection in PROJECTIONS[:4] else "mlp"


class Block(nn.Module):
    """One decoder layer: weights are kept apart (one optimizer matrix each) and fused on the fly."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        d, f = shape.hidden_size, shape.intermediate_size
        sizes = dict.fromkeys(PROJECTIONS[:4], (d, d))
        sizes |= {"gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)}
        self.weight = nn.ParameterDict({n: nn.Parameter(torch.randn(s) * 0.02) for n, s in sizes.items()})
        nn.init.zeros_(self.weight["o_proj"])  # residual branches start at zero: stable at a high learning rate
        nn.init.zeros_(self.weight["down_proj"])
        r = shape.lora_rank
        self.lora_a = nn.ParameterDict({n: nn.Parameter(torch.randn(r, s[1]) * s[1] ** -0.5) for n, s in sizes.items()})
        self.lora_b = nn.ParameterDict({n: nn.Parameter(torch.zeros(s[0], r)) for n, s in sizes.items()})
        self.input_norm = nn.Parameter(torch.ones(d))
        self.post_norm = nn.Parameter(torch.ones(d))

    def matrices(self, encoder: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Fused (qkv, o, gate-up, down); with `encoder`, LoRA merged in."""
        w = dict(self.weight.items())
        if encoder:
            scale = self.shape.lora_alpha / self.shape.lora_rank
            w = {n: torch.addmm(w[n], self.lora_b[n], self.lora_a[n], alpha=scale) for n in PROJECTIONS}
        qkv = torch.cat([w["q_proj"], w["k_proj"], w["v_proj"]])
        return qkv, w["o_proj"], torch.cat([w["gate_proj"], w["up_proj"]]), w["down_proj"]

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, packing: Packing, encoder: bool,
                tap: list[tuple[Tensor, Tensor]] | None = None, kept: Tensor | None = None,
                edit: Edit | None = None) -> Tensor:
        """Hidden states (tokens, hidden_size), or those at `kept`; `tap` takes the queries and keys, each (tokens,
        heads, head_dim); `edit` returns what to go on with in the place of queries, keys and values (tokens, 3, heads,
        head_dim) before they are rotated."""
        s = self.shape
        qkv_w, o_w, gate_up_w, down_w = self.matrices(encoder)
        n, d = x.shape
        h = F.rms_norm(x, (d,), self.input_norm, s.rms_norm_eps)
        qkv = F.linear(h, qkv_w).view(n, 3, s.num_heads, s.head_dim)
        qk, v = (edit(qkv) if edit else qkv).split((2, 1), dim=1)
        one, two = qk.chunk(2, dim=-1)
        q, k = (qk * cos + torch.cat([-two, one], dim=-1) * sin).unbind(1)
        if tap is not None:
            tap.append((q, k))
        a = packing.attend(q, k, v[:, 0])
        if kept is not None:
            x, a = x.index_select(0, kept), a.index_select(0, kept)
        x = x + F.linear(a, o_w)
        h = F.rms_norm(x, (d,), self.post_norm, s.rms_norm_eps)
        gate, up = F.linear(h, gate_up_w).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, down_w)


class Model(nn.Module):
    """Decoder + ICAE compressor in one set of weights; `encode` uses LoRA, `decode` does not."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        d = shape.hidden_size
        self.embed = nn.Parameter(torch.randn(shape.vocab_size, d) * 0.02)
        self.special = nn.Parameter(torch.randn(2, d) * 0.02)  # rows: memory token, [AE]
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.num_layers))
        self.final_norm = nn.Parameter(torch.ones(d))
        angle = torch.outer(torch.arange(shape.max_positions).float(), shape.rotary_frequencies()).repeat(1, 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def run(self, x: Tensor, positions: Tensor, packing: Packing, where: Tensor, encoder: bool,
            tap: list[tuple[Tensor, Tensor]] | None = None, states: list[Tensor] | None = None,
            edits: Sequence[Edit] | None = None) -> Tensor:
        """Hidden states (len(where), hidden_size) of the tokens at `where`; `states` takes those of all tokens, of all
        layers but the last; `edits` are the layers' (see Block)."""
        cos = self.cos[positions][:, None, None, :]
        sin = self.sin[positions][:, None, None, :]
        for number, block in enumerate(self.blocks):
            last = block is self.blocks[-1]
            x = block(x, cos, sin, packing, encoder, tap, where if last else None, edits[number] if edits else None)
            if states is not None and not last:
                states.append(x)
        return F.rms_norm(x, (x.shape[-1],), self.final_norm, self.shape.rms_norm_eps)

    def encode(self, ids: Tensor, positions: Tensor, packing: Packing, where: Tensor) -> Tensor:
        """Slots (len(where), hidden_size): `ids` (tokens,) uses vocab_size for the memory token."""
        table = torch.cat([self.embed, self.special[:1]])
        return self.run(F.embedding(ids, table), positions, packing, where, encoder=True)

    def decode(self, ids: Tensor, slots: Tensor, slot: Tensor, positions: Tensor, packing: Packing, where: Tensor,
               tap: list[tuple[Tensor, Tensor]] | None = None, states: list[Tensor] | None = None) -> Tensor:
        """Logits (len(where), vocab) at `where`; id vocab_size + 1 is [AE]; row `slot` of `slots` enters where it is
        not -1; `tap` takes what Block says, of every layer, `states` what `run` says."""
        x = F.embedding(ids, torch.cat([self.embed, self.special]))
        if slots.shape[0]:
            x = torch.where((slot >= 0)[:, None], slots[slot.clamp(min=0)], x)
        return F.linear(self.run(x, positions, packing, where, False, tap, states), self.embed)

    def compressor_parameters(self) -> list[nn.Parameter]:
        return [p for n, p in self.named_parameters() if "lora_" in n or n == "special"]
