"""Train a PCC compressor for a small decoder: an encoder with the decoder's own weights and LoRA, and a converter.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 recipes/pcc/train.py \
        --data DATA --out runs/pcc

DATA holds `squad-train-v1.1.json.xz`. Run the command again after an interruption: it goes on from the last checkpoint.
Stages (Dai et al., ACL 2025): short texts repeated at 4x, the three special tokens included, which stay as they are
from then on; reconstruction and continuation drawn half and half; questions. Not the paper's: slots are spread over the
positions of the text, so that one compressor serves every factor it meets in training, and a quarter of the last stage
goes on with reconstruction. With `--begin DIR` the encoder begins as that of an ICAE compressor. Then OUT/pcc is the
compressor and OUT/home_ground.json its measurement, in the table of the other methods.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from texts import fictional, squad
from tqdm import tqdm

from ctxcomp_rag.backbone import EMBEDDED_MODEL, Backbone, load_frozen
from ctxcomp_rag.compressors.icae import ICAECompressor
from ctxcomp_rag.compressors.pcc import Converter, Encoder, PCCCompressor, PCCConfig, load_encoder
from ctxcomp_rag.evaluation.home_ground import evaluate_home_ground
from ctxcomp_rag.evaluation.provenance import write_result
from ctxcomp_rag.retrieval import load_retrieval_encoder
from ctxcomp_rag.training import (
    BracketedAutoencoding,
    BracketedContinuation,
    BracketedQuestion,
    Example,
    Source,
    Stage,
    Trainer,
    passages,
    summed_bracketed_loss,
)
from ctxcomp_rag.training.optimizers import muon

SHORT = 4  # source tokens per slot unless drawn otherwise; the warm-up's texts are this much shorter than a segment
FROZEN = ("special_rows",)
Objective = BracketedAutoencoding | BracketedContinuation | BracketedQuestion
FACTORS = {4.0: 0.5, 8.0: 0.3, 16.0: 0.2}  # source tokens per slot: how often it is drawn


def make_compressor(backbone: Backbone, model: str, *, segment_tokens: int, rank: int, seed: int,
                    begin: ICAECompressor | None = None) -> PCCCompressor:
    """A PCC compressor whose encoder is the decoder itself with LoRA on everything; with `begin`, it begins as the
    encoder of that compressor of the same decoder, and has its rank."""
    torch.manual_seed(seed)
    rank = begin.config.lora_rank if begin else rank
    encoder = load_encoder(model, large=True, lora_rank=rank, lora_alpha=rank, lora_dropout=0.0)
    special_rows = begin_as(encoder, begin) if begin else None
    config = PCCConfig(segment_tokens, segment_tokens // SHORT, encoder=model, slot_positions="spread")
    return PCCCompressor(backbone, encoder, config, converter=passing_on(encoder, backbone.hidden_size),
                         special_rows=special_rows)


def begin_as(encoder: Encoder, icae: ICAECompressor) -> torch.Tensor:
    """Give an encoder the LoRA matrices and memory tokens of an ICAE compressor.

    Returns:
        (3, hidden_size): <mem>, <ae>, </mem> to begin with; the brackets as the mean token.
    """
    own, scale = encoder.model.state_dict(), icae.config.lora_alpha / icae.config.lora_rank  # that of ours is 1
    slots = icae.config.num_memory_tokens
    rows = icae.memory_tokens.detach().float()
    with torch.no_grad():
        for name, tensor in icae.encoder.state_dict().items():
            if "lora_" in name:
                own[name].copy_(scale * tensor if "lora_B" in name else tensor)
        table = encoder.body.get_input_embeddings().weight
        mean = table[: encoder.memory_ids[0]].mean(0)
        for number, row in enumerate(encoder.memory_ids):
            table[row] = rows[number % slots]
    return torch.stack([mean, rows[slots], mean])


def passing_on(encoder: Encoder, decoder_size: int) -> Converter:
    """A converter that begins by passing on what it reads, as far as both sizes reach.

    From random matrices the slots say nothing to the decoder, and the loss stays where it would be without them.
    GELU(x) is about x above 2: the states go in halved and moved up by 3, and come out moved back and doubled.
    """
    converter = Converter(encoder.hidden_size, decoder_size)
    with torch.no_grad():
        states = encoder.body(input_ids=torch.arange(64)[None]).last_hidden_state
        converter.norm.weight.fill_(float(states.square().mean().sqrt()))  # the scale that the norm takes away
        for layer, factor, bias in ((converter.dense_in, 0.5, 3.0), (converter.dense_out, 2.0, -6.0)):
            layer.weight.copy_(factor * torch.eye(*layer.weight.shape))
            layer.bias.fill_(bias)
    return converter


def make_stages(compressor: PCCCompressor, args: argparse.Namespace) -> list[Stage]:
    """The paper's two stages and the fine-tuning, over fictional documents and SQuAD train."""
    tokenizer, tokens = compressor.encoder.tokenizer, compressor.config.segment_tokens
    documents, asked = fictional(args.documents, args.seed)
    paragraphs, asked_squad = squad(args.data / "squad-train-v1.1.json.xz", tokenizer, tokens,
                                    args.paragraphs)
    joined = [" ".join(documents[i : i + 4]) for i in range(0, len(documents), 4)]
    # pieces that another follows: a continuation needs one, and the weights that come with the package had no others
    short, whole = ([p for p in passages(texts, tokenizer, longest) if p.continuation] for texts, longest in (
        ([*documents, *paragraphs], tokens // SHORT), ([*joined, *paragraphs], tokens)))

    def drawn(kind: type[Objective], examples: Sequence[Example], weight: float) -> list[Source]:
        return [Source(kind(compressor, factor), examples, weight * often) for factor, often in FACTORS.items()]

    every = {"batch_size": args.batch_size, "learning_rate": args.rate, "warmup_steps": args.rate_warmup}
    pretrain = [*drawn(BracketedAutoencoding, whole, 0.5), *drawn(BracketedContinuation, whole, 0.5)]
    questions = [*drawn(BracketedQuestion, asked, 0.5), *drawn(BracketedQuestion, asked_squad, 0.25),
                 *drawn(BracketedAutoencoding, whole, 0.25)]
    return [Stage("warm-up", (Source(BracketedAutoencoding(compressor), short),), args.warm_up, **every),
            Stage("pretrain", tuple(pretrain), args.pretrain, frozen=FROZEN, **every),
            Stage("questions", tuple(questions), args.questions, frozen=FROZEN, **every)]


def save_halved(compressor: PCCCompressor, folder: Path) -> None:
    """Round the encoder to bf16 and write it so: half the bytes, and what is loaded is what was measured."""
    with torch.no_grad():
        for parameter in compressor.encoder.model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    compressor.save_pretrained(folder)
    weights = folder / "encoder" / "adapter_model.safetensors"
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in load_file(weights).items()}, weights,
              metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with squad-train-v1.1.json.xz")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint, log, compressor and result")
    parser.add_argument("--model", default=EMBEDDED_MODEL, help="folder of the decoder [default: the embedded one]")
    parser.add_argument("--segment-tokens", type=int, default=112)
    parser.add_argument("--rank", type=int, default=64, help="of the LoRA matrices")
    parser.add_argument("--begin", type=Path, help="folder of an ICAE compressor of the decoder to begin as "
                                                   "[default: as the decoder itself]")
    parser.add_argument("--documents", type=int, default=4000, help="fictional documents to train on")
    parser.add_argument("--paragraphs", type=int, default=1500, help="SQuAD paragraphs to train on, at most")
    parser.add_argument("--warm-up", type=int, default=200, help="steps on short texts")
    parser.add_argument("--pretrain", type=int, default=500, help="steps of reconstruction and continuation")
    parser.add_argument("--questions", type=int, default=600, help="steps on questions")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--rate-warmup", type=int, default=50, help="steps at the beginning of a stage")
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure", type=int, default=300, help="held-out documents to measure with")
    args = parser.parse_args()
    backbone = load_frozen(args.model, dtype=torch.float32)
    compressor = make_compressor(backbone, args.model, segment_tokens=args.segment_tokens, rank=args.rank,
                                 seed=args.seed,
                                 begin=args.begin and ICAECompressor.from_pretrained(args.begin, backbone))
    trainer = Trainer(compressor, partial(summed_bracketed_loss, compressor), make_stages(compressor, args), args.out,
                      seed=args.seed, optimizers=muon, save_every=args.save_every)
    main_process = trainer.accelerator.is_main_process
    with tqdm(unit="step", disable=not main_process, mininterval=10) as bar:
        def show(record: dict[str, object]) -> None:
            bar.update()
            bar.set_postfix_str(f"{record['stage']} {record['step']}/{record['steps']} loss {record['loss']:.3f}")

        trainer.run(show)
    if main_process:
        save_halved(compressor, args.out / "pcc")
        report = evaluate_home_ground(compressor, load_retrieval_encoder(), documents=args.measure)
        write_result(args.out / "home_ground.json", asdict(report))
        print(f"exact match: {report.exact_match}; reconstruction BLEU: {report.reconstruction_bleu}")


if __name__ == "__main__":
    main()
