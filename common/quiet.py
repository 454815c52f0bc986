"""Keeps what other libraries say at every start, and nobody can act on, from the screen. Scripts import it before
those libraries; it knows each sentence, so that whatever else they say is still heard."""

import logging
import os
import sys
import warnings

SAID = {  # by logger
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",  # an optional kernel, slower without
    "DeepSpeed": "Setting accelerator to CPU",
    "transformers.configuration_utils": "`use_return_dict` is deprecated",
}
WARNED = ("`torch.jit.script` is deprecated", "`is_gradient_checkpointing` is deprecated")


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(SAID[record.name])


for _name in SAID:
    logging.getLogger(_name).addFilter(_is_news)
for _words in WARNED:
    warnings.filterwarnings("ignore", message=_words, category=FutureWarning)
if not sys.stderr.isatty():  # bars of the hub's client and of transformers fill a log file
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
