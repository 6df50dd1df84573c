"""A command that ends with an error."""

import pytest

from cronos_flax.compare.cli import main


def stopped(args, capsys):
    """The exit status of a command that stops with an error, and what it says, in one line."""
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, args)))
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return stop.value.code, " ".join(said.split())
