"""Teaches mkdocstrings what it does not know: pydantic fields, and `Example:` as a section of doctests."""

import ast
import re
from typing import Any

import griffe

_HEADING = re.compile(r"^(\s*)Example:$", re.MULTILINE)


class PydanticFields(griffe.Extension):
    """Shows a field's default and description instead of the call of `Field`, and a strategy's fields as parameters."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the heading, since only the plural is known as a section."""
        if obj.docstring is not None:
            obj.docstring.value = _HEADING.sub(r"\1Examples:", obj.docstring.value)

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        """Rewrite the fields of one class."""
        fields = []
        for attribute in cls.attributes.values():
            call = attribute.value
            if not isinstance(call, griffe.ExprCall) or str(call.function) != "Field":
                continue
            named = {argument.name: argument.value for argument in call.arguments if hasattr(argument, "name")}
            positional = [argument for argument in call.arguments if not isinstance(argument, griffe.ExprKeyword)]
            attribute.value = positional[0] if positional else named.get("default")
            if attribute.docstring is None and "description" in named:
                text = ast.literal_eval(str(named["description"]))
                attribute.docstring = griffe.Docstring(text[:1].upper() + text[1:] + ".", parent=attribute)
            fields.append(attribute)
        if fields and "Compressor" in map(str, cls.bases):
            kind = griffe.ParameterKind.keyword_only
            parameters = griffe.Parameters(
                griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword),
                *(griffe.Parameter(f.name, annotation=f.annotation, kind=kind, default=f.value) for f in fields),
            )
            cls.set_member("__init__", griffe.Function("__init__", parameters=parameters, parent=cls))
