"""Errors that name the field, what it must be, what it is, and the remedy."""


class MMGFPError(Exception):
    """Base of every error that mmgfp raises on purpose.

    The message is one sentence, "<field> must be <expected> (got <got>); <remedy>".
    Where that does not read well, the whole message is the only argument, with the
    same parts. Registries give it like that, too, when they raise an error again.

    Args:
        field: The argument, key or file that is wrong; or the whole message.
        expected: A description of valid values.
        got: The value that was given.
        remedy: The change that helps.

    Examples:
        >>> print(MMGFPError('interval', 'at least 1', '0', 'change the configuration'))
        interval must be at least 1 (got 0); change the configuration
    """

    def __init__(
        self, field: str, expected: str = '', got: str = '', remedy: str = ''
    ) -> None:
        details = f' must be {expected} (got {got}); {remedy}' if expected else ''
        super().__init__(field + details)


class ConfigError(MMGFPError, ValueError):
    """An argument or a configuration value cannot be used."""


class StructureError(MMGFPError, ValueError):
    """A structure or checkpoint file is damaged or does not belong to the model."""


class TraceError(MMGFPError, RuntimeError):
    """The model's channels cannot be followed, or verification fails."""


class StatisticsError(MMGFPError, RuntimeError):
    """No decision can be based on the statistics of a run."""


class SavingError(MMGFPError, RuntimeError):
    """A file could not be written."""
