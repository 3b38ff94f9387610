"""Training of compressors; the decoder stays frozen."""

from ctxcomp_rag.training.bracketed import (
    BracketedAutoencoding,
    BracketedContinuation,
    BracketedQuestion,
    summed_bracketed_loss,
)
from ctxcomp_rag.training.examples import Example, passages
from ctxcomp_rag.training.forward import summed_loss, training_loss
from ctxcomp_rag.training.objectives import (
    AutoencodingObjective,
    ContinuationObjective,
    InstructionObjective,
    SampleIds,
    TrainingSample,
)
from ctxcomp_rag.training.trainer import Source, Stage, Trainer

__all__ = ["AutoencodingObjective", "BracketedAutoencoding", "BracketedContinuation", "BracketedQuestion",
           "ContinuationObjective", "Example", "InstructionObjective", "SampleIds", "Source", "Stage", "Trainer",
           "TrainingSample", "passages", "summed_bracketed_loss", "summed_loss", "training_loss"]
