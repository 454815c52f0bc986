"""Where the embedded tiny models and data come from: drawn scenes, what the recipes' make_tiny.py share, and the
scripts that pretrained the tiny bases (pretrain_<model>.py, one a recipe)."""
