"""On PyPI the name fastbert is another project's: ours has its own, and no text sends anyone to the other."""

import re
import tomllib

from builds import ROOT

from fastbert import _version

# "fastbert[extra]", or fastbert as an argument of pip; a folder or a command of that name is something else.
_BY_NAME = re.compile(r"\bfastbert\[[a-z]|pip install\b[^`\n]*[ \"'](fastbert)(?![-\w/]|'s)")


def test_the_distribution_has_a_name_of_its_own():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["name"] == _version.DISTRIBUTION != "fastbert"
    assert set(project["scripts"]) == {"fastbert"}


def test_no_text_installs_fastbert_by_that_name():
    assert _BY_NAME.search('pip install "fastbert[train]"')
    assert _BY_NAME.search("`pip install --no-deps fastbert`")
    assert not _BY_NAME.search("`pip install --no-deps .` in fastbert's source tree")
    folders = [ROOT / name for name in ("fastbert", "benchmarks", "docs", "examples", "csrc")]
    paths = [*ROOT.glob("*.md"), ROOT / "CMakeLists.txt", ROOT / "Makefile"]
    paths += [p for folder in folders for p in folder.rglob("*") if p.suffix in (".py", ".md", ".cpp", ".h", ".cu")]
    wrong = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in paths
        for line in path.read_text(encoding="utf-8").splitlines()
        if _BY_NAME.search(line)
    ]
    assert not wrong, "\n".join(wrong)
