"""What pydantic needs to read, write and describe records. Only pydantic calls it, so it need not be installed."""

from types import NoneType
from typing import TYPE_CHECKING, Any, Final, get_args

import msgspec

NULL_IS_UNDOCUMENTED: Final = {"null": "undocumented"}
"""Marks a field that is read as None if it is null, although the API documents that it is never null."""

if TYPE_CHECKING:
    from pydantic_core import SchemaSerializer


class PydanticSerializer:
    """Gives a class the serializer that pydantic looks for on objects whose type it does not know, as in `Any`."""

    def __get__(self, part: object | None, owner: type[Any]) -> "SchemaSerializer":
        from pydantic import TypeAdapter  # noqa: PLC0415 - only pydantic asks, and it is optional

        serializer: SchemaSerializer = TypeAdapter(owner).serializer
        return serializer


def record_schema(cls: type[Any], handler: Any) -> Any:
    """Return pydantic's schema of a record: it reads records and JSON objects, and writes all that the server sent."""
    from pydantic_core import core_schema  # noqa: PLC0415 - as above

    # The fields are here to be described in JSON Schema; msgspec reads them.
    fields = core_schema.typed_dict_schema(
        {
            field.encode_name: core_schema.typed_dict_field(
                handler.generate_schema(_described(field.type)), required=is_documented(field)
            )
            for field in msgspec.structs.fields(cls)
        },
        cls_name=cls.__name__,
        extra_behavior="allow",
    )

    def read(value: Any, _: object) -> Any:
        return value if isinstance(value, cls) else cls.from_dict(value)

    read.__name__ = cls.__name__  # errors of pydantic name it
    return core_schema.no_info_wrap_validator_function(
        read,
        fields,
        serialization=core_schema.plain_serializer_function_ser_schema(cls.to_dict),
        ref=f"{cls.__module__}.{cls.__qualname__}:{id(cls)}",
    )


def status_schema(cls: type[Any]) -> Any:
    """Return pydantic's schema of an open enum: any text, given as a member."""
    from pydantic_core import core_schema  # noqa: PLC0415 - as above

    return core_schema.no_info_after_validator_function(
        cls, core_schema.str_schema(), serialization=core_schema.to_string_ser_schema()
    )


def is_documented(field: msgspec.structs.FieldInfo) -> bool:
    """Return whether the API promises a field, even if a record without it can be read."""
    return field.required or field.default_factory is not msgspec.NODEFAULT


def _described(kind: Any) -> Any:
    """Return a type as JSON Schema should show it: a number is a number, and null is allowed where the API says so."""
    kinds = get_args(kind)
    if any(isinstance(note, msgspec.Meta) and note.extra == NULL_IS_UNDOCUMENTED for note in kinds[1:]):
        return next(one for one in get_args(kinds[0]) if one is not NoneType)
    if {int, float} <= set(kinds):
        return float | None if NoneType in kinds else float
    return kind
