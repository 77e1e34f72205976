# Training data: training and evaluation rows, and the tokens in the loss
from .data import Auxiliary as Auxiliary, required_sizes as required_sizes

# Supervised fine-tuning of a loaded model on prompts with their answers
from .finetuning import finetune as finetune

# Low-rank adapters (LoRA) on the linear maps of a hooked model, made by `peft`
from .lora import Lora as Lora

# Losses on a model's internal states, beside that of its answers
from .losses import StateLoss as StateLoss, contrast as contrast, pull as pull

# Training a native model from scratch, with log-spaced checkpoints and an exact resume
from .pretraining import train as train

# Results of a training: its scores, and the model at each checkpoint
from .runs import TrainingRun as TrainingRun

# Temporary fine-tuning of a loaded model, undone at the end of a block
from .temporary import Finetuned as Finetuned, finetuned as finetuned
