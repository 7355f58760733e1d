"""SmolLM3: calls as Hermes has them; its template names tools otherwise and leaves earlier calls out."""

from __future__ import annotations

from server.tools.format import register
from server.tools.hermes import Hermes


@register
class SmolLM3(Hermes):
    """A format of its own, so that it can be named; what its template leaves out is found by rendering."""

    name = "smollm3"
    functions_variable = "xml_tools"
    rank = 2

    @classmethod
    def fits(cls, template: str) -> bool:
        return "xml_tools" in template
