"""The settings of a verb, as its --help lists them."""

from raysl.config.base import Config


def describe_settings(model: type[Config]) -> str:
    """Return a line with the default, and one that says what it is, for each setting of a model."""
    lines = []
    for name, field in model.model_fields.items():
        if name == "source":
            continue
        default = "null" if field.default is None else field.default
        default = str(default).lower() if isinstance(default, bool) else default
        text = " ".join((field.description or "").split())
        lines.append(f"  {name}={'[]' if default == () else default}\n      {text}")
    return "\n".join(lines)
