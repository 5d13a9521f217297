"""`/v1/completions`, see https://platform.openai.com/docs/api-reference/completions"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from paceline.server.choices import MIN_LOGPROB, Choice, ChoicesAnswer, round_report
from paceline.server.runner import RunningRequest
from paceline.server.schemas import CompletionRequest
from paceline.types import Event, TokenDelta


class CompletionAnswer(ChoicesAnswer):
    """The answer to a completion request; see `ChoicesAnswer`.

    Args:
        echoes: the text to put in front of each choice.
    """

    id_prefix, object_name, chunk_name = "cmpl", "text_completion", "text_completion"

    def __init__(
        self,
        running: RunningRequest,
        choices: list[Choice],
        body: CompletionRequest,
        model: str,
        fingerprint: str,
        echoes: list[str],
    ) -> None:
        super().__init__(running, choices, body, model, fingerprint)
        self._with_logprobs, self._with_rounds = body.logprobs is not None, bool(body.return_rounds)
        self._echoes, self._unsent_echoes = echoes, [*echoes]
        self._lengths = [len(echo) for echo in echoes]  # of the text sent so far

    def _complete(self, index: int, tokens: list[TokenDelta]) -> dict[str, Any]:
        choice, echo = self._choices[index], self._echoes[index]
        return {"text": echo + choice.content, "logprobs": self._logprobs(choice, tokens, len(echo))}

    def _partial(self, index: int, event: Event) -> Iterator[dict[str, Any]]:
        choice = self._choices[index]
        deltas, tokens = choice.push(event)
        text = "".join(delta.text for delta in deltas)
        chunk = {
            "text": self._unsent_echoes[index] + text,
            "logprobs": self._logprobs(choice, tokens, self._lengths[index]),
            "finish_reason": choice.finish,
        }
        self._unsent_echoes[index] = ""
        self._lengths[index] += len(text)
        if self._with_rounds:
            chunk["round"] = round_report(event)
        if event.finish:
            chunk["paceline"] = choice.report
        yield chunk

    def _logprobs(self, choice: Choice, tokens: list[TokenDelta], offset: int) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        report: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            assert token.logprobs is not None
            report["tokens"].append(choice.token_text(token.token))
            report["token_logprobs"].append(max(token.logprobs.token, MIN_LOGPROB))
            top = {choice.token_text(other): max(value, MIN_LOGPROB) for other, value in token.logprobs.top}
            report["top_logprobs"].append(top)
            report["text_offset"].append(offset)
            offset += len(token.text)
        return report
