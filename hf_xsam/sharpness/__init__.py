"""How sharp any model's minimum is, whatever trained it.

from hf_xsam.sharpness import MeasureSettings, measure

sharpness = measure(model, dataloader, MeasureSettings(top_k=3))
sharpness.save("output/sharpness.json")
"""

from ..step.curvature import TopEigenpair, top_eigenpair
from .landscape import Slice
from .measuring import Sharpness, measure
from .settings import MeasureSettings

__all__ = ["MeasureSettings", "Sharpness", "Slice", "TopEigenpair", "measure", "top_eigenpair"]
