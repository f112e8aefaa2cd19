#!/usr/bin/env bash
# A chat template that ends in a newline renders a prompt that does not.
#
# Jinja drops one newline at the very end of a template, and transformers leaves that setting as it
# is. A template whose text ends in "<assistant>\n" therefore ends the prompt in "<assistant>". The
# answer then starts with a newline that the model has to produce itself, and training texts made
# elsewhere from the same strings are tokenized differently. A newline inside a block or an
# expression stays.
#
# Seen with transformers 5.10.4, jinja2 3.1.6, Python 3.11: how the newline is written, the prompt
#   as text                '<user>\nhi\n<assistant>'
#   as text, two newlines  '<user>\nhi\n<assistant>\n'
#   in a block             '<user>\nhi\n<assistant>\n'
#   as an expression       '<user>\nhi\n<assistant>\n'
# Exits 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.10.4 tokenizers==0.22.2 jinja2==3.1.6 numpy==2.4.6
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import sys

import transformers
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0})))
TURNS = "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}\n{% endfor %}"
TEMPLATES = {
    "as text": TURNS + "<assistant>\n",
    "as text, two newlines": TURNS + "<assistant>\n\n",
    "in a block": TURNS + "{% if add_generation_prompt %}<assistant>\n{% endif %}",
    "as an expression": TURNS + "{{ '<assistant>\\n' }}",
}
print(f"transformers {transformers.__version__}")
prompts = {}
for how, template in TEMPLATES.items():
    prompts[how] = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], chat_template=template, tokenize=False,
        add_generation_prompt=True,
    )
    print(f"{how:22} {prompts[how]!r}")
whole = "<user>\nhi\n<assistant>\n"
same = (
    prompts["as text"] == whole[:-1]
    and prompts["as text, two newlines"] == prompts["in a block"] == whole
    and prompts["as an expression"] == whole
)
sys.exit(0 if same else 1)
PYTHON
