"""How near the encoder of an offline job comes to the machine's matrix products, as a ratio within one run.

    python benchmarks/encoder_rate.py --shape 135m --texts 8 --repeats 5

Random weights, one thread, CPU time. In every repeat a large matrix product and compressing the texts take turns.
Counted are the operations that the decoder's body needs for as many rows (matrix products and attention, no head, no
LoRA): what the compressor does beyond them lowers its rate. The type is the one whose matrix products are faster here.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

from ctxcomp_rag.compressors.icae import ICAECompressor, ICAEConfig
from ctxcomp_rag.evaluation.bench.clock import one_thread
from ctxcomp_rag.evaluation.bench.offline import timed
from ctxcomp_rag.evaluation.bench.shapes import load_shape
from ctxcomp_rag.evaluation.provenance import write_result

GEMM_SIZE = 2048


def gemm_rate(dtype: torch.dtype, size: int = GEMM_SIZE) -> float:
    """FLOP/s of a product of two square matrices."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    return 2 * size**3 / timed(lambda: a @ b)[1]


def faster_dtype() -> torch.dtype:
    # a small product: where bfloat16 has no instructions it is a hundred times slower
    return max((torch.float32, torch.bfloat16), key=lambda dtype: gemm_rate(dtype, 512))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="135m")
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="of a text")
    parser.add_argument("--factor", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "encoder_rate.json")
    args = parser.parse_args()
    one_thread()
    dtype = faster_dtype()
    backbone = load_shape(args.shape)
    backbone.model.to(dtype)
    config = ICAEConfig(slots="proportional", slot_positions="spread", segment_tokens=args.tokens,
                        compression_factor=args.factor)
    compressor = ICAECompressor(backbone, config)
    vocabulary = int(backbone.config.vocab_size)
    texts = torch.randint(vocabulary, (args.texts, args.tokens), generator=torch.Generator().manual_seed(0)).tolist()
    rows = torch.zeros(1, args.tokens + config.num_slots(args.tokens, args.factor), dtype=torch.long)
    gemm, encoder = [], []
    with torch.inference_mode():
        with FlopCounterMode(display=False) as counter:
            backbone.model.base_model(rows, use_cache=False)
        needed = args.texts * counter.get_total_flops()
        compressor.encode(texts[:1])
        for _ in range(args.repeats):
            gemm.append(gemm_rate(dtype))
            encoder.append(needed / timed(lambda: compressor.encode(texts))[1])
    shares = [e / g for e, g in zip(encoder, gemm, strict=True)]
    result = {"shape": args.shape, "dtype": str(dtype).removeprefix("torch."), "factor": args.factor,
              "gemm_gflops": [round(g / 1e9, 1) for g in gemm], "encoder_gflops": [round(e / 1e9, 1) for e in encoder],
              "share_of_gemm": round(median(shares), 3),
              "tokens_per_cpu_second": round(median(encoder) / needed * args.texts * args.tokens, 1)}
    print(result)
    write_result(args.out, result)


if __name__ == "__main__":
    main()
