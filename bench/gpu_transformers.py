"""transformers' own MTP on a device: tokens a second of plain decoding, and rounds a second of assisted generation.

    python bench/gpu_transformers.py (--shape 31b | --model tiny-python) [--device cuda] [--draft-tokens 3]

On random weights no draft is accepted, so a round gives one token; `simulated_tokens_per_s` says what the same rounds
would give at SIMULATED acceptance 0.8, 0.65, 0.5. Ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

import torch
import transformers as hf

from paceline.bench.shapes import TARGETS, drafter_settings
from paceline.checkpoint import locate, locate_drafter
from paceline.errors import PacelineError

SHARES = (0.8, 0.65, 0.5)
PROMPT = 512  # tokens


def random_pair(shape: str, device: str) -> tuple[Any, Any]:
    """A pair in an official shape, as transformers initialises it."""
    target, drafter = dict(TARGETS[shape]), drafter_settings(shape)
    torch.set_default_dtype(torch.bfloat16)
    text = hf.Gemma4TextConfig(**drafter.pop("text_config"))
    with torch.device(device):
        return (
            hf.Gemma4ForCausalLM(hf.Gemma4TextConfig(**target)).eval(),
            hf.Gemma4AssistantForCausalLM(hf.Gemma4AssistantConfig(text_config=text, **drafter)).eval(),
        )


def loaded_pair(model: str, device: str) -> tuple[Any, Any]:
    folder = locate(model)
    drafter = locate_drafter(model, folder, "auto")
    assert drafter is not None
    return (
        hf.Gemma4ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval(),
        hf.Gemma4AssistantForCausalLM.from_pretrained(drafter, dtype=torch.bfloat16).to(device).eval(),
    )


class Rounds:
    """Counts a model's passes."""

    def __init__(self, model: Any) -> None:
        self.count = 0
        model.register_forward_hook(self._add)

    def _add(self, *_: object) -> None:
        self.count += 1


@torch.inference_mode()
def generate(target: Any, ids: torch.Tensor, tokens: int, **how: Any) -> float:
    """Seconds of greedy decoding of that many tokens."""
    started = time.perf_counter()
    out = target.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        pad_token_id=0,
        **how,
    )
    assert out.cpu().shape[1] == ids.shape[1] + tokens
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--shape")
    which.add_argument("--model")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--draft-tokens", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    pair = random_pair(options.shape, options.device) if options.shape else loaded_pair(options.model, options.device)
    target, drafter = pair
    target.generation_config = hf.GenerationConfig()
    drafter.generation_config.num_assistant_tokens = options.draft_tokens
    drafter.generation_config.num_assistant_tokens_schedule = "constant"
    ids = torch.randint(0, target.config.get_text_config().vocab_size, (1, PROMPT), device=options.device)
    rounds = Rounds(target)
    plain, assisted, passes = [], [], []
    modes: tuple[dict[str, Any], ...] = ({}, {"assistant_model": drafter})
    for _ in range(options.repeats + 1):  # the first warms up
        for how, seen in zip(modes, (plain, assisted), strict=True):
            first = generate(target, ids, 1)
            before = rounds.count
            seen.append(generate(target, ids, options.tokens + 1, **how) - first)  # less the prompt
            if how:
                passes.append(rounds.count - before - 1)
    rounds_per_s = statistics.median(n / s for n, s in zip(passes[1:], assisted[1:], strict=True))
    report = {
        "benchmark": "transformers",
        "version": f"transformers {hf.__version__}, torch {torch.__version__}",
        "model": options.model or options.shape,
        "random_weights": options.shape is not None,
        "draft_tokens": options.draft_tokens,
        "plain_tokens_per_s": options.tokens / statistics.median(plain[1:]),
        "mtp_tokens_per_s": options.tokens / statistics.median(assisted[1:]),
        "rounds_per_s": rounds_per_s,
        "simulated_tokens_per_s": rounds_per_s * (1 + sum(SHARES)) if options.shape else None,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    try:
        main()
    except PacelineError as error:
        sys.exit(f"gpu_transformers.py: {error}")
