"""What a teacher answers, laid beside the student's logits: all classes, or the likeliest and a bucket for the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Answers:
    """A teacher's answers at the positions of the student's logits.

    Attributes:
        logits: (..., classes); where `tokens` is given, log-probabilities (..., k + 1) of those and of all others
            together, at a temperature that is applied already.
        tokens: (..., k), the likeliest tokens; None where `logits` has all classes.
        answered: which positions (...) have an answer; None where all have.
    """

    logits: torch.Tensor
    tokens: torch.Tensor | None = None
    answered: torch.Tensor | None = None

    def beside(self, student: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the student's logits and the teacher's over the same classes, both still to be divided by temperature.

        Args:
            student: (..., classes).
            temperature: the one that was applied, where `tokens` is given.

        Example:
            >>> logits = torch.tensor([[2.0, 0.0, 1.0]])
            >>> ours, theirs = likeliest(logits, 1, 2.0).beside(logits, 2.0)
            >>> bool(torch.allclose(ours, theirs)), tuple(ours.shape)
            (True, (1, 2))
        """
        if self.tokens is None:
            return student, self.logits
        ours = bucketed(student.float() / temperature, self.tokens.to(student.device))
        return ours * temperature, self.logits.float() * temperature


def bucketed(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities of `tokens`, and last the one of all other classes together.

    Args:
        logits: (..., classes).
        tokens: (..., k), with k below the number of classes.

    Returns:
        (..., k + 1).

    Example:
        >>> bucketed(torch.zeros(1, 4), torch.tensor([[2]])).exp()
        tensor([[0.2500, 0.7500]])
    """
    total = logits.logsumexp(-1, keepdim=True)
    # Taken from the others' logits: 1 minus what the tokens have loses all digits where they have almost everything.
    rest = logits.scatter(-1, tokens, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, tokens), rest], -1) - total


def likeliest(logits: torch.Tensor, k: int, temperature: float) -> Answers:
    """Return the answers in which only the `k` likeliest classes (below the number of classes) are told apart."""
    softened = logits.float() / temperature
    tokens = softened.topk(k, dim=-1).indices
    return Answers(bucketed(softened, tokens), tokens)
