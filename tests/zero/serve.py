"""``vllm serve MODEL --host H --port P ...`` with the tests' server, until it is ended."""

import sys
import time

from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.fake_vllm import Behaviour, fake_vllm

if __name__ == "__main__":
    model = sys.argv[2]
    port, host = (sys.argv[sys.argv.index(f"--{name}") + 1] for name in ("port", "host"))
    runner = "pooling" if "--runner" in sys.argv else "generate"
    student = AutoModelForCausalLM.from_pretrained(model).eval()
    behaviour = Behaviour(name=model, runner=runner, version="0.32.0")
    with fake_vllm(student, AutoTokenizer.from_pretrained(model), behaviour, port=int(port), host=host):
        while True:
            time.sleep(1)
