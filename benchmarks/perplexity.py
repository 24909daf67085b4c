"""Perplexity: our window losses beside a bare torch loop over the same windows.

    python benchmarks/perplexity.py [--model FOLDER] [--windows 4] [--length 512] [--rounds 5] [--json FILE]

The peer is the loop that scripts write: logits of a window, cross-entropy of the shifted ids. It does the least that
can be done, so nothing is much faster; the limit of 0.9 leaves a tenth to what is recorded besides.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from common import Figure, alternate, language_model, parser, report
from torch import Tensor, nn

from methodbench.context import Context
from methodbench_quant.tasks.perplexity import window_losses
from methodbench_quant.tasks.texts import pydoc_topics
from methodbench_quant.tasks.tokens import consecutive, token_ids


@torch.no_grad()
def bare_loop(module: nn.Module, windows: Tensor) -> Tensor:
    """Return the mean loss of each window."""
    losses = []
    for ids in windows:
        logits = module(ids.unsqueeze(0), use_cache=False).logits[0, :-1]
        losses.append(nn.functional.cross_entropy(logits, ids[1:]))
    return torch.stack(losses)


def main() -> int:
    """Measure, print, and return 1 when ours is slower than the limit allows."""
    options = parser(__doc__ or "")
    options.add_argument("--model", type=Path)
    options.add_argument("--windows", type=int, default=4)
    options.add_argument("--length", type=int, default=512)
    given = options.parse_args()
    model = language_model(given.model)
    windows = consecutive(token_ids(pydoc_topics(), model.tokenizer, Context()), given.length)[
        : given.windows
    ]
    seconds = alternate(
        {
            "ours": lambda: window_losses(model.module, windows),
            "peer": lambda: bare_loop(model.module, windows),
        },
        given.rounds,
    )
    torch.testing.assert_close(
        window_losses(model.module, windows).float(), bare_loop(model.module, windows), rtol=1e-4, atol=1e-4
    )
    tokens = windows.numel()
    ours, peer = tokens / seconds["ours"], tokens / seconds["peer"]
    return report([Figure("perplexity", ours, peer, 0.9, "tokens/s")], given.json)


if __name__ == "__main__":
    sys.exit(main())
