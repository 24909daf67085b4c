"""CoreInfer: one set of neurons for a whole answer, chosen while the prompt is read.

Wang et al., "CoreInfer: Accelerating Large Language Model Inference with Semantics-Inspired Adaptive Sparse
Activation", arXiv 2410.18311; authors' code wangqinsi1/CoreInfer.

Sentences of one meaning use the same neurons. The prompt is read densely; which neurons its tokens use most becomes
the core set of each feed-forward network, and every later token is computed with these alone, without any prediction
per token. With v_t the inputs of the down projection (or what enters ReLU) for token t of a prompt of n tokens::

    limit = int(beta * |{(t, i): v_ti > 0}| / n)        S_t = the limit largest of v_t
    C = the int(d keep) neurons that lie in most of the S_t            (stability-guided)

Similarity-guided, sentences of calibration text are clustered by the neurons that they use in one late block (k-means,
the number of clusters by the elbow of its inertia), each cluster has its core sets, and a prompt takes those of the
cluster that it is nearest to. Only the middle blocks are touched. Of a sequence that comes at once, the first half is
the prompt; a single token belongs to the prompt before it. Weights stay dense: no time is saved here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.errors import MissingExtraError, NotApplicableError
from methodbench.params import hyperparameters
from methodbench.torchkit.activation_sparsity import (
    FeedForward,
    Positions,
    Site,
    dense_tokens,
    feed_forwards,
    observed,
    sequence_shapes,
)
from methodbench.torchkit.model import Calibration, LoadedModel, set_submodule

#: Most clusters that the elbow looks at, the fewest that it gives, and the seed of k-means (authors' code).
MOST_CLUSTERS, FEWEST_CLUSTERS, CLUSTER_SEED = 10, 4, 42


@hyperparameters
class CoreInfer:
    """Computes tokens behind a prompt with the neurons that the prompt uses most."""

    sparsity: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description="share of neurons left out in the touched blocks; 1 - the code's `sparsity`",
        ),
    ] = 0.6
    guided: Annotated[
        Literal["stability", "similarity"],
        Field(
            description="core neurons of the prompt itself, or of the cluster of sentences that it is nearest to"
        ),
    ] = "stability"
    token_share: Annotated[
        float, Field(gt=0, le=1, description="beta: core neurons of a token, as a share of its positive ones")
    ] = 0.2
    first_block: Annotated[
        float,
        Field(ge=0, le=1, description="where touched blocks begin, as a share of the depth (block 6 of 32)"),
    ] = 6 / 32
    end_block: Annotated[
        float,
        Field(ge=0, le=1, description="where touched blocks end, as a share of the depth (block 27 of 32)"),
    ] = 27 / 32
    cluster_block: Annotated[
        float, Field(ge=0, le=1, description="block whose neurons sentences are clustered by (25 of 32)")
    ] = 25 / 32
    cluster_token_share: Annotated[
        float,
        Field(gt=0, le=1, description="core neurons of a token in the clustering, of its positive ones"),
    ] = 0.4
    sentence_share: Annotated[
        float, Field(gt=0, le=1, description="neurons that describe a sentence (3000 of 11008)")
    ] = 3000 / 11008
    positions: Annotated[
        Literal["last-half", "last-10%", "decode"],
        Field(description="tokens that are touched; those before them are the prompt"),
    ] = "last-half"

    def compress(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        """Return the model with core sets; see :class:`methodbench.protocols.Compressor`.

        Raises:
            NotApplicableError: blocks without exactly one feed-forward network, no touched block, or, guided by
                similarity, fewer calibration sequences than clusters.
        """
        networks = feed_forwards(model)
        blocks = len(model.adapter.block_names(model.module))
        if len(networks) != blocks:
            raise NotApplicableError(
                f"coreinfer needs one feed-forward network a block; {model.name} has more"
            )
        touched = [
            n for index, n in enumerate(networks) if self.first_block <= index / blocks < self.end_block
        ]
        if not touched:
            raise NotApplicableError(
                f"none of the {blocks} blocks of {model.name} lies between first_block and end_block"
            )
        lists: Mapping[FeedForward, Tensor] = {}
        choice: ClusterChoice | None = None
        if self.guided == "similarity" and self.sparsity:
            index = min(int(self.cluster_block * blocks), networks.index(touched[-1]))
            guide = networks[max(index, networks.index(touched[0]))]
            with ctx.phase("cluster"):
                lists, choice = self._clusters(model, data, touched, guide)
        sparse = model.clone()
        shapes = sequence_shapes(sparse, [network.activation for network in touched])
        for network in touched:
            core = CoreSet(
                network.block,
                self._keep(network),
                self.token_share,
                choice,
                lists.get(network),
                network.neurons,
            )
            names = [name for name in (network.first, network.up, network.down) if name]
            site = Site("neurons", self.positions, dict.fromkeys(names, 1.0), shapes[network.activation])
            if network.up:
                set_submodule(
                    sparse.module,
                    network.down,
                    CoreInput(sparse.module.get_submodule(network.down), core, site),
                )
            else:
                set_submodule(
                    sparse.module,
                    network.activation,
                    CoreActivation(sparse.module.get_submodule(network.activation), core, site),
                )
        if choice is not None:
            sparse.module.register_forward_pre_hook(choice.read_prompt, with_kwargs=True)
        sparse.storage = "simulated"
        sparse.facts |= {
            "core_blocks": len(touched),
            "core_clusters": 0 if choice is None else len(choice.centres),
        }
        return sparse

    def _keep(self, network: FeedForward) -> int:
        return int(network.neurons * (1 - self.sparsity))

    def _clusters(
        self, model: LoadedModel, data: Calibration, touched: Sequence[FeedForward], guide: FeedForward
    ) -> tuple[dict[FeedForward, Tensor], ClusterChoice]:
        def sites(networks: Sequence[FeedForward]) -> dict[str, FeedForward]:
            return {network.down if network.up else network.activation: network for network in networks}

        size = int(guide.neurons * self.sentence_share)
        vectors = [
            multi_hot(token_counts_each(scores, self.cluster_token_share), size)
            for _, tensors in observed(model, data, sites([guide]), "coreinfer")
            for batch in tensors
            for scores in batch
        ]
        labels, centres = cluster(torch.stack(vectors).float())
        lists: dict[FeedForward, Tensor] = {}
        for (name,), tensors in observed(model, data, sites(touched), "coreinfer"):
            network = sites(touched)[name]
            sentences = [scores for batch in tensors for scores in batch]
            rows = []
            for label in range(len(centres)):
                pool = torch.cat(
                    [s for s, own in zip(sentences, labels.tolist(), strict=True) if own == label]
                )
                ids = core_set(token_counts(pool, self.cluster_token_share), self._keep(network))
                rows.append(torch.zeros(network.neurons, dtype=torch.bool).index_fill(0, ids.cpu(), True))
            lists[network] = torch.stack(rows)
        choice = ClusterChoice(centres, guide.block, size, self.cluster_token_share, self.positions)
        return lists, choice


def token_counts(scores: Tensor, share: float) -> Tensor:
    """Return in how many tokens' core sets each neuron lies, int64 [neurons].

    Args:
        scores: [tokens, neurons]; what is positive counts as used.
        share: beta; all tokens have core sets of one size, a share of the mean number of positive entries.
    """
    limit = int(share * int((scores > 0).sum()) / len(scores))
    top = scores.topk(limit, dim=-1).indices
    return torch.bincount(top.flatten(), minlength=scores.shape[-1])


def token_counts_each(scores: Tensor, share: float) -> Tensor:
    """Like :func:`token_counts`, each token's core set being a share of its own positive entries."""
    order = scores.argsort(dim=-1, descending=True)
    limits = ((scores > 0).sum(-1) * share).round()
    rank = torch.arange(scores.shape[-1], device=scores.device)
    return torch.bincount(order[rank < limits[:, None]], minlength=scores.shape[-1])


def core_set(counts: Tensor, keep: int) -> Tensor:
    """Return the ``keep`` neurons of highest count, int64; fewer where fewer have any. Ties go to the lower number."""
    order = counts.argsort(descending=True, stable=True)[:keep]
    return order[counts[order] > 0]


def multi_hot(counts: Tensor, size: int) -> Tensor:
    """Return True for the ``size`` neurons of highest count, bool [neurons]."""
    return torch.zeros(len(counts), dtype=torch.bool).index_fill(0, core_set(counts, size).cpu(), True)


def cluster(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cluster of each of ``vectors`` [sentences, neurons], and the centres [clusters, neurons].

    The number of clusters is where the inertia of k-means bends most, at least four.

    Raises:
        NotApplicableError: fewer sentences than clusters.
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise MissingExtraError(
            "similarity-guided CoreInfer", "scikit-learn", "methodbench[sparse]"
        ) from error
    most = min(MOST_CLUSTERS, len(vectors))
    if most < FEWEST_CLUSTERS:
        raise NotApplicableError(
            f"coreinfer clusters sentences, and {len(vectors)} calibration sequences make no "
            f"{FEWEST_CLUSTERS} clusters",
            f"Set calibration_samples to {MOST_CLUSTERS} or more.",
        )
    x = vectors.numpy()
    inertia = [KMeans(k, random_state=CLUSTER_SEED).fit(x).inertia_ for k in range(1, most + 1)]
    fitted = KMeans(elbow(inertia), random_state=CLUSTER_SEED).fit(x)
    return torch.from_numpy(fitted.labels_.astype(np.int64)), torch.from_numpy(fitted.cluster_centers_)


def elbow(inertia: Sequence[float]) -> int:
    """Return the number of clusters at the largest second difference of ``inertia`` (of 1, 2, ... clusters)."""
    return max(FEWEST_CLUSTERS, int(np.argmax(np.diff(inertia, 2))) + 2)


class ClusterChoice:
    """Finds the cluster of every prompt of a batch before its later tokens are computed.

    The prompts run through the dense blocks first, which costs what reading them costs.
    """

    def __init__(self, centres: Tensor, block: str, size: int, share: float, positions: Positions) -> None:
        self.centres, self.block, self.size, self.share = centres, block, size, share
        self.positions = positions
        self.reading = False
        self.labels: Tensor | None = None

    def read_prompt(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model: choose clusters for ``input_ids`` [batch, tokens] of several tokens."""
        ids = args[0] if args else kwargs.get("input_ids")
        if self.reading or not isinstance(ids, Tensor) or ids.shape[1] == 1:
            return
        self.reading = True
        try:
            with torch.no_grad():
                module(ids[:, : dense_tokens(self.positions, ids.shape[1])], use_cache=False)
        finally:
            self.reading = False

    def see(self, block: str, scores: Tensor) -> None:
        """Take the scores [batch, tokens, neurons] of a block while a prompt is read."""
        if block == self.block:
            hot = torch.stack([multi_hot(token_counts(s, self.share), self.size) for s in scores])
            self.labels = torch.cdist(hot.to(self.centres), self.centres).argmin(-1)


class CoreSet(nn.Module):
    """The core sets of one feed-forward network for the prompts of a batch.

    Buffer: ``lists``, bool [clusters, neurons], where a cluster gives them.
    """

    lists: Tensor | None

    def __init__(
        self,
        block: str,
        keep: int,
        share: float,
        choice: ClusterChoice | None,
        lists: Tensor | None,
        neurons: int,
    ) -> None:
        super().__init__()
        self.block, self.keep, self.share, self.choice = block, keep, share, choice
        self.neurons = neurons
        self.register_buffer("lists", lists)
        self.chosen: Tensor | None = None

    def forward(self, scores: Tensor, dense: int) -> Tensor | None:
        """Return the mask of the tokens behind the prompts, bool [batch, tokens - dense, neurons]; None without any.

        Args:
            scores: [batch, tokens, neurons]. Several tokens begin a new answer.
            dense: tokens of the prompts.

        Raises:
            NotApplicableError: a single token that follows no prompt, or one prompt for another batch.
        """
        batch, tokens, _ = scores.shape
        if self.choice is not None and self.choice.reading:
            self.choice.see(self.block, scores)
            return None
        if tokens > 1:
            self.chosen = self._choose(scores[:, :dense])
        elif self.chosen is None or len(self.chosen) != batch:
            known = (
                "none was read"
                if self.chosen is None
                else f"prompts of a batch of {len(self.chosen)} were read"
            )
            raise NotApplicableError(
                f"coreinfer decodes a batch of {batch} with the neurons of its prompts, and {known}",
                "Read prompts of more than one token first, in the same batch.",
            )
        assert self.chosen is not None
        behind = tokens - dense
        return self.chosen[:, None].expand(-1, behind, -1) if behind else None

    def _choose(self, prompts: Tensor) -> Tensor:
        if self.keep >= self.neurons or not prompts.shape[1]:
            return torch.ones(len(prompts), self.neurons, dtype=torch.bool, device=prompts.device)
        if self.choice is not None and self.lists is not None and self.choice.labels is not None:
            return self.lists[self.choice.labels]
        return torch.stack([multi_hot(token_counts(scores, self.share), self.keep) for scores in prompts]).to(
            prompts.device
        )


def _apply(site: Site, core: CoreSet, scores: Tensor, values: Tensor) -> Tensor:
    grid, dense = site.split(scores)
    mask = core(grid, dense)
    if core.choice is not None and core.choice.reading:
        return values
    site.count(mask, grid.shape[0] * grid.shape[1])
    if mask is None:
        return values
    own = values.view(grid.shape)
    return torch.cat([own[:, :dense], own[:, dense:].masked_fill(~mask, 0)], dim=1).view_as(values)


class CoreInput(nn.Linear):
    """The down projection of a gated network, which shares another's parameters and reads the core neurons alone."""

    def __init__(self, linear: nn.Module, core: CoreSet, site: Site) -> None:
        weight = linear.get_parameter("weight")
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = weight
        self.register_parameter("bias", getattr(linear, "bias", None))
        self.core = core
        self.site = site
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """Return ``W (mask input) + b``."""
        return super().forward(_apply(self.site, self.core, input, input))


class CoreActivation(nn.Module):
    """The activation function of a network without gate; what enters it chooses the core neurons."""

    def __init__(self, activation: nn.Module, core: CoreSet, site: Site) -> None:
        super().__init__()
        self.activation = activation
        self.core = core
        self.site = site
        self.train(activation.training)

    def forward(self, input: Tensor) -> Tensor:
        """Return ``mask activation(input)``."""
        return _apply(self.site, self.core, input, self.activation(input))
