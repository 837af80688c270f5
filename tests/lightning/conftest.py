import pytest
from datasets import Dataset

from kd_plugin.cache import TopK
from kd_plugin.capturing import capture
from kd_plugin.teachers import LocalTeacher
from tests.lightning.help import ROWS


@pytest.fixture(scope="session")
def cache(tmp_path_factory, teacher_dir):
    teacher = LocalTeacher(teacher_dir, dtype="float32")
    directory = tmp_path_factory.mktemp("cache") / "all"
    return capture(Dataset.from_list(ROWS), teacher, directory, targets=TopK(32), progress=False)
