"""One browser for the tests of a file."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.laws.common import one_thread
from tests.web.common import browser

__all__ = ["one_thread"]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as started:
        yield started
