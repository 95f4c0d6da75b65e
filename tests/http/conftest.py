"""Fixtures of HTTP."""

from collections.abc import Iterator

import pytest

from tests.http.common import Site, site
from tests.laws.common import one_thread

__all__ = ["one_thread"]


@pytest.fixture(scope="module")
def served() -> Iterator[Site]:
    """A server in local mode with the base alone, which holds nothing at the module's end."""
    with site() as s:
        yield s
        s.idle()
