"""Errors that say the field, what was expected, what came, and the remedy."""


class MMGFPError(Exception):
    """Base of every error that mmgfp raises on purpose.

    Args:
        field: The argument, key or file that is wrong; or the whole message, as
            registries give it when they raise an error again.
        expected: What it should have been.
        got: What it is.
        remedy: What to do about it.
    """

    def __init__(
        self, field: str, expected: str = '', got: str = '', remedy: str = ''
    ) -> None:
        details = f': expected {expected}, got {got}; {remedy}' if expected else ''
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
