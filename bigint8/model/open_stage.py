"""Which way a loaded stage runs its steps."""

from ..plan.spec import ModelSpec
from .fused_stage import FusedStage
from .offload import Kept
from .ragged import RaggedStage, Room
from .stage import StageModel


def open_stage(stage: StageModel, spec: ModelSpec, room: Room, kept: Kept | None = None) -> RaggedStage:
    """A loaded stage, ready for steps: with fused blocks if there is a recipe for the model, else transformers' own.

    Allocates the keys and values that `room` says, and the buffers of the offloaded blocks in `kept`. Raises
    BigInt8Error for a model that cannot run ragged steps.
    """
    recipe = stage.family.recipe(spec.config)
    if recipe is not None:
        return FusedStage(stage, recipe, spec.known_layout, room, kept)
    from .general import GeneralStage

    return GeneralStage(stage, spec.known_layout, room)
