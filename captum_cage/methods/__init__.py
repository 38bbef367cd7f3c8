"""Base methods that the field has and Captum lacks, as Captum attribution classes."""

from captum_cage.methods.attention_maps import (
    AttentionRollout,
    AttentionXIntegratedGradients,
    MeanAttention,
    ValueWeightedAttention,
)
from captum_cage.methods.attnlrp import AttnLRP
from captum_cage.methods.capability import Capability
from captum_cage.methods.flow import IFR
from captum_cage.methods.gradient_shap import EmbeddingGradientShap
from captum_cage.methods.method import TokenMethod, UnitMethod
from captum_cage.methods.probing import ContextLengthProbing, WeightedLogRatio
from captum_cage.methods.reagent import OneShotReAGent, ReAGent
from captum_cage.methods.receiver import ReceiverHeads, receiver_heads
from captum_cage.methods.resampling import (
    CounterfactualResampling,
    ResampledStep,
    ResamplingResult,
    Sample,
)
from captum_cage.methods.similarity import TextSimilarityProvider
from captum_cage.methods.subsets import CLime, ContextCite, LShap
from captum_cage.methods.suppression import AttentionSuppression

__all__ = [
    "IFR",
    "AttentionRollout",
    "AttentionSuppression",
    "AttentionXIntegratedGradients",
    "AttnLRP",
    "CLime",
    "Capability",
    "ContextCite",
    "ContextLengthProbing",
    "CounterfactualResampling",
    "EmbeddingGradientShap",
    "LShap",
    "MeanAttention",
    "OneShotReAGent",
    "ReAGent",
    "ReceiverHeads",
    "ResampledStep",
    "ResamplingResult",
    "Sample",
    "TextSimilarityProvider",
    "TokenMethod",
    "UnitMethod",
    "ValueWeightedAttention",
    "WeightedLogRatio",
    "receiver_heads",
]
