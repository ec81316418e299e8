"""Load a checkpoint and ask it something, with stock transformers alone: this process cannot import dpa.

python examples/load_checkpoint.py runs/quickstart/checkpoint data/lab/images/IMAGE.png "what colour is the circle?"
"""

import sys

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

assert "dpa" not in sys.modules
sys.modules["dpa"] = None  # type: ignore[assignment]  # and any import of it fails from here on
checkpoint, picture, question = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(checkpoint)
processor = AutoProcessor.from_pretrained(checkpoint)
typed = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
plain = [{"role": "user", "content": f"<image>\n{question}"}]
ids = []
for messages in (typed, plain):
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=prompt, images=Image.open(picture), return_tensors="pt")
    ids.append(inputs["input_ids"].tolist())
    answer = model.generate(**inputs, max_new_tokens=16)[0, inputs["input_ids"].shape[1] :]
    print(processor.decode(answer, skip_special_tokens=True))
print(type(model).__name__, type(processor).__name__, "same ids" if ids[0] == ids[1] else "DIFFERENT ids")
