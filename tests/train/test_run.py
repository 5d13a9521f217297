"""The training loop, its optimizer, and sequences that are trained on as they are decoded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from paceline.models.gemma4 import embed
from paceline.train.optimizer import Optimizer, Parameters, orthogonal
from paceline.train.progress import Progress, trained
from paceline.train.run import Run, schedule
from paceline.train.sequences import Cache, DraftRows, states
from paceline.train.workers import Workers
from tests.fixtures.pairs import VOCABULARY, WINDOW, write_pair
from tests.models.test_parity import our_pair


@torch.no_grad()
def test_all_positions_at_once_draft_as_one_does_while_decoding(tmp_path: Path) -> None:
    """Three unrolled steps, given the same tokens, at positions before and beyond the window."""
    target, drafter = our_pair(*write_pair(tmp_path, "text", seed=2))
    tokens = torch.randint(4, VOCABULARY, (2, 3 * WINDOW))
    count, steps = 3 * WINDOW - 3, 3
    cache = Cache()
    hidden = states(target, tokens, cache)
    embeddings = embed(target, tokens.flatten()).view(*tokens.shape, -1)
    rows = DraftRows(drafter, cache, torch.arange(1, count + 1), 2)
    feedback, together = hidden[:, :count], []
    for step in range(steps):
        state, feedback = rows.step(embeddings[:, 1 + step : 1 + step + count], feedback)
        together.append(state)
    for row in range(2):
        cache = Cache()
        hidden = states(target, tokens[row : row + 1], cache)
        for position in (1, WINDOW, WINDOW + 1, 2 * WINDOW + 3):
            one, feedback = DraftRows(drafter, cache, torch.tensor([position])), hidden[:, position - 1 : position]
            for step in range(steps):
                newest = embeddings[row : row + 1, position + step : position + step + 1]
                state, feedback = one.step(newest, feedback)
                torch.testing.assert_close(together[step][row, position - 1], state[0, 0], rtol=1e-4, atol=1e-4)


def test_a_run_is_resumed_and_reports(tmp_path: Path) -> None:
    steps, reports = [], []

    def batch(share: float, step: int) -> tuple[torch.Tensor, ...]:
        assert 0 <= share < 1
        steps.append(step)
        return torch.full((2, 16), step).chunk(2)

    def examine(weights: Parameters) -> dict[str, float]:
        return {"largest": float(weights["w"].detach().max())}

    for minutes in (0.004, 0.008):
        run = Run(tmp_path / "state.pt", minutes, Workers(2), report=reports.append, examine=examine)
        weights = run.train({"w": torch.full((4,), 0.01)}, lambda w, tokens: w["w"].float().square().sum(), batch)
    assert len(steps) > 20
    assert steps == list(range(len(steps)))  # the second run continued the first
    assert [report.number for report in reports] == list(range(1, 1 + len(steps)))
    assert str(reports[19]).startswith("step 20 share 0.")
    progress = trained(tmp_path / "state.pt")
    assert progress.tokens == 32 * len(steps)
    assert progress.seconds >= 0.48
    times = [found["seconds"] for found in progress.history]
    assert times == sorted(times)
    assert times[-1] == progress.seconds
    assert all(found["largest"] < 0.01 for found in progress.history)
    assert weights["w"].dtype == torch.bfloat16
    assert (weights["w"] < 0.01).all()


@pytest.mark.parametrize("shape", [(16, 16), (16, 48), (48, 16)])
def test_orthogonal(shape: tuple[int, int]) -> None:
    """Singular values come near one, singular vectors stay."""
    matrix = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrix).float())
    assert values.min() > 0.3
    assert values.max() < 1.5
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    assert ((u @ v) * orthogonal(matrix).float()).sum((1, 2)).min() > 0.7 * 16


def test_optimizer_resumes_exactly(tmp_path: Path) -> None:
    """Two replicas, stopped and resumed half way, end where an uninterrupted run ends."""

    def run(stops: bool) -> torch.Tensor:
        workers, path = Workers(2), tmp_path / f"{stops}.pt"
        replicas = _replicas()
        optimizer = Optimizer(replicas, workers, 0.1)
        progress = Progress.resume(path, optimizer)
        for step in range(6):
            if stops and step == 3:
                progress.save(optimizer)
                replicas = _replicas()
                optimizer = Optimizer(replicas, workers, 0.1)
                progress = Progress.resume(path, optimizer)
            for number, weights in enumerate(replicas):
                x = torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + number))
                (x @ weights["layers.0.weight"] @ weights["layers.1.weight"]).square().sum().backward()
            optimizer.step(schedule(step / 6, step))
            progress.seconds += 1
            progress.tokens += 32
        progress.save(optimizer)
        assert (trained(path).seconds, trained(path).tokens) == (6.0, 192)
        assert torch.equal(replicas[0]["layers.0.weight"], replicas[1]["layers.0.weight"])
        return replicas[0]["layers.0.weight"].detach()

    first, second = run(False), run(True)
    assert torch.equal(first, second)
    assert not torch.equal(first, _replicas()[0]["layers.0.weight"])


def _replicas() -> list[Parameters]:
    def one() -> Parameters:
        generator = torch.Generator().manual_seed(0)
        shapes = {"layers.0.weight": (8, 8), "layers.1.weight": (8, 4)}
        return {name: torch.randn(shape, generator=generator).requires_grad_() for name, shape in shapes.items()}

    return [one(), one()]


def test_schedule() -> None:
    assert schedule(0.0, 0) < schedule(0.0, 10) < schedule(0.1, 100) == 1.0 == schedule(0.5, 100)
    assert schedule(0.75, 100) == 0.5
    assert schedule(1.0, 100) == 0.0
