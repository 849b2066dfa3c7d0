"""Errors a user can cause: one line that names the key, file or row, and the mend."""


class UserError(Exception):
    """Something the user can put right. The message is one line; the command line prints it without a traceback."""


class RecipeError(UserError):
    """A recipe, or an override of one, that cannot be used."""


class DataError(UserError):
    """A data set, manifest or stored object that is missing, incomplete or not what it says it is."""


class StoreError(UserError):
    """A store that cannot be reached, read or written."""


class CheckpointError(UserError):
    """A checkpoint whose keys, shapes or files do not fit."""
