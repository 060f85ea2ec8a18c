"""A bare PyTorch loop: save the base, train as usual, and take the difference.

python examples/bare_loop.py --folder runs/bare
"""

import argparse
from pathlib import Path

import torch
from torch import nn

from tva import TaskVector, open_weights, save_weights


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("runs/bare"))
    folder = parser.parse_args().folder
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))
    save_weights(model.state_dict(), folder / "base.safetensors")  # before the first step

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(50):
        inputs = torch.randn(32, 8)
        loss = (model(inputs) - inputs[:, :1]).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    base = open_weights(folder / "base.safetensors")
    vector = TaskVector.between(base, model.state_dict())  # after the last
    vector.save(folder / "copy_first_input.tv.safetensors")
    model.load_state_dict(vector.apply_to(base, scaling_coef=0.5))
    print(f"loss {loss:.3f}; {vector}")


if __name__ == "__main__":
    main()
