"""What can go wrong with files and requests (wrong arguments are `ValueError`, `TypeError`)."""


class CurateError(Exception):
    """Base of every error that the toolkit raises about data, files and runs."""


class PoolError(CurateError):
    """A pool cannot be opened or read: a missing file, no rows, a column that is not there."""


class ShardError(CurateError):
    """A part on disk is damaged, or does not match the rows that it should hold."""


class FingerprintError(CurateError):
    """A folder holds the result of other parameters or other inputs; the message names them."""


class BudgetError(CurateError):
    """The data cannot meet the request, for example fewer rows survive than must be kept."""


class FailedRowsError(CurateError):
    """More rows failed than `max_failed` allows; everything is written and recorded."""


class ModelError(CurateError):
    """A model or its weights cannot be loaded."""
