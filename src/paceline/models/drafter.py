"""The readable truth: Gemma 4's MTP drafter, in execution order.

A few layers of queries over the target's own cache. A draft step takes the newest token (as the target embeds it) and
a hidden state, and gives logits for the next token and the hidden state for the next step. Attribute names are the
checkpoint's tensor names. B is a batch of sequences, A the anchors per sequence (1 when decoding; all positions at once
in training), S the visible rows of the target's cache, H the drafter's and `backbone` the target's hidden size.

Source: transformers 5.17.0, `gemma4_assistant`, with one difference: exactly the target's rows below the anchor's
position P are visible (full layers 0..P-1, sliding layers the last `sliding_window` of them), on every step of a round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paceline.config import DrafterConfig
from paceline.models.gemma4 import (
    Cache,
    DecoderLayer,
    Gemma4,
    KeysValues,
    RMSNorm,
    Rotation,
    ScaledEmbedding,
    load_exactly,
    rotation,
)


@dataclass(frozen=True)
class View:
    """What the anchors of a round see; constant over its steps. Keyed by `sliding`."""

    keys_values: dict[bool, KeysValues]  # the target's last own sliding and full layer, [B, kv_heads, S, head_dim]
    masks: dict[bool, Tensor]  # [A, S] which of those rows each anchor sees
    rotations: dict[bool, Rotation]  # of the anchors' positions


class Drafter(nn.Module):
    """A `gemma4_assistant`."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = config
        self.pre_projection = nn.Linear(2 * config.backbone_hidden_size, config.hidden_size, bias=False)
        self.model = Layers(config)
        self.post_projection = nn.Linear(config.hidden_size, config.backbone_hidden_size, bias=False)
        self.masked_embedding = CentroidHead(config) if config.centroids else None

    def forward(self, embedding: Tensor, hidden: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """One draft step: the newest token's target embedding and a hidden state, each [B, A, backbone] -> the
        drafter's normed state [B, A, H], input of `logits`, and the hidden state of the next step [B, A, backbone]."""
        x = self.pre_projection(torch.cat((embedding, hidden), dim=-1))
        x = self.model(x, view)
        return x, self.post_projection(x)

    def logits(self, state: Tensor) -> Tensor:
        """[B, A, H] -> [B, A, vocabulary]; tokens outside the chosen centroids get -inf."""
        if self.masked_embedding is None:
            return F.linear(state, self.model.embed_tokens.weight)
        return self.masked_embedding(state, self.model.embed_tokens.weight)  # type: ignore[no-any-return]

    def rotations(self, positions: Tensor, dtype: torch.dtype) -> dict[bool, Rotation]:
        """cos and sin for anchors at `positions` [A]."""
        layers = {layer.sliding: layer for layer in self.config.layers}
        return {
            sliding: rotation(self.config.rope(layer), layer.head_dim, positions[None], dtype)
            for sliding, layer in layers.items()
        }

    def view(self, target: Gemma4, cache: Cache, position: int) -> View:
        """What an anchor at `position` sees of the target's cache (which may hold later rows)."""
        keys_values, masks = {}, {}
        weight = self.pre_projection.weight
        for sliding in {layer.sliding for layer in self.config.layers}:
            source = target.config.last_layer(sliding=sliding)
            assert source is not None  # check_pair has refused such a pair
            start = max(0, position - self.config.sliding_window) if sliding else 0
            keys_values[sliding] = cache.visible(source, start, position)
            masks[sliding] = torch.ones(1, position - start, dtype=torch.bool, device=weight.device)
        return View(keys_values, masks, self.rotations(torch.tensor([position], device=weight.device), weight.dtype))


class Layers(nn.Module):
    """The decoder layers, the final norm, and the embedding table that is only ever used as LM head."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = ScaledEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer, False, 0, None) for layer in config.layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_eps)

    def forward(self, x: Tensor, view: View) -> Tensor:
        for layer, settings in zip(self.layers, self.config.layers, strict=True):
            assert isinstance(layer, DecoderLayer)
            kind = settings.sliding
            x = layer(x, layer.input_layernorm(x), view.rotations[kind], view.keys_values[kind], view.masks[kind])
        return self.norm(x)  # type: ignore[no-any-return]


class CentroidHead(nn.Module):
    """Scores centroids first, then only the tokens that belong to the best of them."""

    token_ordering: Tensor

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.top_k = config.centroid_top_k
        self.centroids = nn.Linear(config.hidden_size, config.centroids, bias=False)
        # Token ids grouped by centroid: those of centroid c are rows c * size .. (c + 1) * size - 1.
        self.register_buffer("token_ordering", torch.arange(config.vocab_size))

    def forward(self, state: Tensor, table: Tensor) -> Tensor:
        chosen = self.centroids(state).topk(self.top_k, dim=-1).indices  # [B, A, top_k]
        members = self.token_ordering.view(self.centroids.out_features, -1)  # [centroids, tokens of each]
        tokens = members[chosen].flatten(-2)  # [B, A, top_k * size]
        scores = (table[tokens] @ state[..., None]).squeeze(-1)  # [B, A, top_k * size]
        logits = state.new_full((*state.shape[:-1], table.shape[0]), -torch.inf)
        return logits.scatter(-1, tokens, scores)


@torch.no_grad()
def draft(
    drafter: Drafter, target: Gemma4, cache: Cache, token: int, hidden: Tensor, position: int, depth: int
) -> tuple[list[int], list[float]]:
    """Guess `depth` tokens after `token`, which stands at `position` and is not in the cache.

    `hidden` [backbone] is the target's hidden state at `position - 1`. Returns the guesses and the drafter's own
    probability of each.
    """
    view = drafter.view(target, cache, position)
    feedback = hidden.view(1, 1, -1)
    tokens, confidence = [], []
    for _ in range(depth):
        embedding = target.embed_tokens(torch.tensor([[token]], device=hidden.device))
        state, feedback = drafter(embedding, feedback, view)
        shares = drafter.logits(state)[0, 0].float().softmax(-1)
        token = int(shares.argmax())
        tokens.append(token)
        confidence.append(float(shares[token]))
    return tokens, confidence


def load_drafter(model: Drafter, tensors: Mapping[str, Tensor]) -> None:
    """Fill `model` from a checkpoint's tensors; a stored copy of the tied LM head is passed over.

    Raises:
        CheckpointError: a tensor is missing, left over or of another shape.
    """
    load_exactly(model, {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"})
