"""``vllm serve MODEL --host H --port P ...`` with the tests' server, until it is ended."""

import sys
import time

from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.fake_vllm import Behaviour, fake_vllm

if __name__ == "__main__":
    model = sys.argv[2]
    port = int(sys.argv[sys.argv.index("--port") + 1])
    student = AutoModelForCausalLM.from_pretrained(model).eval()
    with fake_vllm(student, AutoTokenizer.from_pretrained(model), Behaviour(name=model), port=port):
        while True:
            time.sleep(1)
