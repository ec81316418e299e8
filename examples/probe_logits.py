"""Do two environments see the same model? Stock transformers (4.50 or later) alone.

python examples/probe_logits.py FOLDER --save a.pt       in one environment
python examples/probe_logits.py FOLDER --compare a.pt    in another: prints the largest difference
"""

import argparse

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder")
parser.add_argument("--save")
parser.add_argument("--compare")
arguments = parser.parse_args()

noise = np.random.default_rng(0).integers(0, 255, (48, 80, 3), dtype=np.uint8)
messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]}]
processor = AutoProcessor.from_pretrained(arguments.folder)
text = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(text=text, images=Image.fromarray(noise), return_tensors="pt")
# eager: some versions leave the soft-cap of Gemma's attention out elsewhere
model = AutoModelForImageTextToText.from_pretrained(
    arguments.folder, torch_dtype=torch.float32, attn_implementation="eager"
)
with torch.inference_mode():
    logits = model(**inputs).logits[0]
found = {"ids": inputs["input_ids"], "pixels": inputs["pixel_values"], "logits": logits}
if arguments.save:
    torch.save(found, arguments.save)
if arguments.compare:
    other = torch.load(arguments.compare, weights_only=True)
    print("transformers", transformers.__version__)
    print("same ids:", torch.equal(other["ids"], found["ids"]))
    print("pixels: largest difference", float((other["pixels"] - found["pixels"]).abs().max()))
    print("logits: largest difference", float((other["logits"] - logits).abs().max()), "of", float(logits.abs().max()))
