"""Readers on files that are not what they say: read, or refused with a reason and the file's name, nothing else."""

import random
import resource
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.readers import READERS, attempt

RELAXED = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize("name", READERS)
def test_what_is_valid_is_read(name, tmp_path):
    for data in READERS[name].samples():
        assert attempt(READERS[name], data, tmp_path) == "read"


@pytest.mark.parametrize("name", [name for name, reader in READERS.items() if reader.claims])
def test_headers_that_promise_too_much_are_refused_before_memory_is_taken(name, tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for data in READERS[name].claims:
        assert attempt(READERS[name], data, tmp_path) == "refused"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_or_refused(name, tmp_path):
    samples = READERS[name].samples()

    @RELAXED
    @given(data=st.data())
    def damaged(data):
        content = bytearray(data.draw(st.sampled_from(samples)))
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, len(content)))
            kind = data.draw(st.sampled_from(["cut", "flip", "insert", "double", "digit"]))
            if kind == "cut":
                del content[at:]
            elif kind == "flip" and at < len(content):
                content[at] ^= 1 << data.draw(st.integers(0, 7))
            elif kind == "insert":
                content[at:at] = data.draw(st.binary(min_size=1, max_size=8))
            elif kind == "double":
                content[at:at] = content[at : at + data.draw(st.integers(1, 16))]
            elif kind == "digit":
                digits = [i for i, byte in enumerate(content) if 48 <= byte < 58]
                if digits:
                    place = data.draw(st.sampled_from(digits))
                    content[place : place + 1] = data.draw(
                        st.sampled_from([b"-1", b"99999999999999999999", b"nan", b"1e999"])
                    )
        attempt(READERS[name], bytes(content), tmp_path)

    damaged()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
def test_bytes_of_any_kind_are_read_or_refused(name, tmp_path):
    draw = random.Random(name)
    for size in (0, 1, 7, 64, 1000):
        attempt(READERS[name], draw.randbytes(size), tmp_path)


KEPT = sorted((Path(__file__).parent / "data" / "fuzz").glob("*/*"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", KEPT, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_fuzzing_found_stays_mended(path, tmp_path):
    attempt(READERS[path.parent.name.replace("_", " ")], path.read_bytes(), tmp_path)
