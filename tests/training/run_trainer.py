"""A short ICAE training run of the tiny decoder, into the folder that is named; run alone or by torchrun."""

import sys

import torch

from ctxcomp_rag.compressors.icae import ICAECompressor, ICAEConfig
from ctxcomp_rag.training import (
            AutoencodingObjective,
            Example,
            InstructionObjective,
            Source,
            Stage,
            Trainer,
            summed_loss,
)
from tests.tiny_models import tiny_backbone

torch.manual_seed(6)
compressor = ICAECompressor(tiny_backbone("llama"), ICAEConfig(num_memory_tokens=4, segment_tokens=16, lora_rank=2))
examples = [Example(f"The lamp number {i} is " + "very " * i + "red.", question="What?", answer=f" {i}")
            for i in range(5)]
sources = (Source(AutoencodingObjective(compressor), examples), Source(InstructionObjective(compressor), examples))
Trainer(compressor, lambda samples: summed_loss(compressor, samples), [Stage("one", sources, 3, 4, 0.01)], sys.argv[1],
        optimizers=lambda parameters, rate: [torch.optim.SGD(parameters.values(), lr=rate)]).run()
