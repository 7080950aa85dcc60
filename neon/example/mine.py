from dataclasses import dataclass
import torch
from torch import nn
from neon.config_table import Count
from neon.family import Family

class Net(nn.Module):                                     # your network, as it is
    def __init__(self, width):
        super().__init__()
        layers = nn.Linear(784 + 1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 784)
        self.layers = nn.Sequential(*layers)
    def forward(self, x, t):                              # velocity at time t: 0 is noise, 1 is data
        return self.layers(torch.cat([x.flatten(1), t.flatten(1)], 1)).view_as(x)

@dataclass(frozen=True, kw_only=True)
class Sampling:                                           # keys of [sampling] in the config
    num_steps: Count = 8                                  # >= 1; other ranges: neon/config_table.py

class Mine(Family):
    name = "mine"
    sampling = Sampling
    def build(self, arch):                                # [model], and what checkpoints store
        return Net(**arch)
    def sample(self, model, rng, labels, how):            # noise only from rng: one generator per image
        x = rng.normal((1, 28, 28))
        for k in range(how.num_steps):
            x = x + model(x, torch.full((len(x), 1), k / how.num_steps)) / how.num_steps
        return x.clamp(-1, 1), None                       # images in [-1, 1]
    def draw(self, rng, codes, labels, how):              # every random number of a training step
        return {"t": rng.uniform((1, 1, 1)), "noise": rng.normal(codes.shape[1:])}
    def loss(self, model, codes, labels, draws, how):     # one number per image
        data, t, noise = codes / 127.5 - 1, draws["t"], draws["noise"]
        return (model(t * data + (1 - t) * noise, t) - (data - noise)).square().mean((1, 2, 3))
