"""What a client may ask for, as the API documents it; every check that needs no model."""

from __future__ import annotations

import base64
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr

from t2idist.sampling.axes import BATCH_IMAGES
from t2idist.sampling.draw import check_truncation

DEFAULT_STEPS = 8

Kind = Literal["text", "unconditional", "attributes", "domains"]


class DrawRequest(BaseModel):
    """Images of a sentence, as ``t2idist sample`` draws them for the same options."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=True)

    text: Annotated[StrictStr | None, Field(description="the sentence; null for a model without text")] = None
    n: Annotated[StrictInt, Field(description="number of images, each of other noise")] = BATCH_IMAGES
    seed: Annotated[StrictInt, Field(description="equal seeds give equal images")] = 0
    truncation: Annotated[StrictFloat | None, Field(description="redraw noise of a magnitude above this")] = None
    scale: Annotated[Literal["largest", "all"], Field(description="image sizes to return")] = "largest"
    attention: Annotated[StrictBool, Field(description="also return the attention map of each word")] = False
    to: Annotated[
        StrictStr | None, Field(description="second sentence: returns `steps` rows of n images from `text` to it")
    ] = None
    interpolate_noise: Annotated[
        StrictBool, Field(description="return `steps` images from the first noise to the second, instead of n")
    ] = False
    steps: Annotated[StrictInt | None, Field(description="steps of an interpolation, both ends included")] = None

    def check(self, most: int) -> None:
        """Raise ValueError for values that do not fit each other, or for more than `most` images."""
        check_truncation(self.truncation, "truncation")
        steps = 1
        if self.to is not None and self.interpolate_noise:
            raise ValueError("to and interpolate_noise: give one of them")
        if self.to is not None and self.attention:
            raise ValueError("attention: there are no words to show between two sentences; remove it")
        if self.to is not None or self.interpolate_noise:
            steps = DEFAULT_STEPS if self.steps is None else self.steps
            if not 2 <= steps <= most:
                raise ValueError(f"steps {steps}: give at least 2, the two ends, and at most {most}")
        elif self.steps is not None:
            raise ValueError("steps is for to and interpolate_noise; give one of them or remove it")
        if not 1 <= self.n <= most:
            raise ValueError(f"n {self.n}: give at least 1 and at most {most}")
        if self.to is not None and steps * self.n > most:
            raise ValueError(f"{steps} steps of {self.n} images are {steps * self.n}; at most {most} in one request")

    @property
    def step_count(self) -> int:
        return DEFAULT_STEPS if self.steps is None else self.steps

    @property
    def truncation_or_none(self) -> float:
        """The truncation as a number; infinity if there is none."""
        return float("inf") if self.truncation is None else self.truncation


class Map(BaseModel):
    """Attention of a word at one stage."""

    png: str
    """Base64 of a grey PNG, brightest at its own peak."""
    peak: float
    """Largest weight; weights sum to 1 over the words."""


class Picture(BaseModel):
    """One image."""

    label: str
    """The sentence, or how far an interpolation has come."""
    sizes: list[int]
    pngs: list[str]
    """Base64 of the PNG file of each size."""
    attention: list[list[Map]] = []
    """For each word, its map at every attention stage."""


class DrawResponse(BaseModel):
    """The images of a request."""

    images: list[Picture]
    words: list[str]
    """Words of the sentence that the model reads, in order."""
    warnings: list[str]
    """What is left out of the sentence."""


class TranslateResponse(BaseModel):
    """A translated image."""

    title: str
    """What was changed."""
    given: str
    """Base64 of the PNG of the central square of the upload, as the model sees it."""
    png: str
    """Base64 of the PNG of its translation."""

    def png_bytes(self) -> bytes:
        return base64.b64decode(self.png)


class Limits(BaseModel):
    """What one request may ask for."""

    images: int
    characters: int
    upload_bytes: int
    upload_pixels: int


class ModelCard(BaseModel):
    """What the served export can do."""

    name: str
    """Name of the system."""
    images_seen: int
    kind: Kind
    """What it draws from: a sentence, nothing, or an image whose attributes or domain are changed."""
    sizes: list[int]
    attention: bool
    """Whether there are attention maps."""
    words: int
    """Words that it knows; 0: any word."""
    max_words: int
    attributes: list[list[str]]
    """Attributes of each domain of a model that changes attributes."""
    conflicts: list[dict[str, list[str]]]
    """For each domain and attribute, those that it excludes."""
    domains: list[str]
    """Domains that images can be translated to."""
    limits: Limits


class Health(BaseModel):
    """State of the server."""

    ok: bool
    waiting: int
    """Images that wait."""


class Problem(BaseModel):
    """Why a request was not answered."""

    error: str
    """One sentence."""
