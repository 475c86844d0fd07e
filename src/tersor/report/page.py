"""Page: templates of offline pages in one file.

A page has no script, font or picture from elsewhere, and its content-security policy forbids them. Names come
from files, so a template escapes every value and shows invisible characters by their number.
"""

from __future__ import annotations

import functools
from typing import Any

from tersor.errors import visible

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@functools.cache
def template(name: str) -> Any:
    """A template in report/templates."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tersor.report"), autoescape=True, finalize=visible,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(name, globals={"policy": POLICY})
