"""The ways a stage may end other than well, each with its exit code (DESIGN, "Commands")."""

EXIT_DONE = 0
EXIT_CRASHED = 1  # a mistake of ours
EXIT_WARNINGS = 1  # of `rlhf data check`: usable, with warnings
EXIT_INPUT = 2
EXIT_STOPPED = 3
EXIT_INTERRUPTED = 130

SKIPS_IN_A_ROW = 5  # steps (in ppo: rollouts) without a finite loss and gradient after which training stops (CANON A4)


def first_line(error: BaseException) -> str:
    """What an error says, without the lines of detail that libraries add; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class InputError(Exception):
    """The user's input is wrong: one message that names the thing, what was found, what was wanted, and the remedy."""

    exit_code = EXIT_INPUT


class TrainingStopped(Exception):
    """Training had to stop: the message gives the reason and the last good checkpoint."""

    exit_code = EXIT_STOPPED
