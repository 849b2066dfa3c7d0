"""The `sd3` command: its exit codes, and errors of one line.

The code is 0 only when the thing was done, and 130 after Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from http import HTTPStatus

from flows.local.interrupt import Interrupted, end_on_the_next, listen


def main() -> None:
    try:
        listen()  # before the imports, which take long enough to be interrupted
        from flows.cli.commands import run
        from flows.local.home import home
        from sd3core.loopback import keep_loopback_direct

        keep_loopback_direct()
        # else in /tmp, where others write
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(home() / "cache" / "compiled"))
        sys.exit(run(_print))
    except Interrupted as stopped:
        end_on_the_next()
        _print(str(stopped))
        sys.exit(130)
    except Exception as error:
        line = _line(error)
        if line is None:
            raise
        _print(line)
        sys.exit(1)


def _line(error: Exception) -> str | None:
    """What to tell a user who can mend it; None where it is a fault of the program."""
    import httpx  # what Prefect's client raises when its server is away; not needed to start

    from flows.local.home import full_disk, home, local_command
    from sd3core.errors import UserError, described_os_error

    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, httpx.HTTPStatusError):
        if error.response.status_code == HTTPStatus.UNAUTHORIZED:
            return f"the Prefect server asks for another password than this home's; `{local_command('sd3 up')}` starts it again"
        said = f"{error.response.status_code} {error.response.reason_phrase}"
        return full_disk() or f"the Prefect server answers {said}; {home()}/logs/server.log says why"
    if isinstance(error, httpx.HTTPError):
        return f"the Prefect server does not answer; `{local_command('sd3 up')}` starts it again"
    if isinstance(error, OSError):
        return described_os_error(error)
    return None


def _print(line: str) -> None:
    from flows.cli.console import PlainConsole
    from sd3core.errors import LINE_CHARS
    from sd3core.shown_text import shortened

    PlainConsole(stderr=True).print(f"sd3: {shortened(line, LINE_CHARS)}", soft_wrap=True)
