"""Run by an interpreter that has the `adapters` package: write its own folders, and the logits that it computes with each.

    python adapterhub_make.py MODEL-FOLDER OUT-FOLDER

OUT/NAME/ is what save_adapter writes, OUT/NAME.safetensors holds the logits of `IDS`.
"""

import sys
from pathlib import Path

import adapters
import torch
from adapters import DoubleSeqBnConfig, IA3Config, LoRAConfig, ParBnConfig, SeqBnConfig
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

IDS = [[7, 250, 3, 3, 90, 41, 12, 199, 5, 64, 28, 77, 130, 9]]
CONFIGS = {
    "houlsby": DoubleSeqBnConfig(reduction_factor=5, dropout=0.1, scaling=1.5),
    "sequential": SeqBnConfig(reduction_factor=8, leave_out=[0], original_ln_before=False, non_linearity="gelu"),
    "attention": DoubleSeqBnConfig(reduction_factor=4, output_adapter=False, non_linearity="tanh"),
    "pfeiffer": SeqBnConfig(reduction_factor=8),
    "parallel": ParBnConfig(reduction_factor=4),
    "lora": LoRAConfig(r=4, alpha=12, attn_matrices=["q", "v"], intermediate_lora=True, output_lora=True, leave_out=[1]),
    "ia3": IA3Config(selfattn_lora=False, output_lora=True),
}


def main(base: str, out: Path) -> None:
    for name, config in CONFIGS.items():
        model = AutoModelForCausalLM.from_pretrained(base, torch_dtype=torch.float32, attn_implementation="eager")
        adapters.init(model)
        model.add_adapter(name, config=config)
        model.set_active_adapters(name)
        model.eval()  # only now: the layers that the package puts in start in training mode
        torch.manual_seed(5)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if f".{name}." in key:
                    parameter += 0.1 * torch.randn_like(parameter)
            logits = model(torch.tensor(IDS)).logits
        model.save_adapter(str(out / name), name, use_safetensors=True)
        save_file({"logits": logits}, out / f"{name}.safetensors")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
