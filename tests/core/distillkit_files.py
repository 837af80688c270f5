"""Write data/distillkit by DistillKit's own code: python tests/core/distillkit_files.py CHECKOUT

CHECKOUT is one of arcee-ai/DistillKit (a61c2e7 was used). Its vLLM is replaced by a tiny model of ours, whose prompt
log-probabilities go through DistillKit's own compressor, Parquet writer and packing; what its own code reads again from
the files is in ``expected.npz``.
"""

# ruff: noqa: E402
import sys
from pathlib import Path

import datasets
import numpy as np
import torch
import yaml

HERE = Path(__file__).with_name("data") / "distillkit"
sys.path[:0] = [sys.argv[1], str(HERE.parents[3])]

from distillkit.compression.compressor import LogprobCompressor
from distillkit.compression.config import DistributionQuantizationConfig
from distillkit.pack_logits import pack_pass
from distillkit.sample_common import StreamingParquetWriter, compressed_logit_schema

from tests.tiny import byte_tokenizer, tiny_llama

VOCAB = 259
CONFIGS = {
    # The two that DistillKit's README recommends, and the one of its published Qwen3-235B outputs, with fewer tokens
    "recommended": {"k": 32, "exact_k": 8, "exact_dtype": "bfloat16", "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"],
                    "delta_encoding": False},
    "budget": {"k": 20, "exact_k": 1, "exact_dtype": "bfloat16", "polynomial_terms": [0, 1, "sqrt"],
               "delta_encoding": False},
    "published": {"k": 24, "exact_k": 8, "exact_dtype": "float32", "polynomial_terms": [0, 1, 2],
                  "delta_encoding": True},
    # Everything else that the form has
    "bins": {"k": 30, "exact_k": 4, "exact_dtype": "float16", "polynomial_terms": [0, 1], "delta_encoding": False,
             "normalize_t": True, "term_dtype": "float16", "residual_bins": [
                 {"scale_dtype": "float16", "element_bits": 7, "num_elements": 9},
                 {"scale_dtype": "float32", "element_bits": 1, "num_elements": 5},
                 {"scale_dtype": "bfloat16", "element_bits": 3, "num_elements": 6}]},
    "diffused": {"k": 12, "exact_k": 0, "exact_dtype": "float32", "polynomial_terms": None, "delta_encoding": True,
                 "error_diffusion": True, "residual_bins": [
                     {"scale_dtype": "float32", "element_bits": 12, "num_elements": 12}]},
}  # fmt: skip


def texts():
    """Return what a tiny model wrote, as tokens, with its distributions over each token after the first."""
    torch.manual_seed(0)
    model = tiny_llama(seed=5, tied=False).eval()  # a tied one repeats itself
    model.lm_head.weight.data *= 12  # as sure as a trained one
    found = []
    with torch.no_grad():
        for number in range(7):
            ids = byte_tokenizer()(f"Text {number}:")["input_ids"]
            for _ in range(20 + 3 * number):
                ids.append(int(torch.multinomial(model(torch.tensor([ids])).logits[0, -1].softmax(-1), 1)))
            found.append((ids, model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)))
    return found


def main():
    written = texts()
    for name, values in CONFIGS.items():
        config = DistributionQuantizationConfig.model_validate({"d": VOCAB, "residual_bins": [], **values})
        compressor, directory = LogprobCompressor(config=config), HERE / name
        directory.mkdir(exist_ok=True)
        (directory / "compression_config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
        with StreamingParquetWriter(
            str(directory), compressed_logit_schema(), file_max_rows=100, queue_maxsize=200
        ) as writer:
            for ids, logprobs in written:
                row = compressor.compress(logprobs.unsqueeze(0))
                writer.write({"input_ids": ids} | {key: value.squeeze(0).tolist() for key, value in row.items()})
        rows = datasets.Dataset.from_parquet(str(directory / "data_0.parquet"))
        read = [
            compressor.decompress_to_sparse(
                {key: torch.tensor(row[key]).unsqueeze(0) for key in ("compressed_logprobs", "bytepacked_indices")}
            )
            for row in rows
        ]
        np.savez_compressed(
            directory / "expected.npz",
            ids=np.concatenate([ids.squeeze(0).numpy() for ids, _ in read]).astype(np.int16),
            logprobs=np.concatenate([values.squeeze(0).float().numpy() for _, values in read]),
        )
    cut = datasets.Dataset.from_parquet(str(HERE / "published" / "data_0.parquet")).map(
        lambda row: {"input_ids": row["input_ids"][: len(row["bytepacked_indices"])]}
    )
    packed = cut.map(pack_pass, batched=True, fn_kwargs={"max_len": 64})
    (HERE / "packed").mkdir(exist_ok=True)
    packed.to_parquet(str(HERE / "packed" / "data_0.parquet"))
    settings = (HERE / "published" / "compression_config.yaml").read_text()
    (HERE / "packed" / "compression_config.yaml").write_text(settings)


if __name__ == "__main__":
    main()
