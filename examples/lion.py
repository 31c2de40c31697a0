"""An optimizer that onepass does not have: twelve lines get the kernel, every dtype, every option.

python examples/lion.py
"""

import torch

import onepass
from onepass import lerp, sign


class Lion(onepass.Optimizer):
    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @staticmethod
    def rule(p, g, exp_avg, *, lr, betas, weight_decay):
        beta1, beta2 = betas
        u = sign(lerp(exp_avg, g, 1 - beta1))
        return {"p": p * (1 - lr * weight_decay) - lr * u, "exp_avg": lerp(exp_avg, g, 1 - beta2)}


def main() -> None:
    """Fit a noisy line, and print what came out."""
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 256).unsqueeze(1)
    y = 3 * x - 1 + 0.01 * torch.randn_like(x)
    model = torch.nn.Linear(1, 1)
    optimizer = Lion(model.parameters(), lr=2e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=600)
    for _ in range(600):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        schedule.step()
    print(f"y = {model.weight.item():.2f} x + {model.bias.item():.2f}, the truth is 3 x - 1")


if __name__ == "__main__":
    main()
