"""Coverage-guided fuzzing of what reads strangers' bytes: bodies, HTTP, the detokenizer, tool calls.

    python tests/fault/fuzz_parsers.py TARGET [--seconds 60] [--corpus DIR]

TARGET: protocol, http, detokenizer or tools. Needs `atheris` beside this Python (`pip install atheris`, on
Linux). The corpus begins with the HTTP fuzzer's inputs. Ends with 0 if nothing was found; what was
found is written to the working directory, and its traceback told.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

with atheris.instrument_imports(include=["server", "h11"]):
    from fault.fuzzing.targets import TARGETS

from fault.fuzzing.inputs import Inputs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path)
    arguments = parser.parse_args()
    corpus = arguments.corpus or Path(tempfile.mkdtemp())
    corpus.mkdir(parents=True, exist_ok=True)
    inputs = Inputs(3, "sk-a-key", "tiny")
    for place in range(200):
        raw = b"".join(inputs.next().pieces)[:4000]
        data = b"\x03" + raw if arguments.target == "http" else raw.partition(b"\r\n\r\n")[2]
        (corpus / f"begin-{place}").write_bytes(data)
    options = [f"-max_total_time={arguments.seconds}", "-max_len=4096", "-timeout=20", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], TARGETS[arguments.target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
