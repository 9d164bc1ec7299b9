"""The shape of a model, the settings of a training run, and the presets.

A preset is an instance; `python gpt2/train_gpt2.py PRESET --max-steps 100` starts from it and changes one field.
Settings that follow from others (grad_accum_steps, the padded vocabulary) are computed, not set.
"""

from dataclasses import dataclass, fields, replace
from typing import Literal

from common import LIMIT, ROOT, UsageError, validate


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT-2. The defaults are the 124M model."""

    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50257  # ids of the tokenizer, special tokens included
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    low_precision_residual: bool = False  # residual stream in the type of the matmuls, not in float32
    pad_vocab_to: int = 128  # wte gets a multiple of this many rows (50257 -> 50304): even tiles for the GPU's matmuls

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise UsageError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}; change one of them")

    @property
    def padded_vocab_size(self):
        """Rows of wte. The rows past vocab_size are never sampled and never counted in a loss."""
        return -(-self.vocab_size // self.pad_vocab_to) * self.pad_vocab_to


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of gpt2/train_gpt2.py; each field is a flag. The defaults are GPT-2 124M on FineWeb-Edu."""

    # --- files
    data_dir: str = str(ROOT / "data/corpora/fineweb-edu")  # folder of token shards that data/prepare.py wrote
    run_dir: str = str(ROOT / "runs/gpt2-124M")  # run directory; the same command on it resumes where it stopped
    init: str = "random"  # initial weights: random, a hub name (gpt2, gpt2-medium, …), a Hugging Face folder, or a run

    # --- model
    n_layer: int = 12  # transformer blocks
    n_head: int = 12  # attention heads a block
    n_embd: int = 768  # width of the residual stream
    block_size: int = 1024  # context length T, in tokens
    dropout: float = 0.0  # dropout probability; above 0 the masks depend on the processes (not with --exact-reduction)

    # --- batch and schedule
    total_batch_size: int = 524288  # tokens an optimizer step, over all processes and micro-batches
    micro_batch_size: int = 0  # sequences a forward pass, accumulated to total_batch_size; 0: what fits the memory
    max_steps: int = 19073  # optimizer steps; 19,073 of 524,288 tokens are one epoch over 10B tokens
    warmup_steps: int = 715  # steps of linear warmup (375M tokens, as in the GPT-3 paper)
    max_lr: float = 6e-4  # peak learning rate of AdamW
    lr_decay: Literal["cosine", "linear", "wsd"] = "cosine"  # cosine: to a tenth; linear: to 0; wsd: late, linear to 0
    cooldown_share: float = 0.2  # share of the steps after the warm-up in which the rate of wsd falls

    # --- optimizer
    optimizer: Literal["adamw", "muon", "normuon"] = "adamw"  # GPT-2's adamw; muon and normuon: for hidden matrices
    muon_lr: float = 0.01  # peak learning rate of Muon and NorMuon, scaled to AdamW's RMS; same schedule
    weight_decay: float = 0.1  # decoupled weight decay, on parameters of two or more dimensions only
    cautious_decay: bool = False  # weight decay only where the update also shrinks the weight
    average_last: int = 0  # average the weights of so many last steps into the final weights; 0: no averaging
    grad_clip: float = 1.0  # largest global gradient norm; 0: no clipping
    skip_nonfinite: int = 0  # skip at most this many steps with a non-finite loss or gradient (reads every loss)
    align_documents: bool = False  # rows begin where a document does, if one does in the T tokens before
    seed: int = 1337  # seed of the initial weights and of the order of the data

    # --- every so many steps, and at the last one (0: never)
    val_every: int = 250  # steps between validation losses
    val_tokens: int = 10_485_760  # validation tokens: the first so many of the val split, whatever the world size
    hellaswag_every: int = 0  # steps between HellaSwag accuracies
    hellaswag_file: str = ""  # local HellaSwag items (.jsonl, .jsonl.gz); empty: from the hub
    hellaswag_limit: int = 10042  # HellaSwag items: the first so many of a fixed permutation
    sample_every: int = 250  # steps between samples of text
    sample_prompt: str = "Hello, I'm a language model,"  # what the samples begin with
    checkpoint_every: int = 1000  # steps between checkpoints; one is also saved when the run is preempted
    keep_checkpoints: int = 2  # newest checkpoints kept
    log_every: int = 1  # steps between log lines; losses stay on the device in between, so more means fewer syncs
    tensorboard: bool = False  # also write the metrics to RUN_DIR/tensorboard
    wandb: bool = False  # also send the metrics to Weights & Biases; WANDB_MODE=offline keeps them in RUN_DIR/wandb

    # --- hardware
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: cuda, else mps, else cpu
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the matmuls; auto: 16 bits in hardware
    low_precision_residual: bool = False  # residual stream in that type, too, not in float32
    compile: bool = True  # torch.compile the model; eager, with a message, where no compiler is found
    exact_reduction: bool = False  # the same bits on 1, 2, 4, … processes with as many threads (GPUs: --deterministic)
    deterministic: bool = False  # deterministic kernels: with --compile, too, a resumed run ends bit-identical

    # --- this start
    eval_only: bool = False  # evaluate the weights of --init once and stop: a reference line for a curve
    plan: bool = False  # print parameters, memory, tokens, hours and disk of this run, and start nothing
    stop_after_minutes: float = 0.0  # save and stop as preempted after so many minutes (a scheduler's limit); 0: never
    overwrite: bool = False  # replace a run that was made with other settings or data, instead of refusing
    allow_config_change: bool = False  # resume although a setting that decides what is learned has changed

    def __post_init__(self):
        ranges = {"dropout": (0, 0.99), "cooldown_share": (0.001, 1), "seed": (0, 2**63 - 1), "max_lr": (0, 1e300)}
        positive = ("max_steps", "block_size", "total_batch_size", "log_every", "val_tokens")
        validate(self, ranges | dict.fromkeys(positive, (1, LIMIT)))
        if self.total_batch_size % (T := self.block_size):
            raise UsageError(f"--total-batch-size {self.total_batch_size} tokens are no multiple of --block-size {T}")
        if self.exact_reduction and not self.micro_batch_size:
            raise UsageError("--exact-reduction needs a --micro-batch-size, which otherwise depends on the free memory")

    @property
    def shape(self):
        """The settings that are fields of GPTConfig, as a dict."""
        return {f.name: getattr(self, f.name) for f in fields(GPTConfig) if hasattr(self, f.name)}

    def grad_accum_steps(self, world_size):
        """Micro-batches that each of `world_size` processes computes for one step."""
        sequences = self.total_batch_size // self.block_size
        if sequences % (self.micro_batch_size * world_size):
            raise UsageError(
                f"a step of {sequences} sequences does not divide into micro-batches of {self.micro_batch_size} on "
                f"{world_size} process(es); leave out --micro-batch-size, or make a step a multiple of both"
            )
        if self.exact_reduction and (n := sequences // self.micro_batch_size).bit_count() != 1:
            raise UsageError(f"--exact-reduction needs 1, 2, 4, … micro-batches a step, not {n}: --micro-batch-size")
        return sequences // (self.micro_batch_size * world_size)


# A resumed run may differ in these; all other settings decide what is learned.
FREE_ON_RESUME = {
    *("data_dir", "run_dir", "micro_batch_size", "device", "compile", "deterministic"),
    *("val_every", "val_tokens", "sample_every", "sample_prompt", "hellaswag_every", "hellaswag_file"),
    *("hellaswag_limit", "checkpoint_every", "keep_checkpoints", "log_every", "tensorboard", "wandb"),
    *("eval_only", "plan", "stop_after_minutes", "overwrite", "allow_config_change"),
}


def _published(name, n_layer, n_head, n_embd, max_lr):
    """One of OpenAI's four shapes, with the learning rate that the GPT-3 paper has for its size."""
    shape = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd}
    often = {"hellaswag_every": 250, "sample_every": 1000, "log_every": 10}
    return TrainConfig(run_dir=str(ROOT / f"runs/{name}"), max_lr=max_lr, **shape, **often)


# Two cores are enough for these; eager, so that no compiler is needed.
_LAPTOP = TrainConfig(
    n_head=6, n_embd=192, block_size=128, total_batch_size=16 * 128, micro_batch_size=16, log_every=10, compile=False
)
PRESETS = {
    # Minutes, on the Python documentation with a tokenizer of our own (`make quickstart`); float32, so that the figures
    # are the same on every CPU.
    "quickstart": replace(
        _LAPTOP, data_dir=str(ROOT / "data/corpora/pydocs"), run_dir=str(ROOT / "runs/quickstart"), n_layer=4,
        max_steps=300, warmup_steps=75, max_lr=1e-2, optimizer="muon", muon_lr=5e-3, val_every=50, val_tokens=65536,
        sample_every=150, sample_prompt="Return the", checkpoint_every=100, dtype="float32",
    ),
    # A debugging corpus: Tiny Shakespeare, GPT-2's tokenizer; overfits within the hour.
    "shakespeare": replace(
        _LAPTOP, data_dir=str(ROOT / "data/corpora/shakespeare"), run_dir=str(ROOT / "runs/shakespeare"), n_layer=6,
        dropout=0.1, max_steps=2000, warmup_steps=50, max_lr=1e-3, val_every=200, val_tokens=32768,
        sample_every=500, sample_prompt="First Citizen:", checkpoint_every=200,
    ),
    "gpt2-124M": _published("gpt2-124M", 12, 12, 768, 6e-4),
    "gpt2-350M": _published("gpt2-350M", 24, 16, 1024, 3e-4),
    "gpt2-774M": _published("gpt2-774M", 36, 20, 1280, 2.5e-4),
    "gpt2-1558M": _published("gpt2-1558M", 48, 25, 1600, 2e-4),
}  # fmt: skip
DEFAULT_PRESET = "gpt2-124M"
