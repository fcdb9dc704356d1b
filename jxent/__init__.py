"""Cross-entropy for JAX: exact, and with PyTorch's meaning."""

from jxent._cross_entropy import cross_entropy as cross_entropy
from jxent._linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from jxent._loss.loss import Stats as Stats
from jxent._next_token import next_token_labels as next_token_labels
from jxent._nll_loss import nll_loss as nll_loss
from jxent._softmax import log_softmax as log_softmax
from jxent._softmax import logsumexp as logsumexp
from jxent._softmax import softmax as softmax

__version__ = "0.1.0"
