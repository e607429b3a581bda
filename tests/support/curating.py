"""Text for tests of data_tools.curate: English and Chinese prose, code, duplicates and damaged text."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path
from typing import Any

from data_tools.curate import CurateConfig
from pretrain.config import load_config

PROSE = (
    "The committee met on Tuesday to talk about the new library. Most members said that the old building was too small "
    "for the books which the town had bought during the last ten years, and that readers often had to wait for a seat. "
    "A plan was shown that would move the children's books to the ground floor. It was agreed that the architect "
    "should come back in March with a second drawing, and that the cost of it would be shared with the county. "
    "Nobody spoke against the plan, although two members asked whether the roof could be mended first, since rain "
    "came in every winter."
)
CHINESE = (
    "图书馆的新馆将于明年春天动工。委员会认为,旧馆面积太小,近十年来购入的图书已经无处存放,读者常常需要排队等候座位。"
    "新的方案把儿童读物移到一楼,并在二楼增设一间安静的阅览室。会议决定请建筑师在三月份提交第二份图纸,费用由市里和县里共同承担。"
    "没有人反对这个方案,但有两位委员提出,屋顶每年冬天都会漏水,是否应当先行修缮。主任答复说,修缮工作会与新馆的建设同时进行。"
)


def report(number: int) -> str:
    text = PROSE.replace("ten years", f"{number + 3} years")
    return f"Report number {number}. {text}\n\nPage {number * 37}"


def documents() -> list[dict[str, Any]]:
    """English and Chinese prose, duplicates of it, damaged text, and modules of the standard library."""
    records: list[dict[str, Any]] = []

    def add(source: str, text: str) -> None:
        records.append({"id": f"{source}:{len(records)}", "source": source, "text": text})

    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    for text in list(dict.fromkeys(path.read_text(encoding="utf-8") for path in modules))[
        :40
    ]:  # Debian has copies
        add("code", text)
    for number in range(12):
        add("news", report(number))
        add(
            "新闻",
            f"第{number}号报道。"
            + CHINESE.replace("三月份", f"{number % 9 + 1}月份")
            + f"编号{number * 37}。",
        )
    add("copies", "Report number 3. " + PROSE.replace("ten years", "6 years") + "\n\nPage 111")
    add("mail", PROSE + " Write to jane.doe@corporation.org or call 13812345678 before noon.")
    add("short", "Buy now!!! " * 3)
    return records


def write_text(path: Path) -> Path:
    lines = [json.dumps(record, ensure_ascii=False) for record in documents()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def config(text: Path, output: Path, *more: str) -> CurateConfig:
    units = [] if any(word.startswith("unit_bytes=") for word in more) else ["unit_bytes=100000"]
    return load_config(CurateConfig, [f"input=[{text}]", f"output={output}", *units, *more])
