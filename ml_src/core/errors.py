"""Every error that a user can cause or meet, as one small tree.

    MLError                 the command prints it as one sentence and ends with exit code 2
    ├── ConfigError         the YAML file, a flag or a name in them
    ├── DataError           images, masks, index files
    ├── CheckpointError     a file that is no checkpoint of ours, or does not fit
    └── TrainingError       training cannot start or go on
        └── BudgetError     the privacy budget is spent

A message says what is wrong, where, and what to do. Any other exception is a bug of ours.
"""

ERROR_FILE = "ML_SRC_ERROR_FILE"
"""Environment variable: where one of several processes writes the line of its error, for its parent to show once."""


class MLError(Exception):
    """What a user can mend; its text is the one sentence that is shown."""


class ConfigError(MLError):
    """The configuration file, a flag, or a name used in them."""


class DataError(MLError):
    """An image, a mask, or an index file."""


class CheckpointError(MLError):
    """A file that is not a checkpoint of this program, or one that does not fit what was asked."""


class TrainingError(MLError):
    """Training cannot start or cannot go on."""


class BudgetError(TrainingError):
    """The privacy budget is spent."""
