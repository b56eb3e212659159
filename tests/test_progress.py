"""Progress: shown on a terminal, quiet elsewhere, silenced by transformers' own switch."""

import os
import pty
import re
import subprocess
import sys
import termios

from models import FAMILIES


CODE = """
import sys
from transformers import AutoModelForCausalLM, logging
from optimum_pgsvd import PGSVDConfig
if sys.argv[2] == "quiet":
    logging.disable_progress_bar()
config = PGSVDConfig(parameter_reduction=0.3, dataset="self", num_samples=8, sequence_length=16)
AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config)
"""


def on_a_terminal(*arguments):
    """What a program writes to standard error where that is a terminal."""
    parent, child = pty.openpty()
    termios.tcsetwinsize(child, (40, 120))
    process = subprocess.Popen([sys.executable, "-c", CODE, *arguments], stderr=child, stdout=subprocess.DEVNULL)
    os.close(child)
    written = b""
    try:
        while chunk := os.read(parent, 4096):
            written += chunk
    except OSError:  # Linux reports the closed terminal as an error
        pass
    os.close(parent)
    assert process.wait() == 0, written.decode()
    return written.decode()


def test_every_step_shows_how_far_it_is_and_the_switch_silences_it(tmp_path):
    FAMILIES["llama"].build().save_pretrained(tmp_path)
    shown = on_a_terminal(str(tmp_path), "shown")
    for step in ("Sampling", "Measuring weights", "Factoring"):
        assert f"{step}: 100%" in shown
    last = shown[shown.rindex("Factoring: 100%") :]
    assert re.search(r"\| 2/2 \[.*block/s?.*, [\d,]+ tokens/s, peak \d+\.\d\d GiB\]", last)
    assert "Factoring" not in on_a_terminal(str(tmp_path), "quiet")


def test_nothing_is_drawn_where_standard_error_is_no_terminal(tmp_path):
    FAMILIES["llama"].build().save_pretrained(tmp_path)
    command = [sys.executable, "-c", CODE, str(tmp_path), "shown"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not any(step in done.stderr for step in ("Sampling", "Measuring", "Factoring"))
