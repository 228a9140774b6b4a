"""The layers of each pipeline stage, for Megatron, where the stages differ."""

from collections.abc import Sequence
from typing import Any

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout


class StageLayers(PipelineParallelLayerLayout):
    """Megatron's layout of layers by stage, as one rank's stage sees it.

    Megatron 0.16 looks for the stage in its global groups, which we do not create.
    """

    def __init__(self, counts: Sequence[int], stage: int) -> None:
        rows: list[Any] = [["decoder"] * count for count in counts]
        rows[0].insert(0, "embedding")
        rows[-1].append("loss")
        super().__init__(rows, len(counts))
        self._stage = stage

    def get_num_layers_to_build(
        self, layer_type: LayerType = LayerType.decoder, vp_stage: int | None = None, pp_rank: int | None = None
    ) -> int:
        """Returns the number of layers of the stage; of the rank's own unless `pp_rank` names another."""
        return super().get_num_layers_to_build(layer_type, vp_stage, self._stage if pp_rank is None else pp_rank)

    def get_layer_offset(
        self, layer_type: LayerType = LayerType.decoder, vp_stage: int | None = None, pp_rank: int | None = None
    ) -> int:
        """Returns the number of layers before the stage; before the rank's own unless `pp_rank` names another."""
        return super().get_layer_offset(layer_type, vp_stage, self._stage if pp_rank is None else pp_rank)
