"""How sharp any model's minimum is, whatever trained it.

from hf_xsam.sharpness import measure

sharpness = measure(model, dataloader, top_k=3)
sharpness.save("output/sharpness.json")
"""

from ..step.curvature import top_eigenpair
from .landscape import Slice
from .measuring import Sharpness, measure

__all__ = ["Sharpness", "Slice", "measure", "top_eigenpair"]
