"""What llama.cpp and ik_llama.cpp have in common as engines to compare: their C interface, with default settings."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

BATCH = 512  # rows in one pass: llama.cpp's own default


class LlamaEngine:
    """See `worker.Engine`. Subclasses forget and roll back, which the two do differently.

    Args:
        api: the module with the C functions.
        model: a loaded model.
        settings: of the context, to be completed.
    """

    version: str

    def __init__(self, api: Any, model: Any, settings: Any, threads: int, room: int) -> None:
        settings.n_ctx, settings.n_batch, settings.n_ubatch = room, BATCH, BATCH
        settings.n_threads = settings.n_threads_batch = threads
        self._api = api
        self._context = api.llama_init_from_model(model, settings)
        if not self._context:
            raise SystemExit("no context for this model")
        self._vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        self._batch = api.llama_batch_init(BATCH, 0, 1)
        self._cached = self._kept = 0

    def clear(self) -> None:
        """Forget all rows."""
        raise NotImplementedError

    def remove(self, first: int) -> bool:
        """Forget the rows from a position on; whether that was possible."""
        raise NotImplementedError

    def get_logits(self) -> Any:
        """Pointer to the last pass's logits, once it is done."""
        return self._api.llama_get_logits(self._context)

    def read(self, tokens: list[int]) -> None:
        self.clear()
        self._cached = 0
        for start in range(0, len(tokens), BATCH):
            chunk = tokens[start : start + BATCH]
            self._run(chunk, wanted=int(start + len(chunk) == len(tokens)))
        self._kept = self._cached

    def extend(self, tokens: list[int]) -> None:
        self._run(tokens, wanted=len(tokens))

    def rewind(self) -> None:
        if not self.remove(self._kept):
            raise SystemExit("the cache could not be rolled back")
        self._cached = self._kept

    def best(self) -> int:
        return int(self._logits[-1].argmax())

    def logits(self) -> NDArray[np.float32]:
        return self._logits

    def _run(self, tokens: list[int], wanted: int) -> None:
        batch, rows = self._batch, len(tokens)
        batch.n_tokens = rows
        for row, token in enumerate(tokens):
            batch.token[row] = token
            batch.pos[row] = self._cached + row
            batch.n_seq_id[row] = 1
            batch.seq_id[row][0] = 0
            batch.logits[row] = row >= rows - wanted
        if code := self._api.llama_decode(self._context, batch):
            raise SystemExit(f"failed with code {code} on {rows} rows at position {self._cached}")
        self._cached += rows
        if wanted:
            self._logits = np.ctypeslib.as_array(self.get_logits(), (wanted, self._vocab_size))
