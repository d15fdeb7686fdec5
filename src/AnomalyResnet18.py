"""The backbone: torchvision's ResNet18, adapted to a category by a two-class head."""

from torch import Tensor, nn
from torchvision.models import resnet18


class AnomalyResnet18(nn.Module):
    """ResNet18 with a head for two classes, "unchanged" and "with a defect": (N,3,H,W) -> (N,2) logits.

    Its pooled features (N,512) are the targets of patch-wise distillation. Initialised with random weights.
    """

    def __init__(self):
        super().__init__()
        self.trunk = resnet18(num_classes=2)
        self.head = self.trunk.fc
        self.trunk.fc = nn.Identity()

    def features(self, images: Tensor) -> Tensor:
        """Pooled features: (N,3,H,W) -> (N,512)."""
        return self.trunk(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))

    def load_torchvision(self, state: dict[str, Tensor]) -> None:
        """Load the weights of a torchvision resnet18 state dict, without its classifier.

        Raises RuntimeError if entries are missing or have other shapes.
        """
        self.trunk.load_state_dict({name: value for name, value in state.items() if not name.startswith("fc.")})
