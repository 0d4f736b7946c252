"""Draw the pictures of a run: docs/curve.svg, its loss, and docs/report.png, the top of its page in a browser.

    python docs/pictures.py
    python docs/pictures.py --run runs/a        of another run, which is kept in docs/run/

The run is what `python train.py --output` left, without the model, and with the last parts of each path only. It needs
matplotlib (extra `report`) and, for the second picture, Chromium. Both pictures say what they were made from, and
tests/test_pictures.py says when they are not of the page as it is now.
"""

from __future__ import annotations

import hashlib
import io
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from nanofinetune.ground.cli import Parser, run_main  # noqa: E402
from nanofinetune.ground.errors import UsageError  # noqa: E402
from nanofinetune.report import plots  # noqa: E402
from nanofinetune.report.page import page  # noqa: E402
from nanofinetune.report.read import read_run  # noqa: E402
from nanofinetune.report.style import THEMES  # noqa: E402
from nanofinetune.report.svg import alone  # noqa: E402

RUN, CURVE, PICTURE = (ROOT / "docs" / name for name in ("run", "curve.svg", "report.png"))
WIDTH, HEIGHT = 1080, 585  # of the window


def curve() -> str:
    """The loss of the run as a file of its own, light and dark."""
    return alone(plots.loss([read_run(RUN, "docs/run")]), THEMES, 640)


def document() -> str:
    """The page of the run."""
    return page([read_run(RUN, "A run of train.py")])


def made_from() -> str:
    """What the picture is of: the hash of the page, and of what it is drawn with, whose versions differ."""
    import matplotlib

    return f"{hashlib.sha256(document().encode()).hexdigest()} matplotlib {matplotlib.__version__}"


def screenshot() -> bytes:
    """The top of the page, as Chromium shows it on white, as PNG."""
    from PIL import Image, PngImagePlugin

    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        raise UsageError("there is no Chromium to take docs/report.png with: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        file, taken = Path(folder, "report.html"), Path(folder, "taken.png")
        file.write_text(document(), encoding="utf-8")
        subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}/p",
             f"--window-size={WIDTH},{HEIGHT}", "--blink-settings=preferredColorScheme=1", f"--screenshot={taken}",
             file.as_uri()],
            capture_output=True, check=True, timeout=240,
        )  # fmt: skip
        picture = Image.open(taken).convert("RGB").quantize(256, dither=Image.Dither.NONE)  # a third as large
    notes, out = PngImagePlugin.PngInfo(), io.BytesIO()
    notes.add_text("made from", made_from())
    picture.save(out, format="png", optimize=True, pnginfo=notes)
    return out.getvalue()


def keep(folder: Path) -> None:
    """Copy what a page is made of into docs/run/; a path of this machine is cut to its last two parts."""
    for name in ("metrics.jsonl", "result.json", "validation.jsonl"):
        if not (folder / name).is_file():
            raise UsageError(f"--run {folder}: it has no {name}; name the --output of a training that has ended")
        text = (folder / name).read_text(encoding="utf-8")
        if name == "result.json":
            text = re.sub(r'(?<=")(?:/[^/\s",]+)+/([^/\s",]+/[^/\s",]+)', r"\1", text)
        (RUN / name).write_text(text, encoding="utf-8")


def main() -> None:
    """Draw both pictures."""
    parser = Parser(prog="pictures.py", description=__doc__)
    parser.add_argument("--run", metavar="DIR", type=Path, help="a run to draw instead, which replaces docs/run/")
    args = parser.parse_args()
    if args.run is not None:
        keep(args.run)
    CURVE.write_text(curve(), encoding="utf-8")
    PICTURE.write_bytes(screenshot())


if __name__ == "__main__":
    sys.exit(run_main("pictures.py", main))
