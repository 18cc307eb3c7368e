#!/usr/bin/env python3
"""What ptxas made of the attention kernels, read from their machine code (SASS).

    sass_check.py FOLDER TABLE COMPILER           checks the objects flash_attention_*.cu.o of the folder
    sass_check.py FOLDER TABLE COMPILER --write   writes the table anew, to be looked at and committed
    sass_check.py --self-test

For each kernel: the left operand of every product on tensor cores is made by one kind of instruction, a load of a tile
(LDSM) or a rounding of scores (F2FP), on every way that leads there. (ptxas has been seen to give two operands the same
registers.) No local memory. Registers, static shared memory and the number of products by what their left operands are
made by: as the table says, or less. COMPILER is nvcc's version; the table is of one, and others are not held to it.

cuobjdump and nvdisasm are those of the PATH, or those that `.ci/install check` fetched. Without them: exit code 77.
"""

import argparse
import collections
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z0-9][\w.]*)\s*(.*?)\s*;")
LABEL = re.compile(r"^(\.L_\w+):")
SECTION = re.compile(r"^\s*\.section\s+\.text\.(\w+),")
TARGET = re.compile(r"`\((\.L_\w+)\)")
REGISTER = re.compile(r"^R(\d+)\b")
TENSOR_PRODUCTS = ("HMMA", "HGMMA")
MAKE_OPERANDS = ("LDSM", "F2FP")
# Their first operand is no register that they write.
WRITES_NONE = ("ST", "RED", "BRA", "EXIT", "BAR", "BSSY", "BSYNC", "WARPSYNC", "LDGSTS", "NOP", "CALL", "RET", "DEPBAR",
               "MEMBAR", "FENCE", "R2UR", "CCTL", "ERRBAR", "YIELD", "BREAK", "LDGDEPBAR", "WARPGROUP", "UTMA", "SYNCS")


class Instruction:
    def __init__(self, line):
        _, self.predicate, self.name, operands = INSTRUCTION.match(line).groups()
        self.opcode = self.name.split(".")[0]
        self.operands = [operand.strip() for operand in operands.split(",")]
        self.targets = TARGET.findall(operands)

    def register(self, operand):
        found = REGISTER.match(self.operands[operand]) if operand < len(self.operands) else None
        return int(found.group(1)) if found else None

    def written(self):
        """The registers that it writes."""
        if self.opcode.startswith(WRITES_NONE):
            return range(0)
        first = self.register(0)
        if first is None and self.opcode in ("SHFL", "ATOMS", "ATOMG", "ATOM"):
            first = self.register(1)
        if first is None:
            return range(0)
        count = 1
        if self.opcode == "HGMMA":
            rows, columns = re.search(r"\.(\d+)x(\d+)x", self.name).groups()
            count = int(rows) * int(columns) // 128
        elif self.opcode in ("HMMA",) or ".128" in self.name or (self.opcode == "LDSM" and self.name.endswith(".4")):
            count = 4
        elif ".64" in self.name or ".WIDE" in self.name or (self.opcode == "LDSM" and self.name.endswith(".2")):
            count = 2
        return range(first, first + count)

    def left_registers(self):
        """The registers of a product's left operand; none where that is in shared memory."""
        first = self.register(1)
        return range(0) if first is None else range(first, first + 4)


class Kernel:
    def __init__(self, name, lines):
        self.name = name
        self.code, self.labels = [], {}
        for line in lines:
            label = LABEL.match(line)
            if label:
                self.labels[label.group(1)] = len(self.code)
            elif INSTRUCTION.match(line):
                self.code.append(Instruction(line))
        self.followers = [self.successors(at, instruction) for at, instruction in enumerate(self.code)]
        self.predecessors = collections.defaultdict(list)
        for at, followers in enumerate(self.followers):
            for follower in followers:
                self.predecessors[follower].append(at)

    def successors(self, at, instruction):
        targets = [] if instruction.opcode == "BSSY" else [self.labels[target] for target in instruction.targets
                                                           if target in self.labels]
        if instruction.opcode == "BSYNC":
            # On to where the BSSY of its barrier says, which is the nearest such place behind it.
            meetings = [self.labels[other.targets[0]] for other in self.code
                        if other.opcode == "BSSY" and other.operands[0] == instruction.operands[0]]
            return [min(place for place in meetings if place > at)]
        ends = instruction.opcode in ("EXIT", "RET") or (instruction.opcode == "BRA" and "DIV" not in instruction.name)
        falls_through = not ends or instruction.predicate is not None or \
            (instruction.opcode == "BRA" and len(instruction.operands) > 1)
        if falls_through and at + 1 < len(self.code):
            targets.append(at + 1)
        return targets

    def after(self, at):
        """Where the program may go from there."""
        visited, todo = set(), list(self.followers[at])
        while todo:
            place = todo.pop()
            if place not in visited:
                visited.add(place)
                todo.extend(self.followers[place])
        return visited

    def sources(self, register, at, seen=None):
        """The places of all instructions whose result `register` may hold before instruction `at`."""
        seen = set() if seen is None else seen
        found, todo, visited = set(), list(self.predecessors[at]), set()
        while todo:
            place = todo.pop()
            if place in visited:
                continue
            visited.add(place)
            instruction = self.code[place]
            if register in instruction.written():
                copied = instruction.register(1) if instruction.opcode == "MOV" else None
                if copied is None:
                    found.add(place)
                elif (copied, place) not in seen:
                    seen.add((copied, place))
                    found |= self.sources(copied, place, seen)
                if instruction.predicate is None:
                    continue
            todo.extend(self.predecessors[place])
        return found

    def left_operands(self):
        """(what the left operands of a product are, where), for each product."""
        for at, instruction in enumerate(self.code):
            if instruction.opcode not in TENSOR_PRODUCTS:
                continue
            kinds, loop = set(), self.after(at)
            for register in instruction.left_registers():
                for place in self.sources(register, at):
                    # What a register held before the loop in which it is loaded at the first turn does not count.
                    if self.code[place].opcode in MAKE_OPERANDS or place in loop:
                        kinds.add(self.code[place].opcode)
            yield "+".join(sorted(kinds)) or "shared", at

    def uses_local_memory(self):
        return any(instruction.opcode in ("LDL", "STL") for instruction in self.code)


def kernels_of(sass):
    name, lines = None, []
    for line in sass.splitlines():
        section = SECTION.match(line)
        if section or re.match(r"^\s*\.section", line):
            if name:
                yield Kernel(name, lines)
            name, lines = (section.group(1) if section else None), []
        elif name:
            lines.append(line)
    if name:
        yield Kernel(name, lines)


def short_name(mangled):
    """flash_attention_wgmma.cu's wgmma_kernel<64, true, false> as "wgmma_kernel<64,1,0>"."""
    name = re.search(r"\d+([a-z]+(?:_[a-z]+)*_kernel)I", mangled)
    arguments = re.findall(r"L[ib](\d+)E", mangled)
    return f"{name.group(1) if name else mangled}<{','.join(arguments)}>"


def find_tools():
    fetched = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "regroup" / "cuda-tools"
    path = os.pathsep.join([os.environ["PATH"], *map(str, fetched.glob("nvidia/*/bin"))])
    return [shutil.which(tool, path=path) for tool in ("cuobjdump", "nvdisasm")]


def output_of(*command, folder=None):
    return subprocess.run([str(word) for word in command], cwd=folder, check=True, capture_output=True, text=True).stdout


def look_at(folder, cuobjdump, nvdisasm):
    """{architecture and kernel: {quantity: value}}, and what is wrong in any case."""
    found, problems = {}, []
    objects = sorted(pathlib.Path(folder).resolve().rglob("flash_attention_*.cu.o"))
    if not objects:
        problems.append(f"there are no objects flash_attention_*.cu.o in {folder}")
    for path in objects:
        resources, architecture, kernel = {}, "", ""
        for line in output_of(cuobjdump, "-res-usage", path).splitlines():
            architecture = line.split("=")[1].strip() if line.startswith("arch =") else architecture
            kernel = line.split()[1].rstrip(":") if line.strip().startswith("Function ") else kernel
            if "REG:" in line:
                resources[architecture, kernel] = dict(part.split(":") for part in line.split() if part.count(":") == 1)
        with tempfile.TemporaryDirectory() as work:
            output_of(cuobjdump, "-xelf", "all", path, folder=work)
            for cubin in sorted(pathlib.Path(work).glob("*.cubin")):
                architecture = cubin.name.split(".")[-2]
                for kernel in kernels_of(output_of(nvdisasm, "-c", cubin)):
                    name = f"{architecture} {short_name(kernel.name)}"
                    products = collections.Counter()
                    for kinds, at in kernel.left_operands():
                        products[kinds] += 1
                        if "+" in kinds:
                            problems.append(f"{name}: the left operand of product {at} comes from {kinds}")
                    if kernel.uses_local_memory():
                        problems.append(f"{name} uses local memory")
                    usage = resources[architecture, kernel.name]
                    found[name] = {"registers": int(usage["REG"]), "shared": int(usage["SHARED"]), **{
                        f"products_{kind}": count for kind, count in sorted(products.items())}}
    return found, problems


def release(compiler):
    return ".".join(compiler.split(".")[:2])


def read_table(path, compiler):
    """The table; empty where it is another compiler's."""
    table = {}
    for line in pathlib.Path(path).read_text().splitlines():
        if line.startswith("compiler "):
            if line.split()[1] != release(compiler):
                print(f"The table is of nvcc {line.split()[1]}, this is {compiler}: registers are not compared")
                return {}
        elif line and not line.startswith("#"):
            words = line.split()
            table[" ".join(words[:2])] = {key: int(value) for key, value in (word.split("=") for word in words[2:])}
    return table


def write_table(path, compiler, found):
    lines = ["# What each attention kernel may use: written by tests/kernels/sass_check.py, which compares it.",
             f"compiler {release(compiler)}"]
    lines += [" ".join([name, *(f"{key}={value}" for key, value in row.items())]) for name, row in sorted(found.items())]
    pathlib.Path(path).write_text("\n".join(lines) + "\n")


def compare(found, table):
    architectures = {name.split()[0] for name in table}
    for name, row in sorted(found.items()):
        if name.split()[0] not in architectures:
            continue  # no table of it
        if name not in table:
            yield f"{name} is not in the table"
            continue
        for key, value in row.items():
            allowed = table[name].get(key, 0)
            if value > allowed or (key.startswith("products") and value != allowed):
                yield f"{name} has {key} = {value}; the table says {allowed}"


SELF_TEST = """
	.section	.text._Z11some_kernelILi64ELb1EEv,"ax",@progbits
.text._Z11some_kernelILi64ELb1EEv:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/              @!P0 LDSM.16.M88.4 R88, [R2] ;
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, R88, gdesc[UR8], RZ, !UPT ;
        /*0030*/                   F2FP.BF16.F32.PACK_AB R{first}, R25, R24 ;
        /*0040*/                   MOV R97, R{first} ;
        /*0050*/                   F2FP.BF16.F32.PACK_AB R98, R25, R24 ;
        /*0060*/                   F2FP.BF16.F32.PACK_AB R99, R25, R24 ;
        /*0070*/                   F2FP.BF16.F32.PACK_AB R96, R25, R24 ;
        /*0080*/                   HGMMA.64x64x16.F32.BF16 R56, R96, gdesc[UR8], R56 ;
        /*0090*/                   HGMMA.64x64x16.F32.BF16 R56, gdesc[UR4], R56 ;
        /*00a0*/               @P1 BRA `(.L_x_0) ;
        /*00b0*/                   EXIT ;
"""


def self_test():
    for first, expected in ((110, ["LDSM", "F2FP", "shared"]), (88, ["F2FP+LDSM", "F2FP", "shared"])):
        (kernel,) = kernels_of(SELF_TEST.replace("{first}", str(first)))
        assert short_name(kernel.name) == "some_kernel<64,1>", short_name(kernel.name)
        assert [kinds for kinds, _ in kernel.left_operands()] == expected, list(kernel.left_operands())
    table = {"sm_90a k<1>": {"registers": 100, "products_LDSM": 4}}
    assert not list(compare({"sm_90a k<1>": {"registers": 99, "products_LDSM": 4}}, table))
    assert len(list(compare({"sm_90a k<1>": {"registers": 101, "products_LDSM": 3}}, table))) == 2
    assert len(list(compare({"sm_90a other<1>": {}}, table))) == 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?")
    parser.add_argument("table", nargs="?")
    parser.add_argument("compiler", nargs="?")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--self-test", action="store_true")
    arguments = parser.parse_args()
    if arguments.self_test:
        return self_test()
    tools = find_tools()
    if None in tools:
        print("SKIPPED: cuobjdump and nvdisasm are not here; .ci/install check fetches them from PyPI")
        return 77
    found, problems = look_at(arguments.folder, *tools)
    if arguments.write:
        write_table(arguments.table, arguments.compiler, found)
    else:
        problems += compare(found, read_table(arguments.table, arguments.compiler))
    print("\n".join([f"{len(found)} kernels", *problems]))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
