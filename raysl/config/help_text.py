"""Format the settings of a verb for its --help."""

from collections.abc import Collection

from raysl.config.base import Config


def settings_text(model: type[Config], *, without: Collection[str] = ()) -> str:
    """Return each key of a model with its default and its description.

    Args:
        model: The configuration class that the verb's overrides set.
        without: Keys to leave out, because the verb takes them as arguments.
    """
    lines = []
    for name, field in model.model_fields.items():
        if name in without:
            continue
        default = field.get_default(call_default_factory=True)
        default = "null" if default is None else default
        default = str(default).lower() if isinstance(default, bool) else default
        text = " ".join((field.description or "").split())
        lines.append(f"  {name}={'[]' if default == () else default}\n      {text}")
    return "\n".join(lines)
