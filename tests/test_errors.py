"""Errors carry the exit codes that the manual promises."""

from __future__ import annotations

import pytest

from mptunnel import errors

EXIT_CODES = {
    errors.MptunnelError: 1, errors.ConfigError: 2, errors.NotRunningError: 3, errors.HostError: 1,
    errors.NotPermittedError: 5, errors.UnreachableError: 6, errors.RefusedError: 7,
}  # fmt: skip


@pytest.mark.parametrize("error", EXIT_CODES)
def test_each_error_has_its_exit_code(error: type[errors.MptunnelError]) -> None:
    assert error("why").exit_code == EXIT_CODES[error]
    assert str(error("why")) == "why"


def test_what_a_user_must_act_on_is_never_an_error_of_the_protocol() -> None:
    for error in EXIT_CODES:
        assert not issubclass(error, errors.ProtocolError)
    assert issubclass(errors.BadPacketError, errors.ProtocolError)
    assert issubclass(errors.NotAuthenticError, errors.ProtocolError)
    assert issubclass(errors.ProtocolError, errors.MptunnelError)
    assert issubclass(errors.NotPermittedError, errors.HostError)
