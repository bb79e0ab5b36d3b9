"""The form in which the hot modules are tested: imported before any of them."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Final

from mptunnel import native

if os.environ.get("MPTUNNEL_COMPILED") == "1":
    native.use()
import_module("mptunnel.timers")  # with the first one it is settled, whatever a test calls
FORM: Final = native.core()
