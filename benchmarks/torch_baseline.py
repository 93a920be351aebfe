"""The training step in PyTorch, tuned as one would: channels_last, and on a GPU bfloat16 autocast
and torch.compile. Called by train_step.py.

Encoder, exact softmax over the bank, SGD with momentum and weight decay, and the bank's update;
images are augmented and standardized already, on the device.
"""

import time

import torch
from torch import nn


class BasicBlock(nn.Module):
  expansion = 1

  def __init__(self, inputs, features, stride):
    super().__init__()
    outputs = features * self.expansion
    self.layers = self.make_layers(inputs, features, outputs, stride)
    self.shortcut = nn.Identity() if inputs == outputs and stride == 1 else nn.Sequential(
        nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

  def make_layers(self, inputs, features, outputs, stride):
    return nn.Sequential(
        nn.Conv2d(inputs, features, 3, stride, 1, bias=False), nn.BatchNorm2d(features),
        nn.ReLU(inplace=True), nn.Conv2d(features, outputs, 3, 1, 1, bias=False),
        nn.BatchNorm2d(outputs))

  def forward(self, x):
    return torch.relu(self.layers(x) + self.shortcut(x))


class Bottleneck(BasicBlock):
  expansion = 4

  def make_layers(self, inputs, features, outputs, stride):
    return nn.Sequential(
        nn.Conv2d(inputs, features, 1, bias=False), nn.BatchNorm2d(features),
        nn.ReLU(inplace=True), nn.Conv2d(features, features, 3, stride, 1, bias=False),
        nn.BatchNorm2d(features), nn.ReLU(inplace=True),
        nn.Conv2d(features, outputs, 1, bias=False), nn.BatchNorm2d(outputs))


def resnet(name, width, dim):
  """resnet18_cifar, resnet18, resnet50, ... as a module that returns [B, dim]."""
  block, sizes = {'resnet18': (BasicBlock, (2, 2, 2, 2)), 'resnet34': (BasicBlock, (3, 4, 6, 3)),
                  'resnet50': (Bottleneck, (3, 4, 6, 3))}[name.removesuffix('_cifar')]
  if name.endswith('_cifar'):
    layers = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(True)]
  else:
    layers = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(True),
              nn.MaxPool2d(3, 2, 1)]
  inputs = width
  for stage, size in enumerate(sizes):
    for i in range(size):
      layers.append(block(inputs, width * 2**stage, 2 if stage and not i else 1))
      inputs = width * 2**stage * block.expansion
  return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, dim))


def images_per_second(name, width, batch, side, rows, steps=10, dim=128, temperature=0.1):
  """Images per second of the full step, after warm-up."""
  cuda = torch.cuda.is_available()
  device = torch.device('cuda' if cuda else 'cpu')
  torch.backends.cudnn.benchmark = True
  torch.set_float32_matmul_precision('high')
  net = resnet(name, width, dim).to(device, memory_format=torch.channels_last).train()
  optimizer = torch.optim.SGD(net.parameters(), 0.03, momentum=0.9, weight_decay=5e-4,
                              fused=cuda or None)
  bank = nn.functional.normalize(torch.randn(rows, dim, device=device))
  images = torch.randn(batch, 3, side, side, device=device).to(memory_format=torch.channels_last)
  index = torch.randperm(rows, device=device)[:batch]

  def step():
    with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
      features = nn.functional.normalize(net(images))
      logits = features @ bank.T / temperature
    loss = nn.functional.cross_entropy(logits.float(), index)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    with torch.no_grad():
      moved = nn.functional.normalize(0.5 * bank[index] + 0.5 * features.float())
      bank.index_copy_(0, index, moved)

  if cuda:
    step = torch.compile(step)
  wait = torch.cuda.synchronize if cuda else lambda: None
  for _ in range(5 if cuda else 2):
    step()
  wait()
  start = time.perf_counter()
  for _ in range(steps):
    step()
  wait()
  return steps * batch / (time.perf_counter() - start)
