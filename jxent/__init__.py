"""Cross-entropy losses for JAX, with PyTorch's definitions.

Losses of logits:
    cross_entropy                 one right class per position, or class probabilities
    sigmoid_cross_entropy         each logit a yes or no of its own
    nll_loss                      labels against log-probabilities

Losses and log-probabilities of an output layer, without the logits of all positions:
    linear_cross_entropy          cross_entropy(hidden @ kernel + bias, labels)
    linear_sigmoid_cross_entropy  a yes or no for each class; SigLIP
    linear_log_probs              log-probabilities of given classes
    linear_top_k                  the most probable classes

Distances between two models:
    kl_divergence, linear_kl_divergence
    js_divergence, linear_js_divergence
    tv_distance, linear_tv_distance

Normalization:
    softmax, log_softmax, logsumexp

Labels and results:
    next_token_labels             labels of a language model
    SparseLabels                  a few classes per position, with probabilities
    Stats                         what return_stats=True adds
    ClassLogProbs                 what linear_log_probs and linear_top_k return

Each docstring has the arguments and an example: help(jxent.cross_entropy).
"""

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
__version__ = "0.2.0"
