"""lm-eval's interface on a loaded model, fast on few cores and equal to lm-eval's own back end.

Three things make it fast. The head, which costs as much as many blocks, runs only at positions whose logits
are asked for. Requests that begin alike (the answers to one question) are packed into a prefix tree and
computed in one row; what all requests have in common (few-shot examples) is computed once and kept as keys
and values. Rows of similar length are batched.

Tree packing presumes a decoder that honours position ids and a mask of its own; whether a model does is
measured once on a small tree, and a model that does not is run on plain right-padded batches.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from torch import Tensor, nn

from methodbench.errors import NotApplicableError
from methodbench.torchkit.model import LoadedModel
from methodbench_quant.tasks.head import sliceable, token_scores
from methodbench_quant.tasks.prefix_tree import Tree, batches, build_trees, common_prefix

_TREE_NODES = 512
_FILLED_NODES = 128
_WORTH_SHARING = 4
_WORTH_CACHING = 16
_BATCH_TOKENS = 512
_GENERATED_ROWS = 16
_GENERATED_TOKENS = 256

Request = tuple[Any, list[int], list[int]]


class _AtHead(Exception):
    """Leaves the model's forward pass with the hidden states that its head was about to read."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class BatchedLM(TemplateLM):
    """A causal language model as lm-eval sees it.

    Args:
        model: a decoder with a tokenizer; shared, not changed.
        seed: of sampled generations.
        max_length: context in tokens; by default what the model's configuration says.
        batch_tokens: tokens of one forward pass, padding included.
        trees: whether to pack requests into prefix trees; None to find out whether the model allows it.
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        seed: int = 0,
        max_length: int | None = None,
        batch_tokens: int = _BATCH_TOKENS,
        trees: bool | None = None,
    ) -> None:
        super().__init__()
        self.module: nn.Module = model.module
        self.head: nn.Module | None = model.adapter.head(model.module)
        self.tokenizer: Any = model.tokenizer
        self.seed = seed
        parameter = next(self.module.parameters())
        self._device = parameter.device
        self.dtype = parameter.dtype
        self.config = getattr(self.module, "config", None)
        self.max_length: int = max_length or resolve_max_length(self.config, self.tokenizer)
        self.batch_tokens = batch_tokens
        self._trees = trees
        self._bare_head: bool | None = None
        self.requests = 0
        """Requests answered so far."""
        self.seconds = 0.0
        """Wall-clock seconds spent on them, tokenization included."""

    @property
    def eot_token_id(self) -> int:
        """Id that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """Id that stands for an empty context: the beginning of a text where there is one, else its end."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """Name under which lm-eval may cache requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return ids; a beginning-of-text token that ``string`` starts with is not added a second time."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        chosen = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **chosen))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return the log-likelihood (nats) of each continuation, and whether greedy decoding gives it."""
        with self._timed(len(requests)):
            return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Return the log-likelihood (nats) of each whole text, in windows of ``max_length`` tokens."""
        with self._timed(len(requests)):
            owners: list[int] = []
            windows: list[Request] = []
            for owner, request in enumerate(requests):
                rolling = utils.get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
                for window in rolling:
                    context, continuation = utils.make_disjoint_window(window)
                    owners.append(owner)
                    windows.append((None, context, continuation))
            totals = [0.0] * len(requests)
            for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
                totals[owner] += value
            return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Return the text that follows each context, up to the first stop sequence.

        Greedy decoding runs here; anything else (sampling, beams) is left to the module's own ``generate``.
        """
        results = [""] * len(requests)
        with self._timed(len(requests)):
            groups: dict[str, list[int]] = {}
            for index, request in enumerate(requests):
                groups.setdefault(repr(request.args[1]), []).append(index)
            eos = self.tokenizer.decode(self.eot_token_id)
            for indices in groups.values():
                kwargs: dict[str, Any] = dict(
                    normalize_gen_kwargs(requests[indices[0]].args[1], _GENERATED_TOKENS)
                )
                stops = handle_stop_sequences(kwargs.pop("until"), eos=eos)
                count = int(kwargs.pop("max_gen_toks"))
                room = self.max_length - count
                if room < 1:
                    raise NotApplicableError(
                        f"{count} generated tokens leave no room for a prompt in {self.max_length} positions"
                    )
                prompts = [self.tok_encode(requests[index].args[0])[-room:] for index in indices]
                if kwargs == {"do_sample": False} or kwargs == {"do_sample": False, "temperature": 0.0}:
                    outputs = self._greedy(prompts, stops, count)
                else:
                    outputs = self._generate(prompts, count, kwargs)
                for index, ids in zip(indices, outputs, strict=True):
                    text = self.tokenizer.decode(ids, skip_special_tokens=True)
                    results[index] = postprocess_generated_text(text, stops, None)
        return results

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = True, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Score (text, context ids, continuation ids); the beginning of what is too long is cut off."""
        inputs: list[list[int]] = []
        targets: list[list[int]] = []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise NotApplicableError(
                    f"a continuation of {len(continuation)} tokens exceeds the {self.max_length} positions"
                )
            whole = (context + continuation)[-(self.max_length + 1) :]
            inputs.append(whole[:-1])
            targets.append(whole[len(whole) - len(continuation) :])
        packs = self._packs(inputs)
        shared = self._shared_prefix(inputs, targets) if packs else 0
        cache = self._prefill(inputs[0][:shared]) if shared else None
        rest = [tokens[shared:] for tokens in inputs]
        trees = build_trees(
            rest,
            limit=_TREE_NODES if packs else 0,
            worth=_WORTH_SHARING,
            fill=_FILLED_NODES if packs else 0,
        )
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for members in batches([len(tree) for tree in trees], self.batch_tokens):
            batch = [trees[member] for member in members]
            wanted = [
                (number, row, path[len(path) - len(targets[number]) :], targets[number])
                for row, tree in enumerate(batch)
                for number, path in tree.paths.items()
                if targets[number]
            ]
            width = max(map(len, batch))
            positions = sorted({row * width + node for _, row, nodes, _ in wanted for node in nodes})
            if not positions:
                continue
            place = {position: index for index, position in enumerate(positions)}
            rows = [place[row * width + node] for _, row, nodes, _ in wanted for node in nodes]
            tokens = [token for _, _, _, tokens in wanted for token in tokens]
            ids, options = self._inputs(batch, width, cache, shared)
            values, greedy = self._score(ids, options, positions, rows, tokens)
            start = 0
            for number, _, nodes, _ in wanted:
                stop = start + len(nodes)
                results[number] = (sum(values[start:stop]), all(greedy[start:stop]))
                start = stop
        for (text, _, _), result in zip(requests, results, strict=True):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, result)
        return results

    def _inputs(
        self, trees: Sequence[Tree], width: int, cache: Any, shared: int
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return ids [trees, width], padded on the right, and what else the module must be called with.

        ``cache`` holds ``shared`` tokens that stand before every tree.
        """
        ids = torch.zeros(len(trees), width, dtype=torch.long)
        for row, tree in enumerate(trees):
            ids[row, : len(tree)] = torch.tensor(tree.tokens)
        options: dict[str, Any] = {"use_cache": False}
        if cache is not None or not all(tree.is_chain for tree in trees):
            depths = torch.zeros(len(trees), width, dtype=torch.long)
            # Padding sees itself alone: a row that sees nothing would be not-a-number.
            seen = torch.eye(width, dtype=torch.bool).repeat(len(trees), 1, 1)
            for row, tree in enumerate(trees):
                depths[row, : len(tree)] = torch.tensor(tree.depths)
                seen[row, : len(tree), : len(tree)] = torch.from_numpy(tree.visible())
            mask = torch.zeros(len(trees), 1, width, shared + width, dtype=self.dtype)
            mask[:, 0, :, shared:].masked_fill_(~seen, torch.finfo(self.dtype).min)
            options.update(
                attention_mask=mask.to(self._device), position_ids=(depths + shared).to(self._device)
            )
            if cache is not None:
                options.update(past_key_values=_repeated(cache, len(trees)), use_cache=True)
        return ids.to(self._device), options

    def _score(
        self, ids: Tensor, options: dict[str, Any], positions: list[int], rows: list[int], tokens: list[int]
    ) -> tuple[list[float], list[bool]]:
        """Return log-probability and greediness of ``tokens[i]`` at flat position ``positions[rows[i]]``."""
        where = torch.tensor(positions, device=self._device)
        row = torch.tensor(rows, device=self._device)
        token = torch.tensor(tokens, device=self._device)
        if self._bare_head is None:
            self._bare_head = self._head_is_last(ids[:1, :1])
        if isinstance(self.head, nn.Linear) and self._bare_head and sliceable(self.head):
            values, greedy = token_scores(self.head, self._hidden_at(ids, where, options), row, token)
        else:
            logits = self._logits_at(ids, where, options)
            values = logits.log_softmax(-1)[row, token]
            greedy = logits.argmax(-1)[row] == token
        return values.tolist(), greedy.tolist()

    def _hidden_at(self, ids: Tensor, positions: Tensor, options: dict[str, Any]) -> Tensor:
        """Return the hidden states [positions, hidden] that the head would read; the head is not run."""
        assert self.head is not None

        def leave(_: nn.Module, args: tuple[Any, ...]) -> None:
            raise _AtHead(args[0].flatten(0, 1)[positions])

        hook = self.head.register_forward_pre_hook(leave)
        try:
            self.module(ids, **options)
        except _AtHead as reached:
            return reached.hidden
        finally:
            hook.remove()
        raise AssertionError("the module ran to its end without its head")

    def _head_is_last(self, ids: Tensor) -> bool:
        """Whether the module returns its head's output as it is, without capping or scaling it."""
        if self.head is None:
            return False
        outputs: list[Tensor] = []
        hook = self.head.register_forward_hook(lambda _, __, output: outputs.append(output))
        try:
            logits = self.module(ids, use_cache=False).logits
        finally:
            hook.remove()
        return len(outputs) == 1 and torch.equal(outputs[0].to(logits), logits)

    def _logits_at(self, ids: Tensor, positions: Tensor, options: dict[str, Any]) -> Tensor:
        """Return fp32 logits [positions, vocabulary]; the head sees no other hidden state than theirs."""
        if self.head is None:
            return self.module(ids, **options).logits.flatten(0, 1)[positions].float()

        def select(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return args[0].flatten(0, 1)[positions].unsqueeze(0), *args[1:]

        hook = self.head.register_forward_pre_hook(select)
        try:
            return self.module(ids, **options).logits[0].float()
        finally:
            hook.remove()

    def _prefill(self, prefix: list[int]) -> Any:
        """Return keys and values of ``prefix``, to be continued by every request."""
        ids = torch.tensor([prefix], device=self._device)
        return self._decode(ids, None, None, None)[1]

    def _shared_prefix(self, inputs: Sequence[list[int]], targets: Sequence[list[int]]) -> int:
        """Return how many tokens all requests begin with and score nothing at, 0 if not worth a cache."""
        if len(inputs) < 2:
            return 0
        length = common_prefix(min(inputs), max(inputs))
        free = min(len(tokens) - len(wanted) for tokens, wanted in zip(inputs, targets, strict=True))
        shared = min(length, free)
        return shared if shared >= _WORTH_CACHING else 0

    def _logits_of(
        self, trees: Sequence[Tree], positions: list[int], cache: Any = None, shared: int = 0
    ) -> Tensor:
        ids, options = self._inputs(trees, max(map(len, trees)), cache, shared)
        return self._logits_at(ids, torch.tensor(positions, device=self._device), options)

    def _packs(self, inputs: Sequence[list[int]]) -> bool:
        """Whether the model may be given trees of these sequences."""
        window = getattr(self.config, "sliding_window", None)
        if window and any(len(tokens) > window for tokens in inputs):
            return False
        if self._trees is None:
            self._trees = self._honours_trees()
        return self._trees

    def _honours_trees(self) -> bool:
        """Whether two short sequences score the same in one tree, after cached tokens, as they do alone."""
        generator = torch.Generator().manual_seed(0)
        vocabulary = int(getattr(self.config, "vocab_size", 0) or len(self.tokenizer))
        tokens = torch.randint(vocabulary, (12,), generator=generator).tolist()
        first, second = tokens[:9], [*tokens[:5], *tokens[9:]]
        shared = 2
        tree = Tree()
        tree.add(0, first[shared:], ())
        tree.add(1, second[shared:], tree.paths[0][: 5 - shared])
        leaves = [tree.paths[0][-1], tree.paths[1][-1]]
        try:
            cache = self._prefill(first[:shared])
            packed = self._logits_of([tree], leaves, cache, shared)
            alone = [self._logits_of([_chain(tokens)], [len(tokens) - 1]) for tokens in (first, second)]
        except Exception:  # a model says in many ways that it takes no mask, no positions or no cache
            return False
        tolerance = 1e-3 if self.dtype == torch.float32 else 0.05
        return torch.allclose(packed, torch.cat(alone), rtol=tolerance, atol=tolerance)

    @torch.no_grad()
    def _greedy(self, prompts: Sequence[list[int]], stops: Sequence[str], count: int) -> list[list[int]]:
        """Return up to ``count`` generated ids for each prompt; rows that have stopped leave the batch."""
        results: list[list[int]] = [[] for _ in prompts]
        ends = self._end_ids()
        for members in _rows([len(prompt) for prompt in prompts]):
            shared = common_prefix(min(prompts[m] for m in members), max(prompts[m] for m in members))
            shared = min(shared, min(len(prompts[m]) for m in members) - 1)
            cache = None
            if shared >= _WORTH_CACHING and len(members) > 1:
                cache = _repeated(self._prefill(prompts[members[0]][:shared]), len(members))
            else:
                shared = 0
            ids, mask = self._left_padded([prompts[m][shared:] for m in members])
            mask = torch.cat([mask.new_ones(len(members), shared), mask], dim=1)
            active = list(members)
            for _ in range(count):
                positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
                logits, cache = self._decode(ids, mask, positions, cache)
                chosen = logits.argmax(-1)
                keep = []
                for row, token in enumerate(chosen.tolist()):
                    results[active[row]].append(token)
                    text = self.tokenizer.decode(results[active[row]])
                    if token not in ends and not any(stop in text for stop in stops if stop):
                        keep.append(row)
                if not keep:
                    break
                if len(keep) < len(active):
                    kept = torch.tensor(keep, device=self._device)
                    cache.batch_select_indices(kept)
                    chosen, mask = chosen[kept], mask[kept]
                    active = [active[row] for row in keep]
                ids = chosen.unsqueeze(1)
                mask = torch.cat([mask, mask.new_ones(len(active), 1)], dim=1)
        return results

    def _decode(
        self, ids: Tensor, mask: Tensor | None, positions: Tensor | None, cache: Any
    ) -> tuple[Tensor, Any]:
        """Return fp32 logits [B, vocabulary] of the last position of ``ids`` [B, T], and the grown cache."""
        last = torch.arange(len(ids), device=self._device) * ids.shape[1] + ids.shape[1] - 1
        grown: list[Any] = []
        hook = self.module.register_forward_hook(lambda _, __, output: grown.append(output.past_key_values))
        options = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        try:
            logits = self._logits_at(
                ids, last, {"use_cache": True, **{k: v for k, v in options.items() if v is not None}}
            )
        finally:
            hook.remove()
        return logits, grown[0]

    def _generate(self, prompts: Sequence[list[int]], count: int, kwargs: dict[str, Any]) -> list[list[int]]:
        """Return ids generated by the module's own ``generate``, seeded."""
        generate: Any = self.module.generate
        results: list[list[int]] = [[] for _ in prompts]
        with torch.random.fork_rng(devices=[] if self._device.type == "cpu" else None):
            torch.manual_seed(self.seed)
            for members in _rows([len(prompt) for prompt in prompts]):
                ids, mask = self._left_padded([prompts[m] for m in members])
                output = generate(
                    ids, attention_mask=mask, max_new_tokens=count, pad_token_id=self.eot_token_id, **kwargs
                )
                for member, row in zip(members, output[:, ids.shape[1] :].tolist(), strict=True):
                    results[member] = row
        return results

    def _left_padded(self, prompts: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Return ids and attention mask, both int64 [B, longest]."""
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self.eot_token_id)
        mask = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        return ids.to(self._device), mask.to(self._device)

    def _end_ids(self) -> set[int]:
        declared = getattr(getattr(self.module, "generation_config", None), "eos_token_id", None)
        ends = declared if isinstance(declared, list) else [declared]
        return {self.eot_token_id, *(end for end in ends if end is not None)}

    @contextmanager
    def _timed(self, requests: int) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start
            self.requests += requests


def _repeated(cache: Any, count: int) -> Any:
    """Return a copy of a cache of one row, repeated ``count`` times."""
    grown = copy.deepcopy(cache)
    grown.batch_repeat_interleave(count)
    return grown


def _chain(tokens: Sequence[int]) -> Tree:
    tree = Tree()
    tree.add(0, tokens, ())
    return tree


def _rows(lengths: Sequence[int]) -> list[list[int]]:
    """Return prompts in batches of similar length, longest first."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [order[start : start + _GENERATED_ROWS] for start in range(0, len(order), _GENERATED_ROWS)]
