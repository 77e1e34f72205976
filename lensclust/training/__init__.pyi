# What a training reads: the rows it trains and reports on, and the tokens its loss counts
from .data import Auxiliary as Auxiliary
from .data import required_sizes as required_sizes

# Supervised fine-tuning of a loaded model on prompts with their answers
from .finetuning import finetune as finetune

# Low-rank adapters (LoRA) on the linear maps of a hooked model, made by `peft`
from .lora import Lora as Lora

# Losses of a model's inner states, beside that of its answers
from .losses import StateLoss as StateLoss
from .losses import contrast as contrast
from .losses import pull as pull

# Training a native model from scratch, with log-spaced checkpoints and an exact resume
from .pretraining import train as train

# What a training leaves: its scores, and the model at each checkpoint
from .runs import TrainingRun as TrainingRun

# Fine-tuning of a loaded model for as long as a block of code lasts
from .temporary import Finetuned as Finetuned
from .temporary import finetuned as finetuned
