"""A model pair in PyTorch: the three verbs over the readable models' own modules and static K/V memory.

Exact by fixed shapes: every pass runs in tiles of TILE rows, the last one padded, so each matrix product has one shape
whatever is in the batch, and a row's attention is computed for that row alone, over a number of keys that its position
determines. What a row computes so depends on nothing but itself; the tests compare bits, on a processor. This is the
eager form, for any device of PyTorch; it is not fast, and no GPU has run it yet.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paceline.backends.cuda.memory import SlotMemory, TorchSnapshot
from paceline.config import DrafterConfig, TargetConfig, check_pair
from paceline.decode.draw import allowed, draw
from paceline.errors import BackendError
from paceline.models.drafter import Drafter, View
from paceline.models.gemma4 import Attention, DecoderLayer, Gemma4, Rotation, rotation
from paceline.types import Anchors, Batch, Drafts, Float32, Output, Sampling

TILE = 16  # rows of every pass
UNSEEN = -3e38  # logit of a token that a drafter's head did not look at

Weights = Mapping[str, Tensor]
"""Tensors by their canonical names; see `checkpoint.names`."""


class TorchBackend:
    """A loaded model pair and its K/V memory; see `backends.base.Backend` for the verbs.

    Args:
        target: settings and weights.
        drafter: the same of the drafter, or None for plain decoding.
        dtype: of weights and arithmetic, float32 or bfloat16.
        device: of PyTorch.
        context: positions a slot can hold.
        slots: sequences held at once.
        max_rows: most rows of one slot in one batch.

    Raises:
        PairError: the drafter is another target's.
        BackendError: no such device here.
    """

    stops_early = False  # every stop would wait for the device

    def __init__(
        self,
        target: tuple[TargetConfig, Weights],
        drafter: tuple[DrafterConfig, Weights] | None = None,
        *,
        dtype: torch.dtype,
        device: str = "cpu",
        context: int,
        slots: int = 1,
        max_rows: int = 256,
    ) -> None:
        if drafter:
            check_pair(target[0], drafter[0])
        # Products of one shape are then one order of summation on CUDA devices, too:
        # https://docs.nvidia.com/cuda/cublas/#results-reproducibility
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        try:
            self.device = torch.device(device)
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            first = str(error).splitlines()[0]
            reason = "it knows no such kind" if first.startswith("Expected one of") else first
            raise BackendError(f"PyTorch cannot use the device {device!r} ({reason}); choose another") from error
        self._config = target[0]
        self.vocab_size, self.context, self.max_rows, self.slots = target[0].vocab_size, context, max_rows, slots
        with torch.device("meta"):
            self._target = Gemma4(target[0])
            self._drafter = Drafter(drafter[0]) if drafter else None
        fill(self._target, target[1], dtype, self.device)
        if self._drafter and drafter:
            fill(self._drafter, drafter[1], dtype, self.device)
        self._dtype = dtype
        self.threads = torch.get_num_threads()
        self.weight_bytes = sum(parameter.nbytes for parameter in self._target.parameters())
        self._memory = SlotMemory(target[0], slots, context, max_rows, dtype, self.device)
        self._last_kv = max(index for index, layer in enumerate(target[0].layers) if layer.kv_source == index)
        self._free = list(range(slots))[::-1]

    @property
    def can_draft(self) -> bool:
        return self._drafter is not None

    def open_slot(self) -> int:
        if not self._free:
            raise BackendError("all cache slots are taken; finish or cancel a sequence first")
        return self._free.pop()

    def close_slot(self, slot: int) -> None:
        self._memory.clear(slot)
        self._free.append(slot)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Output:
        self._check(batch)
        logits, hidden = [], []
        for start in range(0, len(batch), TILE):
            rows = slice(start, start + TILE)
            wanted = np.flatnonzero(batch.wanted[rows])
            state = self._run(batch.slots[rows], batch.positions[rows], batch.tokens[rows], len(wanted) > 0)
            if state is not None:
                picked = torch.from_numpy(wanted).to(self.device)
                logits.append(self._target.logits(state)[0, picked].float().cpu().numpy())
                hidden.append(state[0, picked].float().cpu().numpy())
        for slot, position in zip(batch.slots.tolist(), batch.positions.tolist(), strict=True):
            self._memory.extend(slot, position + 1)
        none = np.zeros((0, self.vocab_size), np.float32), np.zeros((0, self._config.hidden_size), np.float32)
        return Output(np.concatenate([none[0], *logits]), np.concatenate([none[1], *hidden]))

    def _run(
        self, slots: NDArray[np.int32], positions: NDArray[np.int32], tokens: NDArray[np.int32], to_end: bool
    ) -> Tensor | None:
        """Run up to TILE rows through the layers: [1, TILE, H] after the final norm, None if nobody wants it."""
        model, count = self._target, len(tokens)
        places = self._padded(positions)  # [TILE]
        x = model.embed_tokens(self._padded(tokens)[None])  # [1, TILE, H]
        per_layer = model.per_layer_inputs(self._padded(tokens)[None], x)
        at = torch.from_numpy(slots.astype(np.int64)).to(self.device), places[:count]
        rotations: dict[bool, Rotation] = {}
        for index, layer in enumerate(model.layers):
            assert isinstance(layer, DecoderLayer)
            settings = self._config.layers[index]
            if settings.sliding not in rotations:
                rope = self._config.rope(settings)
                rotations[settings.sliding] = rotation(rope, settings.head_dim, places[None], x.dtype)
            rotate = rotations[settings.sliding]
            normed = layer.input_layernorm(x)
            if settings.kv_source == index:
                keys, values = layer.self_attn.keys_values(normed, rotate)
                self._memory.write(index, *at, (keys[:, :, :count], values[:, :, :count]))
                if index == self._last_kv and not to_end:
                    return None
            mixed = self._attend(layer.self_attn, layer.self_attn.queries(normed, rotate), index, slots, positions)
            ple = per_layer[:, :, index] if per_layer is not None else None
            x = layer.behind_attention(x, layer.self_attn.o_proj(mixed), ple)
        return model.norm(x)  # type: ignore[no-any-return]

    def _attend(
        self, attention: Attention, queries: Tensor, index: int, slots: NDArray[np.int32], positions: NDArray[np.int32]
    ) -> Tensor:
        """Each row over what it sees, one at a time: [1, TILE, heads * head_dim], zeros for padding."""
        settings = self._config.layers[index]
        mixed = torch.zeros(1, TILE, settings.head_dim * self._config.heads, dtype=queries.dtype, device=self.device)
        for row, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
            start = max(0, position + 1 - self._config.sliding_window) if settings.sliding else 0
            visible = self._memory.visible(settings.kv_source, slot, start, position + 1)
            mask = torch.ones(1, position + 1 - start, dtype=torch.bool, device=self.device)
            mixed[:, row] = attention.mix(queries[:, :, row : row + 1].contiguous(), visible, mask)[:, 0]
        return mixed

    def _padded(self, numbers: NDArray[np.int32]) -> Tensor:
        padded = np.zeros(TILE, np.int64)
        padded[: len(numbers)] = numbers
        return torch.from_numpy(padded).to(self.device)

    @torch.inference_mode()
    def draft(self, anchors: Anchors) -> Drafts:
        if self._drafter is None:
            raise BackendError("no drafter is loaded")
        depths = [plan.depth for plan in anchors.plans]
        shape = (len(depths), max(depths))
        tokens, confidence = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        logits = np.full((*shape, self.vocab_size), UNSEEN, np.float32) if anchors.with_logits else None
        for row, depth in enumerate(depths):
            view = self._view(int(anchors.slots[row]), int(anchors.positions[row]))
            token = int(anchors.tokens[row])
            feedback = torch.from_numpy(anchors.hidden[row].copy()).to(self.device, self._dtype).view(1, 1, -1)
            for step in range(depth):
                embedding = self._target.embed_tokens(torch.tensor([[token]], device=self.device))
                state, feedback = self._drafter(embedding, feedback, view)
                scores = self._drafter.logits(state)[0, 0].float().cpu().numpy()
                scores = np.where(np.isneginf(scores), np.float32(UNSEEN), scores)
                position = int(anchors.positions[row]) + 1 + step
                token, sure = guess(scores, anchors.samplings[row], position, anchors.streams[row])
                tokens[row, step], confidence[row, step] = token, sure
                if logits is not None:
                    logits[row, step] = scores
        return Drafts(tokens, confidence, np.array(depths, np.int32), logits)

    def _view(self, slot: int, position: int) -> View:
        """What an anchor sees of the target's cache: all below it, in sliding layers the last `window` rows."""
        assert self._drafter
        keys_values, masks = {}, {}
        for sliding in {layer.sliding for layer in self._drafter.config.layers}:
            source = self._config.last_layer(sliding=sliding)
            assert source is not None  # check_pair has refused such a pair
            start = max(0, position - self._config.sliding_window) if sliding else 0
            keys_values[sliding] = self._memory.visible(source, slot, start, position)
            masks[sliding] = torch.ones(1, position - start, dtype=torch.bool, device=self.device)
        at = torch.tensor([position], device=self.device)
        return View(keys_values, masks, self._drafter.rotations(at, self._dtype))

    def draw(self, logits: Float32, sampling: Sampling, position: int) -> int:
        return draw(logits, sampling, position)

    def allowed(self, logits: Float32, sampling: Sampling) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        return allowed(logits, sampling)

    def truncate(self, slot: int, length: int) -> None:
        self._memory.truncate(slot, length)

    def save(self, slot: int) -> TorchSnapshot:
        return self._memory.save(slot)

    def restore(self, slot: int, snapshot: TorchSnapshot) -> None:
        self._memory.restore(slot, snapshot)

    def _check(self, batch: Batch) -> None:
        """Refuse rows that do not continue their slot's cache."""
        expected: dict[int, int] = {}
        previous = -1
        for slot, position in zip(batch.slots.tolist(), batch.positions.tolist(), strict=True):
            if not 0 <= slot < self.slots or (slot in expected and slot != previous):
                raise BackendError(f"a batch the caches cannot take: slot {slot}")
            start = expected.get(slot, self._memory.length[slot])
            if position != start or position >= self.context:
                raise BackendError(f"a batch the caches cannot take: position {position} where {start} follows")
            if position - self._memory.length[slot] >= self.max_rows:
                raise BackendError(f"a batch the caches cannot take: more than {self.max_rows} rows of a slot")
            expected[slot], previous = position + 1, slot


def guess(logits: Float32, sampling: Sampling, position: int, stream: int) -> tuple[int, float]:
    """The token drawn from a drafter's logits [vocabulary], and its probability among those it could have drawn."""
    token = draw(logits, sampling, position, stream)
    if sampling.temperature == 0:
        shares = np.exp(logits - logits[token])
        return token, float(1 / shares.sum())
    ids, weights = allowed(logits, sampling)
    return token, float(weights[ids == token].sum() / weights.sum())


def fill(model: torch.nn.Module, weights: Weights, dtype: torch.dtype, device: torch.device) -> None:
    """Give a model without memory its weights."""
    state = {
        name: tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in weights.items()
    }
    model.load_state_dict(state, assign=True)
    model.eval()
