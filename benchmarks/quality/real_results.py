# SPDX-License-Identifier: Apache-2.0
"""The file of what was measured on a real model: a row for each measure, rule and size, with figures of each text."""

import fcntl
import json
from pathlib import Path
from typing import Any

FULL = {"name": "full cache"}


class Results:
    """Rows as they come. Those that the file has already are taken over, so that a run goes on where another ended;
    other rows of the file stay."""

    def __init__(self, path: Path | None, head: dict) -> None:
        self.path, self.head, self.rows = path, head, {}
        if path is not None and path.exists():
            found = json.loads(path.read_text())
            if found["model"] != head["model"]:
                raise SystemExit(f"{path} must be of {head['model']}; got figures of {found['model']}")
            self.rows = {_key(row): row for row in found["rows"]}
        self.changed = set()

    def count(self, measure: str, rule: dict, C: int | None) -> int:
        """Texts that are measured already."""
        row = self.rows.get((measure, rule["name"], C))
        if row is None:
            return 0
        if row["rule"] != rule:
            raise SystemExit(f"{self.path} must have {rule}; got {row['rule']}, measured before it was changed")
        return len(row.get("kl", row.get("right")))

    def add(self, measure: str, rule: dict, C: int | None, slots: float, **figures: Any) -> None:
        """Those of the next text."""
        key = measure, rule["name"], C
        row = self.rows.setdefault(key, {"measure": measure, "cache_size": C, "slots": slots, "rule": rule})
        for name, figure in figures.items():
            row[name] = [*row.get(name, []), figure]
        self.changed.add(key)

    def write(self) -> None:
        if self.path is None:
            return
        with open(self.path, "a+") as file:  # several measures may be running
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            text = file.read()
            before = json.loads(text) if text else {"rows": []}
            ours = {key: row for key, row in self.rows.items() if key in self.changed}
            rows = {_key(row): row for row in before["rows"]} | ours
            profiles = {**before.get("profiles", {}), **self.head.get("profiles", {})}
            said = json.dumps({**self.head, **({"profiles": profiles} if profiles else {}), "rows": []})
            lines = ",\n".join(json.dumps(row) for row in rows.values())
            file.truncate(0)
            file.write(said[: -len("[]}")] + f"[\n{lines}\n]}}\n")


def _key(row: dict) -> tuple:
    return row["measure"], row["rule"]["name"], row["cache_size"]
