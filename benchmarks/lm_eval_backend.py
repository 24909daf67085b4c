"""PIQA requests: our lm-eval back end beside lm-eval's own HFLM, as it comes and at its best batch size.

    python benchmarks/lm_eval_backend.py [--model FOLDER] [--items 100] [--rounds 5] [--json FILE]

Needs METHODBENCH_DATA with ``piqa/valid.jsonl``. Both sides answer the same requests; log-likelihoods must agree
to 1e-3 and greedy answers exactly. The limits, 2 beside the peer as it comes and 1.5 beside its best batch size, are
what evaluating each shared prefix once was hoped to be worth; the requests themselves bound it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from common import Figure, alternate, language_model, parser, report
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from methodbench.sources import data_path
from methodbench_quant.tasks.batched_lm import BatchedLM

#: What HFLM does unless told otherwise.
PEER_DEFAULT = 1
PEER_BATCHES = (2, 4, 8, 16)
OUR_BATCHES = (256, 512, 1024)

Answers = list[tuple[float, bool]]


def requests(path: Path, items: int) -> list[Instance]:
    """Return the two requests of each of the first ``items`` questions."""
    made = []
    for line in path.read_text().splitlines()[:items]:
        item = json.loads(line)
        for choice, answer in enumerate((item["sol1"], item["sol2"])):
            arguments = (f"Question: {item['goal']}\nAnswer:", f" {answer}")
            made.append(Instance("loglikelihood", item, arguments, choice))
    return made


def main() -> int:
    """Measure, print, and return 1 when ours is slower than the limit allows."""
    options = parser(__doc__ or "")
    options.add_argument("--model", type=Path)
    options.add_argument("--items", type=int, default=100)
    given = options.parse_args()
    path = data_path("piqa/valid.jsonl")
    if path is None:
        print("piqa/valid.jsonl is in none of the folders of METHODBENCH_DATA", file=sys.stderr)
        return 2
    model = language_model(given.model)
    asked = requests(path, given.items)

    def peer(batch: int, questions: list[Instance]) -> Answers:
        lm = HFLM(pretrained=model.module, tokenizer=model.tokenizer, batch_size=batch)
        return lm.loglikelihood(questions, disable_tqdm=True)

    def ours(tokens: int, questions: list[Instance]) -> Answers:
        return BatchedLM(model, batch_tokens=tokens).loglikelihood(questions)

    # The best batch size of each side is found on a part of the requests.
    part = asked[: max(16, len(asked) // 4)]
    best_peer = fastest({batch: partial(peer, batch, part) for batch in PEER_BATCHES})
    best_ours = fastest({tokens: partial(ours, tokens, part) for tokens in OUR_BATCHES})
    print(f"best batches: ours {best_ours} tokens, peer {best_peer} requests")

    mine, theirs = ours(best_ours, asked), peer(best_peer, asked)
    apart = max(abs(a[0] - b[0]) for a, b in zip(mine, theirs, strict=True))
    unequal = sum(a[1] != b[1] for a, b in zip(mine, theirs, strict=True))
    print(f"largest difference of log-likelihoods {apart:.2e}, unequal greedy answers {unequal}")
    if apart > 1e-3 or unequal:
        return 1
    contestants = {
        "ours": partial(ours, best_ours, asked),
        "best": partial(peer, best_peer, asked),
        "default": partial(peer, PEER_DEFAULT, asked),
    }
    rates = {name: len(asked) / value for name, value in alternate(contestants, given.rounds).items()}
    # Both sides compute at the machine's speed: at its best the peer has 1.6 times the operations of ours.
    figures = [
        Figure("piqa, peer as it comes", rates["ours"], rates["default"], 2.0, "requests/s"),
        Figure("piqa, peer at its best batch size", rates["ours"], rates["best"], 1.5, "requests/s"),
    ]
    return report(figures, given.json)


def fastest(contestants: dict[int, Callable[[], Answers]]) -> int:
    """Return the key of the fastest contestant."""
    seconds = alternate({str(key): run for key, run in contestants.items()}, rounds=2)
    return int(min(seconds, key=seconds.__getitem__))


if __name__ == "__main__":
    sys.exit(main())
