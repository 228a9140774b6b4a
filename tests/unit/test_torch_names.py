"""Names of torch that the lowest torch of pyproject.toml lacks are not imported."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
NEWER_THAN_LOWEST = {"torch.distributed.distributed_c10d.GroupName"}
"""Met once each; torch 2.13 has them, 2.8 has not."""


def test_no_name_is_imported_that_the_lowest_torch_lacks():
    imported = set()
    for path in [*ROOT.glob("megatron_tip/**/*.py"), *ROOT.glob("tools/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
                imported |= {f"{node.module}.{alias.name}" for alias in node.names}
    assert "torch.distributed.distributed_c10d.PrefixStore" in imported
    assert not imported & NEWER_THAN_LOWEST
