#!/usr/bin/env bash
# In reasoning-gym, a newline after the right answer can cost half of the reward.
#
# Many tasks use the default scoring: 1 for the very string, else the share of the text that the
# answer makes up, if the answer is in it. One would expect white space at the ends not to count.
# After a one-digit answer it halves the score, and "The answer is 1." gets 0.06, hardly more than a
# wrong answer. Other tasks strip, so one format scores differently from task to task.
#
# Seen with reasoning-gym 0.1.25, Python 3.11:
#   gcd, answer 1: bare 1.00, newline 0.50, full stop 0.50, sentence 0.06
#   simple_equations, answer 13: bare 1.00, newline 0.67, full stop 0.67, sentence 0.12
#   chain_sum, answer -4: bare 1.00, newline 1.00, full stop 1.00, sentence 0.12
# Exits 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet reasoning-gym==0.1.25
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import version

import reasoning_gym

FORMS = {"bare": "{}", "newline": "{}\n", "full stop": "{}.", "sentence": "The answer is {}."}
print(f"reasoning-gym {version('reasoning-gym')}")
scores = {}
for task in ("gcd", "simple_equations", "chain_sum"):
    data = reasoning_gym.create_dataset(task, size=1, seed=1)
    item = data[0]
    answers = [form.format(item["answer"]) for form in FORMS.values()]
    scores[task] = [data.score_answer(answer, item) for answer in answers]
    listed = zip(FORMS, scores[task], strict=True)
    print(f"{task}, answer {item['answer']}: "
          + ", ".join(f"{name} {score:.2f}" for name, score in listed))
same = (
    scores["gcd"][:3] == [1.0, 0.5, 0.5] and scores["gcd"][3] < 0.1
    and scores["simple_equations"][0] == 1 and scores["simple_equations"][1] < 0.7
    and scores["chain_sum"][:3] == [1.0, 1.0, 1.0] and scores["chain_sum"][3] < 0.2
)
sys.exit(0 if same else 1)
PYTHON
