"""The server's objects. Fields that this version does not know are in `raw`. Times are Unix seconds."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from .errors import ServerError

__all__ = [
    "Concept",
    "ConceptKind",
    "ConceptStatus",
    "Failure",
    "Generation",
    "GenerationPlan",
    "GenerationProgress",
    "GenerationSettings",
    "GenerationStatus",
    "InputTokens",
    "Losses",
    "Model",
    "ModelConcept",
    "OutputTokens",
    "Preview",
    "Progress",
    "StoredImage",
    "Training",
    "TrainingMethod",
    "TrainingStatus",
    "TrainingWithLosses",
    "Usage",
    "UsedConcept",
    "Version",
    "VersionInUse",
]

ConceptKind = Literal["subject", "style"]
ConceptStatus = Literal["training", "ready", "failed", "cancelled"]
TrainingStatus = Literal["queued", "running", "succeeded", "failed", "cancelled"]
TrainingMethod = Literal["coar", "coar-text", "textual-inversion"]
GenerationStatus = Literal["queued", "running", "succeeded", "failed", "cancelled"]


@dataclass(frozen=True, kw_only=True)
class Object:
    """What all objects have."""

    #: Names of the OpenAPI schemas that the class represents.
    SCHEMAS: ClassVar[tuple[str, ...]] = ()

    #: The whole object as the server sent it.
    raw: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class Failure(Object):
    """Why a training or a generation failed."""

    SCHEMAS = ("TrainingError", "GenerationFailure")

    code: str
    message: str
    #: The setting that caused the failure.
    field: str | None = None


@dataclass(frozen=True, kw_only=True)
class Progress(Object):
    """Progress of a training."""

    SCHEMAS = ("TrainingProgress",)

    step: int
    total_steps: int
    loss: float | None = None
    steps_per_second: float | None = None
    #: None while it is unknown: before the second step, and when the training is not running.
    eta_seconds: int | None = None

    @property
    def fraction(self) -> float:
        """From 0 to 1."""
        return self.step / self.total_steps if self.total_steps else 0.0


@dataclass(frozen=True, kw_only=True)
class Preview(Object):
    """An image that was generated during a training, always with the same prompt and seed."""

    SCHEMAS = ("TrainingPreview",)

    step: int
    url: str


@dataclass(frozen=True, kw_only=True)
class Losses(Object):
    """Losses of one step. Disabled terms are None."""

    SCHEMAS = ("TrainingLosses",)

    step: int
    total: float
    next_token: float
    prior: float | None = None
    regularisation: float | None = None


@dataclass(frozen=True, kw_only=True)
class Training(Object):
    """A training of a concept."""

    SCHEMAS = ("Training",)

    id: str
    object: str
    #: The concept's current name.
    concept: str
    concept_id: str
    status: TrainingStatus
    progress: Progress
    previews: tuple[Preview, ...]
    attempt: int
    resumed_from_step: int
    priority: int
    created_at: int
    hyper_parameters: Mapping[str, Any]
    checkpoint_step: int | None = None
    started_at: int | None = None
    finished_at: int | None = None
    #: Number of the version that the training made; None until then.
    version: int | None = None
    webhook_url: str | None = None
    error: Failure | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingWithLosses(Training):
    """A training with its loss curve."""

    SCHEMAS = ("TrainingWithLosses",)

    losses: tuple[Losses, ...]


@dataclass(frozen=True, kw_only=True)
class VersionInUse(Object):
    """The active version of a concept."""

    SCHEMAS = ("VersionInUse",)

    number: int
    #: SHA-256 of the concept file.
    hash: str
    created_at: int


@dataclass(frozen=True, kw_only=True)
class Version(Object):
    """A version of a concept."""

    SCHEMAS = ("ConceptVersion",)

    id: str
    object: str
    number: int
    #: SHA-256 of the concept file.
    hash: str
    created_at: int
    #: None if the version was imported.
    training_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class Concept(Object):
    """A subject or a style that the model has learned or is learning."""

    SCHEMAS = ("Concept",)

    id: str
    object: str
    #: Name of the concept, written `<name>` in prompts.
    name: str
    kind: ConceptKind
    status: ConceptStatus
    #: Number of versions.
    versions: int
    #: Number of reference images; 0 if the concept was imported.
    images: int
    metadata: Mapping[str, str]
    created_at: int
    updated_at: int
    #: The noun of a subject.
    class_: str | None = None
    description: str | None = None
    #: Only in the response to a registration: another concept that was trained from the same images and settings.
    duplicate_of: str | None = None
    #: The newest training.
    training: Training | None = None
    #: The version that prompts use; None until a training has succeeded.
    version: VersionInUse | None = None


@dataclass(frozen=True, kw_only=True)
class UsedConcept(Object):
    """A concept that a generation used."""

    SCHEMAS = ("UsedConcept",)

    name: str
    version: int
    #: SHA-256 of the concept file.
    hash: str


@dataclass(frozen=True, kw_only=True)
class InputTokens(Object):
    """Input tokens by kind."""

    SCHEMAS = ("InputTokens",)

    text_tokens: int
    image_tokens: int


@dataclass(frozen=True, kw_only=True)
class OutputTokens(Object):
    """Output tokens by kind."""

    SCHEMAS = ("OutputTokens",)

    text_tokens: int
    image_tokens: int


@dataclass(frozen=True, kw_only=True)
class Usage(Object):
    """Tokens that a generation took."""

    SCHEMAS = ("Usage",)

    total_tokens: int
    input_tokens: int
    output_tokens: int
    input_tokens_details: InputTokens
    #: None from older servers.
    output_tokens_details: OutputTokens | None = None


@dataclass(frozen=True, kw_only=True)
class StoredImage(Object):
    """A stored image. `url` is signed: it needs no key and expires with the image."""

    SCHEMAS = ("GeneratedImage",)

    id: str
    index: int
    seed: int
    url: str
    width: int
    height: int
    #: SHA-256 of the file.
    content_hash: str


@dataclass(frozen=True, kw_only=True)
class GenerationProgress(Object):
    """Progress of a generation in image tokens."""

    SCHEMAS = ("ProgressObject",)

    done: int
    total: int

    @property
    def fraction(self) -> float:
        """From 0 to 1."""
        return self.done / self.total if self.total else 0.0


@dataclass(frozen=True, kw_only=True)
class GenerationSettings(Object):
    """All settings, resolved. Sent again with the prompt, they give the same images."""

    SCHEMAS = ("GenerationSettings",)

    n: int
    size: str
    seed: int
    first_index: int
    guidance_scale: float
    temperature: float
    top_k: int
    identity_mask: bool
    output_format: str
    output_compression: int
    partial_images: int


@dataclass(frozen=True, kw_only=True)
class Generation(Object):
    """Images of one prompt."""

    SCHEMAS = ("Generation",)

    id: str
    object: str
    status: GenerationStatus
    priority: int
    progress: GenerationProgress
    #: The prompt as it is used, with all concepts placed in it.
    prompt: str
    request: GenerationSettings
    concepts: tuple[UsedConcept, ...]
    images: tuple[StoredImage, ...]
    metadata: Mapping[str, str]
    created_at: int
    #: Number of generations ahead of it while it is queued.
    queue_position: int | None = None
    started_at: int | None = None
    finished_at: int | None = None
    usage: Usage | None = None
    error: Failure | None = None


@dataclass(frozen=True, kw_only=True)
class GenerationPlan(Object):
    """A request that was checked but not run."""

    SCHEMAS = ("GenerationPlan",)

    valid: bool
    #: The prompt as it would be used, with all concepts placed in it.
    prompt: str
    request: GenerationSettings
    concepts: tuple[UsedConcept, ...]
    #: The tokens that it would take.
    usage: Usage


@dataclass(frozen=True, kw_only=True)
class ModelConcept(Object):
    """A concept in a model's name."""

    SCHEMAS = ("ModelConcept",)

    name: str
    kind: ConceptKind
    class_: str | None = None
    version: VersionInUse | None = None


@dataclass(frozen=True, kw_only=True)
class Model(Object):
    """The base model, or the base model with concepts."""

    SCHEMAS = ("Model",)

    id: str
    object: str
    created: int
    owned_by: str
    #: Fingerprint of the base model. Concepts work only with the base model that they were trained on.
    fingerprint: str
    #: Supported sizes, the default first.
    sizes: tuple[str, ...]
    layers: int
    hidden_size: int
    concepts: tuple[ModelConcept, ...]


O = TypeVar("O", bound=Object)


def json_name(name: str) -> str:
    """What a field or parameter is called in JSON: `class_` is a keyword's other form."""
    return name.removesuffix("_")


def decode(cls: type[O], data: object) -> O:
    """An object from JSON.

    Raises ServerError if a required field is missing.
    """
    if not isinstance(data, Mapping):
        raise ServerError(f"The answer is not a {cls.__name__}.", code="unexpected_answer")
    values: dict[str, Any] = {"raw": data}
    for name, key, required, convert in _plan(cls):
        if (value := data.get(key)) is not None:
            values[name] = convert(value)
        elif required:
            raise ServerError(f"The answer is a {cls.__name__} without `{key}`.", code="unexpected_answer")
    return cls(**values)


_PLANS: dict[type[Object], list[tuple[str, str, bool, Callable[[Any], Any]]]] = {}


def _plan(cls: type[Object]) -> list[tuple[str, str, bool, Callable[[Any], Any]]]:
    """Of each field: its name, its name in JSON, whether it must be there, and what its value becomes."""
    if cls in _PLANS:
        return _PLANS[cls]
    hints = typing.get_type_hints(cls)
    _PLANS[cls] = [
        (field.name, json_name(field.name), field.default is dataclasses.MISSING, _converter(hints[field.name]))
        for field in dataclasses.fields(cls)
        if field.name != "raw"
    ]
    return _PLANS[cls]


def _converter(hint: Any) -> Callable[[Any], Any]:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        item = _converter(typing.get_args(hint)[0])
        return lambda value: tuple(item(one) for one in value)
    if isinstance(hint, type) and issubclass(hint, Object):
        return functools.partial(decode, hint)
    return lambda value: value
