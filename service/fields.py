"""What every request is made of: the base of its models, names, texts, and how something is trained."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _storable(text: str) -> str:
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("the text must not hold NUL or lone surrogates")
    return text


NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
ID = r"^[0-9a-z-]+$"
ALLOWED = {
    NAME: "must begin with a letter or digit, and hold only letters, digits, dots, underscores and hyphens",
    ID: "must hold only small letters, digits and hyphens",
}
"""What these patterns say, in words."""
Name = Annotated[str, Field(min_length=1, max_length=100, pattern=NAME)]
Text = Annotated[str, AfterValidator(_storable)]
"""Free text that every database can hold."""


class Model(BaseModel):
    """Unknown fields are refused, and so are NaN and infinity."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


class DescentSpec(Model):
    """Stochastic gradient descent with momentum, the learning rate falling linearly epoch by epoch."""

    epochs: Annotated[int, Field(ge=1, le=1000)] | None = None
    batch_size: Annotated[int, Field(ge=2, le=4096)] | None = None
    learning_rate: Annotated[float, Field(gt=0, le=10)] | None = None
    schedule: Literal["linear", "steps"] | None = None
    """How the rate falls: linearly over the epochs (the default), or to a tenth after every quarter of them."""
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    weight_decay: Annotated[float, Field(ge=0, le=1)] | None = None
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] | None = None
    clip_norm: Annotated[float, Field(gt=0, le=1e6)] | None = None
    augment: bool | None = None
    """Whether images are shifted and mirrored at random."""


class ScratchSpec(DescentSpec):
    """The same for one network, which may warm up."""

    warm_up: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of the training over which the learning rate rises to its value."""
