"""Convert checkpoints from and to Hugging Face folders: ``megasparse convert``, for those who look under tools.

python tools/convert_checkpoint.py from-hf path/of/model checkpoints/model
python tools/convert_checkpoint.py to-hf runs/NAME path/of/folder --dtype bf16
"""

from __future__ import annotations

import sys

from megasparse.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "convert")
    main()
