"""Small files of a work directory; the faults of file systems as one line."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from etils import epath

from hybridjax.config import UserError


def read_json(path: epath.Path) -> dict[str, Any] | None:
    with one_line(f"cannot read {path}: ", "repair or remove it"):
        return json.loads(path.read_text()) if path.exists() else None


def write_json(path: epath.Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)


@contextmanager
def one_line(fault: str, advice: str) -> Iterator[None]:
    """Turns a failure of the file system, as Orbax or Python reports it, into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{fault}{reason(error)}; {advice}") from error


def reason(error: BaseException) -> str:
    """One line, of which TensorStore puts the cause at the end."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 200 else f"...{line[-200:]}"
