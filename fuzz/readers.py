"""A coverage-guided fuzzer of the readers, by atheris (Python up to the newest that has a wheel; Linux).

    pip install atheris
    python fuzz/readers.py obj -max_total_time=600        # any name of tests/readers.py, then libFuzzer's options

Starts from the valid files of that reader. What ends in anything but a result or a refusal is written to
fuzz/found/NAME, from where it belongs into tests/data/fuzz/NAME, which the tests read again.
"""

import sys
import tempfile
import warnings
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
with atheris.instrument_imports(
    include=["vision3dgen.io", "vision3dgen.files", "vision3dgen.config", "vision3dgen.datasets"]
):
    from tests.readers import READERS, attempt


def main() -> None:
    name, *options = sys.argv[1:]
    if name not in READERS:
        sys.exit(f"unknown reader {name!r}; choose from {', '.join(READERS)}")
    warnings.simplefilter("ignore")
    found = ROOT / "fuzz" / "found" / name.replace(" ", "_")
    found.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as corpus:
        for number, data in enumerate(READERS[name].samples()):
            (Path(corpus) / f"{number}").write_bytes(data)
        arguments = [sys.argv[0], corpus, f"-artifact_prefix={found}/", "-rss_limit_mb=4096", "-timeout=20", *options]
        atheris.Setup(arguments, lambda data: attempt(READERS[name], data, Path(folder)))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
