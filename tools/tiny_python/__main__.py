"""Train `tiny-python` and `tiny-python-assistant` from the standard library's source: one command, no downloads.

    python -m tools.tiny_python --out DIR --minutes 50 --drafter-minutes 15

Writes `DIR/tiny-python` and `DIR/tiny-python-assistant`. Everything in between (tokenizer, training state, the
target's own text) is kept in `DIR/state`, from which an interrupted run is resumed; delete it to start again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenizers import Tokenizer
from tools.tiny_python.card import Figures, card
from tools.tiny_python.data import Corpus, Sources, standard_library
from tools.tiny_python.drafter import Distillation, drafter_of
from tools.tiny_python.evaluate import acceptance, held_out_loss, held_out_prompts
from tools.tiny_python.export import write_drafter, write_target
from tools.tiny_python.target import target_of, train_target
from tools.tiny_python.tokenizer import train_tokenizer
from torch import Tensor

from paceline.train.optimizer import Parameters
from paceline.train.progress import trained
from paceline.train.run import Run, Step
from paceline.train.workers import Workers


def train(out: Path, minutes: float, drafter_minutes: float, threads: int | None, seed: int) -> None:
    """Tokenizer, target, drafter, figures, files."""
    state = out / "state"
    state.mkdir(parents=True, exist_ok=True)
    workers = Workers(threads)
    sources = standard_library()
    tokenizer = kept_tokenizer(state / "tokenizer.json", sources)
    corpus = Corpus.encode(sources.training, tokenizer)
    say(f"{len(sources.training)} files, {len(corpus.tokens)} tokens; {len(sources.held_out)} files held out")
    runs = (state / "target.pt", minutes, 0.1), (state / "drafter.pt", drafter_minutes, 0.0)
    first, second = (
        Run[Tensor](path, limit, workers, decay, compiled=True, report=say_some) for path, limit, decay in runs
    )
    target = train_target(corpus, first, seed)
    drafter = Distillation(corpus, second, say, seed).train(target)
    figures = measure(target, drafter, tokenizer, sources, len(corpus.tokens), state, workers.count)
    say(f"{figures.loss}; acceptance length {figures.on_source.length:.3f}, {figures.generating.length:.3f}")
    write_target(target, tokenizer, out / "tiny-python", card(target, drafter, figures))
    write_drafter(drafter, out / "tiny-python-assistant")


def kept_tokenizer(path: Path, sources: Sources) -> Tokenizer:
    if not path.exists():
        train_tokenizer(sources.training.values()).save(str(path))
    return Tokenizer.from_file(str(path))


def measure(
    target: Parameters,
    drafter: Parameters,
    tokenizer: Tokenizer,
    sources: Sources,
    corpus_tokens: int,
    state: Path,
    threads: int,
) -> Figures:
    """Figures on the held-out files."""
    pair = target_of(target), drafter_of(drafter)
    target_run, drafter_run = trained(state / "target.pt"), trained(state / "drafter.pt")
    return Figures(
        loss=held_out_loss(pair[0], tokenizer, sources.held_out),
        on_source=acceptance(*pair, held_out_prompts(tokenizer, sources.held_out, 12, 128), 2),
        generating=acceptance(*pair, held_out_prompts(tokenizer, sources.held_out, 1, 64), 128),
        files=len(sources.training),
        held_out_files=len(sources.held_out),
        corpus_tokens=corpus_tokens / 1e6,
        target_tokens=target_run.tokens / 1e6,
        target_minutes=target_run.seconds / 60,
        drafter_tokens=drafter_run.tokens / 1e6,
        drafter_minutes=drafter_run.seconds / 60,
        threads=threads,
    )


def say_some(step: Step) -> None:
    if step.number % 20 == 0:
        say(str(step))


def say(line: str) -> None:
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--minutes", type=float, default=50, help="training time of the target (default 50)")
    parser.add_argument("--drafter-minutes", type=float, default=15, help="training time of the drafter (default 15)")
    parser.add_argument("--threads", type=int, help="CPU threads (default all)")
    parser.add_argument("--seed", type=int, default=0, help="of first weights and batches (default 0)")
    arguments = parser.parse_args()
    train(arguments.out, arguments.minutes, arguments.drafter_minutes, arguments.threads, arguments.seed)


if __name__ == "__main__":
    main()
