"""Training of compressors; the decoder stays frozen."""

from ctxcomp_rag.training.forward import training_loss
from ctxcomp_rag.training.objectives import (
    AutoencodingObjective,
    ContinuationObjective,
    InstructionObjective,
    SampleIds,
    TrainingSample,
)

__all__ = ["AutoencodingObjective", "ContinuationObjective", "InstructionObjective", "SampleIds", "TrainingSample",
           "training_loss"]
