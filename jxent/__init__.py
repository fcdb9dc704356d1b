"""Exact cross-entropy losses for JAX, with PyTorch's definitions."""

from jxent._call.loss import Stats
from jxent._cross_entropy import cross_entropy
from jxent._divergences import js_divergence, kl_divergence, tv_distance
from jxent._labels.sparse import SparseLabels
from jxent._linear_cross_entropy import linear_cross_entropy
from jxent._linear_divergences import linear_js_divergence, linear_kl_divergence, linear_tv_distance
from jxent._linear_log_probs import ClassLogProbs, linear_log_probs, linear_top_k
from jxent._linear_sigmoid_cross_entropy import linear_sigmoid_cross_entropy
from jxent._next_token import next_token_labels
from jxent._nll_loss import nll_loss
from jxent._sigmoid_cross_entropy import sigmoid_cross_entropy
from jxent._softmax import log_softmax, logsumexp, softmax

__all__ = [
    "ClassLogProbs",
    "SparseLabels",
    "Stats",
    "cross_entropy",
    "js_divergence",
    "kl_divergence",
    "linear_cross_entropy",
    "linear_js_divergence",
    "linear_kl_divergence",
    "linear_log_probs",
    "linear_sigmoid_cross_entropy",
    "linear_top_k",
    "linear_tv_distance",
    "log_softmax",
    "logsumexp",
    "next_token_labels",
    "nll_loss",
    "sigmoid_cross_entropy",
    "softmax",
    "tv_distance",
]
__version__ = "0.1.0"
