#!/usr/bin/env python3
"""What the linker sees of the ops that are compiled once a level of instruction sets.

    level_objects_test.py NM OBJDUMP FOLDER     FOLDER holds cpu_<level>.o

An inline function that two objects define is merged into one. Were it the copy of an AVX-512 object, the program would
die of it on a lesser processor. So each object shows one function and has instructions of no higher level.
"""

import re
import subprocess
import sys
from pathlib import Path

# Registers that only higher levels have.
ABOVE = {"portable": r"%[yz]mm\d", "avx2": r"%zmm\d|%k[0-7]", "avx512": r"vdpbf16ps|vcvtne2?ps2?bf16", "avx512_bf16": None}
AT = {"avx2": r"%ymm\d", "avx512": r"%zmm\d", "avx512_bf16": r"vdpbf16ps"}


def main(nm, objdump, folder):
    failures = []
    objects = sorted(Path(folder).glob("cpu_*.o"))
    for file in objects:
        level = file.stem.removeprefix("cpu_")
        symbols = subprocess.run([nm, "--extern-only", "--defined-only", file], capture_output=True, text=True, check=True)
        visible = [line.split(maxsplit=1)[1] for line in symbols.stdout.splitlines()]
        if len(visible) != 1 or not visible[0].startswith("T ") or f"make_{level}_backend" not in visible[0]:
            failures.append(f"{file.name} should show make_{level}_backend() alone, and shows {visible[:5]}")
        code = subprocess.run([objdump, "-d", "--no-show-raw-insn", file], capture_output=True, text=True, check=True).stdout
        if ABOVE.get(level) and (found := re.search(rf".*({ABOVE[level]}).*", code)):
            failures.append(f"{file.name} has an instruction of a higher level: {found.group().strip()}")
        if AT.get(level) and not re.search(AT[level], code):
            failures.append(f"{file.name} has no instruction of its own level")
    if not objects:
        failures.append(f"{folder} holds no object of a level")
    print("\n".join(failures) or f"{len(objects)} levels, one visible function each")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
