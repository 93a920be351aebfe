"""Faster R-CNN of torchvision on a ResNet of ours, as the literature transfers features: C4.

The stem to conv4 is the backbone, on whose map regions are proposed; conv5 is the head of each
region (Ren et al., NeurIPS 2015; He et al., CVPR 2020). Batch norm is trained with the rest.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from instdisc_jax.interop.safe_pickle import import_optional
from instdisc_jax.models import resnet_blocks
from instdisc_jax.runtime import errors

STRIDE_SIDES = (32, 64, 128, 256, 512)  # of the anchors, where the shorter side has 800 pixels
_RATIOS = (0.5, 1.0, 2.0)
_REGION = 14  # side of a region's map, which conv5 halves


def make(name: str, width: int, weights: Mapping[str, np.ndarray], num_classes: int, *, side: int,
         regions: int, mean: Sequence[float], std: Sequence[float]) -> Any:
  """A `torchvision.models.detection.FasterRCNN`.

  Args:
    name: a ResNet of `models.NAMES`.
    width: channels of its first stage.
    weights: of the encoder, in torchvision's layout, without its head.
    num_classes: C, without the background.
    side: shorter side of the images, to which they are resized.
    regions: regions of an image that the head is trained on.
    mean: of the channels of images in [0, 1].
    std: likewise.

  Raises:
    errors.UserError: PyTorch or torchvision is not installed, or the encoder is not a ResNet.
  """
  torch = import_optional('torch', '--protocol', 'detection')
  detection = import_optional('torchvision.models.detection', '--protocol', 'detection')
  ops = import_optional('torchvision.ops', '--protocol', 'detection')
  block, sizes = resnet_blocks(name)
  if block is None:
    raise errors.UserError(f'the encoder is {name}', 'a ResNet', setting='--workdir')
  net = _resnet(torch, name, block, sizes, width)
  found = net.load_state_dict({key: torch.tensor(x) for key, x in weights.items()}, strict=True)
  assert not found.missing_keys
  last = net.layer4
  del net.layer4
  expansion = 4 if block == 'Bottleneck' else 1
  net.out_channels = 4 * width * expansion
  scale = side / 800
  anchors = detection.rpn.AnchorGenerator((tuple(max(1, round(s * scale)) for s in STRIDE_SIDES),),
                                          (_RATIOS,))
  head = torch.nn.Sequential(last, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
  return detection.FasterRCNN(
      net, rpn_anchor_generator=anchors,
      box_roi_pool=ops.MultiScaleRoIAlign(['0'], _REGION, sampling_ratio=0), box_head=head,
      box_predictor=detection.faster_rcnn.FastRCNNPredictor(8 * width * expansion,
                                                            num_classes + 1),
      min_size=side, max_size=round(side * 1333 / 800), image_mean=list(mean),
      image_std=list(std), box_batch_size_per_image=regions)


def _resnet(torch, name, block, sizes, width):
  """The ResNet, with torchvision's blocks and names, without pooling at its end and head."""
  blocks = import_optional('torchvision.models.resnet', '--protocol', 'detection')
  make_block, nn = getattr(blocks, block), torch.nn
  stem = [nn.Conv2d(3, width, 3, 1, 1, bias=False)] if name.endswith('_cifar') else [
      nn.Conv2d(3, width, 7, 2, 3, bias=False)]

  class Backbone(nn.Module):
    """Images -> the map of conv4."""

    def __init__(self):
      super().__init__()
      self.conv1, self.bn1, channels = stem[0], nn.BatchNorm2d(width), width
      self.pool = nn.Identity() if name.endswith('_cifar') else nn.MaxPool2d(3, 2, 1)
      for stage, size in enumerate(sizes):
        planes, layer = width * 2**stage, []
        for i in range(size):
          stride, out = 2 if stage > 0 and i == 0 else 1, planes * make_block.expansion
          shortcut = None if stride == 1 and channels == out else nn.Sequential(
              nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
          layer.append(make_block(channels, planes, stride, shortcut))
          channels = out
        setattr(self, f'layer{stage + 1}', nn.Sequential(*layer))

    def forward(self, x):
      x = self.pool(torch.relu(self.bn1(self.conv1(x))))
      return self.layer3(self.layer2(self.layer1(x)))

  return Backbone()
