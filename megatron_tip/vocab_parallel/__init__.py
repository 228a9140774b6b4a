"""Exact statistics and losses of two next-token distributions whose vocabulary is sharded over a tensor-parallel group.

The inputs are hidden states and LM head shards; logits exist only for one chunk of rows at a time.
"""

from megatron_tip.vocab_parallel.divergence import DIVERGENCES, divergence_loss
from megatron_tip.vocab_parallel.inputs import HiddenAndHead
from megatron_tip.vocab_parallel.partition import VocabPartition, padded_vocab_size
from megatron_tip.vocab_parallel.statistics import token_statistics
from megatron_tip.vocab_parallel.vocabulary import ShardedVocabulary

__all__ = [
    "DIVERGENCES",
    "HiddenAndHead",
    "ShardedVocabulary",
    "VocabPartition",
    "divergence_loss",
    "padded_vocab_size",
    "token_statistics",
]
