"""Trains the demo model from the tales and writes it in Hugging Face layout, with its figures in metrics.json.

Needs transformers, tokenizers and rich beside PyTorch. A few minutes on a GPU, hours on a CPU.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy, dropout

from evenflow.demo import MODEL_DIR, TALES_DIR, chat
from evenflow.demo.corpus import Tale, load_tales, split_held_out
from evenflow.demo.documents import Document, DocumentMaker, batches
from evenflow.demo.evaluate import perplexity, recited_fables, samples
from evenflow.demo.tokenizer import BEGIN, END, PAD, save_tokenizer, token_id, train_tokenizer

MAX_LENGTH = 1024
VOCAB_SIZE = 3072
ARCHITECTURE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": MAX_LENGTH,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "initializer_range": 0.02,
    "use_cache": True,
}
# The held-out tales whose perplexity the tests recompute, since that takes a second on a CPU.
PROBE_TITLES = ("The Lion and the Hare", "The Milk-Woman and Her Pail", "The Camel and Jupiter")


def import_transformers() -> Any:
    """The transformers module; it is optional for the engine, but not here."""
    try:
        import transformers
    except ImportError as error:
        raise SystemExit("training the demo model needs transformers: pip install transformers") from error
    return transformers


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m evenflow.demo.train",
        description="Train the demo model from five books of tales.",
        epilog="example: python -m evenflow.demo.train --out /tmp/demo-model --device cuda",
    )
    parser.add_argument("--out", type=Path, required=True, help=f"directory to write (shipped: {MODEL_DIR})")
    parser.add_argument("--tales", type=Path, default=TALES_DIR, help="directory of the five books")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cuda or cpu")
    parser.add_argument("--steps", type=int, default=1600, help="optimizer steps")
    parser.add_argument("--batch-tokens", type=int, default=32768, help="tokens in a batch, padding included")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak, after a warm-up and before a cosine")
    parser.add_argument("--weight-decay", type=float, default=0.5)
    parser.add_argument("--dropout", type=float, default=0.1, help="of embeddings and of each block's two outputs")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def build_tokenizer(tales: list[Tale], seed: int) -> Tokenizer:
    """Learnt from the training tales and the small talk alone."""
    talk = [text for exchange in chat.small_talk(random.Random(seed)) for text in exchange]
    return train_tokenizer([*(tale.text for tale in tales), *talk], VOCAB_SIZE)


def build_model(tokenizer: Tokenizer, dropout_rate: float) -> Any:
    """A LlamaForCausalLM in float32 with random weights, and with dropout, which transformers' own has not."""
    transformers = import_transformers()
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config_dict(tokenizer)))

    def drop(module: torch.nn.Module, _: Any, output: Tensor) -> Tensor:
        return dropout(output, dropout_rate, module.training)

    model.model.embed_tokens.register_forward_hook(drop)
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)
    return model


def config_dict(tokenizer: Tokenizer) -> dict[str, Any]:
    ids = {
        "bos_token_id": token_id(tokenizer, BEGIN),
        "eos_token_id": token_id(tokenizer, END),
        "pad_token_id": token_id(tokenizer, PAD),
    }
    return {**ARCHITECTURE, **ids}


def build_optimizer(model: Any, args: argparse.Namespace) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW, which decays matrices and not norms, and its schedule: 5 % warm-up, then a cosine to zero."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95))
    num_steps: int = args.steps
    warm_up = max(1, num_steps // 20)

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, num_steps - warm_up)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def endless_batches(
    maker: DocumentMaker, batch_tokens: int, rng: random.Random
) -> Iterator[tuple[int, list[Document]]]:
    """(epoch, batch) for ever; each epoch has new windows and new phrasings of the same tales."""
    epoch = 0
    while True:
        for batch in batches(maker.epoch(rng), batch_tokens, rng):
            yield epoch, batch
        epoch += 1


def padded(batch: list[Document], pad: int, device: str) -> tuple[Tensor, Tensor]:
    """Input ids and targets, both int64 [N, L - 1]; a target of -100 is not scored.

    Padding is on the right, where causal attention keeps it out of every real token's sight: no mask is needed.
    """
    length = max(len(document.ids) for document in batch)
    ids = torch.full((len(batch), length), pad)
    targets = torch.full((len(batch), length), -100)
    for row, document in enumerate(batch):
        values = torch.tensor(document.ids)
        ids[row, : len(values)] = values
        targets[row, document.num_unscored : len(values)] = values[document.num_unscored :]
    return ids[:, :-1].to(device), targets[:, 1:].to(device)


def train(model: Any, maker: DocumentMaker, held_out: DocumentMaker, args: argparse.Namespace, device: str) -> int:
    """Trains `model` in place for `args.steps` steps and returns how many epochs that were."""
    optimizer, schedule = build_optimizer(model, args)
    pad = token_id(maker.tokenizer, PAD)
    stream = endless_batches(maker, args.batch_tokens, random.Random(args.seed))
    smooth_loss, epoch = torch.zeros((), device=device), 0
    with Progress() as progress:
        task = progress.add_task("training", total=args.steps)
        for step in range(1, args.steps + 1):
            epoch, batch = next(stream)
            ids, targets = padded(batch, pad, device)
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                logits = model(input_ids=ids, use_cache=False).logits
            loss = cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            smooth_loss += (loss.detach() - smooth_loss) / min(step, 20)
            progress.advance(task)
            if step % max(1, args.steps // 10) == 0:
                model.eval()
                unseen = perplexity(model, held_out, held_out.tales)["perplexity"]
                model.train()
                progress.console.print(
                    f"step {step} epoch {epoch} loss {float(smooth_loss):.3f} held-out perplexity {unseen:.2f}"
                )
    return epoch + 1


def save(model: Any, tokenizer: Tokenizer, out: Path) -> None:
    """Writes weights in bfloat16, both configurations and the tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to("cpu", torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    del tensors["lm_head.weight"]  # tied to the embedding
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    config = {**config_dict(tokenizer), "torch_dtype": "bfloat16", "dtype": "bfloat16"}
    generation = {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": config["eos_token_id"],
        "pad_token_id": config["pad_token_id"],
        "do_sample": True,
        "max_new_tokens": 256,
        "temperature": 0.5,
        "top_p": 0.9,
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    save_tokenizer(tokenizer, out, MAX_LENGTH)


def measure(model: Any, maker: DocumentMaker, held_out: DocumentMaker) -> dict[str, Any]:
    """The figures of metrics.json that need the finished model."""
    probe = [item for item in held_out.tales if item.tale.title in PROBE_TITLES]
    return {
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "held_out": perplexity(model, held_out, held_out.tales),
        "train": perplexity(model, maker, maker.tales),
        "probe": {"titles": PROBE_TITLES, **perplexity(model, held_out, probe)},
        "recited_fables": recited_fables(model, maker, token_id(maker.tokenizer, PAD)),
    }


def main() -> None:
    args = parse_args()
    transformers = import_transformers()
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    train_tales, held_out_tales = split_held_out(load_tales(args.tales))
    tokenizer = build_tokenizer(train_tales, args.seed)
    maker = DocumentMaker(tokenizer, train_tales, MAX_LENGTH)
    held_out = DocumentMaker(tokenizer, held_out_tales, MAX_LENGTH)
    model = build_model(tokenizer, args.dropout).to(device)

    started = time.monotonic()
    num_epochs = train(model, maker, held_out, args, device)
    train_s = time.monotonic() - started
    save(model, tokenizer, args.out)

    # What is measured is what was saved: bfloat16 weights, computed in float32.
    shipped = transformers.AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32).to(device).eval()
    settings = {key: value for key, value in vars(args).items() if not isinstance(value, Path) and key != "device"}
    settings |= {"num_epochs": num_epochs, "train_s": round(train_s, 1), "torch": torch.__version__}
    settings["device"] = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    metrics = {**measure(shipped, maker, held_out), "training": settings}
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics, indent=2))
    for heading, text in samples(shipped, maker, token_id(tokenizer, PAD), args.seed):
        print(f"\n--- {heading}\n{text}")


if __name__ == "__main__":
    main()
