"""The class of all blocks of a recipe: it refuses unknown keys."""

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Strict(BaseModel):
    """A block of a recipe. Unknown keys are refused; the docstring under a field is its help text in the JSON
    schema (recipe_schema.py)."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), validate_default=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_boolean_for_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would read true as 1."""
        annotation = str(cls.model_fields[info.field_name].annotation)
        takes_number = "int" in annotation or "float" in annotation
        if isinstance(value, bool) and takes_number and "bool" not in annotation:
            raise ValueError(f"is {str(value).lower()}, expected a number")
        return value
