"""The three ways a command ends badly, each with its exit code. The message is one sentence with a remedy."""


class SpecMoEOffError(Exception):
    """Base of all errors shown to people without a traceback."""

    exit_code = 2


class AnswerIsNo(SpecMoEOffError):
    """The question was understood and the answer is no: validation failed, or nothing is feasible."""

    exit_code = 1


class BadInput(SpecMoEOffError):
    """Malformed input or an impossible request."""

    exit_code = 2


class AnotherModel(BadInput):
    """A plan meets a model it was not made for."""


class MissingCapability(SpecMoEOffError):
    """The machine or the installation lacks something; the message names the remedy."""

    exit_code = 3


class TrialFailed(AnswerIsNo):
    """A measured run of a plan did not end well. `kind`: out_of_memory, timeout, constraint or crash."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
