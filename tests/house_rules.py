#!/usr/bin/env python3
"""Checks what neither compiler nor linker can: the rules of docs/architecture.md, "House rules".

    house_rules.py ROOT          lists every violation as file:line: [rule] message; exit status 1 if there are any
    house_rules.py --self-test   plants a violation of each kind in a temporary tree and expects each to be found

Looks at the C++ files under ROOT that git tracks or would track (all of them where ROOT is no git checkout).
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path, PurePosixPath

SUFFIXES = {".h", ".hpp", ".cpp", ".cc", ".cxx", ".cu", ".cuh"}
HEADER_SUFFIXES = {".h", ".hpp", ".cuh"}
LAYERS = ("kernels", "parallel", "data", "trainer", "tests")
MAX_LINES = 500

# Which layers a file of a layer may include. Tests may include everything.
LAYER_SEES = {
    "base": {"base"},
    "kernels": {"base", "kernels"},
    "parallel": {"base", "kernels", "parallel"},
    "data": {"base", "data"},
    "trainer": {"base", "kernels", "parallel", "data", "trainer"},
}
# The same among the parts of trainer/, or single headers. "model contracts" are model/parameters.h and model/config.h;
# version.h and quickstart_config.h are made by CMake from a .in file.
CONTRACTS = {"trainer/model/parameters.h", "trainer/model/config.h"}
PART_SEES = {
    "model": {"model"},
    "optimizer": {"optimizer", "model contracts", "trainer/model/parameter_store.h"},
    "formats": {"formats", "model contracts"},
    "checkpoint": {"checkpoint", "formats", "model contracts"},
    "conversion": {"conversion", "formats", "model contracts"},
    "run": {"run", "model", "optimizer", "formats", "checkpoint", "conversion", "options", "exit_code"},
    "option_table": {"option_table", "options", "model contracts"},
    "options": {"options", "option_table", "model contracts", "quickstart_config"},
    "commands": {"commands", "version", "run", "model", "optimizer", "formats", "checkpoint", "conversion", "options",
                 "exit_code"},
    "main": {"commands", "run", "model", "optimizer", "formats", "checkpoint", "conversion", "options", "exit_code"},
}


def layer_of(path):
    if path.startswith("kernels/base/"):
        return "base"
    top = path.split("/")[0]
    return top if top in LAYERS else None


def part_of(path):
    """The part of trainer/ a file belongs to: its folder, or the stem of a file directly in trainer/."""
    pieces = path.split("/")
    return pieces[1] if len(pieces) > 2 else PurePosixPath(path).stem


# ---- Reading C++ ---------------------------------------------------------------------------------------------------

TOKEN = re.compile(
    r"""R"(?P<delimiter>[^()\\\s]{0,16})\((?:.|\n)*?\)(?P=delimiter)"   # raw string
      | "(?:\\(?:.|\n)|[^"\\\n])*"                                      # string
      | (?<![0-9A-Za-z_])'(?:\\.[^'\n]*|[^'\\\n])'                      # character, not a digit separator
      | //(?:\\\n|[^\n])*                                               # comments
      | /\*(?:.|\n)*?\*/""",
    re.VERBOSE,
)


def without_comments_and_strings(text):
    """The code alone, line by line where it was: strings become "", characters ' ', comments a space."""

    def blank(match):
        token = match.group()
        newlines = "\n" * token.count("\n")
        if token.startswith("/"):
            return " " + newlines
        return ("' '" if token.startswith("'") else '""') + newlines

    return TOKEN.sub(blank, text)


def without_preprocessor(code):
    return re.sub(r"^[ \t]*#(?:\\\n|[^\n])*", lambda m: "\n" * m.group().count("\n"), code, flags=re.MULTILINE)


def line_at(text, offset):
    return text.count("\n", 0, offset) + 1


def scope_opened_by(head, inside):
    """What kind of scope the '{' after `head` opens: namespace, class, enum, function or initialiser."""
    if inside in ("function", "enum", "initialiser"):
        return inside if inside != "initialiser" else "function"
    head = re.sub(r"\btemplate\s*<[^{};]*?>\s*(?=\w|\[)", "", head).strip()
    if re.search(r"\bnamespace\b", head) or re.fullmatch(r'extern\s*""', head):
        return "namespace"
    if re.match(r"(typedef\s+)?enum\b", head):
        return "enum"
    if re.search(r"(?<![=<>!])=(?!=)", head) and not re.search(r"\boperator\s*\S*=", head):
        return "initialiser"
    if re.match(r"(typedef\s+|static\s+|inline\s+)*(class|struct|union)\b", head):
        return "class"
    return "function" if "(" in head else "initialiser"


def statements(code):
    """Yields (scope, line, text) for each declaration or statement, and the heads of braced ones."""
    scopes, heads, head, start = ["namespace"], [], "", 0
    parentheses = 0
    for i, c in enumerate(code):
        if not head.strip() and not c.isspace():
            start, head = i, ""
        if c == "(":
            parentheses += 1
        elif c == ")":
            parentheses -= 1
        if c == "{":
            kind = scope_opened_by(head, scopes[-1])
            if kind == "initialiser" and scopes[-1] in ("namespace", "class"):
                heads.append((head, start, parentheses))
            else:
                yield scopes[-1], line_at(code, start), head.strip() + " {"
                heads.append(None)
            scopes.append(kind)
            head, parentheses = "", 0
        elif c == "}":
            if len(scopes) > 1:
                scopes.pop()
                saved = heads.pop()
                head, start, parentheses = (saved[0] + "{}", saved[1], saved[2]) if saved else ("", i, 0)
            else:
                head = ""
        elif c == ";" and parentheses == 0:
            if head.strip():
                yield scopes[-1], line_at(code, start), head.strip() + ";"
            head = ""
        elif c == ":" and re.fullmatch(r"\s*(public|protected|private)\s*", head):
            head = ""
        else:
            head += c


# ---- The rules: each a function of a file that yields (line, rule, message) ----------------------------------------


class Source:
    def __init__(self, root, path):
        self.path = path
        self.root = root
        self.bytes = (root / path).read_bytes()
        self.text = self.bytes.decode("utf-8", errors="replace")
        self.code = without_comments_and_strings(self.text)
        self.plain = without_preprocessor(self.code)
        self.layer = layer_of(path)
        self.is_test = self.layer == "tests"
        # (line, name, quoted). Searched in the text, for a name in quotes is no longer in the code.
        self.includes = [
            (line_at(self.text, m.start()), m.group(2), m.group(1) == '"')
            for m in re.finditer(r'^[ \t]*#[ \t]*include[ \t]*(["<])([^">\n]+)[">]', self.text, re.MULTILINE)
            if re.match(r"[ \t]*#[ \t]*include", self.code.split("\n")[line_at(self.text, m.start()) - 1])
        ]

    def find(self, pattern, text=None):
        text = self.plain if text is None else text
        for match in re.finditer(pattern, text):
            yield line_at(text, match.start()), match


def is_project(name, quoted):
    return quoted or name.split("/")[0] in LAYERS and "/" in name


def arrows(source):
    for line, name, quoted in source.includes:
        if not is_project(name, quoted):
            continue
        target = layer_of(name)
        if target is None:
            continue
        if not source.is_test and source.layer is not None and target not in LAYER_SEES[source.layer]:
            yield line, "arrow", f"{source.layer} must not include {name}"
        elif source.layer == "trainer" and target == "trainer":
            seen = PART_SEES.get(part_of(source.path))
            part = part_of(name)
            if seen is None:
                yield line, "arrow", f"trainer/{part_of(source.path)} has no place in PART_SEES of house_rules.py"
            elif part not in seen and name not in seen and not (name in CONTRACTS and "model contracts" in seen):
                yield line, "arrow", f"trainer/{part_of(source.path)} must not include {name}"


def project_headers(source):
    for line, name, quoted in source.includes:
        if is_project(name, quoted) and not any((source.root / (name + end)).is_file() for end in ("", ".in")):
            yield line, "missing header", f"{name} does not exist (project headers are named from the root)"


# (rule, names of headers, prefixes of the paths that may include them)
LIBRARY_HEADERS = (
    ("mpi", r"mpi\.h|mpi-ext\.h|nccl\.h", ("parallel/", "tests/support/", "tests/cuda_emulation/nccl.")),
    ("cuda", r"(.*/)?(cuda|cublas|cudnn)[^/]*(/.*)?", ("kernels/cuda/", "parallel/nccl_", "tests/cuda_emulation/")),
    ("onednn", r"oneapi/dnnl/.*|dnnl.*\.h(pp)?", ("kernels/cpu/",)),
)


def library_headers(source):
    for line, name, quoted in source.includes:
        if is_project(name, quoted) and layer_of(name) is not None:
            continue
        for rule, pattern, places in LIBRARY_HEADERS:
            if re.fullmatch(pattern, name) and not source.path.startswith(places):
                yield line, rule, f"<{name}> only in {' and '.join(places)}*"


FACTORY = re.compile(r"(?<!return)[\w>&*]\s+(\w+::)*make_(backend|communicator)\s*\([^;{}]*\)\s*(noexcept\s*)?\{")
INSTRUCTION_SETS = {"kernels/cpu/": re.compile(r"__(AVX|AMX|SSE|FMA|F16C|BMI|ARM_|aarch64|x86_64)\w*"),
                    "kernels/cuda/ptx.cuh": re.compile(r"__CUDA_ARCH\w*")}


def feature_conditions(source):
    for line, match in source.find(r"(?m)^[ \t]*#[ \t]*(?:if|ifdef|ifndef|elif)\b((?:\\\n|[^\n])*)", source.code):
        words = [w for w in re.findall(r"[A-Za-z_]\w*", match.group(1)) if w != "defined"]
        known = [names for place, names in INSTRUCTION_SETS.items() if source.path.startswith(place)]
        if known and words and all(known[0].match(word) for word in words):
            continue
        if not FACTORY.search(source.plain):
            condition = match.group().strip()
            yield line, "feature #if", f"'{condition}' outside the files of make_backend and make_communicator"


def is_constant(declaration):
    """const or constexpr, and for a pointer const itself, not only what it points to."""
    if re.search(r"\bconst(expr|eval)\b", declaration):
        return True
    name = re.split(r"[={(]", declaration)[0]
    while (shorter := re.sub(r"<[^<>]*>", "", name)) != name:  # what the template arguments say does not count
        name = shorter
    return re.search(r"\bconst\b", name.rsplit("*", 1)[-1]) is not None


NOT_A_VARIABLE = re.compile(
    r"(\[\[.*?\]\]\s*)*(using|typedef|template|friend|extern|static_assert|namespace|class|struct|union|enum|concept|"
    r"public|private|protected|asm)\b"
)


# The emulated GPU: kernels name their thread by global variables. What is preloaded has nobody to own it.
GLOBAL_STATE = ("tests/cuda_emulation/machine.cpp", "tests/support/fault_preload.cpp")


def mutable_statics(source):
    if source.path in GLOBAL_STATE:
        return
    for scope, line, text in statements(source.plain):
        declaration = text[:-1].strip()
        is_static = re.match(r"(\[\[.*?\]\]\s*|inline\s+|template\s*<.*?>\s*)*(static|constinit)\b", declaration, re.DOTALL)
        if scope in ("function", "initialiser"):  # the latter holds the bodies of lambdas
            # A statement in a body may follow a label or the head of an if.
            if re.search(r"(^|[\s:)])static\b", declaration) and not is_constant(declaration):
                yield line, "mutable static", f"'{shorten(declaration)}' keeps state between calls"
        elif scope in ("namespace", "class") and not is_constant(declaration):
            before = re.split(r"[={]", declaration)[0]
            call = re.search(r"\((.*)", before, re.DOTALL)
            is_function = call and not re.match(r"""\s*[-0-9"'&]""", call.group(1))
            if is_function or re.search(r"\boperator\b", declaration):
                continue
            namespace_variable = (
                scope == "namespace"
                and text.endswith(";")
                and not NOT_A_VARIABLE.match(declaration)
                and re.match(r"[\w:]+[\w:<>,*&\s\[\]()]*[\s*&>]\w+\s*(\[.*\]\s*)*(\(.*\)|[={].*)?$", declaration, re.DOTALL)
            )
            if is_static or namespace_variable:
                yield line, "mutable static", f"'{shorten(declaration)}' is state that nobody owns"


def shorten(text, limit=60):
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def raw_memory(source):
    # Placement new, `new (address) T`, makes no memory and is fine; `new (std::nothrow) T` does. Tests may replace the
    # global operators, to count allocations.
    for line, match in source.find(r"\b(operator\s+)?(new|delete)\b\s*(\(\s*(?:std::)?nothrow|\()?"):
        before = source.plain[: match.start()].rstrip()
        if match.group(1):
            if not source.is_test:
                yield line, "raw new/delete", f"operator {match.group(2)}"
        elif match.group(2) == "new" and match.group(3) == "(":
            continue
        elif match.group(2) == "delete" and before.endswith("="):
            continue
        else:
            yield line, "raw new/delete", f"'{match.group(2)}': let an object own it"


# Ends a process whose main thread is stuck, from another thread.
WATCHDOG = "trainer/run/watchdog.cpp"


def process_exits(source):
    for line, match in source.find(r"(?<![\w.>])(::|std::)?\b(exit|_exit|_Exit|quick_exit|abort)\s*\("):
        if source.path == WATCHDOG and match.group(1, 2) == ("::", "_exit"):
            continue
        # `void abort(` declares a member, `Mesh::abort(` defines one.
        before = source.plain[: match.start()].rstrip()
        word = re.search(r"[\w\]>*&:]+$", before)
        if match.group(1) is None and word and word.group() not in ("return", "else", "do", "case", ":"):
            continue
        if match.group(1) == "::" and before.endswith(tuple("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_>")):
            if source.plain[match.start() - 1] == before[-1] and not before.endswith("std"):
                continue
        yield line, "exit", f"'{match.group(2)}(': throw instead, main() ends the job"
    if not source.path.startswith(("parallel/", "tests/support/")):
        for line, _ in source.find(r"\bMPI_Abort\s*\("):
            yield line, "exit", "MPI_Abort only in parallel/"


def environment(source):
    if not re.match(r"trainer/options\.|tests/", source.path):
        for line, match in source.find(r"\b(secure_getenv|getenv|environ)\b"):
            yield line, "getenv", f"{match.group()} only in trainer/options"


def words(source):
    for line, _ in source.find(r"\bthread_local\b"):
        yield line, "thread_local", "state that nobody owns"
    for line, _ in source.find(r"\bstd::cout\b"):
        yield line, "std::cout", "messages go through Log, results through fmt::print"
    for line, match in source.find(r"\busing\s+namespace\s+[\w:]+"):
        yield line, "using namespace", match.group()
    for line, match in source.find(r"\b(TODO|FIXME|XXX)\b", source.text):
        yield line, "to do", f"{match.group()}: do it, or open an issue"


def machine_paths(source):
    always, outside_tests = ("work", "root"), ("tmp",)
    names = "|".join(always if source.is_test else always + outside_tests)
    for line, match in source.find(rf"(?<![\w./-])/({names})/", source.text):
        yield line, "machine path", f"{match.group()} is a place on somebody's machine"


def whole_file(source):
    count = len(source.text.splitlines())
    if count > MAX_LINES:
        yield MAX_LINES + 1, "long file", f"{count} lines, more than {MAX_LINES}"
    for number, line in enumerate(source.bytes.split(b"\n"), 1):
        if any(byte > 127 for byte in line):
            yield number, "non-ASCII", "a character outside ASCII"
    if PurePosixPath(source.path).suffix in HEADER_SUFFIXES and not re.search(r"(?m)^#pragma once\s*$", source.code):
        yield 1, "#pragma once", "a header without it"
    for piece in PurePosixPath(source.path).with_suffix("").parts:
        if re.fullmatch(r"(.*_)?(utils?|common|misc|helpers?)(_.*)?", piece):
            yield 1, "file name", f"'{piece}' says nothing about what is inside"


def orphaned_test(source):
    path = PurePosixPath(source.path)
    if not path.name.endswith("_test.cpp"):
        return
    lists = source.root / path.parent / "CMakeLists.txt"
    if not lists.is_file() or path.name not in lists.read_text(encoding="utf-8"):
        yield 1, "orphaned test", f"{path.parent}/CMakeLists.txt does not name it"


RULES = (orphaned_test, arrows, project_headers, library_headers, feature_conditions, mutable_statics, raw_memory, process_exits,
         environment, words, machine_paths, whole_file)


def source_paths(root):
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, capture_output=True)
    if listing.returncode == 0:
        names = listing.stdout.decode("utf-8", errors="surrogateescape").split("\0")
    else:
        names = []
        for folder, folders, files in os.walk(root):
            folders[:] = [f for f in folders if not f.startswith((".", "build"))]
            names += [(Path(folder) / f).relative_to(root).as_posix() for f in files]
    return sorted({n for n in names if PurePosixPath(n).suffix in SUFFIXES and (root / n).is_file()})


def violations(root):
    for path in source_paths(root):
        source = Source(root, path)
        for rule in RULES:
            for line, name, message in rule(source):
                yield path, line, name, message


# ---- Self-test -----------------------------------------------------------------------------------------------------

# A tree without violations; the second file has what looks like violations and is none.
CLEAN = {
    "kernels/base/error.h": "#pragma once\n",
    "kernels/backend.h": '#pragma once\n#include "kernels/base/error.h"\n',
    "kernels/cpu/matmul.h": "#pragma once\n#include <oneapi/dnnl/dnnl.hpp>\n#if defined(__AVX512F__)\n#endif\n",
    "kernels/cuda/handles.h": "#pragma once\n#include <cublasLt.h>\n#include <cuda_runtime.h>\n#include <cudnn.h>\n",
    "kernels/backend.cpp": '#include "kernels/backend.h"\n'
    "namespace regroup {\nstd::unique_ptr<Backend> make_backend(const Options& o) {\n#ifdef REGROUP_CUDA\n#endif\n}\n}\n",
    "parallel/mesh.h": '#pragma once\n#include <mpi.h>\n#include "kernels/backend.h"\n',
    "parallel/nccl_communicator.h": "#pragma once\n#include <cuda_runtime.h>\n#include <nccl.h>\n",
    "data/corpus.h": '#pragma once\n#include "kernels/base/error.h"\n',
    "trainer/model/config.h": "#pragma once\n",
    "trainer/model/parameters.h": '#pragma once\n#include "parallel/mesh.h"\n#include "trainer/model/config.h"\n',
    "trainer/model/t5.h": '#pragma once\n#include "kernels/cuda/handles.h"\n',
    "trainer/optimizer/adafactor.h": '#pragma once\n#include "trainer/model/parameters.h"\n',
    "trainer/formats/names.h": '#pragma once\n#include "trainer/model/config.h"\n',
    "trainer/checkpoint/store.h": '#pragma once\n#include "trainer/formats/names.h"\n',
    "trainer/conversion/regroup.h": '#pragma once\n#include "trainer/formats/names.h"\n',
    "trainer/run/loop.h": '#pragma once\n#include "trainer/model/t5.h"\n#include "data/corpus.h"\n',
    "trainer/commands/train.h": '#pragma once\n#include "trainer/run/loop.h"\n',
    "trainer/options.cpp": "const char* home() { return std::getenv(\"HOME\"); }\n",
    "trainer/main.cpp": '#include "trainer/commands/train.h"\nint main() { return 0; }\n',
    "tests/CMakeLists.txt": "regroup_test(NAME model_test SOURCES model_test.cpp)\n",
    "tests/model_test.cpp": '#include "trainer/model/t5.h"\n#include "trainer/commands/train.h"\n'
    'const char* shared() { return std::getenv("SHARED"); }\nvoid* operator new(std::size_t size);\n',
    "tests/cuda_emulation/machine.cpp": "#include <cuda_runtime_api.h>\nMachine machine;\n",
    "data/fine.cpp": r'''
// std::cout << new int; static int x; using namespace std; exit(1) - only words, as are "thread_local" and abort().
#include <new>
#include "data/corpus.h"
namespace regroup {
namespace {
static constexpr int kOne = 1;
static const std::map<int, int> kTable = {{1, 2}, {3, 4}};
constexpr std::array<std::string_view, 2> kNames = {"a", "static int x;"};
const auto kSquare = [](int x) { return x * x; };
const char* const kRaw = R"(new int; // static)";
static const std::vector<const char*> kPointers = {"a"};
constexpr char kQuote = '"';
constexpr int kMillion = 1'000'000;
static int twice(int x) { return 2 * x; }
struct sigaction action(void (*handler)(int)) {
  struct sigaction result = {};
  return result;
}
extern "C" void handler(int) {}
}  // namespace
using Pair = std::pair<int, int>;
enum class Kind { kA, kB = 3 };
template <class T>
class alignas(64) Thing : public Base<T> {
 public:
  Thing(int a) : a_{a}, b_(a) {}
  Thing(const Thing&) = delete;
  Thing& operator=(const Thing&) = delete;
  static Thing make(int a = 3) { return Thing(a); }
  static Thing read(const std::string& path);
  static constexpr int kSize = 4;
  bool operator==(const Thing&) const = default;
  [[noreturn]] void abort(int code);

 private:
  int a_ = 0;
  std::vector<int> b_{};
};
void Thing::abort(int code) { communicator_.abort(code); }
template <class To, class From>
To narrow(From value) { return static_cast<To>(value); }
std::string path_of(const Thing& thing);
int sum(const std::vector<int>& v) {
  static const int kStart = 0;
  new (buffer) Thing(1);
  const auto on_exit = [&] { leave(); };
  std::vector<std::string> paths = {"data/work/x", "https://host/work/"};
  std::atexit(nullptr);
  for (int i = 0; i < 3; ++i) { int x = 1; }
  return std::accumulate(v.begin(), v.end(), kStart);
}
}  // namespace regroup
''',
}

# (rule, path, text, line at which it must be found)
H = "#pragma once\n"
SEEDS = (
    ("arrow", "kernels/base/bad.h", H + '#include "kernels/backend.h"\n', 2),
    ("arrow", "kernels/bad.h", H + '#include "parallel/mesh.h"\n', 2),
    ("arrow", "kernels/bad.h", H + '#include "data/corpus.h"\n', 2),
    ("arrow", "parallel/bad.h", H + "#include <data/corpus.h>\n", 2),
    ("arrow", "parallel/bad.h", H + '#include "trainer/model/t5.h"\n', 2),
    ("arrow", "data/bad.h", H + '#include "kernels/backend.h"\n', 2),
    ("arrow", "data/bad.h", H + '#include "parallel/mesh.h"\n', 2),
    ("arrow", "trainer/run/bad.h", H + '#include "tests/support.h"\n', 2),
    *(("arrow", "trainer/model/bad.h", H + f'#include "trainer/{part}"\n', 2) for part in (
        "optimizer/adafactor.h", "formats/names.h", "checkpoint/store.h", "conversion/regroup.h", "run/loop.h", "commands/train.h",
        "options.h")),
    *(("arrow", f"trainer/{part}/bad.h", H + f'#include "trainer/{seen}"\n', 2) for part, seen in (
        ("optimizer", "model/t5.h"), ("optimizer", "formats/names.h"), ("checkpoint", "model/t5.h"),
        ("checkpoint", "conversion/regroup.h"), ("formats", "checkpoint/store.h"), ("conversion", "checkpoint/store.h"),
        ("conversion", "model/t5.h"), ("conversion", "run/loop.h"), ("run", "commands/train.h"))),
    ("arrow", "trainer/options.h", H + '#include "trainer/commands/train.h"\n', 2),
    ("arrow", "trainer/novelty/bad.h", H + '#include "trainer/model/config.h"\n', 2),
    ("orphaned test", "tests/bad_test.cpp", "int a();\n", 1),
    ("missing header", "data/bad.cpp", '\n#include "data/no_such.h"\n', 2),
    ("missing header", "data/bad.cpp", '#include "corpus.h"\n', 1),
    ("missing header", "tests/bad.cpp", "#include <trainer/model/no_such.h>\n", 1),
    ("mpi", "trainer/run/bad.cpp", "\n\n#include <mpi.h>\n", 3),
    ("mpi", "kernels/cuda/bad.cpp", "#include <nccl.h>\n", 1),
    ("mpi", "tests/bad.cpp", "#include <mpi.h>\n", 1),
    ("cuda", "kernels/bad.cpp", "#include <cuda_runtime.h>\n", 1),
    ("cuda", "parallel/bad.cpp", "#include <cublasLt.h>\n", 1),
    ("cuda", "trainer/model/bad.cpp", "#include <cudnn_frontend/graph.h>\n", 1),
    ("cuda", "tests/bad.cpp", "#include <cuda/std/array>\n", 1),
    ("onednn", "kernels/bad.cpp", "#include <oneapi/dnnl/dnnl.hpp>\n", 1),
    ("onednn", "trainer/bad.cpp", "#include <dnnl.hpp>\n", 1),
    ("feature #if", "kernels/bad.cpp", "int a;\n#ifdef REGROUP_CUDA\n#endif\n".replace("int a;", ""), 2),
    ("feature #if", "kernels/cpu/bad.cpp", "#if defined(__AVX512F__) && defined(REGROUP_CUDA)\n#endif\n", 1),
    ("feature #if", "kernels/bad.cpp", "#if defined(__AVX512F__)\n#endif\n", 1),
    ("feature #if", "kernels/bad.h", H + "#ifndef BAD_H\n#endif\n", 2),
    ("feature #if", "kernels/bad.cpp", "void f() { auto b = make_backend(o); }\n#if 0\n#endif\n", 2),
    ("mutable static", "data/bad.cpp", "namespace a {\nstatic int count = 0;\n}\n", 2),
    ("mutable static", "tests/cuda_emulation/bad.cpp", "Machine machine;\n", 1),
    ("mutable static", "data/bad.cpp", "namespace a {\n\nint count;\n}\n", 3),
    ("mutable static", "data/bad.cpp", "std::map<int, int> cache = {{1, 2}};\n", 1),
    ("mutable static", "data/bad.cpp", "std::atomic<bool> stop{false};\n", 1),
    ("mutable static", "data/bad.cpp", "namespace {\nvolatile std::sig_atomic_t flag = 0;\n}\n", 2),
    ("mutable static", "data/bad.cpp", "static std::string name(3, 'x');\n", 1),
    ("mutable static", "data/bad.cpp", "static const char* name = nullptr;\n", 1),
    ("mutable static", "data/bad.cpp", "static std::vector<const int> numbers = {};\n", 1),
    ("mutable static", "data/bad.cpp", "int next() {\n  static int n = 0;\n  return n++;\n}\n", 2),
    ("mutable static", "data/bad.cpp", "Log& log() {\n  if (a) {\n    static Log log(1);\n  }\n}\n", 3),
    ("mutable static", "data/bad.cpp", "const auto f = [] {\n  static int n;\n};\n", 2),
    ("mutable static", "data/bad.h", H + "class A {\n public:\n  static inline int count = 0;\n};\n", 4),
    ("mutable static", "data/bad.h", H + "struct A {\n  static std::vector<int> all;\n};\n", 3),
    ("thread_local", "data/bad.cpp", "void f() {\n  thread_local int n = 0;\n}\n", 2),
    ("raw new/delete", "data/bad.cpp", "auto f() {\n  return new int(3);\n}\n", 2),
    ("raw new/delete", "data/bad.cpp", "auto f() { return new (std::nothrow) int(3); }\n", 1),
    ("raw new/delete", "data/bad.cpp", "void f(int* p) {\n  delete p;\n}\n", 2),
    ("raw new/delete", "data/bad.cpp", "void f(int* p) { delete[] p; }\n", 1),
    ("raw new/delete", "data/bad.cpp", "void* f() { return ::operator new(3); }\n", 1),
    ("exit", "data/bad.cpp", "void f() {\n  exit(1);\n}\n", 2),
    ("exit", "data/bad.cpp", "void f() {\n  g();\n  std::abort();\n}\n", 3),
    ("exit", "data/bad.cpp", "void f() { if (a) ::_exit(1); }\n", 1),
    ("exit", "trainer/run/watchdog.cpp", "void f() { ::_exit(1);\n std::exit(1); }\n", 2),
    ("exit", "data/bad.cpp", "void f() { if (a) abort(); }\n", 1),
    ("exit", "data/bad.cpp", "int f() { return a ? exit(1) : 0; }\n", 1),
    ("exit", "trainer/run/bad.cpp", "void f() { MPI_Abort(c, 1); }\n", 1),
    ("getenv", "trainer/run/bad.cpp", 'auto f() { return std::getenv("A"); }\n', 1),
    ("std::cout", "trainer/run/bad.cpp", "void f() { std::cout << 1; }\n", 1),
    ("using namespace", "trainer/run/bad.cpp", "using namespace std;\n", 1),
    ("to do", "trainer/run/bad.cpp", "\n// TODO: later\n", 2),
    ("to do", "trainer/run/bad.cpp", "// FIXME\n", 1),
    ("to do", "trainer/run/bad.cpp", "/* XXX */\n", 1),
    ("machine path", "trainer/run/bad.cpp", 'const char* const p = "/tmp/x";\n', 1),
    ("machine path", "trainer/run/bad.cpp", "// see /root/notes\n", 1),
    ("machine path", "tests/bad.cpp", "// see /work/notes\n", 1),
    ("long file", "data/bad.cpp", "\n" * (MAX_LINES + 1), MAX_LINES + 1),
    ("non-ASCII", "data/bad.cpp", "\n// caf\u00e9\n", 2),
    ("#pragma once", "data/bad.h", "// a header\n", 1),
    *(("file name", path, "", 1) for path in (
        "data/utils.cpp", "data/string_util.cpp", "data/common/x.cpp", "data/misc.cpp", "tests/test_helpers.cpp")),
)


def found_in(files):
    with tempfile.TemporaryDirectory() as folder:
        for path, text in files.items():
            target = Path(folder) / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
        return list(violations(Path(folder)))


def self_test():
    failures = [f"in the clean tree: {found}" for found in found_in(CLEAN)]
    extra = {"trainer/options.h": H, "tests/support.h": H}
    for rule, path, text, line in SEEDS:
        found = [(p, n, r) for p, n, r, _ in found_in({**CLEAN, **extra, path: text})]
        if found != [(path, line, rule)]:
            failures.append(f"planted {rule} at {path}:{line} in {text!r}, found {found}")
    for failure in failures:
        print(failure)
    print(f"self-test: {len(SEEDS)} violations planted, {len(failures)} surprises")
    return 1 if failures else 0


def main():
    if sys.argv[1:] == ["--self-test"]:
        return self_test()
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        print(__doc__)
        return 2
    paths = source_paths(Path(sys.argv[1]))
    found = list(violations(Path(sys.argv[1])))
    for path, line, rule, message in found:
        print(f"{path}:{line}: [{rule}] {message}")
    print(f"{len(paths)} files, {len(found)} violations")
    # A root without sources is the wrong root, not a clean one.
    return 1 if found or not paths else 0


if __name__ == "__main__":
    sys.exit(main())
