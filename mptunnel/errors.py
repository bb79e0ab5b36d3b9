"""Every error of ours. What the user must act on carries the exit code of the program with it."""


class MptunnelError(Exception):
    """Something we foresaw; the command line prints it as one line and leaves with `exit_code`."""

    exit_code = 1


class ConfigError(MptunnelError):
    """The user must change something: an option, a file, a key, a token."""

    exit_code = 2


class NotRunningError(MptunnelError):
    """The program that was asked for does not run."""

    exit_code = 3


class HostError(MptunnelError):
    """The kernel, or a program of the host, refused something."""

    exit_code = 1


class NotPermittedError(HostError):
    """The kernel wants more privilege than we have."""

    exit_code = 5


class UnreachableError(MptunnelError):
    """The server did not answer on any path, and this run cannot go on without it."""

    exit_code = 6


class RefusedError(MptunnelError):
    """The server answered, and said no."""

    exit_code = 7


class ProtocolError(MptunnelError):
    """The remote sent nonsense: counted, never shown to the user, never leaves the core."""


class BadPacketError(ProtocolError):
    """Bytes that are not what they claim to be."""


class NotAuthenticError(ProtocolError):
    """A tag or a key that does not fit."""
