#!/usr/bin/env bash
# transformers' `stop_strings` count the end of the prompt as the beginning of a stop string.
#
# They should end generation "if the model outputs them". The text that is searched is prompt and
# answer together, up to the newest token. A chat prompt ends in a newline, so the stop string of
# two newlines, which should end the first paragraph, ends an answer that starts with a single one:
# the answer is empty. Behind a prompt without the newline the same answer runs to its end, and a
# stop string that lies in the prompt as a whole does no harm.
#
# Seen with transformers 5.24.0, tokenizers 0.23.3, torch 2.13.0 (CPU), Python 3.11: a tiny model
# that is made to answer "\n42\n\nbye", by prompt
#   'hi assistant:\n'    answer '\n'
#   'hi assistant:'      answer '\n42\n\n'
#   'hi\n\nassistant:'   answer '\n42\n\n'
# Exits 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 tokenizers==0.23.3 numpy==2.4.6
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import sys

import tokenizers
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)
torch.manual_seed(0)
letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
inner = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(letters)}, []))
inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
inner.decoder = tokenizers.decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
config = AutoConfig.for_model(
    "llama", vocab_size=len(letters), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2, bos_token_id=None, eos_token_id=None,
)
model = AutoModelForCausalLM.from_config(config).eval()
wanted = tokenizer("\n42\n\nbye").input_ids


def answer(prompt):
    """What `generate` returns of the wanted answer."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    start = inputs.input_ids.shape[1]

    def force(ids, scores):
        scores = torch.full_like(scores, -1e9)
        scores[:, wanted[ids.shape[1] - start]] = 0
        return scores

    out = model.generate(
        **inputs, max_new_tokens=len(wanted), do_sample=False, stop_strings=["\n\n"],
        tokenizer=tokenizer, logits_processor=[force],
    )
    text = tokenizer.decode(out[0, start:])
    print(f"{prompt!r:20} answer {text!r}")
    return text


print(f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}")
answers = [answer(prompt) for prompt in ("hi assistant:\n", "hi assistant:", "hi\n\nassistant:")]
sys.exit(0 if answers == ["\n", "\n42\n\n", "\n42\n\n"] else 1)
PYTHON
