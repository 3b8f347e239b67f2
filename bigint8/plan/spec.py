"""A model as plans and loaders know it: where its weights are, its modules' sizes, how it is quantized."""

from dataclasses import dataclass, replace
from pathlib import Path

from ..checkpoint.headers import Checkpoint
from ..checkpoint.int8_format import is_int8_config, stored_threshold
from ..errors import CheckpointError, PlanError
from ..families.layout import Config, Layout
from ..families.table import family_of, find_family, layout_of
from ..options import Access, Int8Config, Workload
from ..sources.find import Source
from ..sources.hub import HubCommit
from ..units import FLOAT_BYTES


@dataclass(frozen=True)
class ModelSpec:
    """One model, and what is asked of it. Everything that plans or loads it takes this, and nothing beside it.

    name: for people; folder: of its checkpoint, None where only its config is known
    config: what config.json holds; stored: the float dtype of most of its weights
    int8: the settings, the stored threshold of an int8 checkpoint included
    layout: its modules and their sizes, None for a family that cannot be cut
    hub: what each machine fetches its part of, where the folder has the shards' headers only
    one_process: its stages will be in one process, which has each tensor once
    """

    name: str
    folder: Path | None
    config: Config
    stored: str
    int8: Int8Config
    access: Access
    layout: Layout | None
    one_process: bool = False
    hub: HubCommit | None = None

    @property
    def max_context(self) -> int | None:
        """The longest sequence that the model was made for, None where it does not say."""
        if self.layout is not None:
            return self.layout.sizes.max_context
        longest = self.config.get("max_position_embeddings")
        return longest if isinstance(longest, int) and longest > 0 else None

    @property
    def tied(self) -> bool:
        """Whether the output head is the token embeddings' matrix, in the first stage."""
        return self.known_layout.tied

    @property
    def stored_int8(self) -> bool:
        """Whether the checkpoint holds int8 layers."""
        return is_int8_config(self.config)

    @property
    def known_layout(self) -> Layout:
        """The layout. Raises PlanError for a family that cannot be cut."""
        if self.layout is None:
            family_of(self.config["model_type"])
            raise AssertionError("a family in the table has a layout")
        return self.layout

    def workload(self, context: int | None = None, sequences: int = 1) -> Workload:
        """The work to leave room for; by default one sequence of the default length, or the model's if that is less."""
        return Workload.of(context, sequences, self.max_context)

    def with_int8_head(self) -> "ModelSpec | None":
        """This model with its output head in int8, and the embeddings that are tied to it; None if the settings
        decide about the head, or if it is int8 already."""
        if self.int8.int8_head is not None or self.int8.skip_modules is not None:
            return None
        layout = self.known_layout.with_int8_head()
        if layout == self.known_layout:
            return None
        return replace(self, int8=self.int8.model_copy(update={"int8_head": True}), layout=layout)

    def with_copied_head(self) -> "ModelSpec | None":
        """This model with a copy of its embeddings in the last stage as output head; None where the two are not tied,
        and in one process."""
        if not self.tied or self.one_process:
            return None
        return replace(self, layout=self.known_layout.with_copied_head())


def spec_of(
    source: Source,
    int8: Int8Config | None = None,
    access: Access = Access(),  # noqa: B008  (frozen)
    checkpoint: Checkpoint | None = None,
) -> ModelSpec:
    """The spec of a model that was found, from its checkpoint's headers or, without one, from its config alone.

    Raises CheckpointError where there is no config, or one that lacks or garbles sizes.
    """
    config = checkpoint.config if checkpoint is not None else source.config(access)
    stored = checkpoint.stored_dtype if checkpoint is not None else _told_dtype(source, config)
    settings = int8 or Int8Config()
    threshold = stored_threshold(config) if is_int8_config(config) else None
    if threshold is not None and "threshold" not in settings.model_fields_set:
        settings = settings.model_copy(update={"threshold": threshold})
    return ModelSpec(
        name=source.name,
        folder=source.folder,
        config=config,
        stored=stored,
        int8=settings,
        access=access,
        layout=_layout(source, config, settings, stored, checkpoint),
        hub=source.hub,
    )


def _layout(
    source: Source, config: Config, int8: Int8Config, stored: str, checkpoint: Checkpoint | None
) -> Layout | None:
    if find_family(config["model_type"]) is None:
        return None
    try:
        return layout_of(config, int8, stored, checkpoint)
    except PlanError as error:  # of a known family: a size that no model has
        if source.folder is None:
            raise
        raise CheckpointError(f"{source.folder / 'config.json'}: {error}") from None


def _told_dtype(source: Source, config: Config) -> str:
    """What the weights are stored as, as far as a preset or a config tells; most are float16."""
    told = source.preset.dtype if source.preset is not None else config.get("dtype") or config.get("torch_dtype")
    return told if told in FLOAT_BYTES else "float16"


def check_workload(spec: ModelSpec, workload: Workload) -> None:
    """Raise PlanError for sequences longer than the model was made for."""
    longest = spec.max_context
    if longest is not None and workload.context > longest:
        raise PlanError(f"context={workload.context} is longer than the {longest} tokens that {spec.name} was made for")
