"""The errors a user can meet. Each carries what the command line needs: the message and the exit code.

Exit codes: 0 done, 2 the user's mistake (`UserError`), 1 our failure (anything else), 75 stopped for requeue (`StoppedForRequeue`).
"""

from __future__ import annotations

from typing import Literal

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USER = 2
EXIT_REQUEUE = 75


class UserError(Exception):
    """A mistake the user can mend: says which field or place, what is wrong with it, and what would work.

    >>> str(UserError("parallel.tp", "3 does not divide model.num_attention_heads = 4", "use 1, 2 or 4"))
    'parallel.tp: 3 does not divide model.num_attention_heads = 4; use 1, 2 or 4'
    """

    exit_code = EXIT_USER

    def __init__(self, where: str, problem: str, remedy: str = "") -> None:
        super().__init__(where, problem, remedy)
        self.where, self.problem, self.remedy = where, problem, remedy

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}" + (f"; {self.remedy}" if self.remedy else "")


class ConfigError(UserError):
    """The configuration disagrees with itself or with the schema. Holds every broken rule, so that all are reported at once."""

    def __init__(self, problems: list[UserError]) -> None:
        self.problems = problems
        first = problems[0]
        super().__init__(first.where, first.problem, first.remedy)
        self.args = (problems,)

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class DataError(UserError):
    """A data file, line or image that cannot be used: `where` is the file and the line."""


class CheckpointError(UserError):
    """A checkpoint that is missing, incomplete, damaged, or of another model."""


class StorageError(UserError):
    """Rollouts or images of a run that cannot be written (a full disk), or are not as they were stored."""


class RouteMismatch(RuntimeError):
    """The learner replayed other routes than the rollout recorded: training on them would be wrong, so the run stops."""


class WeightSyncError(RuntimeError):
    """Weights arrived damaged or with the wrong version at a rollout worker."""


FailureKind = Literal["died", "hung", "raised", "late"]
"""How a rank is lost: its process ended; gives no sign of life; raised an error; is alive, but has not answered in time."""


class ProbeMismatch(RuntimeError):
    """With the weights it was given, a rollout rank computes other log-probs than the learner: what it would generate is not this model's."""


class RankFailed(RuntimeError):
    """A rank of a multi-process run is lost: names the rank and carries its traceback. `rank` is its name, "" where no single one is to blame.

    >>> failure = RankFailed("learner rank 1 (pid 7) ended with exit code -9", "learner rank 1")
    >>> failure.kind, failure.rank, str(failure)
    ('died', 'learner rank 1', 'learner rank 1 (pid 7) ended with exit code -9')
    """

    def __init__(self, message: str, rank: str = "", kind: FailureKind = "died") -> None:
        super().__init__(message)
        self.rank, self.kind = rank, kind


class LearnerLost(Exception):
    """A rank of the learner died or hangs. Its world is of no use any more: it can be started again from its latest checkpoint."""

    @classmethod
    def of(cls, failure: RankFailed) -> LearnerLost | RankFailed:
        """The failure itself where starting again would not help: a rank raised an error, or no single rank is to blame, such as when Ray's head is gone."""
        return failure if failure.kind == "raised" or not failure.rank else cls(str(failure))


class LeaderEnded(Exception):
    """Another rank has ended the run before this one had something to do; that rank says why."""

    exit_code = EXIT_OK


class StoppedForRequeue(Exception):
    """Stopped on request, with what was done on disk: run again, the stage goes on from there."""

    exit_code = EXIT_REQUEUE
