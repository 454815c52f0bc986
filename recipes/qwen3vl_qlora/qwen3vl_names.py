"""Other names of train.py's flags, and of the keys of YAML files with groups."""

SECOND_NAMES = {
    "data_dir": "train_data_dir",
    "base_model": "pretrained_model_name_or_path",
    "fp16": "mixed_precision=fp16",
    "lora.r": "lora_rank",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.target_modules": "target_modules",
    "training.learning_rate": "learning_rate",
    "training.min_lr": "min_lr",
    "training.lr_reduction_factor": "lr_reduction_factor",
    "training.lr_patience": "lr_patience",
    "training.improvement_threshold": "improvement_threshold",
    "training.min_val_loss": "min_val_loss",
    "training.batch_size": "train_batch_size",
    "training.gradient_accumulation_steps": "gradient_accumulation_steps",
    "training.num_epochs": "num_train_epochs",
    "training.max_length": "max_length",
    "training.warmup_ratio": "lr_warmup_ratio",
    "training.weight_decay": "adam_weight_decay",
    "training.fp16": "mixed_precision=fp16",
}
