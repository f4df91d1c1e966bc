import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WeightNormLinear(nn.Module):
    """A linear layer without bias whose rows are g * v / |v| (Salimans and Kingma, arXiv 1602.07868).

    torch's own weight normalisation stores the two parts as `parametrizations.weight.original0/1`; DINOv2's checkpoints
    name them `weight_g` and `weight_v`.

    Args:
        fixed_gain: g stays 1.
    """

    def __init__(self, in_features: int, out_features: int, fixed_gain: bool = False) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.empty(out_features, 1), requires_grad=not fixed_gain)
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight_g)
        bound = self.weight_v.shape[1] ** -0.5
        nn.init.uniform_(self.weight_v, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_g * F.normalize(self.weight_v, dim=1))


class DINOHead(nn.Module):
    """The head from tokens to prototype logits (Caron et al., arXiv 2104.14294, section 3.1).

    It consists of an MLP, L2 normalisation and a weight-normalised linear layer.

    Args:
        in_dim: channels of the tokens.
        out_dim: number of prototypes P.
        nlayers: number of linear layers before the normalisation, with GELU between them.
        hidden_dim: width between these layers.
        bottleneck_dim: channels that are normalised and compared with the prototypes.
        norm_last_layer: keep every prototype at norm 1.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        norm_last_layer: bool = False,
    ) -> None:
        super().__init__()
        if nlayers < 1:
            raise ValueError(f"nlayers={nlayers}: a DINO head needs at least 1 linear layer before the prototypes")
        widths = [in_dim, *[hidden_dim] * (nlayers - 1), bottleneck_dim]
        layers: list[nn.Module] = []
        for width, next_width in itertools.pairwise(widths):
            layers += [nn.Linear(width, next_width), nn.GELU()]
        layers.pop()  # no activation before the normalisation
        self.mlp = layers[0] if nlayers == 1 else nn.Sequential(*layers)  # names as in DINOv2: "mlp" for a single layer
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim, fixed_gain=norm_last_layer)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialises every parameter; call it after `to_empty`, or to draw new weights."""
        for module in self.mlp.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.last_layer.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Maps x [..., in_dim] -> logits [..., P]."""
        x = self.mlp(x)
        eps = 1e-6 if x.dtype == torch.float16 else 1e-12  # 1e-12 is zero in fp16
        return self.last_layer(F.normalize(x, dim=-1, eps=eps))
