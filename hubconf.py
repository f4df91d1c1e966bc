"""Entry points for torch.hub: dinov2_eq_vit{t,s,b,l,g}{8,14,16}, and each with `_reg` for registers.

    torch.hub.load("PATH OF A CHECKOUT", "dinov2_eq_vitt8", source="local")

`torch.hub.help` tells the arguments of one; `weights/manifest.json` lists the released weights.
"""

from dinov2_eq.hub import ENTRY_POINTS as _ENTRY_POINTS

dependencies = ["torch"]

globals().update(_ENTRY_POINTS)
