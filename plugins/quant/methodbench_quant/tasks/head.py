"""Log-probabilities from a linear head, a slice of the vocabulary at a time.

All logits of a batch fill far more memory than a processor's cache holds; a slice of them stays in it, together
with the slice of the weights that it is made from.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_SLICE = 2048


def sliceable(head: nn.Module | None) -> bool:
    """Whether ``head`` is a plain Linear that nothing observes, so that it may be computed in slices."""
    return type(head) is nn.Linear and not head._forward_hooks and not head._forward_pre_hooks


def token_scores(head: nn.Linear, hidden: Tensor, rows: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probability of tokens, and whether each is the likeliest one.

    Args:
        head: from hidden states to logits over the vocabulary.
        hidden: [N, hidden].
        rows: int64 [M], the hidden state that each token is to follow.
        tokens: int64 [M].

    Returns:
        fp32 [M], natural logarithm; bool [M], true for the first of equally likely tokens.
    """
    chosen = torch.empty(len(rows), device=hidden.device)
    partial, best, arg_best = [], [], []
    for start in range(0, head.out_features, _SLICE):
        stop = min(start + _SLICE, head.out_features)
        bias = None if head.bias is None else head.bias[start:stop]
        logits = nn.functional.linear(hidden, head.weight[start:stop], bias).float()
        largest, where = logits.max(-1)
        best.append(largest)
        arg_best.append(where + start)
        # The fused log-softmax is many times faster than logsumexp; they differ by the logit itself.
        partial.append(largest - logits.log_softmax(-1).gather(1, where.unsqueeze(1))[:, 0])
        inside = (tokens >= start) & (tokens < stop)
        chosen[inside] = logits[rows[inside], tokens[inside] - start]
    normalizer = torch.stack(partial).logsumexp(0)
    winner = torch.stack(best).argmax(0, keepdim=True)
    likeliest = torch.stack(arg_best).gather(0, winner)[0]
    return chosen - normalizer[rows], likeliest[rows] == tokens
