"""What `/metrics` says of acceptance, and what requests tell the monitor."""

from __future__ import annotations

from paceline.server.metrics import Metrics
from paceline.server.prompts import RequestPreparer
from paceline.server.schemas import ChatMessage, ChatRequest, CompletionRequest
from tests.fixtures.serving import scripted_engine

MESSAGES = [ChatMessage(role="user", content="Well?")]


def test_a_cause_of_low_acceptance_is_a_gauge() -> None:
    engine = scripted_engine("yes")
    metrics = Metrics(engine, "m")
    assert "paceline:acceptance_low{" not in metrics.text().decode()
    assert engine.acceptance
    engine.acceptance.cause = "long_context"
    assert 'paceline:acceptance_low{cause="long_context",model_name="m"} 1.0' in metrics.text().decode()


def test_the_recent_acceptance_is_a_gauge() -> None:
    engine = scripted_engine(None)
    engine.generate("Well?", max_tokens=60, draft_tokens="auto")
    assert engine.acceptance
    rate = engine.acceptance.rate
    assert rate > 0
    assert f'paceline:acceptance_recent{{model_name="m"}} {rate}' in Metrics(engine, "m").text().decode()


def test_requests_say_in_which_situation_they_are() -> None:
    prepare = RequestPreparer(scripted_engine("yes"))
    plain = prepare.chat(ChatRequest(model="m", messages=MESSAGES))
    reasoning = prepare.chat(ChatRequest(model="m", messages=MESSAGES, chat_template_kwargs={"enable_thinking": True}))
    raw = prepare.completions(CompletionRequest(model="m", prompt="Well"))
    assert prepare.completions(CompletionRequest(model="m", prompt=[5, 6]))[0].requests[0].situations == ()
    assert [one[0].requests[0].situations for one in (plain, reasoning, raw)] == [(), ("reasoning",), ("raw_text",)]


def test_raw_text_is_a_situation_of_the_library_too() -> None:
    engine = scripted_engine("yes")
    with engine.stream("Well", raw=True) as raw, engine.stream("Well") as chat, engine.stream([5], raw=True) as tokens:
        assert raw.sequence.situations == ("raw_text",)
        assert chat.sequence.situations == tokens.sequence.situations == ()
