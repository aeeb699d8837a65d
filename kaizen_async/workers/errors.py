"""What a run raises. Lookups never raise here: their errors are outcomes."""


class RunError(Exception):
    """Base of every error of a run and of its Redis server. The text is one line that says what to do."""


class RedisUnusableError(RunError):
    """Raised when the Redis server is unreachable, refuses the credentials, is too old, or may drop keys."""


class UnknownRunError(RunError):
    """Raised when no run has this name: it was never started, was purged, or was untouched for too long."""


class OtherInputError(RunError):
    """Raised when a run of this name was started with other ids or other options. Nothing was sent."""


class RunCancelledError(RunError):
    """Raised when the run was cancelled."""


class NoWorkersError(RunError):
    """Raised when the broker's workers accept tasks but do not know the task of this package."""
