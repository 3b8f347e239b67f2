"""Which way a loaded stage runs its steps."""

from ..plan.spec import ModelSpec
from .fused_stage import FusedStage
from .ragged import RaggedStage, Room
from .stage import StageModel


def open_stage(stage: StageModel, spec: ModelSpec, room: Room) -> RaggedStage:
    """A loaded stage, ready for steps: with fused blocks if there is a recipe for the model, else transformers' own.

    Allocates the keys and values that `room` says. Raises BigInt8Error for a model that cannot run ragged steps.
    """
    recipe = stage.family.recipe(spec.config)
    if recipe is not None:
        return FusedStage(stage, recipe, spec.known_layout, room)
    from .general import GeneralStage

    return GeneralStage(stage, spec.known_layout, room)
